"""Collects the check's rows: what was measured, the result, and the target."""

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_adapmoe.results import environment, write

MET, MISSED, NOT_RUN, SKIPPED, NO_TARGET = "met", "missed", "not run", "skipped", ""
CORRECTNESS, ENGINES = "correctness", "vllm"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    what: str
    figure: str
    target: str = ""
    verdict: str = NO_TARGET
    """Verdict on the target; empty if there is none, and the reader judges the figure."""
    details: dict[str, Any] = field(default_factory=dict)
    """Details for the JSON result only."""


def verdict(met: bool) -> str:
    """Returns the verdict of a row with a target."""
    return MET if met else MISSED


def attempt(section: str, what: str, action: Callable[[], Iterable[Row]]) -> list[Row]:
    """Returns the rows of an action; a failure becomes a last row, so that the other parts still run."""
    rows: list[Row] = []
    try:
        for row in action():
            rows.append(row)
    except Exception as error:  # any failure concerns only this part of the check
        place = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or [f"line {place.lineno} of {Path(place.filename).name}"]
        rows.append(Row(section, what, f"{type(error).__name__}: {lines[0]}"[:160], "", NOT_RUN))
    return rows


def failed(rows: Iterable[Row]) -> bool:
    """Returns whether the check failed: a correctness row was missed or not run, or a vLLM engine could not be run.

    A skipped row is not a failure: there is no vLLM, or no memory or time for a comparison of speed.
    """
    return any(
        (row.section == CORRECTNESS and row.verdict not in (MET, SKIPPED))
        or (row.section == ENGINES and row.verdict == NOT_RUN)
        for row in rows
    )


def render(rows: Sequence[Row], title: str) -> str:
    """Renders the rows as a plain-text table."""
    cells = [("section", "what", "figure", "target", "verdict")]
    cells += [(row.section, row.what, row.figure, row.target or "-", row.verdict or "-") for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, "", *lines])


class Result:
    """Rows of the check so far. The file is written after every part, so that an aborted check keeps its results.

    Args:
        output: JSON file to write.
        title: title of the table.
        made: further entries of `environment` in the JSON.
        seed: random seed of the check.
    """

    def __init__(self, output: Path, title: str, made: dict[str, Any], seed: int) -> None:
        self.output, self.title, self.seed = output, title, seed
        self.environment = environment() | made
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Adds the rows of one part."""
        self.rows += rows
        for row in rows:
            print(f"gpu-check: {row.what}: {row.figure}", file=sys.stderr, flush=True)
        self._write(complete=False)

    def end(self) -> int:
        """Prints the table; returns the exit status."""
        print(render(self.rows, self.title), flush=True)
        self._write(complete=True)
        return int(failed(self.rows))

    def _write(self, complete: bool) -> None:
        write(
            self.output,
            {
                "environment": self.environment,
                "benchmark": "gpu_check",
                "seed": self.seed,
                "complete": complete,
                "rows": [asdict(row) for row in self.rows],
            },
        )

    @contextmanager
    def ended_after(self, seconds: float) -> Iterator[None]:
        """Prints the table and ends the process if the body takes longer: a hanging device cannot be interrupted."""
        timer = threading.Timer(seconds, self._give_up, [seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, seconds: float) -> None:
        faulthandler.dump_traceback()
        what = "the part after the last row here"
        self.add([Row(CORRECTNESS, what, f"still running after {seconds:.0f} s", "", NOT_RUN)])
        os._exit(self.end())
