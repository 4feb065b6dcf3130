"""Replays traces with a part of the experts in host memory (`host_gb`): how many fetches find theirs there.

    python -m examples.host_tier /tmp/batch1.trace /tmp/batch8.trace -o host_tier.json

Compares the product's rule, which keeps what is fetched most often, with LRU and with other values of its constant.
Traces are made by `examples/record_trace.py`.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_adapmoe.experts import ExpertKey
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.host_tier import HostTier
from vllm_adapmoe.results import write
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import replay
from vllm_adapmoe.simulate.trace_file import read_trace
from vllm_adapmoe.simulate.virtual_link import Machine

IN_SLOTS = (0.25, 0.5)
IN_HOST = (0.25, 0.5, 0.75)


class Recent(HostTier):
    """LRU: the value of a record is the time of its last fetch."""

    def __init__(self, num_cells: int, layers: int, experts: int) -> None:
        super().__init__(num_cells, layers, experts)
        self._time = 0

    def _count(self, key: ExpertKey) -> None:
        self._time += 1
        self.counts[key] = self._time
        cell = self._cell_of.get(key)
        if cell is not None:
            self._values[cell] = self._time


RULES = {
    "most fetched": HostTier,
    "LRU": Recent,
    "halved after 8": type("Halved8", (HostTier,), {"HALVING": 8}),
    "never halved": type("NeverHalved", (HostTier,), {"HALVING": np.inf}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    points = []
    with tqdm(total=len(args.traces) * len(IN_SLOTS) * len(IN_HOST) * len(RULES), desc="Replaying") as bar:
        for trace in args.traces:
            info, steps = read_trace(trace)
            experts = sum(info.num_experts)
            for in_slots in IN_SLOTS:
                for in_host in IN_HOST:
                    point = {"trace": trace.name, "model": info.model, "in_slots": in_slots, "in_host": in_host}
                    for name, rule in RULES.items():
                        machine = Machine(host_records=round(in_host * experts))
                        setup = CacheSetup(slots_of_pools(info, round(in_slots * experts)), "next_use")
                        stats = replay(info, steps, setup, machine, tier=rule).stats
                        point[name] = stats["host_hits"] / (stats["host_hits"] + stats["host_misses"])
                        bar.update()
                    points.append(point)
    table = Table(title="Share of fetches whose record is in host memory")
    for column in ("trace", "in slots", "in host memory", *RULES):
        table.add_column(column, justify="left" if column == "trace" else "right")
    for point in points:
        shares = (f"{point['in_slots']:.0%}", f"{point['in_host']:.0%}", *(f"{point[name]:.3f}" for name in RULES))
        table.add_row(point["trace"], *shares)
    Console().print(table)
    if args.output is not None:
        write(args.output, {"simulation": "host_tier", "points": points})


if __name__ == "__main__":
    main()
