"""Replays traces with fewer bits on a miss: experts are fetched narrow, and wide only where they weigh much.

    python -m examples.low_bit_misses examples/tiny_mixtral/model examples/tiny_mixtral/heldout /tmp/batch1.trace \\
        --profile configs/tiny_mixtral.json -o low_bit_misses.json

Compares slots of W bits whose misses are fetched with L bits (written W|L) with slots of W bits throughout, in the same
memory. A fetched record is widened to the slots' format and stays narrow until it is evicted, or until a token needs it
whose weight is above a threshold: then it is fetched again, wide. The loss of each width is measured, every expert
rounded; a mixture is predicted to cost each width's loss by its share of sensitivity times squared weight.

Records count the bits of a GPU's formats: scales of 16 bits for each group, none at 16 bits.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_adapmoe.calibrate.text import read_sequences
from vllm_adapmoe.precision.formats import group_of
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.results import write
from vllm_adapmoe.simulate.trace import Step
from vllm_adapmoe.simulate.trace_file import read_trace

WIDTHS = (16, 8, 4, 3, 2)
PAIRS = ((16, 16), (8, 8), (4, 4), (16, 8), (16, 4), (8, 4), (4, 3), (4, 2))
RESIDENT = (0.1, 0.25, 0.5)
"""Memory for slots, as a share of the bytes of all experts at 16 bits."""
HEAVY = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
"""Thresholds of a token's weight for an expert above which it needs the wide record."""
LIMIT = 0.005
"""Relative loss increase at which bytes are compared."""
SEARCHED = np.linspace(1.0, 0.4, 25)
"""Scales tried for each group, as shares of the one that clips no weight."""


class Event(NamedTuple):
    """Experts of one layer in one step."""

    layer: int
    heaviest: dict[int, float]
    """The largest weight of any token, by expert."""
    squares: dict[int, float]
    """The sum of squared weights, by expert."""


def events_of(steps: Sequence[Step]) -> Iterator[Event]:
    for step in steps:
        for layer, (ids, weights) in enumerate(zip(step.ids, step.weights.astype(np.float64), strict=True)):
            heaviest: dict[int, float] = {}
            squares: dict[int, float] = {}
            for expert, weight in zip(ids.ravel().tolist(), weights.ravel().tolist(), strict=True):
                heaviest[expert] = max(heaviest.get(expert, 0.0), weight)
                squares[expert] = squares.get(expert, 0.0) + weight * weight
            yield Event(layer, heaviest, squares)


class Outcome(NamedTuple):
    wide_loads: int
    narrow_loads: int
    narrow_share: float
    """Of sensitivity times squared weight: the part computed by narrow experts."""


def replay_widths(events: Sequence[Event], sensitivity: Sequence[float], slots: int, heavy: float) -> Outcome:
    """Replays event by event with one pool and LRU eviction.

    Args:
        events: layer by layer, step by step.
        sensitivity: of each layer.
        slots: number of experts that the slots hold.
        heavy: weight above which a token needs the wide record.
    """
    resident: dict[tuple[int, int], bool] = {}  # in the order of use; whether it is wide
    wide_loads = narrow_loads = 0
    narrow = whole = 0.0
    for event in events:
        for expert, weight in event.heaviest.items():
            key = event.layer, expert
            needs = weight > heavy
            was = resident.pop(key, None)
            if was is None or (needs and not was):
                wide_loads, narrow_loads = wide_loads + needs, narrow_loads + (not needs)
                was = needs
            resident[key] = was
            cost = sensitivity[event.layer] * event.squares[expert]
            whole += cost
            narrow += 0.0 if was else cost
        while len(resident) > max(slots, len(event.heaviest)):
            del resident[next(iter(resident))]
    return Outcome(wide_loads, narrow_loads, narrow / whole)


