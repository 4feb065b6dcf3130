"""Computes a lower bound on the time of a load over a link: bytes that any cache with these slots has to move."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.serve_load import WARM_TOKENS, Load, measure
from benchmarks.server import Server
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import belady
from vllm_adapmoe.simulate.trace import FRAME_STEPS, Step, TraceInfo
from vllm_adapmoe.simulate.trace_file import read_trace


def least_bytes(info: TraceInfo, steps: Iterable[Step], slots: int) -> float:
    """Returns the bytes that any eviction policy has to move for these steps, whatever was resident before.

    This is Belady's cache without requiring all experts of a layer to be resident at once, minus one fill of the slots.
    """
    pools = slots_of_pools(info, slots)
    moved = float(belady(info, steps, pools, atomic=False) @ np.array(info.expert_bytes))
    return max(0.0, moved - sum(pools) * max(info.expert_bytes))


def recording(config: dict[str, Any] | None, trace: Path) -> dict[str, Any]:
    """Returns the configuration of a server that records its routing."""
    return (config or {}) | {"trace_out": str(trace), "trace_mib": 4096}


def record(server: Server, load: Load) -> dict[str, float]:
    """Measures one load on a recording server; returns figures and `slots`. The trace is complete on return."""
    with server:
        run = measure(server, load)
        for _ in range(FRAME_STEPS // WARM_TOKENS + 1):  # a frame is written when it is full
            server.complete(prompt=load.prompts[0][1][:1], max_tokens=WARM_TOKENS, ignore_eos=True)
        return run | {"slots": server.metrics()["vllm:adapmoe_slots"]}


def bound(
    trace: Path, run: dict[str, float], rounds: list[dict[str, float]], link_gbps: float | None
) -> dict[str, Any]:
    """Computes upper bounds of throughput for the timed rounds from a recorded load.

    Args:
        trace: trace of the recording server from start to end.
        run: result of `record`.
        rounds: figures of the same load without recording.
        link_gbps: link bandwidth, 1e9 bytes per second; None: the bandwidth of the recorded run's fetches.

    Returns:
        `bound_tokens_per_second`: the link moves the minimum bytes and nothing else takes time (None: nothing to move).
        `bound_with_compute_tokens_per_second`: limited by the link or by computing (all time but stalls), the longer.
        `one_after_the_other_tokens_per_second`: moving and computing do not overlap.
    """
    info, steps = read_trace(trace)

    def timed() -> Iterator[Step]:
        return (step for step in steps if run["started"] <= step.seconds <= run["ended"])

    tokens = run["output_tokens"]
    bandwidth = run["fetched_bytes"] / max(run["fetch_seconds"], 1e-9) if link_gbps is None else link_gbps * 1e9
    min_bytes = least_bytes(info, timed(), int(run["slots"])) / tokens
    moving = min_bytes / bandwidth if min_bytes else 0.0
    compute = median([(figures["seconds"] - figures["stall_seconds"]) / figures["output_tokens"] for figures in rounds])
    return {
        "steps": sum(1 for _ in timed()),
        "slots": run["slots"],
        "link_bytes_per_second": bandwidth,
        "least_bytes_per_output_token": min_bytes,
        "moved_bytes_per_output_token": run["fetched_bytes_per_output_token"],
        "compute_ms_per_output_token": 1e3 * compute,
        "bound_tokens_per_second": 1 / moving if moving else None,
        "bound_with_compute_tokens_per_second": 1 / max(moving, compute),
        "one_after_the_other_tokens_per_second": 1 / (moving + compute),
        "measured_tokens_per_second": median([figures["output_tokens_per_second"] for figures in rounds]),
    }
