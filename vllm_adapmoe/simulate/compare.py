"""Compares cache policies on a trace: loads, prefetches, stalls and tokens/s, relative to the optimal cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.eviction import POLICIES
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.simulate.baselines import SIMULATED
from vllm_adapmoe.simulate.replay import belady, replay
from vllm_adapmoe.simulate.trace import Steps, TraceInfo
from vllm_adapmoe.simulate.trace_file import read_trace
from vllm_adapmoe.simulate.virtual_link import Machine

ALLOCATIONS = ("pool", "uniform", "profile", "trace")


@dataclass(frozen=True)
class PolicyName:
    """`EVICTION[/ALLOCATION][+prefetch]`, such as `lru`, `lru/uniform` or `next_use+prefetch`."""

    eviction: str
    allocation: str
    prefetch: bool

    @classmethod
    def parse(cls, text: str) -> "PolicyName":
        """Parses the name of a policy.

        Raises:
            AdapMoEError: `text` does not name a policy.
        """
        policy, plus, tail = text.partition("+")
        eviction, _, allocation = policy.partition("/")
        name = cls(eviction, allocation or "pool", tail == "prefetch")
        if eviction not in SIMULATED or name.allocation not in ALLOCATIONS or (plus and not name.prefetch):
            raise AdapMoEError(
                f"--policies {text!r} is not known; use EVICTION[/ALLOCATION][+prefetch], EVICTION one of "
                f"{', '.join(SIMULATED)}, ALLOCATION one of {', '.join(ALLOCATIONS)}"
            )
        return name


def slots_of_pools(info: TraceInfo, slots: int) -> list[int]:
    """Divides slots among the pools in proportion to their experts."""
    experts = [0] * (max(info.pool_of) + 1)
    for pool, count in zip(info.pool_of, info.num_experts, strict=True):
        experts[pool] += count
    return [slots * count // sum(experts) for count in experts]


def run_simulate(
    trace: Path,
    shares: Sequence[float],
    policies: Sequence[str],
    machine: Machine,
    lookahead: int,
    max_experts: int,
    profile: Path | None,
    host: float | None = None,
    device_tokens: int = 0,
) -> dict[str, Any]:
    """Replays a trace for every number of slots and policy.

    Args:
        trace: file written by `trace_out`.
        shares: slots; values up to 1 are fractions of all experts, others are counts.
        policies: names of policies, see `PolicyName`.
        machine: speed of link and compute; without bandwidth, only loads are counted.
        lookahead: layers ahead to prefetch for, in policies with prefetch.
        max_experts: maximum prefetches in flight, in policies with prefetch.
        profile: profile for `profile` allocation.
        host: experts whose records host memory holds; up to 1, a fraction of all experts; None: all.
        device_tokens: maximum tokens of a step that a GPU decides; 0: the host decides in every step.

    Raises:
        AdapMoEError: not a trace, an unknown policy or one that a GPU does not run, a trace without the predictions it
            needs, or too few slots.
    """
    names = [PolicyName.parse(text) for text in policies]
    if device_tokens:
        _check_device(policies, names, host)
    info, steps = read_trace(trace)
    total = sum(info.num_experts)
    if host is not None:
        machine = replace(machine, host_records=round(host * total) if host <= 1 else int(host))
    if any(name.eviction == "next_token" for name in names) and not any(step.expected for step in steps):
        raise AdapMoEError(
            f"--policies next_token: the trace {str(trace)!r} has no predictions by next-token heads; record "
            "it with a profile that has heads"
        )
    if any(name.prefetch for name in names) and lookahead > info.lookahead:
        raise AdapMoEError(
            f"--lookahead {lookahead}: the trace {str(trace)!r} has predictions for {info.lookahead} layers ahead; "
            f"record it with prefetch.lookahead={lookahead}"
        )
    curves = None
    if any(name.allocation == "profile" for name in names):
        if profile is None:
            raise AdapMoEError("--policies with /profile need --profile; name the file that `adapmoe calibrate` wrote")
        curves = [curve.tolist() for curve in curves_of_profile(ModelProfile.load(str(profile)), 0.0, max_experts)]
    points = []
    with tqdm(desc="Replaying", total=len(shares) * (len(names) + 2), unit="replay") as bar:
        for share in shares:
            count = round(share * total) if share <= 1 else int(share)
            slots = slots_of_pools(info, count)
            if min(slots) < info.top_k:
                raise AdapMoEError(
                    f"--slots {share:g} gives a pool {min(slots)} slots, too few for the {info.top_k} experts of a "
                    "token; give more"
                )
            optimum: dict[str, int] = {}
            for key, atomic in (("oracle", True), ("bound", False)):
                loads = belady(info, steps, slots, atomic)
                optimum |= {f"{key}_loads": int(loads.sum()), f"{key}_bytes": int(loads @ np.array(info.expert_bytes))}
                bar.update()
            for text, name in zip(policies, names, strict=True):
                setup = CacheSetup(
                    slots,
                    name.eviction,
                    name.allocation,
                    curves,
                    lookahead if name.prefetch else 0,
                    max_experts,
                )
                point = _point(info, steps, setup, machine, device_tokens)
                points.append({"slots": count, "policy": text} | optimum | point)
                bar.update()
    tokens = sum(len(step.positions) for step in steps)
    return {
        "simulation": "replay",
        "trace": str(trace),
        "model": info.model,
        "experts": total,
        "steps": len(steps),
        "tokens": tokens,
        "machine": vars(machine),
        "lookahead": lookahead,
        "max_experts": max_experts,
        "decode": "device" if device_tokens else "host",
        "points": points,
    }


def _check_device(policies: Sequence[str], names: Sequence[PolicyName], host: float | None) -> None:
    """Refuses what the host decides in a server, too.

    Raises:
        AdapMoEError: there is such a setting.
    """
    if host is not None:
        raise AdapMoEError("--decode device copies all experts from host memory; leave out --host")
    for text, name in zip(policies, names, strict=True):
        if name.allocation == "trace" or (name.prefetch and name.eviction not in POLICIES):
            raise AdapMoEError(f"--decode device does not run the policy {text!r}; leave it out of --policies")


def _point(info: TraceInfo, steps: Steps, setup: CacheSetup, machine: Machine, device_tokens: int) -> dict[str, Any]:
    result = replay(info, steps, setup, machine, SIMULATED[setup.eviction], device_tokens=device_tokens)
    stats = result.stats
    useful = stats["prefetch_hits"] + stats["late"]
    missing = useful + result.demand_loads
    return {
        "demand_loads": result.demand_loads,
        "predicted_loads": result.predicted_loads,
        "late": stats["late"],
        "prefetches": stats["prefetches"],
        "prefetch_precision": useful / stats["prefetches"] if stats["prefetches"] else None,
        "prefetch_recall": useful / missing if missing else 1.0,
        "fetched_bytes": stats["fetched_bytes"],
        "host_hit_rate": stats["host_hits"] / fetches
        if (fetches := stats["host_hits"] + stats["host_misses"])
        else None,
        "wasted_bytes": stats["wasted_bytes"],
        "stall_seconds": stats["stall_seconds"],
        "tokens_per_second": result.tokens / result.seconds if result.seconds else None,
    }


def print_simulate(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    timed = result["machine"]["bandwidth"] is not None
    table = Table(
        title=f"Replay of {result['steps']} steps, {result['tokens']} tokens, {result['experts']} experts",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    tiered = result["machine"].get("host_records") is not None
    columns = ["slots", "policy", "demand", "of oracle", "bytes", "wasted", "precision", "recall"]
    for column in columns + (["in host"] if tiered else []) + (["stall", "tok/s"] if timed else []):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for point in result["points"]:
        oracle, moved = max(1, point["oracle_loads"]), max(1, point["fetched_bytes"])
        row = [
            str(point["slots"]),
            point["policy"],
            str(point["demand_loads"]),
            f"{point['demand_loads'] / oracle:.2f}",
            f"{point['fetched_bytes'] / max(1, point['oracle_bytes']):.2f}",
            f"{point['wasted_bytes'] / moved:.1%}",
            "-" if point["prefetch_precision"] is None else f"{point['prefetch_precision']:.0%}",
            f"{point['prefetch_recall']:.0%}",
        ]
        if tiered:
            row.append("-" if point["host_hit_rate"] is None else f"{point['host_hit_rate']:.0%}")
        if timed:
            row += [f"{point['stall_seconds']:.1f}", f"{point['tokens_per_second']:.1f}"]
        table.add_row(*row)
    console.print(table)
    console.print(
        "of oracle, bytes: demand loads and bytes moved, relative to Belady's with the same slots and no prefetch; "
        "precision: share of prefetches that were used; recall: share of misses for which a prefetch had begun"
        + ("; in host: share of fetches whose record was in host memory" if tiered else "")
    )


def plot_simulate(result: dict[str, Any], path: Path) -> None:
    """Plots the bytes moved, relative to the oracle's, against slots, and tokens/s if time was simulated."""
    from vllm_adapmoe.plot import figure

    timed = result["machine"]["bandwidth"] is not None
    with figure(path, "slots", "bytes moved, of Belady's", columns=1 + timed) as drawn:
        axes = drawn[0] if timed else [drawn]
        for number, policy in enumerate(dict.fromkeys(point["policy"] for point in result["points"])):
            style = ("o-", "s--", "^:")[number // 10 % 3]  # matplotlib cycles through ten colours
            points = [point for point in result["points"] if point["policy"] == policy]
            slots = [point["slots"] for point in points]
            ratio = [point["fetched_bytes"] / max(1, point["oracle_bytes"]) for point in points]
            axes[0].plot(slots, ratio, style, label=policy)
            if timed:
                axes[1].plot(slots, [point["tokens_per_second"] for point in points], style, label=policy)
        if timed:
            axes[1].set_ylabel("tokens/s")
        axes[0].legend(fontsize=7)