def rounded(weights: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Returns the matrix after rounding to `bits`, in groups with the scale of least squared error; 8 bits by row."""
    values = weights.float()
    groups = values.unflatten(1, (-1, values.shape[1] if bits == 8 else group))
    most = (1 << (bits - 1)) - 1
    least = -most if bits == 8 else -most - 1
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    end = torch.where(high > -low, high, low)
    best = torch.zeros_like(groups)
    error = torch.full_like(end, float("inf"))
    for share in [1.0] if bits == 8 else SEARCHED.tolist():
        scale = (end * (share / least)).to(torch.bfloat16).float()
        tried = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(least, most) * scale
        tried_error = (tried - groups).square().sum(2, keepdim=True)
        best = torch.where(tried_error < error, tried, best)
        error = torch.minimum(error, tried_error)
    return best.reshape(values.shape).to(weights.dtype)


def losses_of_widths(model: Path, text: Path, tokens: int, group: int) -> dict[int, float]:
    """Measures the loss, nats per token, with every routed expert rounded to each width, by stock vLLM."""
    from vllm_adapmoe.integration.measure.engine import Engine
    from vllm_adapmoe.integration.measure.losses import prefill_losses

    sequences = read_sequences(model, text, 256, tokens // 256, seed=0)
    losses = {}
    for bits in tqdm(WIDTHS, desc="Measuring losses", unit="width"):
        with TemporaryDirectory() as temporary:
            folder = Path(shutil.copytree(model, Path(temporary) / "model"))
            for file in folder.glob("*.safetensors") if bits < 16 else ():
                tensors = load_file(file)
                for name, tensor in tensors.items():
                    if ".experts." in name and tensor.dim() == 2:
                        tensors[name] = rounded(tensor, bits, group)
                save_file(tensors, file, {"format": "pt"})
            with Engine(folder, None, enforce_eager=True, max_model_len=257) as engine:
                losses[bits] = float(prefill_losses(engine, sequences).nats.mean())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="held-out text for the losses")
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32_768, help="for the losses")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings = json.loads((args.model / "config.json").read_text())
    inner = settings.get("moe_intermediate_size") or settings["intermediate_size"]
    group = group_of(settings["hidden_size"], inner)
    assert group is not None
    bits_of = {bits: bits if bits == 16 else bits + (0 if bits == 8 else 16 / group) for bits in WIDTHS}
    losses = losses_of_widths(args.model, args.text, args.tokens, group)
    increase = {bits: loss / losses[16] - 1 for bits, loss in losses.items()}
    sensitivity = [layer.sensitivity for layer in ModelProfile.load(args.profile).layers]
    points = []
    for trace in args.traces:
        info, steps = read_trace(trace)
        events, experts = list(events_of(list(steps))), sum(info.num_experts)
        tokens = sum(len(step.positions) for step in steps)
        for resident in tqdm(RESIDENT, desc=trace.name, unit="size"):
            for wide, narrow in PAIRS:
                slots = min(experts, int(resident * experts * 16 / bits_of[wide]))
                for heavy in HEAVY if wide != narrow else HEAVY[:1]:
                    outcome = replay_widths(events, sensitivity, slots, heavy)
                    nbytes = outcome.wide_loads * bits_of[wide] + outcome.narrow_loads * bits_of[narrow]
                    share = outcome.narrow_share
                    points.append(
                        {
                            "trace": trace.name,
                            "resident": resident,
                            "pair": f"{wide}|{narrow}" if wide != narrow else str(wide),
                            "heavy": heavy if wide != narrow else None,
                            "slots": slots,
                            "loads_per_token": (outcome.wide_loads + outcome.narrow_loads) / tokens,
                            "records_of_16_bits_per_token": nbytes / 16 / tokens,
                            "narrow_share": share,
                            "loss_increase": (1 - share) * increase[wide] + share * increase[narrow],
                        }
                    )
    result: dict[str, Any] = {
        "simulation": "low_bit_misses", "model": str(args.model), "group": group, "bits": bits_of,
        "loss_increase_of_widths": increase, "loss_tokens": args.tokens, "limit": LIMIT, "points": points,
    }  # fmt: skip
    print_result(result)
    if args.output is not None:
        write(args.output, result)


def print_result(result: dict[str, Any]) -> None:
    increases = ", ".join(f"{bits} bits {share:+.2%}" for bits, share in result["loss_increase_of_widths"].items())
    Console().print(f"every expert rounded: {increases}")
    points = result["points"]
    pairs = list(dict.fromkeys(point["pair"] for point in points))
    table = Table(title=f"Least bytes fetched within {LIMIT:.1%} of loss, of slots and records of 16 bits")
    for column in ("trace", "memory", *pairs):
        table.add_column(column, justify="left" if column == "trace" else "right")
    for trace, resident in dict.fromkeys((point["trace"], point["resident"]) for point in points):
        here = [point for point in points if (point["trace"], point["resident"]) == (trace, resident)]
        whole = next(point["records_of_16_bits_per_token"] for point in here if point["pair"] == "16")
        cells = []
        for pair in pairs:
            within = [p for p in here if p["pair"] == pair and p["loss_increase"] <= LIMIT]
            least = min((p["records_of_16_bits_per_token"] for p in within), default=None)
            cells.append("" if least is None else f"{least / whole:.3f}")
        table.add_row(trace, f"{resident:.0%}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
