"""The `adapmoe` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_adapmoe.bench.record import write
from vllm_adapmoe.cli_doctor import doctor
from vllm_adapmoe.cli_keys import fold_keys
from vllm_adapmoe.cli_options import (
    Batch,
    CacheSettings,
    Model,
    Output,
    OutputTokens,
    PromptTokens,
    Rounds,
    Text,
    numbers,
)
from vllm_adapmoe.cli_plan import plan, transfer
from vllm_adapmoe.cli_serve import serve, soak
from vllm_adapmoe.cli_top import top
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.model_folder import check_named_model
from vllm_adapmoe.printable import OneLineError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Expert offloading for vLLM.")
bench = typer.Typer(no_args_is_help=True, help="Side-by-side measurements; each writes a JSON result.")
app.add_typer(bench, name="bench")
app.command()(plan)
app.command()(top)
app.command()(doctor)
bench.command()(transfer)
bench.command()(serve)
bench.command()(soak)


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or the name of a downloaded model.")],
    store_dir: Annotated[str | None, typer.Option(help="Folder for the packed file; default: vLLM's cache.")] = None,
    dtype: Annotated[str, typer.Option(help="As in `vllm serve`.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="As in `vllm serve`.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As in `vllm serve`.")] = 1,
    revision: Annotated[str | None, typer.Option(help="As in `vllm serve`.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="As in `vllm serve`.")] = None,
    load_format: Annotated[str, typer.Option(help="As in `vllm serve`.")] = "auto",
) -> None:
    """Packs a model's experts into the file that `vllm serve --moe-method adapmoe` reads them from."""
    check_named_model(model)
    from vllm_adapmoe.integration.packing import pack_experts

    folder = pack_experts(
        model, store_dir, dtype=dtype, quantization=quantization, tensor_parallel_size=tensor_parallel_size,
        revision=revision, download_dir=download_dir, load_format=load_format,
    )  # fmt: skip
    Console().print(f"packed into {folder}", markup=False)


@app.command()
def calibrate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Text file, or folder of *.txt.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile, JSON.")],
    method: Annotated[
        str, typer.Option(help="fisher: back-propagation. forward: vLLM, experts offloaded. auto: fisher if it fits.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of the data to use.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens of one sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.")] = 0,
    adapmoe_config: CacheSettings = None,
) -> None:
    """Measures a model: what its layers lose when experts are dropped, and how it routes."""
    _quieten_vllm()
    from vllm_adapmoe.calibrate.run import calibrate, print_profile

    if method not in ("fisher", "forward", "auto"):
        raise AdapMoEError(f"--method {method} is not known; use fisher, forward or auto")
    cache = AdapMoEConfig.parse(adapmoe_config).transport()
    profile = calibrate(model, data, output, method, tokens, sequence_length, seed, cache)  # type: ignore[arg-type]
    print_profile(profile, Console().print)


@app.command()
def evaluate(
    model: Model,
    profile: Annotated[Path, typer.Option(help="What `adapmoe calibrate` wrote.", exists=True)],
    data: Annotated[Path, typer.Option(help="Held-out text: a file, or a folder of *.txt.", exists=True)],
    thresholds: Annotated[
        str | None, typer.Option(help="Of sensitivity gating, comma-separated; default: twelve.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of the data to use.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens of one sequence.")] = 256,
    adapmoe_config: CacheSettings = None,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the plot.")] = None,
) -> None:
    """Loss, perplexity and agreement on held-out text, by gating rule and threshold."""
    _quieten_vllm()
    from vllm_adapmoe.bench.evaluate import plot_evaluate, print_evaluate, run_evaluate

    chosen = None if thresholds is None else numbers("--thresholds", thresholds)
    cache = AdapMoEConfig.parse(adapmoe_config).transport()
    result = run_evaluate(model, profile, chosen, data, tokens, sequence_length, cache)
    print_evaluate(result, Console())
    if output is not None:
        write(output, result)
    if plot is not None:
        plot_evaluate(result, plot)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="File that `trace_out` wrote.", exists=True, dir_okay=False)],
    slots: Annotated[
        str, typer.Option(help="Expert slots, comma-separated; at most 1: a share of all experts.")
    ] = "0.25,0.5,0.75",
    policies: Annotated[
        str, typer.Option(help="EVICTION or EVICTION/ALLOCATION, with +prefetch behind it or not; comma-separated.")
    ] = "lru,lru/uniform,lfru,mrs,next_use,lru+prefetch,next_use+prefetch",
    bandwidth: Annotated[
        float | None, typer.Option(help="Of the link, 1e9 bytes per second. Without it, loads are counted, not timed.")
    ] = None,
    compute: Annotated[float, typer.Option(help="Milliseconds of a layer in a step, fetches apart.")] = 0.5,
    step: Annotated[float, typer.Option(help="Milliseconds of a step outside its layers.")] = 1.0,
    lookahead: Annotated[int, typer.Option(min=1, max=8, help="Layers that prefetch looks ahead.")] = 3,
    max_experts: Annotated[int, typer.Option(min=1, help="Most experts that prefetch has under way.")] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="What `adapmoe calibrate` wrote; for /profile.", exists=True)
    ] = None,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the plot.")] = None,
) -> None:
    """Replays recorded routing against cache policies, beside the best that a cache could do."""
    from vllm_adapmoe.simulate.compare import plot_simulate, print_simulate, run_simulate
    from vllm_adapmoe.simulate.replay import Machine

    machine = Machine()
    if bandwidth is not None:
        machine = Machine(bandwidth * 1e9, compute / 1e3, step / 1e3)
    result = run_simulate(
        trace, numbers("--slots", slots), policies.split(","), machine, lookahead, max_experts, profile
    )
    print_simulate(result, Console())
    if output is not None:
        write(output, result)
    if plot is not None:
        plot_simulate(result, plot)


