"""Compares orders in which a loaded server may run its requests, by replay (`request_order`)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.request_order import ORDERS, ReplaySpec, compare
from benchmarks.request_routing import record_routing
from benchmarks.workload import ratios
from vllm_adapmoe.results import spread

LENGTH = 128
"""Tokens of an excerpt: the longest prompt and answer."""
FRACTIONS = (0.5, 0.25)
LOADS = ((16, 64), (64, 256))
"""Seats and clients."""
TOKENS_PER_SEAT = 2000
SHOWN = ("tokens_per_second", "tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms", "ttft_p99_ms")


@dataclass(frozen=True)
class ScheduleSpec:
    """Models and machines to replay."""

    model: Path
    """Checkpoint folder."""
    text: Path | None
    """Folder of `*.txt`, one file per kind of requests; None: the bundled held-out text."""
    load_ms: float
    """Milliseconds of one expert fetch."""
    layer_ms: float
    """Milliseconds of computing of a layer."""
    rounds: int


def run_schedule(spec: ScheduleSpec) -> dict[str, Any]:
    """Records the routing once, and replays every order with every cache size and load."""
    routing = record_routing(spec.model, spec.text, LENGTH)
    points = []
    for fraction in FRACTIONS:
        for seats, clients in tqdm(LOADS, desc=f"{fraction:.0%} resident", unit="load"):
            replayed = ReplaySpec(
                fraction=fraction, seats=seats, clients=clients, load_seconds=spec.load_ms / 1e3,
                layer_seconds=spec.layer_ms / 1e3, prompt_tokens=(16, 64), answer_tokens=(32, 64),
                tokens=TOKENS_PER_SEAT * seats,
            )  # fmt: skip
            figures = compare(replayed, routing, spec.rounds)
            orders = {
                name: {key: spread([one[key] for one in rounds]) for key in rounds[0]}
                | {"of_vllm_order": {key: ratios(rounds, figures["vllm_order"], key) for key in SHOWN}}
                for name, rounds in figures.items()
            }
            points.append(asdict(replayed) | {"orders": orders})
    return {"benchmark": "schedule", "model": str(spec.model), "rounds": spec.rounds, "points": points}


def print_schedule(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(title=f"Orders of requests, {result['model']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("resident", "seats", "clients", "order", "tok/s", "of vLLM's", "TPOT 50", "99", "TTFT 50", "99")
    for column in columns:
        table.add_column(column, justify="left" if column == "order" else "right", no_wrap=True)
    for point in result["points"]:
        for name in ORDERS:
            order = point["orders"][name]
            ratio = order["of_vllm_order"]
            table.add_row(
                f"{point['fraction']:.0%}", str(point["seats"]), str(point["clients"]), name,
                f"{order['tokens_per_second']['median']:.0f}",
                *(f"{ratio[key]['median']:.2f}" for key in SHOWN),
            )  # fmt: skip
    console.print(table)
    console.print("TPOT, TTFT: relative to vLLM's order, p50 and p99.")
