"""Findings of a check, and how they are printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Level = Literal["ok", "note", "problem"]
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. A `problem` prevents serving; a `note` does not."""

    section: str
    level: Level
    text: str
    remedy: str = ""
    works: str = ""
    """Feature that works because of this finding, for the summary; empty: none to name."""
    fails: str = ""
    """Feature that does not work because of this finding, for the summary."""


def serves(findings: Sequence[Finding]) -> bool:
    """Returns whether models can be served: no finding is a `problem`."""
    return all(finding.level != "problem" for finding in findings)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Prints the findings section by section, then a summary of what works and what does not."""
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            console.print(Text(section, "bold"))
        table = _rows()
        table.add_row(Text(finding.level, COLOURS[finding.level]), Text(finding.text))
        if finding.remedy:
            table.add_row("", Text(finding.remedy, "italic"))
        console.print(table)
    for title, texts in (
        ("What will work here", [finding.works for finding in findings if finding.works] if serves(findings) else []),
        (
            "What will not",
            [finding.fails or finding.text for finding in findings if finding.fails or finding.level == "problem"],
        ),
    ):
        if texts:
            console.print(Text(title, "bold"))
            table = _rows()
            for text in texts:
                table.add_row("-", Text(text))
            console.print(table)


def _rows() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(width=7, justify="right")
    table.add_column()
    return table
