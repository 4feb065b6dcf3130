"""Says when speculative decoding pays while experts are offloaded: bytes fetched per output token, by replay.

A step that verifies k draft tokens has 1 + k rows for a request. They use more distinct experts than one row, and give
one token and the accepted drafts. Consecutive positions of a routing trace stand for the rows; acceptance is drawn,
draft by draft. A rejected draft is another token than the one that follows, with a routing that no trace has: at best
it uses the experts of that token, which the next step needs; at worst those of an unrelated token of the same request.

A layer that drafts (MTP) has experts, too. What keeping them resident costs is told by giving the last layer of the
trace that place: the other layers then share the remaining slots.

    python -m examples.record_trace examples/tiny_mixtral/model examples/tiny_mixtral/heldout /tmp/trace --batch 8
    python -m examples.speculation /tmp/trace -o examples/benchmarks/speculation_tiny_mixtral.json
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.results import write
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace import Step, Steps, TraceInfo
from vllm_adapmoe.simulate.trace_file import read_trace

DRAFTS = (1, 2, 3, 4)
ACCEPTANCE = (0.5, 0.7, 0.9)
BATCHES = (1, 8)
RESIDENT = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Routing:
    """Routing of one request, in order of its positions."""

    ids: np.ndarray
    """Integer `[layers, positions, top_k]`."""
    weights: np.ndarray
    """Float16 `[layers, positions, top_k]`."""

    def __len__(self) -> int:
        return self.ids.shape[1]


def routing_of_requests(steps: Steps) -> list[Routing]:
    """Returns the routing of each request of a trace without speculative decoding."""
    rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for step in steps:
        for row, name in enumerate(step.requests):
            rows[name].append((step.ids[:, row], step.weights[:, row]))
    return [Routing(*(np.stack(part, axis=1) for part in zip(*request, strict=True))) for request in rows.values()]


def speculate(
    requests: Sequence[Routing], batch: int, drafts: int, acceptance: float, unrelated: bool
) -> tuple[list[Step], int]:
    """Decodes all requests with `drafts` draft tokens in every step of a request, `batch` requests at a time.

    Args:
        requests: routing of every request.
        batch: requests in a step.
        drafts: draft tokens of each request in a step.
        acceptance: chance that a draft is accepted if all before it are.
        unrelated: whether rejected drafts are routed like a random token of the request; else like the right token.

    Returns:
        The steps, and the number of tokens that they output.
    """
    random = np.random.default_rng(0)
    waiting, running = list(reversed(requests)), []
    steps, output = [], 0
    names = 0
    while waiting or running:
        while waiting and len(running) < batch:
            running.append((f"request-{names}", waiting.pop(), 0))
            names += 1
        parts, following = [], []
        for name, routing, start in running:
            stop = min(start + 1 + drafts, len(routing))
            rejected = np.flatnonzero(random.random(stop - start - 1) >= acceptance)
            accepted = int(rejected[0]) if len(rejected) else stop - start - 1
            output += 1 + accepted
            rows = np.arange(start, stop)
            if unrelated:
                rows[1 + accepted :] = random.integers(len(routing), size=stop - start - 1 - accepted)
            parts.append((name, routing, rows))
            if start + 1 + accepted < len(routing):
                following.append((name, routing, start + 1 + accepted))
        running = following
        steps.append(_step(parts))
    return steps, output


def _step(parts: Sequence[tuple[str, Routing, np.ndarray]]) -> Step:
    return Step(
        seconds=0.0,
        requests=[name for name, _, rows in parts for _ in rows],
        positions=np.concatenate([rows[0] + np.arange(len(rows)) for *_, rows in parts]),
        ids=np.concatenate([routing.ids[:, rows] for _, routing, rows in parts], axis=1),
        weights=np.concatenate([routing.weights[:, rows] for _, routing, rows in parts], axis=1),
        predicted={},
        drafted=np.concatenate([np.arange(len(rows)) > 0 for *_, rows in parts]),
    )


def measure(
    info: TraceInfo,
    requests: Sequence[Routing],
    slots: Sequence[int],
    batch: int,
    drafts: int = 0,
    acceptance: float = 0.0,
    unrelated: bool = False,
) -> dict[str, Any]:
    """Replays one way to decode the requests (`speculate`); returns its cost per step and per output token."""
    steps, output = speculate(requests, batch, drafts, acceptance, unrelated)
    stats = replay(info, steps, CacheSetup(slots, "next_use")).stats
    turns = sum(len(set(step.requests)) for step in steps)
    return {
        "tokens_per_turn": output / turns,
        "experts_per_event": (stats["hits"] + stats["misses"]) / len(steps) / len(info.num_experts),
        "bytes_per_step": stats["fetched_bytes"] / len(steps),
        "bytes_per_token": stats["fetched_bytes"] / output,
    }


def compare(info: TraceInfo, requests: Sequence[Routing], resident: float) -> list[dict[str, Any]]:
    """Replays every number of drafts, acceptance and batch, and compares each with the same batch without drafts.

    `bytes_ratio`: bytes per token relative to no drafts, with rejected drafts at best and at worst. `pays_below`, at
    worst: speculative decoding pays while, without it, fetches take less than this share of the time; 1: always. A
    step's time without fetches is taken not to depend on its rows, as where reading weights is what takes it.
    """
    slots = slots_of_pools(info, round(resident * sum(info.num_experts)))
    ways = [(drafts, acceptance) for drafts in DRAFTS for acceptance in ACCEPTANCE]
    points = []
    with tqdm(desc="Replaying", total=len(BATCHES) * (1 + len(ways)), unit="replay") as bar:
        for batch in BATCHES:
            alone = measure(info, requests, slots, batch)
            points.append({"batch": batch, "drafts": 0} | alone)
            bar.update()
            for drafts, acceptance in ways:
                way = {"batch": batch, "drafts": drafts, "acceptance": acceptance}
                best, worst = (measure(info, requests, slots, **way, unrelated=worst) for worst in (False, True))
                ratios = [point["bytes_per_token"] / alone["bytes_per_token"] for point in (best, worst)]
                saved = 1 - 1 / worst["tokens_per_turn"]
                pays_below = saved / (saved + max(0.0, ratios[1] - 1))
                points.append(way | worst | {"bytes_ratio": ratios, "pays_below": pays_below})
                bar.update()
    return points


def resident_drafter(info: TraceInfo, steps: Steps, batch: int) -> list[dict[str, Any]]:
    """Compares two caches for a model whose last layer drafts: its experts share the slots, or stay resident.

    Args:
        info: of a trace whose layers share a pool.
        steps: the trace.
        batch: requests in a step of the trace.

    Returns:
        For each share of resident experts that leaves the other layers slots for a token, bytes fetched if they share,
        relative to staying resident.
    """
    first = slice(-1)
    target = replace(
        info,
        num_experts=info.num_experts[first],
        pool_of=info.pool_of[first],
        expert_bytes=info.expert_bytes[first],
    )
    of_target = [replace(step, ids=step.ids[first], weights=step.weights[first], predicted={}) for step in steps]
    points = []
    for resident in RESIDENT:
        slots = round(resident * sum(info.num_experts))
        if slots < info.num_experts[-1] + info.top_k:
            continue
        shared = replay(info, steps, CacheSetup([slots], "next_use")).stats["fetched_bytes"]
        setup = CacheSetup([slots - info.num_experts[-1]], "next_use")
        alone = replay(target, of_target, setup).stats["fetched_bytes"]
        points.append({"batch": batch, "resident": resident, "bytes_ratio": shared / alone})
    return points


def print_points(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(title=f"{result['model']}: {result['resident']:.0%} of {result['experts']} experts resident")
    for column in ("batch", "drafts", "accepted", "tokens", "experts", "bytes", "pays below"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in result["points"]:
        table.add_row(
            str(point["batch"]),
            str(point["drafts"]),
            f"{point['acceptance']:.0%}" if point["drafts"] else "",
            f"{point['tokens_per_turn']:.2f}",
            f"{point['experts_per_event']:.2f}",
            "-".join(f"{ratio:.2f}" for ratio in point["bytes_ratio"]) if point["drafts"] else "1",
            f"{point['pays_below']:.0%}" if point["drafts"] else "",
        )
    console.print(table)
    console.print(
        "bytes: fetched per token, relative to no drafts, with rejected drafts at best-at worst; pays below: share of "
        "the time without drafts that fetches may take for drafts to pay, at worst"
    )
    for point in result["drafter"]:
        console.print(
            f"the last layer drafts, batch {point['batch']}, {point['resident']:.0%} resident: if its experts share "
            f"the slots, {point['bytes_ratio']:.3f} of the bytes that are fetched if they stay resident"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="trace of any model, recorded without speculative decoding")
    parser.add_argument("--resident", type=float, default=0.5, help="share of the experts that have a slot")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    info, recorded = read_trace(args.trace)
    steps = list(recorded)
    batch = max(len(set(step.requests)) for step in steps)
    requests = routing_of_requests(steps)
    result = {
        "simulation": "speculation",
        "model": info.model,
        "experts": sum(info.num_experts),
        "top_k": info.top_k,
        "resident": args.resident,
        "requests": len(requests),
        "tokens": sum(map(len, requests)),
        "points": compare(info, requests, args.resident),
        "drafter": resident_drafter(info, steps, batch),
    }
    print_points(result, Console())
    if args.output is not None:
        write(args.output, result)


if __name__ == "__main__":
    main()
