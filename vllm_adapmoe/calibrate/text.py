"""Sequences of token ids from text files."""

from pathlib import Path

import numpy as np
from blake3 import blake3

from vllm_adapmoe.config import AdapMoEError


def read_sequences(model: Path, data: Path, length: int, count: int, seed: int) -> list[list[int]]:
    """At most `count` sequences of `length` ids from `data`, a text file or a folder of `*.txt`.

    Every file is a document and begins with the tokenizer's own first token, if it has one; sequences do not cross
    files. Which of them are taken, and their order, depends on the seed and the ids alone.

    Raises:
        AdapMoEError: no tokenizer, no text, or too little for two sequences.
    """
    from transformers import AutoTokenizer

    paths = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise AdapMoEError(f"model={str(model)!r} has no tokenizer ({str(error).splitlines()[0]})") from None
    sequences: list[list[int]] = []
    for path in paths:
        ids = tokenizer(path.read_text(errors="replace"), verbose=False, add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        sequences += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(sequences) < 2:
        raise AdapMoEError(f"data={str(data)!r} holds fewer than two sequences of {length} tokens; give more text")
    order = np.random.default_rng(seed).permutation(len(sequences))[:count]
    return [sequences[index] for index in order]


def data_hash(sequences: list[list[int]]) -> str:
    """Hash of the ids: the same wherever the text was read from."""
    return blake3(np.array(sequences, dtype=np.int64).tobytes()).hexdigest()[:32]
