"""`adapmoe plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_adapmoe.cli.options import Model, numbers
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.results import write

StoreDir = Annotated[Path | None, typer.Option(help="Folder of the packed file; default: vLLM's cache.")]


def plan(
    model: Model,
    profile: Annotated[Path | None, typer.Option(help="What `adapmoe calibrate` wrote, or one of configs/.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of the device, or on the CPU of the process: 24GiB.")] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            help="Of it, for all but weights and slots: 2GiB. Default: what vLLM leaves and takes of a GPU with its "
            "defaults, CUDA graphs included."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a request, for the default reserve. Default: the model's most.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="Bandwidth that experts arrive with, 1e9 bytes/s; auto: measured.")
    ] = "auto",
    compute: Annotated[
        float | None, typer.Option(min=1e-6, help="Milliseconds of a layer; default: estimated from this machine.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, bfloat16, float16 or float32.")] = "auto",
    expert_bits: Annotated[
        str | None, typer.Option(help="Bits of an expert's weight, comma-separated: 16,8,4.5. Default: the dtype's.")
    ] = None,
    max_loss_increase: Annotated[
        float | None, typer.Option(help="Of gating, as a share of the loss: 0.005. Needs a calibrated profile.")
    ] = None,
    allocation: Annotated[str, typer.Option(help="As in `adapmoe_config`.")] = "pool",
    trace: Annotated[
        Path | None, typer.Option(help="What `trace_out` wrote: replayed, in place of the closed form.", exists=True)
    ] = None,
    store_dir: StoreDir = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the --adapmoe-config.")] = None,
    result: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the plot.")] = None,
) -> None:
    """Tokens per second by memory, before anything is bought or downloaded."""
    from vllm_adapmoe.planning.plan import ALLOCATIONS, Question, config_of, run_plan
    from vllm_adapmoe.planning.table import plot_plan, print_plan

    if allocation not in ALLOCATIONS:
        raise AdapMoEError(f"--allocation {allocation} is not known; use {', '.join(ALLOCATIONS)}")
    bits = [] if expert_bits is None else numbers("--expert-bits", expert_bits)
    if output is not None and len(bits) > 1:
        raise AdapMoEError(f"--output takes one configuration; --expert-bits {expert_bits} has {len(bits)} values")
    if output is not None and memory is None:
        raise AdapMoEError("--output needs to know the budget; add --memory, e.g. --memory 24GiB")
    question = Question(
        model, profile, trace, memory, reserve, dtype, bits, link, compute, max_loss_increase, allocation, store_dir,
        max_model_len,
    )  # fmt: skip
    answer = run_plan(question, _checkpoint_hash)
    print_plan(answer, Console())
    if output is not None:
        output.write_text(json.dumps(config_of(answer), indent=1) + "\n")
    if result is not None:
        write(result, answer)
    if plot is not None:
        plot_plan(answer, plot)


def _checkpoint_hash(model: Path) -> str:
    from vllm_adapmoe.integration.loading.identity import checkpoint_hash  # imports vLLM, which takes seconds

    return checkpoint_hash(model)
