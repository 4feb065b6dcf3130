"""Reads sequences of token ids from text files."""

from pathlib import Path

import numpy as np
from blake3 import blake3

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.files import BadFile, read_text
from vllm_adapmoe.printable import reason

TEXT_BYTES = 1 << 30
"""Maximum size of a text file."""


def read_sequences(model: Path, data: Path, length: int, count: int, seed: int) -> list[list[int]]:
    """Returns at most `count` sequences of `length` ids from `data`, a text file or a folder of `*.txt`.

    Every file is a document that starts with the tokenizer's BOS token, if it has one; sequences do not cross files.
    The choice of sequences and their order depend only on the seed and the ids.

    Raises:
        AdapMoEError: no tokenizer, no text, or too little for two sequences.
    """
    from transformers import AutoTokenizer

    paths = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers and tokenizers may raise anything on bad files
        raise AdapMoEError(
            f"model={str(model)!r} has no tokenizer ({reason(error)}); name the folder of a checkpoint"
        ) from None
    sequences: list[list[int]] = []
    for path in paths:
        ids = tokenizer(text_of(path), verbose=False, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        sequences += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(sequences) < 2:
        raise AdapMoEError(f"data={str(data)!r} holds fewer than two sequences of {length} tokens; give more text")
    order = np.random.default_rng(seed).permutation(len(sequences))[:count]
    return [sequences[index] for index in order]


def text_of(path: Path) -> str:
    """Returns the text of a file, with bytes that are not UTF-8 replaced.

    Raises:
        AdapMoEError: the file cannot be read, or is larger than `TEXT_BYTES`.
    """
    try:
        return read_text(path, TEXT_BYTES)
    except BadFile as problem:
        raise AdapMoEError(f"text {str(path)!r} {problem}; name a text file, or a folder of *.txt") from None


def data_hash(sequences: list[list[int]]) -> str:
    """Returns a hash of the ids, which does not depend on where the text was read from."""
    return blake3(np.array(sequences, dtype=np.int64).tobytes()).hexdigest()[:32]
