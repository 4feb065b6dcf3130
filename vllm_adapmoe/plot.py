"""Plots results as PNG."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_adapmoe.config import AdapMoEError


@contextmanager
def figure(path: Path, x: str, y: str, columns: int = 1, rows: int = 1) -> Iterator[Any]:
    """Yields labelled axes (an array of them if there are several), and writes the figure to `path` at the end.

    Raises:
        AdapMoEError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise AdapMoEError(f"--plot {path} needs matplotlib; pip install vllm-adapmoe[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(
        rows, columns, figsize=(6.4 if columns == 1 else 4 * columns, 4.2 if rows == 1 else 3.2 * rows),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row in axes:
        for panel in row:
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel(x)
    for row in axes:
        row[0].set_ylabel(y)
    yield axes if rows * columns > 1 else axes[0][0]
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)
