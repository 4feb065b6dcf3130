"""TextSignatures: which requests are about similar text, learnt from the texts served so far."""

from collections.abc import Sequence

import numpy as np

Tokens = Sequence[int] | np.ndarray
"""Token ids."""

WIDTH = 64
"""Length of a signature. With 256, replays group requests no better."""
BUCKETS = 1 << 15
"""Rows of the table; tokens of larger vocabularies share them. The table takes 8 MiB whatever the vocabulary."""
MAX_TOKENS = 1024
"""Tokens of a text that are looked at, its last ones: bounds the time per request to a tenth of a millisecond."""
PRIOR = 2
"""Texts without any tendency that every token starts with, so that a rare token does not decide alone."""
MEMORY = 1000
"""Texts after which the weight of a token's older texts has faded to 1/e."""


class TextSignatures:
    """Gives a text a vector, so that texts about similar things have a large dot product.

    A token's row is the mean of random projections of the texts that have contained it (random indexing: Kanerva et
    al., "Random indexing of text samples for latent semantic analysis", 2000), less the mean of all texts; a signature
    is the mean of its tokens' rows. Which experts a request uses depends on its kind of text. Signatures from the
    recorded routing of earlier requests, in place of their words, group requests no better in replays, and would have
    to be computed and sent in every step.
    """

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._projection = generator.standard_normal((BUCKETS, WIDTH), dtype=np.float32) / np.float32(np.sqrt(WIDTH))
        self._rows = np.zeros((BUCKETS, WIDTH), dtype=np.float32)
        self._texts = np.zeros(BUCKETS, dtype=np.int64)
        """Number of texts that each row is the mean of."""
        self._mean = np.zeros(WIDTH, dtype=np.float32)
        self.count = 0
        """Number of texts learnt from."""

    def learn(self, tokens: Tokens) -> None:
        """Learns from one text."""
        if not len(tokens):
            return
        buckets, counts = np.unique(_buckets(tokens), return_counts=True)
        weights = np.sqrt(counts).astype(np.float32)
        text = weights @ self._projection[buckets] / np.linalg.norm(weights)
        self.count += 1
        self._mean += (text - self._mean) / min(self.count, MEMORY)
        self._texts[buckets] += 1
        shares = 1 / (np.minimum(self._texts[buckets], MEMORY) + PRIOR)
        self._rows[buckets] += shares[:, None].astype(np.float32) * (text - self._mean - self._rows[buckets])

    def signature(self, tokens: Tokens) -> np.ndarray:
        """Returns the signature of a text: float32 `[WIDTH]`, of length 1, or zeros if its tokens are new."""
        if not len(tokens):
            return np.zeros(WIDTH, dtype=np.float32)
        total = self._rows[_buckets(tokens)].sum(axis=0)
        length = np.linalg.norm(total)
        return total / length if length else total


def _buckets(tokens: Tokens) -> np.ndarray:
    return np.asarray(tokens[-MAX_TOKENS:], dtype=np.int64) % BUCKETS
