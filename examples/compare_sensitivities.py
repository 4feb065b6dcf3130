"""Compares the sensitivities of two profiles of one model, layer by layer.

adapmoe calibrate MODEL --data TEXT --method fisher -o fisher.json
adapmoe calibrate MODEL --data TEXT --method forward -o forward.json
python examples/compare_sensitivities.py fisher.json forward.json -o comparison.json
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.results import write


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path, nargs=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    first, second = (ModelProfile.load(path) for path in args.profiles)
    second.check(first.model, str(args.profiles[1]))
    a, b = (np.array([layer.sensitivity for layer in profile.layers]) for profile in (first, second))
    errors = [np.array([layer.sensitivity_stderr for layer in profile.layers]) for profile in (first, second)]
    deviations = (b - a) / np.hypot(*errors)
    correlation = float(np.corrcoef(ranks(a), ranks(b))[0, 1])

    table = Table(title=f"{first.model.name}, {first.data.tokens if first.data else 0} tokens")
    for column in ("layer", first.method, "±", second.method, "±", "ratio", "standard errors apart"):
        table.add_column(column, justify="right")
    for index in range(len(a)):
        table.add_row(
            str(index), f"{a[index]:.4f}", f"{errors[0][index]:.4f}", f"{b[index]:.4f}", f"{errors[1][index]:.4f}",
            f"{b[index] / a[index]:.2f}", f"{deviations[index]:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"rank correlation {correlation:.3f}")
    if args.output is not None:
        result = {
            "model": first.model.model_dump(),
            "data": first.data.model_dump() if first.data else None,
            "rank_correlation": correlation,
            first.method: {"sensitivity": a.tolist(), "stderr": errors[0].tolist()},
            second.method: {"sensitivity": b.tolist(), "stderr": errors[1].tolist()},
            "standard_errors_apart": deviations.tolist(),
        }
        write(args.output, result)


if __name__ == "__main__":
    main()
