"""Replays traces with other values of the constants of eviction, one at a time.

    python -m examples.eviction_constants /tmp/batch1.trace /tmp/batch8.trace -o constants.json

Traces are made by `examples/record_trace.py`, with a profile.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.eviction import NextToken, NextUse
from vllm_adapmoe.results import write
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace_file import read_trace

RESIDENT = (0.25, 0.5, 0.75)
VALUES = [(NextToken, "SHARE", value) for value in (0.3, 0.7, 0.85, 1.0)] + [
    (policy, name, value)
    for policy in (NextUse, NextToken)
    for name, values in (("SLOW", (0.02, 0.1)), ("WEIGHT", (0.0, 0.05, 0.3)))
    for value in values
]
"""Policy, constant, and value to try."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    points = []
    with tqdm(total=len(args.traces) * len(RESIDENT) * (len(VALUES) + 2), desc="Replaying", unit="replay") as bar:
        for trace in args.traces:
            info, steps = read_trace(trace)

            def fetched(policy: type[NextUse], resident: float, info=info, steps=steps) -> float:
                slots = slots_of_pools(info, round(resident * sum(info.num_experts)))
                bar.update()
                return replay(info, steps, CacheSetup(slots, "next_token"), eviction=policy).stats["fetched_bytes"]

            for resident in RESIDENT:
                base = {policy: fetched(policy, resident) for policy in (NextUse, NextToken)}
                for policy, name, value in VALUES:
                    ratio = fetched(type("Changed", (policy,), {name: value}), resident) / base[policy]
                    points.append(
                        {"trace": trace.name, "resident": resident, "policy": policy.__name__, "constant": name}
                        | {"value": value, "default": getattr(policy, name), "bytes_ratio": ratio}
                    )
    table = Table(title="Bytes fetched, over those with the default, 25 / 50 / 75 % resident")
    for column in ("policy", "constant", *[trace.name for trace in args.traces]):
        table.add_column(column)
    for policy, name, value in VALUES:
        row = policy.__name__, name, value
        ratios = [each["bytes_ratio"] for each in points if (each["policy"], each["constant"], each["value"]) == row]
        cells = [ratios[start : start + len(RESIDENT)] for start in range(0, len(ratios), len(RESIDENT))]
        table.add_row(
            policy.__name__, f"{name} {value:g}", *(" / ".join(f"{ratio:.2f}" for ratio in cell) for cell in cells)
        )
    Console().print(table)
    if args.output is not None:
        write(args.output, {"simulation": "eviction constants", "model": info.model, "points": points})


if __name__ == "__main__":
    main()
