"""The parts of `python -m benchmarks soak` that need no server."""

import json
from dataclasses import replace

import pytest

from benchmarks.soak import log_errors, tally
from benchmarks.soak_client import Outcome
from benchmarks.soak_replay import chance_of_as_many, difference, spread_out
from benchmarks.soak_traffic import REFUSED, WEIGHTS, Traffic, wrong_with
from benchmarks.soak_watch import Sample, growth
from vllm_adapmoe.units import MiB

TRAFFIC = Traffic("m", {"a": list(range(2, 2000)), "b": list(range(2, 300))}, 1024, 3)
ASKS = [TRAFFIC.ask(number) for number in range(2000)]


def test_the_mix_has_every_kind_as_often_as_it_says():
    for kind, weight in WEIGHTS.items():
        share = sum(ask.kind == kind for ask in ASKS) / len(ASKS)
        assert share == pytest.approx(weight / sum(WEIGHTS.values()), abs=0.03)
    assert [ask.kind for ask in ASKS[: len(WEIGHTS)]] == list(WEIGHTS)


def test_a_request_is_the_same_for_the_same_seed_and_number():
    assert TRAFFIC.ask(1234) == ASKS[1234]
    assert replace(TRAFFIC, seed=4).ask(1234) != ASKS[1234]


def test_bad_requests_are_bad_in_their_own_way_only():
    for ask in ASKS:
        if ask.kind == "malformed":
            with pytest.raises(ValueError, match=r"."):
                json.loads(ask.body)
            continue
        body = json.loads(ask.body)
        assert (ask.expected == "refused") == (ask.kind in REFUSED)
        assert (body["model"] == "m") == (ask.kind != "unknown_model")
        if ask.kind == "oversized":
            assert len(body["prompt"]) > 1024
        elif ask.kind == "too_many_tokens":
            assert body["max_tokens"] > 1024
        elif ask.kind not in ("wrong_type", "chat"):
            assert len(body["prompt"]) + body["max_tokens"] <= 1024 and len(body["prompt"]) >= 4


def test_what_is_wrong_with_an_answer():
    ask = next(ask for ask in ASKS if ask.kind == "complete" and ask.tokens == 4)
    good = {"finish_reason": "length", "token_ids": [1, 2, 3, 4], "text": "x"}
    assert wrong_with(ask, [good]) is None
    assert wrong_with(ask, [good, good]) == "2 choices, not 1"
    assert wrong_with(ask, [good | {"token_ids": [1]}]) == "1 tokens, not 4"
    assert wrong_with(ask, [good | {"finish_reason": "abort"}]) == "finish_reason 'abort'"
    for ask in [ask for ask in ASKS if ask.kind == "structured"]:
        shape = json.loads(ask.body)["structured_outputs"]
        text = {"choice": "beta", "regex": "abc-12", "json": '{"name": "x", "size": 3}'}[next(iter(shape))]
        stopped = {"finish_reason": "stop", "token_ids": [1], "text": text}
        assert wrong_with(ask, [stopped]) is None
        assert "structured_outputs" in str(wrong_with(ask, [stopped | {"text": text + "!"}]))
        assert wrong_with(ask, [stopped | {"text": text[:2], "finish_reason": "length"}]) is None


def test_where_replays_part():
    likeliest = [{"token_id:1": -0.1, "token_id:2": -3.0}, {"token_id:5": -0.5, "token_id:6": -0.6}]
    assert difference(7, [1, 5], [1, 5], likeliest) is None
    found = difference(7, [1, 6], [1, 5], likeliest)
    assert found is not None
    assert (found.number, found.position, found.at_least) == (7, 1, False)
    assert found.gap == pytest.approx(0.1)
    unlikely = difference(7, [9, 5], [1, 5], likeliest)
    assert unlikely is not None and unlikely.at_least and unlikely.gap == pytest.approx(2.9)


def test_replays_are_spread_over_the_soak():
    assert spread_out({5: 0, 1: 0, 3: 0}, 4) == [1, 3, 5]
    assert spread_out(range(100), 4) == [0, 25, 50, 75]


def test_chance_is_fishers():
    def of(replayed, equal):
        return {"replayed": replayed, "equal": equal}

    assert chance_of_as_many(of(4, 1), of(4, 3)) == pytest.approx(17 / 70)
    assert chance_of_as_many(of(50, 50), of(10, 0)) == 1
    assert chance_of_as_many(of(200, 150), of(200, 200)) < 1e-9


def samples(slope):
    """A minute of samples, memory growing by so many MiB a minute."""
    return [
        Sample(second, int((500 + slope * second / 60) * MiB), 500 * MiB, 50, 80, 4) for second in range(0, 1200, 5)
    ]


def test_leaks_show():
    idle = samples(0)[:2]
    flat = growth(samples(0), idle)
    assert all(flat[key]["within"] for key in ("anonymous", "proportional", "threads", "files", "processes"))
    leaking = growth(samples(4), idle)
    assert not leaking["anonymous"]["within"] and leaking["proportional"]["within"]
    assert leaking["anonymous"]["bytes_per_minute"] == pytest.approx(4 * MiB, rel=0.01)
    assert leaking["anonymous"]["growth_bytes"] == pytest.approx(60 * MiB, rel=0.02)
    more = growth(samples(0), [idle[0], replace(idle[1], files=81)])
    assert not more["files"]["within"] and more["threads"]["within"]


def test_outcomes_are_counted_by_kind():
    outcomes = [Outcome(0, "stream", "answered", 1.0), Outcome(1, "stream", "failed", 1.0, "gone")]
    assert tally(outcomes) == {"stream": {"answered": 1, "failed": 1}}


def test_error_lines_are_told_once():
    lines = [
        "(EngineCore pid=1) ERROR 11-25 04:04:02 [core.py:906] request 12 of 0xff00 failed",
        "(EngineCore pid=1) ERROR 11-25 04:05:02 [core.py:906] request 13 of 0xff01 failed",
        "INFO 11-25 04:05:02 [core.py:906] all is well",
    ]
    assert log_errors(lines) == {"[core.py:#] request # of # failed": 2}
