"""Computes the figures of `python -m benchmarks peers` from the runs under one memory limit."""

from collections.abc import Mapping
from statistics import median
from typing import Any, Protocol

import numpy as np

from benchmarks.peer_worker import FORMATS, PRECISIONS
from benchmarks.workload import ratios
from vllm_adapmoe.results import spread

REFERENCES = ("vllm", "adapmoe-lru", "adapmoe", "adapmoe-profile", "transformers", "llama.cpp")
"""Contenders whose most probable tokens are the reference: the first of these that ran."""


class Runs(Protocol):
    """Runs of the contenders under one memory limit."""

    memory: int | None
    settings: dict[str, dict[str, Any]]
    failures: dict[str, dict[str, Any]]
    rounds: dict[str, list[dict[str, Any]]]


def ran(limit: Runs) -> dict[str, list[dict[str, Any]]]:
    """Returns the rounds of the contenders that ran in every round."""
    return {name: rounds for name, rounds in limit.rounds.items() if name not in limit.failures}


def figures(name: str, limit: Runs) -> dict[str, Any]:
    """Returns the figures of a contender; its failure, if it failed."""
    settings = limit.settings.get(name, {})
    complete = ran(limit)
    if name not in complete:
        return {"settings": settings} | limit.failures[name]
    rounds = complete[name]
    reference = next((other for other in REFERENCES if other in complete), None)
    speeds = {other: [1 / token_seconds(result) for result in results] for other, results in complete.items()}
    best = max((other for other in complete if other not in PRECISIONS), key=lambda n: median(speeds[n]), default=None)
    timed = [{"speed": speed} for speed in speeds[name]]
    return {
        "settings": settings,
        "decode_tokens_per_second": spread(speeds[name]),
        "decode_ms_per_token": spread([1e3 * token_seconds(result) for result in rounds]),
        "prefill_seconds": spread([result["prefill_seconds"] for result in rounds]),
        "load_seconds": spread([result["load_seconds"] for result in rounds]),
        "read_bytes_per_token": spread(
            [result["decode_read_bytes"] / len(result["step_seconds"]) for result in rounds]
        ),
        "peak_bytes": None if limit.memory is None else max(result["peak_bytes"] for result in rounds),
        "held_bytes": max(result["held_bytes"] for result in rounds),
        "agreement": None if reference is None else _agreement(rounds, complete[reference]),
        "agreement_with": reference,
        "ratio_to_best_peer": None
        if best is None
        else ratios(timed, [{"speed": speed} for speed in speeds[best]], "speed"),
        "best_peer": best,
        "load_average": spread([result["load_average"] for result in rounds]),
        "cache": [result["cache"] for result in rounds],
        "step_seconds": [result["step_seconds"] for result in rounds],
    }


def token_seconds(result: dict[str, Any]) -> float:
    """Returns the seconds per decoded token of a run."""
    return result["decode_seconds"] / len(result["step_seconds"])


def _agreement(rounds: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Returns the share of positions with the same most probable token."""
    pairs = [
        pair
        for result, expected in zip(rounds, reference, strict=True)
        for pair in zip(result["best"], expected["best"], strict=True)
    ]
    return sum(token == expected for token, expected in pairs) / len(pairs)


def loss_figures(losses: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Returns the mean loss of each format, and its increase over that of the plugin's 16 bits, which are vLLM's.

    The standard error of the increase is that of the mean difference of the same tokens.
    """
    base = next((np.array(nats) for name, nats in losses.items() if PRECISIONS.get(name) == 16), None)
    points = {}
    for name, nats in losses.items():
        points[name] = {"nats": float(np.mean(nats))}
        if base is not None:
            difference = np.array(nats) - base
            points[name] |= {
                "increase": float(difference.mean() / base.mean()),
                "increase_error": float(difference.std() / np.sqrt(len(difference)) / base.mean()),
            }
    return points


def rivals(limit: Runs, losses: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Returns for each of llama.cpp's files the fastest of the plugin's configurations at no more loss.

    No more: the mean difference of the same tokens is at most twice its standard error. Gated configurations, whose
    loss is not measured here, are left out.
    """
    complete = ran(limit)
    measured = {PRECISIONS[name]: np.array(nats) for name, nats in losses.items() if name in PRECISIONS}
    pairs = {}
    for peer in (name for name in FORMATS if name in complete and name in losses):
        able = []
        for name in (name for name in complete if name in PRECISIONS and name != "adapmoe-gated"):
            more = measured[PRECISIONS[name]] - np.array(losses[peer])
            if more.mean() <= 2 * more.std() / np.sqrt(len(more)):
                able.append(name)
        if able:
            best = min(able, key=lambda name: median(map(token_seconds, complete[name])))
            ours, theirs = ([{"speed": 1 / token_seconds(run)} for run in complete[name]] for name in (best, peer))
            pairs[peer] = {"fastest": best, "ratio": ratios(ours, theirs, "speed")}
    return pairs


def floor(limit: Runs, moved: list[float], bandwidth: list[float]) -> dict[str, Any]:
    """Returns the minimum seconds per token in 16 bits, moving and then computing, and how each contender compares.

    Prefetch can overlap both: `overlapped_ms_per_token` is the longer of the two. Computing is the decode time of the
    plugin on demand with LRU, minus its stalls: it makes no predictions and reads nothing in the background.

    Args:
        limit: the runs, among them those of `adapmoe-lru`.
        moved: bytes per token that Belady's cache would move, in each round.
        bandwidth: bytes per second of sequential reads, in each round.
    """
    compute = [
        (result["decode_seconds"] - result["cache"]["stall_seconds"]) / len(result["step_seconds"])
        for result in limit.rounds["adapmoe-lru"]
    ]
    moving = [nbytes / speed for nbytes, speed in zip(moved, bandwidth, strict=True)]
    floors = [sum(parts) for parts in zip(moving, compute, strict=True)]
    return {
        "belady_bytes_per_token": spread(moved),
        "sequential_bytes_per_second": spread(bandwidth),
        "compute_ms_per_token": spread([1e3 * seconds for seconds in compute]),
        "ms_per_token": spread([1e3 * seconds for seconds in floors]),
        "overlapped_ms_per_token": spread([1e3 * max(parts) for parts in zip(moving, compute, strict=True)]),
        "times_floor": {
            name: spread([token_seconds(result) / least for result, least in zip(rounds, floors, strict=True)])
            for name, rounds in ran(limit).items()
        },
    }
