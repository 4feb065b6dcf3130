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
    one, two = (ModelProfile.load(path) for path in args.profiles)
    two.check(one.model, str(args.profiles[1]))
    a, b = (np.array([layer.sensitivity for layer in profile.layers]) for profile in (one, two))
    errors = [np.array([layer.sensitivity_stderr for layer in profile.layers]) for profile in (one, two)]
    deviations = (b - a) / np.hypot(*errors)
    correlation = float(np.corrcoef(ranks(a), ranks(b))[0, 1])

    table = Table(title=f"{one.model.name}, {one.data.tokens if one.data else 0} tokens")
    for column in ("layer", one.method, "±", two.method, "±", "ratio", "standard errors apart"):
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
            "model": one.model.model_dump(),
            "data": one.data.model_dump() if one.data else None,
            "rank_correlation": correlation,
            one.method: {"sensitivity": a.tolist(), "stderr": errors[0].tolist()},
            two.method: {"sensitivity": b.tolist(), "stderr": errors[1].tolist()},
            "standard_errors_apart": deviations.tolist(),
        }
        write(args.output, result)


if __name__ == "__main__":
    main()
