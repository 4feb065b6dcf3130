"""Arguments and options shared by several commands."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import check_model_folder
from vllm_adapmoe.profile.shipped import find_profile, shipped_profiles


def check_any_model(folder: Path | None) -> Path | None:
    """Applies `check_model_folder` unless `folder` is None."""
    return None if folder is None else check_model_folder(folder)


Model = Annotated[
    Path, typer.Argument(help="Checkpoint folder.", exists=True, file_okay=False, callback=check_model_folder)
]


def _profile(profile: Path | None) -> Path | None:
    return None if profile is None else find_profile(profile)


def profile_option(purpose: str = "") -> Any:
    """Returns the option of a profile, whose value is an existing file.

    Args:
        purpose: what the command does with it, as the end of a sentence.
    """
    text = "Profile: a file written by `adapmoe calibrate`, or the name of one that comes with the plugin"
    return typer.Option(help=f"{text}{purpose}.", callback=_profile, autocompletion=shipped_profiles)


Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the result to.")]
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
