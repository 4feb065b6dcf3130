"""Refuses an unsupported vLLM when the method is switched on, in one line that names what it lacks."""

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

from packaging.version import InvalidVersion, Version

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.compat import EDITED, NEWEST, OLDEST
from vllm_adapmoe.integration.entry.vllm_names import needs, package_files

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

INTEGRATION = Path(__file__).parents[1]
SUPPORTED = f"{OLDEST} to {NEWEST}"


def remedy() -> str:
    """Returns the advice to install a supported vLLM."""
    major, minor = NEWEST.split(".")
    return f"install 'vllm>={OLDEST},<{major}.{int(minor) + 1}'"


def is_supported(version: str) -> bool:
    """Returns whether this is one of the releases that we test with."""
    release = _release(version)
    return release is not None and Version(OLDEST).release <= release <= Version(NEWEST).release


def check_version(version: str | None = None) -> None:
    """Accepts a supported vLLM by its version, and a newer one if it has every name that we use.

    Args:
        version: vLLM's version; None: that of the installed one.

    Raises:
        AdapMoEError: vLLM is older than what we support, or lacks a name that we use.
    """
    if version is None:
        from vllm.version import __version__ as version
    assert version is not None
    if is_supported(version):
        return
    release = _release(version)
    absent = next(missing_names(), None)
    if absent is None and (release is None or release > Version(NEWEST).release):
        logger.warning(
            "vLLM %s is not tested with vllm-adapmoe (%s is); but has every name that it uses", version, SUPPORTED
        )
        return
    why = "it is too old" if absent is None else f"{absent} is missing"
    raise AdapMoEError(f"vLLM {version} is not supported ({SUPPORTED}): {why}; {remedy()}")


def explain_import_error(error: ImportError) -> None:
    """Raises if an import failed because vLLM is not supported; returns if `error` has another cause.

    Raises:
        AdapMoEError: as in `check_version`.
    """
    if (error.name or "").partition(".")[0] == "vllm" and importlib.util.find_spec("vllm") is not None:
        check_version()


def _release(version: str) -> tuple[int, ...] | None:
    """Returns major and minor number; None if there are none, as in a source tree without metadata."""
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return None


def missing_names() -> Iterator[str]:
    """Yields the names that our code uses and the installed vLLM lacks, then its abstract methods that we lack."""
    for module, names in EDITED.items():
        yield from (f"{module}.{name}" for name in names if not exists(f"{module}.{name}"))
    for file in package_files():
        for ways in needs(file):
            absent = [[use.path for use in way if not exists(use.path)] for way in ways]
            if all(absent):
                yield absent[0][0]
    yield from _abstract_methods()


def _abstract_methods() -> Iterator[str]:
    """Yields abstract methods of vLLM's base classes that our classes do not implement."""
    for file in package_files():
        if INTEGRATION not in file.parents or file.stem == "__init__":
            continue
        path = file.relative_to(INTEGRATION).with_suffix("")
        module = importlib.import_module(".".join(("vllm_adapmoe", "integration", *path.parts)))
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                for method in sorted(getattr(cls, "__abstractmethods__", ())):
                    yield f"in {cls.__name__}, vLLM's {method}"


def exists(path: str) -> bool:
    """Returns whether a dotted name is a module of vLLM or can be resolved from one."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            target = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if f"{module}.".startswith(f"{error.name}."):
                continue
            return True  # the module exists but a dependency of it is missing: not a matter of vLLM's version
        try:
            for name in parts[count:]:
                target = getattr(target, name)
        except (AttributeError, ImportError):
            return False
        return True
    return False
