"""Writes the table of `docs/compatibility.md` from what `python -m tests.models` found.

`python -m tests.models.table` replaces what is between the markers.
"""

import json
from pathlib import Path
from typing import Any

from tests.generated import write_between
from tests.models.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "examples" / "benchmarks" / "models.json"
DOCUMENT = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
GROUPS = {
    "text": "Text",
    "multimodal": "Multimodal, asked with text",
    "other": "Pooling, embedding, classification",
    "transformers": "Transformers backend",
}
Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """What stands between the markers."""
    models: dict[str, Row] = result["models"]
    served = {name: row for name, row in models.items() if row.get("stock", {}).get("layers")}
    parts = [head(result, served)]
    for kind, title in GROUPS.items():
        rows = [(name, row) for name, row in served.items() if group(row) == kind]
        if rows:
            parts.append(
                f"### {title}\n\n| architecture | for example | half resident | fewest slots |\n|---|---|---|---|"
            )
            parts[-1] += "".join(
                f"\n| {name} | {EXAMPLES.get(name, '')} | {verdict(row, 'half')} | {verdict(row, 'fewest')} |"
                for name, row in rows
            )
    errors = [
        f"- {name}, {step}: `{row[step]['error']}`"
        for name, row in served.items()
        for step in ("half", "fewest")
        if "error" in row.get(step, {})
    ]
    if errors:
        parts.append("### Errors\n\n" + "\n".join(errors))
    parts.append("### Not compared\n\n" + "\n".join(not_compared(models)))
    return "\n\n".join(parts)


def head(result: dict[str, Any], served: dict[str, Row]) -> str:
    environment = result["environment"]
    versions, machine = environment["versions"], environment["machine"]
    good = sum(all(verdict(row, step).startswith(GOOD) for step in ("half", "fewest")) for row in served.values())
    return (
        f"{len(result['models'])} architectures have routed experts. {len(served)} of them run as a tiny random "
        f"checkpoint with stock vLLM {versions['vllm']} on this machine ({machine['processor']}), {good} of these with "
        "the plugin as they should."
    )


GOOD = ("same bits", "rounding")


def verdict(row: Row, step: str) -> str:
    """What a cell says of half of the experts, or of the fewest slots.

    `same bits`: every token and log probability is stock's. `rounding`: the experts were summed in float32, as they
    are in several waves, and what came out is what this sum gives with half of the experts resident, too.
    """
    found = row.get(step)
    if found is None or "error" in found:
        return "**error**"
    stock, pairs = found["stock"], found.get("pairs")
    if stock["equal"] == stock["tokens"] and stock["difference"] == 0:
        return "same bits"
    tokens = f"{stock['equal']} of {stock['tokens']} tokens"
    if pairs is not None and pairs["median"] == 0 and pairs["difference"] <= FLIPPED and step == "fewest":
        return f"rounding, {tokens}"
    return f"**differs**, {tokens}"


FLIPPED = 0.1
"""Log probability; with AMX a row's last bits depend on the rows beside it, and waves have others."""


def group(row: Row) -> str:
    return row["kind"] if row["kind"] in GROUPS else "other"


def not_compared(models: dict[str, Row]) -> list[str]:
    """A line for every reason, with the architectures that it holds for."""
    reasons: dict[str, list[str]] = {}
    for name, row in models.items():
        reason = why_not(row)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return [f"- {reason}: {', '.join(names)}" for reason, names in ordered]


def why_not(row: Row) -> str | None:
    """Why there is nothing to compare; None: there is."""
    made, stock = row["checkpoint"], row.get("stock", {})
    if "cannot" in made:
        return made["cannot"]
    if "error" in made:
        return f"no checkpoint: `{made['error']}`"
    if "error" in stock:
        return f"stock vLLM on the CPU: `{stock['error']}`"
    return None if stock.get("layers") else "the configuration builds no routed experts"


def main() -> None:
    write_between(DOCUMENT, BEGIN, END, markdown(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
