"""The least that a load could take over a link: what any cache with these slots would have had to move."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_adapmoe.bench.record import spread
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import belady
from vllm_adapmoe.simulate.trace import Step, TraceInfo, read_trace


def least_bytes(info: TraceInfo, steps: Sequence[Step], slots: int) -> float:
    """Bytes that any eviction would have to move for these steps, whatever was resident before the first.

    Belady's cache, without all of a layer's experts having to be there at once, less one fill of the slots.
    """
    pools = slots_of_pools(info, slots)
    moved = float(belady(info, steps, pools, atomic=False) @ np.array(info.expert_bytes))
    return max(0.0, moved - sum(pools) * max(info.expert_bytes))


def bound(
    trace: Path, slots: int, run: dict[str, float], rounds: list[dict[str, float]], link: float | None
) -> dict[str, float]:
    """What a load that was recorded says of the loads that were timed.

    Args:
        trace: of a server's whole life.
        slots: of the cache.
        run: figures of the load that was recorded, with the time it `started`.
        rounds: of the same load without recording.
        link: bytes per second; None: as fast as the recorded run fetched.

    Returns:
        `bound_tokens_per_second`: the link moves what it must and nothing else takes time.
        `bound_with_compute_tokens_per_second`: or computing, all that is not waiting for experts, if that takes longer.
        `one_after_the_other_tokens_per_second`: first moving, then computing.
    """
    info, steps = read_trace(trace)
    inside = [step for step in steps if run["started"] <= step.seconds]
    tokens = run["output_tokens"]
    bandwidth = link or run["fetched_bytes"] / max(run["fetch_seconds"], 1e-9)
    least = least_bytes(info, inside, slots) / tokens
    moving = least / bandwidth
    compute = spread([(one["seconds"] - one["stall_seconds"]) / one["output_tokens"] for one in rounds])["median"]
    measured = spread([one["output_tokens_per_second"] for one in rounds])["median"]
    return {
        "steps": len(inside),
        "slots": slots,
        "link_bytes_per_second": bandwidth,
        "least_bytes_per_output_token": least,
        "moved_bytes_per_output_token": run["fetched_bytes_per_output_token"],
        "compute_ms_per_output_token": 1e3 * compute,
        "bound_tokens_per_second": 1 / moving if moving else float("inf"),
        "bound_with_compute_tokens_per_second": 1 / max(moving, compute),
        "one_after_the_other_tokens_per_second": 1 / (moving + compute),
        "measured_tokens_per_second": measured,
    }
