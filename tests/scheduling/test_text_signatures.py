"""Signatures of texts."""

import numpy as np
import pytest

from vllm_adapmoe.scheduling.text_signatures import BUCKETS, MAX_TOKENS, WIDTH, TextSignatures

SUBJECTS = 4
WORDS = 400
COMMON = 50


def text(generator: np.random.Generator, subject: int, length: int = 40) -> list[int]:
    """Half common words, half words of the subject, of which it uses a tenth."""
    own = COMMON + WORDS * subject + generator.integers(0, WORDS, length // 2)
    return [*generator.integers(0, COMMON, length // 2).tolist(), *own.tolist()]


def nearest_share(texts: TextSignatures, generator: np.random.Generator) -> float:
    """Share of texts whose most similar other text is of their subject."""
    subjects = np.arange(80) % SUBJECTS
    vectors = np.stack([texts.signature(text(generator, int(subject))) for subject in subjects])
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    return float(np.mean(subjects[likeness.argmax(axis=1)] == subjects))


def test_texts_of_a_subject_are_found_though_they_share_hardly_a_word():
    generator = np.random.default_rng(0)
    texts = TextSignatures()
    for number in range(300):
        texts.learn(text(generator, number % SUBJECTS))
    assert nearest_share(texts, generator) > 0.95


def test_nothing_is_known_at_first():
    texts = TextSignatures()
    assert not texts.signature([1, 2, 3]).any()
    assert not texts.signature([]).any()
    texts.learn([])
    assert texts.signature([1]).shape == (WIDTH,)


def test_signatures_have_length_one_and_are_the_same_again():
    made = []
    for _ in range(2):
        texts = TextSignatures()
        texts.learn([1, 2, 3])
        texts.learn([4, 5])
        made.append(texts.signature([1, 5]))
    assert np.array_equal(*made)
    assert np.linalg.norm(made[0]) == pytest.approx(1, abs=1e-5)


def test_large_vocabularies_and_long_texts():
    texts = TextSignatures()
    texts.learn([1, 10 * BUCKETS + 2])
    texts.learn([7])
    assert np.array_equal(texts.signature([BUCKETS + 1]), texts.signature([1]))
    assert np.array_equal(texts.signature([7] * 10 + [1] * MAX_TOKENS), texts.signature([1]))
