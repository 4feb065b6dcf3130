"""The figures of `python -m benchmarks peers`, by arithmetic."""

from types import SimpleNamespace

import pytest

from benchmarks.peer_figures import figures, loss_figures, rivals


def run(seconds: float, best: list[int] | None = None) -> dict:
    """A round of two decoded tokens."""
    return {
        "decode_seconds": seconds, "step_seconds": [seconds / 2] * 2, "prefill_seconds": 1.0, "load_seconds": 2.0,
        "decode_read_bytes": 200, "peak_bytes": 7, "held_bytes": 5, "load_average": 0.5, "cache": {},
        "best": best or [1, 2, 3, 4],
    }  # fmt: skip


LIMIT = SimpleNamespace(
    memory=1 << 30,
    settings={"adapmoe-4": {"slots": 9}},
    failures={"vllm": {"failure": "out of memory"}, "llama.cpp-q4_0": {"failure": "not done"}},
    rounds={
        "llama.cpp": [run(2.0), run(4.0)],
        "llama.cpp-q8_0": [run(0.5), run(0.5)],
        "llama.cpp-q4_0": [run(0.1)],  # failed in the second round
        "adapmoe": [run(1.0), run(1.0)],
        "adapmoe-4": [run(0.2, [1, 2, 3, 9]), run(0.4)],
    },
)
LOSSES = {
    "llama.cpp": [2.0, 2.0, 2.0, 2.0],
    "llama.cpp-q8_0": [2.1, 1.9, 2.1, 1.9],
    "adapmoe": [2.0, 2.0, 2.0, 2.0],
    "adapmoe-4": [2.2, 2.2, 2.2, 2.1],
}


def test_a_contender_is_compared_with_the_fastest_peer_that_ran_to_its_end():
    point = figures("adapmoe-4", LIMIT)
    assert point["best_peer"] == "llama.cpp-q8_0" and point["settings"] == {"slots": 9}
    assert point["ratio_to_best_peer"]["median"] == pytest.approx((0.5 / 0.2 + 0.5 / 0.4) / 2)
    assert point["decode_tokens_per_second"]["max"] == pytest.approx(10)
    assert point["read_bytes_per_token"]["median"] == 100 and point["agreement"] == pytest.approx(7 / 8)
    assert point["agreement_with"] == "adapmoe"
    assert figures("vllm", LIMIT) == {"settings": {}, "failure": "out of memory"}
    assert figures("llama.cpp-q4_0", LIMIT)["failure"] == "not done"


def test_a_rival_has_no_more_loss_than_the_peers_file():
    assert rivals(LIMIT, LOSSES) == {
        "llama.cpp": {"fastest": "adapmoe", "ratio": {"median": 3.0, "min": 2.0, "max": 4.0, "runs": 2}},
        "llama.cpp-q8_0": {"fastest": "adapmoe", "ratio": {"median": 0.5, "min": 0.5, "max": 0.5, "runs": 2}},
    }, "adapmoe-4 is faster, but its loss is higher"


def test_losses_are_relative_to_16_bits_in_vllm():
    points = loss_figures(LOSSES)
    assert points["adapmoe"] == {"nats": 2.0, "increase": 0.0, "increase_error": 0.0}
    assert points["adapmoe-4"]["increase"] == pytest.approx(0.175 / 2)
    assert points["llama.cpp-q8_0"]["increase"] == pytest.approx(0)
    assert points["llama.cpp-q8_0"]["increase_error"] == pytest.approx(0.1 / 2 / 2)
    assert loss_figures({"llama.cpp": [1.0]}) == {"llama.cpp": {"nats": 1.0}}
