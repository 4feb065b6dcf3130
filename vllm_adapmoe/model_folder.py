"""Checks of a checkpoint folder, made before libraries open the files in it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.files import BadFile, parse_json, read_bytes

CONFIG_BYTES, CONFIG_VALUES = 16 << 20, 1_000_000
"""Maximum bytes and JSON values of a `config.json`; some have a label for each of many classes."""
TOKENIZER_BYTES = 256 << 20
MAX_COUNT = 65_536
"""Maximum number of layers, experts or heads: building the model creates an object for each."""


def check_model_folder(folder: Path) -> Path:
    """Returns the folder if reading a model from it cannot hang or exhaust memory.

    Raises:
        AdapMoEError: a pipe, socket or device among its files, or an unusable `config.json`.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise AdapMoEError(f"model={str(folder)!r} cannot be read ({error.strerror}); name a checkpoint") from None
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except OSError:  # a broken link: the reader will report it
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise AdapMoEError(f"model={str(folder)!r}: {entry.name!r} in it is not a regular file; remove it")
    if (folder / "config.json").exists():
        read_model_config(folder)
    return folder


def check_named_model(model: str) -> str:
    """Returns the argument MODEL of a command: a folder, which is checked, or a name that only the hub can check.

    Raises:
        AdapMoEError: a path that does not exist, or as `check_model_folder`.
    """
    if os.path.isdir(model):
        check_model_folder(Path(model))
    elif "://" not in model and not os.path.exists(model) and (model[:1] in ("/", ".", "~") or model.count("/") > 1):
        raise AdapMoEError(f"model={model!r} does not exist; name a checkpoint folder, or a model on the hub")
    return model


def model_name(folder: Path) -> str:
    """Returns the name of the model in a folder: the folder's, or the repository's for a snapshot of a hub's cache."""
    folder = Path(os.path.abspath(folder))
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name


def read_model_config(folder: Path) -> dict[str, Any]:
    """Returns a model's `config.json`.

    Raises:
        AdapMoEError: it is missing, or no model can be built from it.
    """
    path = folder / "config.json"
    try:
        config = parse_json(read_bytes(path, CONFIG_BYTES), CONFIG_VALUES, strict=False)
        if not isinstance(config, dict):
            raise BadFile("is not an object")
        for key, value in _numbers(config):
            if value > MAX_COUNT and any(word in key for word in ("layer", "expert", "head")):
                raise BadFile(f"is not usable: {key} = {value}, more than the maximum of {MAX_COUNT}")
    except BadFile as problem:
        raise AdapMoEError(f"{str(path)!r} {problem}; name the folder of a checkpoint") from None
    return config


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields the integers whose key starts with `num_` or `n_`, with their keys, at any depth."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key, entry in value.items():
                if isinstance(entry, int) and key.startswith(("num_", "n_")):
                    yield key, entry
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def read_tokenizer(folder: Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a model.

    Raises:
        AdapMoEError: `tokenizer.json` is missing or cannot be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_str(read_bytes(path, TOKENIZER_BYTES).decode())
    except BadFile as problem:
        raise AdapMoEError(f"{str(path)!r} {problem}; name the folder of a checkpoint") from None
    except Exception as error:  # the parser has no exception class for invalid input
        raise AdapMoEError(f"{str(path)!r} is no tokenizer ({error}); name the folder of a checkpoint") from None


def vocabulary_size(folder: Path) -> int:
    """Returns the vocabulary size of a model.

    Raises:
        AdapMoEError: its configuration has no usable `vocab_size`.
    """
    config = read_model_config(folder)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        size = part.get("vocab_size")
        if isinstance(size, int) and 2 < size < 1 << 31:
            return size
    raise AdapMoEError(f"{str(folder)!r} has no vocab_size in its config.json; name the folder of a checkpoint")
