"""Finds the names that our own code uses of vLLM, by parsing it: nothing is imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Use:
    """A name of vLLM and the place where our code uses it."""

    path: str
    """Dotted path from `vllm` on, to a module, a name in it, or an attribute of that."""
    file: str
    line: int


Need = list[list[Use]]
"""Alternative sets of uses, of which all uses of one set have to exist."""


def package_files() -> list[Path]:
    """Returns the Python files of this package."""
    return sorted(Path(__file__).parents[2].rglob("*.py"))


def needs(path: Path) -> Iterator[Need]:
    """Yields what a file needs of vLLM: its imports, and the attributes it uses of imported names."""
    tree = ast.parse(path.read_text())
    places: dict[str, str] = {}
    yield from _imports(tree.body, path.name, places)
    for node in _chains(tree):
        names = _dotted(node)
        if names is not None and names[0] in places:
            yield [[Use(".".join((places[names[0]], *names[1:])), path.name, node.lineno)]]


def _imports(body: list[ast.stmt], file: str, places: dict[str, str]) -> Iterator[Need]:
    """Yields the needs of imports in statements and nested blocks; records each imported name's path in `places`."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for path, name in _paths(node):
                places[name] = path if isinstance(node, ast.ImportFrom) or path.split(".")[0] != name else name
                yield [[Use(path, file, node.lineno)]]
        elif isinstance(node, ast.Try) and any(_catches_import_error(handler) for handler in node.handlers):
            branches = [node.body, *(handler.body for handler in node.handlers)]
            ways = [[use for need in _imports(branch, file, {}) for use in need[0]] for branch in branches]
            if any(ways):
                yield [way for way in ways if way]
        elif not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            for block in ("body", "orelse", "finalbody"):
                yield from _imports(getattr(node, block, []), file, places)


def _paths(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yields dotted path and local name of everything that a statement imports from vLLM."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            path, name = alias.name, alias.asname or alias.name.split(".")[0]
        else:
            path, name = f"{node.module}.{alias.name}", alias.asname or alias.name
        if path.split(".")[0] == "vllm":
            yield path, name


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.type, ast.Name) and handler.type.id in ("ImportError", "ModuleNotFoundError")


def _chains(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Yields the outermost node of each attribute chain."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            yield node


def _dotted(node: ast.expr) -> list[str] | None:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        names = _dotted(node.value)
        return None if names is None else [*names, node.attr]
    return None