def _quieten_vllm() -> None:
    """Leaves vLLM's errors, unless the user asks for more: its lines would cut through progress bars."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@bench.command()
def overhead(
    model: Model,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 7,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 64,
) -> None:
    """Stock vLLM against the plugin when nothing has to be fetched."""
    from vllm_adapmoe.bench.overhead import print_overhead, run_overhead

    result = run_overhead(model, text, rounds, prompt_tokens, output_tokens, batch)
    print_overhead(result, Console())
    if output is not None:
        write(output, result)


@bench.command()
def residency(
    model: Model,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 64,
) -> None:
    """25, 50, 75 and 100 % of the experts resident, with the file store and the host store."""
    from vllm_adapmoe.bench.residency import print_residency, run_residency

    result = run_residency(model, text, rounds, prompt_tokens, output_tokens, batch)
    print_residency(result, Console())
    if output is not None:
        write(output, result)


@bench.command()
def gating(
    model: Model,
    profile: Annotated[Path, typer.Option(help="What `adapmoe calibrate` wrote.", exists=True)],
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 64,
    store: Annotated[str, typer.Option(help="host or file.")] = "file",
) -> None:
    """Decode speed, kernel time and bytes per token, gating off against on, 25 to 100 % of the experts resident."""
    _quieten_vllm()
    from vllm_adapmoe.bench.gating import print_gating, run_gating

    result = run_gating(model, profile, text, rounds, prompt_tokens, output_tokens, batch, store)
    print_gating(result, Console())
    if output is not None:
        write(output, result)


@bench.command()
def ablation(
    model: Model,
    profile: Annotated[Path, typer.Option(help="What `adapmoe calibrate` wrote.", exists=True)],
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    batches: Annotated[int, typer.Option(min=1, help="Batches of requests, one after the other.")] = 6,
    prompt_tokens: PromptTokens = 16,
    output_tokens: OutputTokens = 40,
    resident: Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of the experts with a slot.")] = 0.5,
    ratio: Annotated[
        float, typer.Option(min=0.1, help="Time to move an expert over the link, in layers of the resident model.")
    ] = 6.3,
    max_loss_increase: Annotated[float, typer.Option(help="Of gating, as a share of the loss.")] = 0.005,
    loss_tokens: Annotated[int, typer.Option(min=0, help="To measure on what gating costs; 0: none.")] = 4096,
) -> None:
    """Gating, prefetch and the cache's policy, alone and together: the paper's and ours, over a limited link."""
    _quieten_vllm()
    from vllm_adapmoe.bench.ablation import print_ablation, run_ablation

    result = run_ablation(
        model, profile, text, rounds, prompt_tokens, output_tokens, batch, batches, resident, ratio, max_loss_increase,
        loss_tokens,
    )  # fmt: skip
    print_ablation(result, Console())
    if output is not None:
        write(output, result)


@bench.command()
def peers(
    model: Model,
    output: Output = None,
    text: Text = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Limit of a contender's processes, page cache included, like 2.5GiB. Default: none."),
    ] = None,
    rounds: Rounds = 3,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 32,
    slots: Annotated[int | None, typer.Option(min=2, help="Of the plugin; default: what fits.")] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder to keep the GGUF file and the packed experts in; default: temporary.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a contender may take.")] = 900,
    contenders: Annotated[
        str, typer.Option(help="Comma-separated; adapmoe always takes part.")
    ] = "llama.cpp,transformers,vllm,adapmoe-lru,adapmoe",
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="As in `vllm serve`.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="What `adapmoe calibrate` wrote: the plugin with it, too.", exists=True)
    ] = None,
) -> None:
    """llama.cpp, transformers with disk offload and stock vLLM beside the plugin: same memory, model and tokens."""
    _quieten_vllm()
    from vllm_adapmoe.bench.peers import parse_size, run_peers
    from vllm_adapmoe.bench.peers_table import print_peers

    nbytes = None if memory is None else parse_size(memory)
    names = contenders.split(",")
    result = run_peers(
        model, text, rounds, prompt_tokens, output_tokens, nbytes, slots, files, timeout, names, enforce_eager, profile
    )
    print_peers(result, Console())
    if output is not None:
        write(output, result)


@bench.command()
def frontier(
    model: Model,
    profile: Annotated[Path, typer.Option(help="What `adapmoe calibrate` wrote.", exists=True)],
    data: Annotated[Path, typer.Option(help="Held-out text: a file, or a folder of *.txt.", exists=True)],
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens of one sequence.")] = 128,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the plot.")] = None,
) -> None:
    """Loss against bytes fetched: gating off, by token, by batch, by weight alone, and a fixed smaller top-k."""
    _quieten_vllm()
    from vllm_adapmoe.bench.frontier import plot_frontier, print_frontier, run_frontier

    result = run_frontier(model, profile, data, sequence_length)
    print_frontier(result, Console())
    if output is not None:
        write(output, result)
    if plot is not None:
        plot_frontier(result, plot)


def main() -> None:
    """Entry point; a mistake of the user is one line and exit code 1."""
    try:
        try:
            app(args=[*fold_keys(sys.argv[1:])])
        except ImportError as error:
            from vllm_adapmoe.integration.version_check import explain_import_error

            explain_import_error(error)
            raise
    except OneLineError as error:
        typer.echo(f"adapmoe: error: {error}", err=True)
        raise SystemExit(1) from None
