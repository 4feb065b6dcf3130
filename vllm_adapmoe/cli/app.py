"""The `adapmoe` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_adapmoe.cli.doctor import doctor
from vllm_adapmoe.cli.keys import fold_keys
from vllm_adapmoe.cli.options import (
    CacheSettings,
    Model,
    Output,
    numbers,
)
from vllm_adapmoe.cli.plan import plan
from vllm_adapmoe.cli.top import top
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.model_folder import check_named_model
from vllm_adapmoe.printable import OneLineError
from vllm_adapmoe.results import write

app = typer.Typer(no_args_is_help=True, help="Expert offloading for vLLM.")
app.command()(plan)
app.command()(top)
app.command()(doctor)


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
    from vllm_adapmoe.integration.loading.packing import pack_experts

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
    quieten_vllm()
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
    quieten_vllm()
    from vllm_adapmoe.calibrate.evaluate import plot_evaluate, print_evaluate, run_evaluate

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


def quieten_vllm() -> None:
    """Leaves vLLM's errors, unless the user asks for more: its lines would cut through progress bars."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def run(program: typer.Typer, name: str) -> None:
    """Runs a command line; a mistake of the user is one line and exit code 1."""
    try:
        try:
            program(args=[*fold_keys(sys.argv[1:])], prog_name=name)
        except ImportError as error:
            from vllm_adapmoe.integration.entry.version_check import explain_import_error

            explain_import_error(error)
            raise
    except OneLineError as error:
        typer.echo(f"{name}: error: {error}", err=True)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point."""
    run(app, "adapmoe")
