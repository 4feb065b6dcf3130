"""Commands of `python -m benchmarks`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.serve_commands import serve, soak
from vllm_adapmoe.cli.app import quieten_vllm
from vllm_adapmoe.cli.options import (
    Batch,
    Model,
    Output,
    OutputTokens,
    PromptTokens,
    Rounds,
    Text,
    check_any_model,
    numbers,
)
from vllm_adapmoe.results import write
from vllm_adapmoe.units import parse_bytes

CONTENDERS = "llama.cpp,transformers,vllm,adapmoe-lru,adapmoe"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Side-by-side measurements of real engines; each can write a JSON result.",
)
app.command()(serve)
app.command()(soak)


@app.command()
def overhead(
    model: Model,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 7,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 64,
) -> None:
    """Compares the plugin with stock vLLM when no expert has to be fetched."""
    from benchmarks.overhead import print_overhead, run_overhead

    result = run_overhead(model, text, rounds, prompt_tokens, output_tokens, batch)
    print_overhead(result, Console())
    if output is not None:
        write(output, result)


@app.command()
def residency(
    model: Model,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 64,
) -> None:
    """Measures throughput with 25, 50, 75 and 100 % of the experts resident, for the file store and the host store."""
    from benchmarks.residency import print_residency, run_residency

    result = run_residency(model, text, rounds, prompt_tokens, output_tokens, batch)
    print_residency(result, Console())
    if output is not None:
        write(output, result)


@app.command()
def gating(
    model: Model,
    profile: Annotated[Path, typer.Option(help="Profile written by `adapmoe calibrate`.", exists=True)],
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 64,
    store: Annotated[str, typer.Option(help="Backing store: host or file.")] = "file",
) -> None:
    """Compares decode speed, kernel time and bytes per token with gating off and on, at 25 to 100 % residency."""
    quieten_vllm()
    from benchmarks.gating import print_gating, run_gating

    result = run_gating(model, profile, text, rounds, prompt_tokens, output_tokens, batch, store)
    print_gating(result, Console())
    if output is not None:
        write(output, result)


@app.command()
def ablation(
    model: Model,
    profile: Annotated[Path, typer.Option(help="Profile written by `adapmoe calibrate`.", exists=True)],
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    batches: Annotated[int, typer.Option(min=1, help="Batches per measurement, run one after another.")] = 6,
    prompt_tokens: PromptTokens = 16,
    output_tokens: OutputTokens = 40,
    resident: Annotated[float, typer.Option(min=0.01, max=0.99, help="Fraction of the experts with a slot.")] = 0.5,
    ratio: Annotated[
        float,
        typer.Option(min=0.1, help="Time to fetch one expert, in layer times of the model with all experts resident."),
    ] = 6.3,
    max_loss_increase: Annotated[float, typer.Option(help="Relative loss increase allowed to gating.")] = 0.005,
    loss_tokens: Annotated[int, typer.Option(min=0, help="Tokens to measure the loss of gating on; 0: none.")] = 4096,
) -> None:
    """Measures gating, prefetch and cache policy, alone and together (the paper's and ours), on a limited link."""
    quieten_vllm()
    from benchmarks.ablation import print_ablation, run_ablation

    result = run_ablation(
        model, profile, text, rounds, prompt_tokens, output_tokens, batch, batches, resident, ratio, max_loss_increase,
        loss_tokens,
    )  # fmt: skip
    print_ablation(result, Console())
    if output is not None:
        write(output, result)


@app.command()
def peers(
    model: Model,
    output: Output = None,
    text: Text = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory limit per contender, page cache included, e.g. 2.5GiB. Default: none."),
    ] = None,
    rounds: Rounds = 3,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 32,
    slots: Annotated[
        int | None, typer.Option(min=2, help="Expert slots of the plugin; default: as many as fit.")
    ] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder to keep the GGUF file and packed experts in; default: temporary.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit per contender and run, s.")] = 900,
    contenders: Annotated[
        str,
        typer.Option(
            help="Contenders, comma-separated; adapmoe always takes part.", show_default=CONTENDERS.replace(",", ", ")
        ),
    ] = CONTENDERS,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Run vLLM without CUDA graphs, as in `vllm serve`.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Profile written by `adapmoe calibrate`: adds the plugin with it.", exists=True)
    ] = None,
) -> None:
    """Compares the plugin with llama.cpp, transformers (disk offload) and stock vLLM: same memory, model and tokens."""
    quieten_vllm()
    from benchmarks.peers import run_peers
    from benchmarks.peers_table import print_peers

    nbytes = None if memory is None else parse_bytes("--memory", memory)
    names = [name.strip() for name in contenders.split(",")]
    result = run_peers(
        model, text, rounds, prompt_tokens, output_tokens, nbytes, slots, files, timeout, names, enforce_eager, profile
    )
    print_peers(result, Console())
    if output is not None:
        write(output, result)


@app.command()
def frontier(
    model: Model,
    profile: Annotated[Path, typer.Option(help="Profile written by `adapmoe calibrate`.", exists=True)],
    data: Annotated[Path, typer.Option(help="Held-out text: a file, or a folder of *.txt.", exists=True)],
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens per sequence.")] = 128,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the plot.")] = None,
) -> None:
    """Measures loss against bytes fetched: gating off, by token, by batch, by weight alone, and a smaller top-k."""
    quieten_vllm()
    from benchmarks.frontier import plot_frontier, print_frontier, run_frontier

    result = run_frontier(model, profile, data, sequence_length)
    print_frontier(result, Console())
    if output is not None:
        write(output, result)
    if plot is not None:
        plot_frontier(result, plot)


@app.command()
def transfer(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint folder whose pack is read.", exists=True, file_okay=False, callback=check_any_model
        ),
    ] = None,
    record_mib: Annotated[
        str, typer.Option(help="Without MODEL: record sizes of synthetic packs, MiB, comma-separated.")
    ] = "3,24,48",
    pass_mib: Annotated[int, typer.Option(min=1, help="Minimum size of a synthetic pack, MiB.")] = 768,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over the pack per read method, interleaved.")] = 5,
    store_dir: Annotated[
        Path | None, typer.Option(help="Folder for packs, on the disk to measure; default: vLLM's cache or temporary.")
    ] = None,
    output: Output = None,
) -> None:
    """Compares the bandwidth of the transfer engine with plain sequential reads of the same records."""
    from benchmarks.transfer import print_transfer, run_transfer

    result = run_transfer(model, numbers("--record-mib", record_mib), store_dir, rounds, pass_mib)
    print_transfer(result, Console())
    if output is not None:
        write(output, result)
