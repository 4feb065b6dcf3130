"""Arguments and options shared by several commands."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import check_named_model
from vllm_adapmoe.profile.shipped import find_profile, shipped_profiles


def _model(model: str | None) -> str | None:
    return None if model is None else check_named_model(model)


def model_argument(purpose: str = "") -> Any:
    """Returns the argument MODEL, as `vllm serve` takes it.

    Args:
        purpose: what the command does with it, as the end of a sentence.
    """
    return typer.Argument(help=f"Checkpoint folder, or the name of a model on the hub{purpose}.", callback=_model)


Model = Annotated[str, model_argument()]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub, as in `vllm serve`.")]


def quieten_vllm() -> None:
    """Limits vLLM's log to errors unless the user set a level: log lines would break progress bars."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """Returns the folder of a model; downloads missing files of a model on the hub."""
    if os.path.isdir(model):
        return Path(model)
    from vllm_adapmoe.integration.loading import model_files  # imports vLLM, which takes seconds

    return model_files.checkpoint_folder(model, revision)


def _profile(profile: Path | None) -> Path | None:
    return None if profile is None else find_profile(profile)


def profile_option(purpose: str = "") -> Any:
    """Returns the option of a profile, whose value is an existing file.

    Args:
        purpose: what the command does with it, as the end of a sentence.
    """
    text = "Profile: a file written by `adapmoe calibrate`, or the name of one shipped with the plugin"
    return typer.Option(help=f"{text}{purpose}.", callback=_profile, autocompletion=shipped_profiles)


Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the result to.")]
Plot = Annotated[Path | None, typer.Option(help="PNG file for the plot.")]
Profile = Annotated[Path, profile_option()]
HeldOut = Annotated[Path, typer.Option(help="Held-out text: a file, or a folder of *.txt.", exists=True)]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements per configuration, interleaved.")]
Batch = Annotated[int, typer.Option(min=1, help="Requests per batch.")]
Text = Annotated[
    Path | None, typer.Option(help="Folder of *.txt to take prompts from; default: random tokens.", exists=True)
]
CacheSettings = Annotated[
    list[str] | None,
    typer.Option(help="Expert cache settings: a JSON object, a JSON file, or single keys as "
                 "--adapmoe-config.KEY VALUE. Default: as many slots as memory allows."),
]  # fmt: skip
PromptTokens = Annotated[int, typer.Option(min=1, help="Prompt tokens per request.")]
OutputTokens = Annotated[int, typer.Option(min=2, help="Output tokens per request.")]


def numbers(option: str, text: str) -> list[float]:
    """Parses a comma-separated list of finite numbers.

    Raises:
        AdapMoEError: `text` is not such a list.
    """
    try:
        values = [float(part) for part in text.split(",")]
        if all(map(math.isfinite, values)):
            return values
        raise ValueError
    except ValueError:
        raise AdapMoEError(f"{option} {text!r} is not a list of numbers; separate them with commas") from None


def precisions(option: str, text: str | None) -> list[Literal[8, 4]]:
    """Parses a comma-separated list of bits per expert weight; returns those below 16, in order, each once.

    Raises:
        AdapMoEError: a value is not 16, 8 or 4.
    """
    values = [] if text is None else numbers(option, text)
    for value in values:
        if value not in (16, 8, 4):
            raise AdapMoEError(f"{option} {value:g} is not usable; use 16, 8 or 4, separated by commas")
    return [8 if value == 8 else 4 for value in dict.fromkeys(values) if value != 16]
