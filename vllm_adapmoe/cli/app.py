"""Implements the `adapmoe` command and most of its subcommands."""

import sys
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from rich.console import Console

from vllm_adapmoe.cli.doctor import doctor
from vllm_adapmoe.cli.keys import fold_keys
from vllm_adapmoe.cli.options import (
    CacheSettings,
    HeldOut,
    Model,
    Output,
    Plot,
    Profile,
    Revision,
    checkpoint_folder,
    numbers,
    precisions,
    profile_option,
    quieten_vllm,
)
from vllm_adapmoe.cli.plan import plan
from vllm_adapmoe.cli.report import report
from vllm_adapmoe.cli.top import top
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.device import MAX_TOKENS
from vllm_adapmoe.printable import OneLineError

POLICIES = "lru,lru/uniform,lfru,mrs,next_use,lru+prefetch,next_use+prefetch"

app = typer.Typer(no_args_is_help=True, help="Expert offloading for vLLM.")
app.command()(plan)
app.command()(top)
app.command()(doctor)


@app.command()
def pack(
    model: Model,
    store_dir: Annotated[str | None, typer.Option(help="Folder for packed files; default: vLLM's cache.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the model, as in `vllm serve`.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="Quantization method, as in `vllm serve`.")] = None,
    precision: Annotated[int, typer.Option(help="Bits per expert weight: 16 as in the checkpoint, 8 or 4.")] = 16,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks, as in `vllm serve`.")] = 1,
    revision: Revision = None,
    download_dir: Annotated[str | None, typer.Option(help="Folder of downloaded models, as in `vllm serve`.")] = None,
    load_format: Annotated[str, typer.Option(help="Format of the weight files, as in `vllm serve`.")] = "auto",
) -> None:
    """Packs a model's experts into the files that `vllm serve --moe-method adapmoe` reads with store=file."""
    from vllm_adapmoe.integration.loading.packing import pack_experts

    folder = pack_experts(
        model, store_dir, precision, dtype=dtype, quantization=quantization, tensor_parallel_size=tensor_parallel_size,
        revision=revision, download_dir=download_dir, load_format=load_format,
    )  # fmt: skip
    Console().print(f"packed into {folder}", markup=False)


@app.command()
def calibrate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Calibration text: a file, or a folder of *.txt.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write the profile to.")],
    method: Annotated[
        str,
        typer.Option(
            help="Sensitivity by back-propagation in transformers (fisher) or by perturbed passes in vLLM (forward); "
            "auto: fisher if the model fits in memory."
        ),
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=512, help="Maximum number of tokens to use of --data.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens per sequence.")] = 256,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of sequences.")] = 0,
    precision: Annotated[
        str | None,
        typer.Option(help="Also measures what these values of the key precision cost, comma-separated: 8,4."),
    ] = None,
    revision: Revision = None,
    adapmoe_config: CacheSettings = None,
) -> None:
    """Measures a model's routing and how much dropping experts in each layer costs; writes a profile."""
    quieten_vllm()
    from vllm_adapmoe.calibrate.run import CalibrationSpec, Method, calibrate, print_profile

    if method not in ("fisher", "forward", "auto"):
        raise AdapMoEError(f"--method {method} is not known; use fisher, forward or auto")
    cache = AdapMoEConfig.parse(adapmoe_config)
    if cache.precision != 16:
        raise AdapMoEError(
            f"adapmoe_config precision={cache.precision} does not work here: a profile is of the checkpoint's own "
            "weights; use --precision for what fewer bits cost"
        )
    spec = CalibrationSpec(
        model=checkpoint_folder(model, revision), data=data, output=output, method=cast(Method, method), tokens=tokens,
        sequence_length=sequence_length, seed=seed, cache=cache.transport(),
        precisions=precisions("--precision", precision),
    )  # fmt: skip
    print_profile(calibrate(spec), Console().print)


