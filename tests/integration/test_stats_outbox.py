"""What steps count reaches the API servers once, whoever of them is told."""

import pytest

from vllm_adapmoe.integration.scheduler.stats_outbox import StatsOutbox
from vllm_adapmoe.scheduling.counters import StepCounters


def step(hits: int, stall: float = 0.0, nbytes: int = 0, seconds: float = 0.0) -> StepCounters:
    return StepCounters(
        hits=hits, stall_seconds=stall, fetched_bytes=nbytes, fetch_seconds=seconds, slots=8, layer_hits=[hits, 0],
        layer_resident=[hits, 1],
    )  # fmt: skip


def test_what_is_sent_adds_up_to_what_was_counted():
    now = 0.0
    outbox = StatsOutbox(lambda: now)
    assert outbox.take(idle=False) is None
    outbox.add(step(3, 0.5), 1)
    first = outbox.take(idle=False)
    assert first["hits"] == 3 and first["stall_seconds"] == [0.5] and first["layer_hits"] == [3, 0]
    outbox.add(step(5, 0.25), 1)
    outbox.add(step(7), 1)
    outbox.add(StepCounters(), 1)  # a step in which nothing was counted
    second = outbox.take(idle=False)
    assert second["hits"] == 12 and second["stall_seconds"] == [0.25, 0] and second["slots"] == 8
    assert "layer_hits" not in second, "layers wait for their second"
    assert outbox.take(idle=False) is None
    outbox.add(step(0), 0)
    assert "stall_seconds" not in outbox.take(idle=False), "a step without tokens waits for nothing"
    now = 1.5
    assert outbox.take(idle=False) == {"layer_hits": [12, 0], "layer_resident": [0, 1]}
    outbox.add(step(1), 1)
    assert outbox.take(idle=True)["layer_hits"] == [1, 0], "or for the last step, after which nobody would ask again"


def test_bandwidth_is_of_late():
    outbox = StatsOutbox()
    outbox.add(step(1), 1)
    assert "link_bandwidth" not in outbox.take(idle=False), "nothing was fetched"
    for _ in range(100):
        outbox.add(step(1, nbytes=10, seconds=0.1), 1)
    assert outbox.take(idle=False)["link_bandwidth"] == pytest.approx(100)
    for _ in range(100):
        outbox.add(step(1, nbytes=50, seconds=0.1), 1)
    outbox.add(step(1), 1)  # time without fetching says nothing of the link
    outbox.add(step(1, nbytes=50, seconds=0.1), 1)
    assert outbox.take(idle=False)["link_bandwidth"] == pytest.approx(500, rel=0.01)
