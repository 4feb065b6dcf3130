"""Writes the table of keys in `docs/configuration.md` from the models of `vllm_adapmoe/config.py`.

`python -m tests.docs.config_table` replaces what is between the markers.
"""

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tests.generated import write_between
from vllm_adapmoe.config import AdapMoEConfig

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
BOUNDS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "maximum": "≤ {}", "maxLength": "at most {} characters"}
Schema = dict[str, Any]


def markdown() -> str:
    """What stands between the markers."""
    head = "| key | type | default | bounds | meaning |\n|---|---|---|---|---|"
    return "\n".join([head, *rows(AdapMoEConfig)])


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    """A row for each key of a model, and for the keys below it."""
    schemas, meanings = model.model_json_schema()["properties"], docstrings(model)
    found = []
    for key, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            found += rows(field.annotation, f"{prefix}{key}.")
            continue
        kinds, bounds = described(schemas[key])
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        cells = [f"`{prefix}{key}`", " or ".join(kinds), default, ", ".join(bounds), meanings[key]]
        found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


def described(schema: Schema) -> tuple[list[str], list[str]]:
    """The types that a value may have, and the bounds of those that have any."""
    if "anyOf" in schema:
        parts = [described(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return [kind for kinds, _ in parts for kind in kinds], [bound for _, bounds in parts for bound in bounds]
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    kinds = [", ".join(f"`{json.dumps(choice)}`" for choice in choices)] if choices else [schema["type"]]
    return kinds, [text.format(f"{schema[name]:.15g}") for name, text in BOUNDS.items() if name in schema]


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The text below each key in the source, on one line."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def main() -> None:
    write_between(DOCUMENT, BEGIN, END, markdown())


if __name__ == "__main__":
    main()