@app.command()
def evaluate(
    model: Model,
    profile: Profile,
    data: HeldOut,
    thresholds: Annotated[
        str | None, typer.Option(help="Sensitivity-gating thresholds, comma-separated; default: twelve values.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Bits per expert weight to compare too, comma-separated: 8,4. Ungated.")
    ] = None,
    precision_only: Annotated[
        bool, typer.Option("--precision-only", help="Measures --precision alone, without gating.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=512, help="Maximum number of tokens to use of --data.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens per sequence.")] = 256,
    revision: Revision = None,
    adapmoe_config: CacheSettings = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measures loss, perplexity and top-1 agreement on held-out text for each gating rule and threshold."""
    quieten_vllm()
    from vllm_adapmoe.calibrate.evaluate import EvaluateSpec, plot_evaluate, print_evaluate, run_evaluate

    cache = AdapMoEConfig.parse(adapmoe_config)
    bits = precisions("--precision", precision)
    if precision_only and not bits:
        raise AdapMoEError("--precision-only leaves nothing to measure; add --precision, e.g. 8,4")
    if bits and cache.precision != 16:
        raise AdapMoEError(
            f"--precision {precision} is compared with 16 bits, and adapmoe_config sets precision={cache.precision}; "
            "remove one of them"
        )
    spec = EvaluateSpec(
        model=checkpoint_folder(model, revision), cache=cache.transport(), gating=not precision_only, precisions=bits,
        profile=profile, data=data, tokens=tokens, sequence_length=sequence_length,
        thresholds=None if thresholds is None else numbers("--thresholds", thresholds),
    )  # fmt: skip
    report(run_evaluate(spec), print_evaluate, output, plot_evaluate, plot)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="Routing trace written by `trace_out`.", exists=True, dir_okay=False)],
    slots: Annotated[
        str, typer.Option(help="Expert slots, comma-separated; values up to 1 are fractions of all experts.")
    ] = "0.25,0.5,0.75",
    policies: Annotated[
        str,
        typer.Option(
            help="Cache policies to compare, comma-separated: EVICTION, optional /ALLOCATION and +prefetch.",
            show_default=POLICIES.replace(",", ", "),
        ),
    ] = POLICIES,
    bandwidth: Annotated[
        float | None, typer.Option(help="Link bandwidth, 1e9 bytes/s; without it, loads are counted but not timed.")
    ] = None,
    host: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Experts that host memory holds (host_gb), the others are on disk; up to 1: a fraction. Default: all.",
        ),
    ] = None,
    disk: Annotated[
        float | None, typer.Option(min=1e-6, help="Disk bandwidth, 1e9 bytes/s; default: the link's.")
    ] = None,
    compute: Annotated[float, typer.Option(help="Time per layer and step without fetches, ms.")] = 0.5,
    step: Annotated[float, typer.Option(help="Time per step outside the MoE layers, ms.")] = 1.0,
    lookahead: Annotated[int, typer.Option(min=1, max=8, help="Maximum number of layers ahead to prefetch for.")] = 3,
    max_experts: Annotated[int, typer.Option(min=1, help="Maximum prefetches in flight.")] = 1,
    decode: Annotated[
        Literal["device", "host"],
        typer.Option(
            help="Who decides what to load, as the key `decode`: the host, or the device in steps of up to "
            f"{MAX_TOKENS} tokens, which prefetches for the next layer alone."
        ),
    ] = "host",
    profile: Annotated[Path | None, profile_option("; for policies with /profile")] = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Replays a routing trace against cache policies and compares them with the optimal (Belady) cache."""
    from vllm_adapmoe.simulate.compare import plot_simulate, print_simulate, run_simulate
    from vllm_adapmoe.simulate.virtual_link import Machine

    machine = Machine()
    if bandwidth is not None:
        disk_bandwidth = None if disk is None else disk * 1e9
        machine = Machine(bandwidth * 1e9, compute / 1e3, step / 1e3, disk_bandwidth=disk_bandwidth)
    names = [name.strip() for name in policies.split(",")]
    result = run_simulate(
        trace, numbers("--slots", slots), names, machine, lookahead, max_experts, profile, host,
        MAX_TOKENS if decode == "device" else 0,
    )  # fmt: skip
    report(result, print_simulate, output, plot_simulate, plot)


def run(program: typer.Typer, name: str) -> None:
    """Runs a command line; a `OneLineError` prints one line and exits with code 1."""
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
    """Runs the `adapmoe` command."""
    run(app, "adapmoe")
