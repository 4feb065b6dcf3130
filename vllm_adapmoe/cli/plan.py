"""Implements `adapmoe plan`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_adapmoe.cli.options import Model, Plot, Revision, numbers, profile_option, quieten_vllm
from vllm_adapmoe.cli.report import report
from vllm_adapmoe.config import AdapMoEError

StoreDir = Annotated[Path | None, typer.Option(help="Folder for packed files; default: vLLM's cache.")]


def plan(
    model: Model,
    revision: Revision = None,
    profile: Annotated[Path | None, profile_option()] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Total memory for weights, KV cache and slots, e.g. 24GiB (device memory; on the CPU, process memory)."
        ),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            help="Part of --memory that is for neither weights nor slots, e.g. 2GiB. Default: estimated for a GPU with "
            "vLLM's defaults: unused share, CUDA context, activations, KV cache of one request, CUDA graphs."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens per request, for the default --reserve. Default: the model's."),
    ] = None,
    link: Annotated[
        str, typer.Option(help="Bandwidth of expert fetches, 1e9 bytes/s; auto: measured on this machine.")
    ] = "auto",
    host: Annotated[
        str | None,
        typer.Option(help="Host memory for experts beside a GPU, e.g. 64GiB (host_gb); the others are on disk."),
    ] = None,
    disk: Annotated[
        str, typer.Option(help="With --host: bandwidth of the disk, 1e9 bytes/s; auto: measured on this machine.")
    ] = "auto",
    compute: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="Compute time per layer, ms; default: estimated from this machine's memory bandwidth."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto, bfloat16, float16 or float32.")] = "auto",
    expert_bits: Annotated[
        str | None, typer.Option(help="Bits per expert weight, comma-separated, e.g. 16,8,4.5. Default: as --dtype.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Values of the key precision, comma-separated, e.g. 16,8,4, with the bytes of vLLM's formats: a GPU's "
            "if --link is given, else this machine's."
        ),
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            help="Adds columns for gating with this relative loss increase, e.g. 0.005; needs a calibrated --profile."
        ),
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="Slots protected per layer: pool (none), uniform, profile or trace.")
    ] = "pool",
    trace: Annotated[
        Path | None,
        typer.Option(help="Routing trace written by `trace_out`, replayed instead of the closed form.", exists=True),
    ] = None,
    store_dir: StoreDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write for --adapmoe-config.")
    ] = None,
    result: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    plot: Plot = None,
) -> None:
    """Predicts tokens per second by memory size, before you buy hardware or download weights."""
    from vllm_adapmoe.planning.plan import ALLOCATIONS, Question, config_of, run_plan
    from vllm_adapmoe.planning.table import plot_plan, print_plan

    if allocation not in ALLOCATIONS:
        raise AdapMoEError(f"--allocation {allocation} is not known; use {', '.join(ALLOCATIONS)}")
    bits = [] if expert_bits is None else numbers("--expert-bits", expert_bits)
    precisions = [] if precision is None else numbers("--precision", precision)
    if output is not None and (len(bits) > 1 or len(precisions) > 1):
        given = f"--precision {precision}" if precisions else f"--expert-bits {expert_bits}"
        raise AdapMoEError(f"--output takes one configuration; {given} has {len(precisions or bits)} values")
    if output is not None and memory is None:
        raise AdapMoEError("--output needs to know the budget; add --memory, e.g. --memory 24GiB")
    question = Question(
        _config_folder(model, revision), profile, trace, memory, reserve, dtype, bits, link, compute, max_loss_increase,
        allocation, store_dir, max_model_len, precisions, host, disk,
    )  # fmt: skip
    answer = run_plan(question, _checkpoint_hash) | {"model": model}
    if output is not None:
        output.write_text(json.dumps(config_of(answer), indent=1) + "\n")
    report(answer, print_plan, result, plot_plan, plot)


def _config_folder(model: str, revision: str | None) -> Path:
    if os.path.isdir(model):
        return Path(model)
    quieten_vllm()
    from vllm_adapmoe.integration.loading.model_files import config_folder  # imports vLLM, which takes seconds

    return config_folder(model, revision)


def _checkpoint_hash(model: Path) -> str:
    from vllm_adapmoe.integration.loading.identity import checkpoint_hash  # imports vLLM, which takes seconds

    return checkpoint_hash(model)
