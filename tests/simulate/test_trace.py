"""Traces: what is written is read, in bounded space, whatever happened to the end of the file."""

from pathlib import Path

import numpy as np
import pytest

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.simulate.trace import FRAME_STEPS, SAMPLE, Step, TraceInfo, TraceWriter, sample_rows
from vllm_adapmoe.simulate.trace_file import read_trace

INFO = TraceInfo("a-model", [8, 8, 300], 2, 2, [100, 100, 50], [0, 0, 1])


def random_steps(count: int, seed: int = 0) -> list[Step]:
    random = np.random.default_rng(seed)
    steps = []
    for number in range(count):
        rows = int(random.integers(1, 100))
        ids = np.stack([random.integers(0, experts, (rows, 2)) for experts in INFO.num_experts])
        sampled = len(range(rows)[sample_rows(rows)])
        predicted = {
            (layer, distance): PredictedExperts(random.integers(0, 8, (sampled, 2)), random.random((sampled, 2)) < 0.7)
            for layer, distance in ((0, 1), (0, 2), (1, 1))
            if random.random() < 0.9
        }
        names = [f"request-{index % 3}-é" for index in range(rows)]
        weights = random.random(ids.shape).astype(np.float16)
        positions = random.integers(0, 9999, rows).astype(np.int32)
        expected = {layer: random.random(8).astype(np.float16) for layer in (0, 1) if random.random() < 0.9}
        drafted = random.random(rows) < 0.3 if number % 2 else None
        steps.append(Step(number / 7, names, positions, ids, weights, predicted, expected, drafted=drafted))
    return steps


def same(one: Step, other: Step) -> bool:
    assert one.seconds == other.seconds and one.requests == other.requests
    assert one.predicted.keys() == other.predicted.keys()
    for key, predicted in one.predicted.items():
        assert np.array_equal(predicted.ids, other.predicted[key].ids)
        assert np.array_equal(predicted.keep_mask, other.predicted[key].keep_mask)
    assert one.expected.keys() == other.expected.keys()
    assert all(np.array_equal(chances, other.expected[layer]) for layer, chances in one.expected.items())
    flags = [[False] * len(step.requests) if step.drafted is None else step.drafted.tolist() for step in (one, other)]
    assert flags[0] == flags[1]
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in ("positions", "ids", "weights"))


def test_rows_of_draft_tokens_are_no_prompt():
    """A request that verifies two drafts, a prompt of four tokens, and a request that decodes one."""
    requests = ["verifies"] * 3 + ["prompt"] * 4 + ["decodes"]
    ids = np.zeros((3, 8, 2), dtype=int)
    step = Step(0.0, requests, np.arange(8), ids, ids, {}, drafted=np.array([0, 1, 1, 0, 0, 0, 0, 0], dtype=bool))
    assert step.prompt_tokens == 4
    step.drafted = None
    assert step.prompt_tokens == 7


def write(path: Path, steps: list[Step], max_bytes: int = 1 << 30) -> None:
    writer = TraceWriter(path, INFO, max_bytes)
    for step in steps:
        writer.add(step)
    writer.close()


def test_reads_what_was_written(tmp_path):
    steps = random_steps(FRAME_STEPS * 2 + 5)
    write(tmp_path / "t", steps)
    info, read = read_trace(tmp_path / "t")
    assert info == INFO
    assert len(read) == len(steps)
    assert all(map(same, steps, read))


def test_is_bounded_and_keeps_the_newest(tmp_path):
    steps = random_steps(FRAME_STEPS * 12)
    write(tmp_path / "whole", steps)
    limit = (tmp_path / "whole").stat().st_size // 4
    write(tmp_path / "t", steps, limit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "t.1", "whole"]
    assert all((tmp_path / name).stat().st_size <= limit for name in ("t", "t.1"))
    _, read = read_trace(tmp_path / "t")
    assert 0 < len(read) < len(steps)
    assert all(map(same, steps[-len(read) :], read))


@pytest.mark.parametrize("cut", [1, 3, 50])
def test_a_trace_of_a_killed_server_is_read_up_to_its_last_frame(tmp_path, cut):
    steps = random_steps(200)
    write(tmp_path / "t", steps)
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:-cut])
    _, read = read_trace(tmp_path / "t")
    assert 0 < len(read) < len(steps)
    assert all(map(same, steps[: len(read)], read))


def test_rows_of_a_large_step_are_sampled_evenly():
    for rows in (1, SAMPLE, SAMPLE + 1, 5000):
        sampled = range(rows)[sample_rows(rows)]
        assert 0 < len(sampled) <= SAMPLE
        assert len(sampled) >= min(rows, SAMPLE // 2)


def test_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(AdapMoEError, match=r"trace_out='.*missing/t' cannot be written .*name another file"):
        TraceWriter(tmp_path / "missing" / "t", INFO, 1 << 20)
    with pytest.raises(AdapMoEError, match="cannot be read"):
        read_trace(tmp_path / "absent")
    for content in (b"", b"{}\n", b"\x00\xff\n", b'{"model": 3}\n'):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(AdapMoEError, match="is not a trace"):
            read_trace(tmp_path / "bad")
    write(tmp_path / "empty", [])
    with pytest.raises(AdapMoEError, match="no step yet"):
        read_trace(tmp_path / "empty")
