"""Repeats requests of a soak one at a time and compares their tokens; a difference should be a near-tie."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.server import Server
from benchmarks.soak_traffic import Traffic

ALTERNATIVES = 5
CHANCE = 0.01
"""Significance level: more differing replays than with stock vLLM count as a failure below this probability."""


@dataclass(frozen=True)
class Difference:
    """First position at which a replay gave another token."""

    number: int
    position: int
    gap: float
    """Log probability of the replay's token minus that of the soak's token, in the replay, nats; near 0 for a tie."""
    at_least: bool
    """Whether `gap` is only a lower bound, since the soak's token is not among the replay's most probable tokens."""


def spread_out(numbers: Iterable[int], count: int) -> list[int]:
    """Returns at most `count` of these numbers, evenly spread."""
    ordered = sorted(numbers)
    if len(ordered) <= count:
        return ordered
    return [ordered[index * len(ordered) // count] for index in range(count)]


def difference(
    number: int, answered: list[int], replayed: list[int], top_logprobs: list[dict[str, float]]
) -> Difference | None:
    """Returns the first difference between two answers; None if they are equal.

    Args:
        number: number of the request.
        answered: token ids of the soak's answer.
        replayed: token ids of the replay.
        top_logprobs: log probabilities of the most probable tokens by `token_id:N`, for each position of the replay.
    """
    pairs = enumerate(zip(answered, replayed, strict=True))
    position = next((position for position, (token, repeated) in pairs if token != repeated), None)
    if position is None:
        return None
    choices = top_logprobs[position]
    chosen = choices[f"token_id:{replayed[position]}"]
    before = choices.get(f"token_id:{answered[position]}")
    return Difference(number, position, chosen - (min(choices.values()) if before is None else before), before is None)


def replay(server: Server, traffic: Traffic, tokens: dict[int, list[int]], count: int) -> dict[str, Any]:
    """Repeats requests one at a time, without using the prefix cache left by the soak, and counts differences."""
    differences = []
    compared = 0
    chosen = spread_out(tokens, count)
    for number in tqdm(chosen, desc=f"Replaying, {server.name}", unit="request"):
        body = json.loads(traffic.ask(number).body) | {"stream": False}
        extra = {"logprobs": ALTERNATIVES, "return_tokens_as_token_ids": True, "cache_salt": f"replay {number}"}
        choice = server.complete(**(body | extra))["choices"][0]
        first = difference(number, tokens[number], choice["token_ids"], choice["logprobs"]["top_logprobs"])
        compared += len(tokens[number]) if first is None else first.position + 1
        if first is not None:
            differences.append(first)
    gaps = [first.gap for first in differences]
    return {
        "replayed": len(chosen),
        "equal": len(chosen) - len(differences),
        "tokens_compared": compared,
        "largest_gap_nats": max(gaps, default=0.0),
        "median_gap_nats": median(gaps) if gaps else 0.0,
        "differences": [asdict(first) for first in differences],
    }


def chance_of_as_many(ours: dict[str, Any], stock: dict[str, Any]) -> float:
    """Returns the probability that at least as many of our replays differ, if both servers' differ equally often
    (Fisher's exact test)."""
    total = ours["replayed"] + stock["replayed"]
    differing = total - ours["equal"] - stock["equal"]
    replayed = ours["replayed"]
    differing_ours = replayed - ours["equal"]
    ways = sum(
        comb(differing, count) * comb(total - differing, replayed - count)
        for count in range(differing_ours, min(differing, replayed) + 1)
        if replayed - count <= total - differing
    )
    return ways / comb(total, replayed)
