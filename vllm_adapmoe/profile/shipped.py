"""Finds the profiles shipped with the package by their names."""

import os
from pathlib import Path

from vllm_adapmoe.config import AdapMoEError

FOLDER = Path(__file__).parent.parent / "configs"


def shipped_profiles() -> list[str]:
    """Returns the names of the profiles shipped with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_profile(profile: str | Path) -> Path:
    """Returns the file of a profile, given as a path or as the name of one shipped with the package.

    An existing file wins over a shipped profile of that name. A folder does not: models are often downloaded to one
    that has the model's name.

    Raises:
        AdapMoEError: neither a file nor such a name.
    """
    path = os.path.expanduser(profile)
    if os.path.exists(path) and not os.path.isdir(path):
        return Path(path)
    names = shipped_profiles()
    if str(profile) in names:
        return FOLDER / f"{profile}.json"
    raise AdapMoEError(
        f"profile={str(profile)!r} is neither a file nor the name of a profile shipped with the plugin; make one "
        f"with adapmoe calibrate, or name one of {', '.join(names)}"
    )
