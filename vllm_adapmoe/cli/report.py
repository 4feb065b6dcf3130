"""Prints, writes and plots the result of a command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_adapmoe.results import write

Result = dict[str, Any]


def report(
    result: Result,
    show: Callable[[Result, Console], None],
    output: Path | None,
    draw: Callable[[Result, Path], None] | None = None,
    plot: Path | None = None,
) -> None:
    """Prints a result; also writes and plots it, for each file that the user named.

    Args:
        result: result of a measurement or a prediction.
        show: prints it as a table.
        output: JSON file for the result and its environment.
        draw: plots it to a PNG file.
        plot: PNG file for the plot.
    """
    show(result, Console())
    if output is not None:
        write(output, result)
    if plot is not None and draw is not None:
        draw(result, plot)
