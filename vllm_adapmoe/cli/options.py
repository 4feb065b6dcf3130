"""Arguments and options that several commands have."""

import math
from pathlib import Path
from typing import Annotated

import typer

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import check_model_folder


def check_any_model(folder: Path | None) -> Path | None:
    """`check_model_folder`, where a model is named."""
    return None if folder is None else check_model_folder(folder)


Model = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint.", exists=True, file_okay=False, callback=check_model_folder)
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the result.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each engine, in turn.")]
Batch = Annotated[int, typer.Option(min=1, help="Requests in a batch.")]
Text = Annotated[
    Path | None, typer.Option(help="Folder of *.txt to take prompts from; default: random tokens.", exists=True)
]
CacheSettings = Annotated[
    list[str] | None,
    typer.Option(help="Expert cache of the engine: JSON, a file, single keys as in --adapmoe-config.cache_gb 8. "
                 "Default: as memory demands."),
]  # fmt: skip
PromptTokens = Annotated[int, typer.Option(min=1)]
OutputTokens = Annotated[int, typer.Option(min=2)]


def numbers(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated list.

    Raises:
        AdapMoEError: it is not one.
    """
    try:
        values = [float(part) for part in text.split(",")]
        if all(map(math.isfinite, values)):
            return values
        raise ValueError
    except ValueError:
        raise AdapMoEError(f"{option} {text!r} is not a list of numbers; separate them with commas") from None
