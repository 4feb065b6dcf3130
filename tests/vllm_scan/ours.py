"""Our side: the classes and functions of the plugin, and what they do with vLLM's objects."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from vllm_adapmoe.integration.entry.vllm_names import package_files

from .tree import _last

ROOT = Path(__file__).parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(eq=False)
class OurClass:
    """A class of ours."""

    name: str
    file: "OurFile"
    node: ast.ClassDef

    @property
    def methods(self) -> dict[str, Function]:
        return {node.name: node for node in self.node.body if isinstance(node, Function)}


@dataclass(eq=False)
class OurFile:
    """One file: its classes and functions, and what each name in it was imported as."""

    path: Path
    tree: ast.Module
    imported: dict[str, str] = field(default_factory=dict)
    """Local name to dotted path, of vLLM and of our own."""
    classes: dict[str, OurClass] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    def functions(self) -> Iterator[tuple[Function | ast.Module, OurClass | None]]:
        """Every function with the class that it is a method of; those inside of others belong to these.

        First what is in none.
        """
        outside = [node for node in self.tree.body if not isinstance(node, Function | ast.ClassDef)]
        yield ast.Module(outside, []), None
        for node in self.tree.body:
            if isinstance(node, Function):
                yield node, None
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function):
                        yield inner, self.classes[node.name]


@cache
def read_ours() -> dict[str, OurFile]:
    """The files of the package, by dotted name."""
    files = {}
    for path in package_files():
        file = OurFile(path, ast.parse(path.read_text()))
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    file.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    file.imported[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        for node in file.tree.body:
            if isinstance(node, ast.ClassDef):
                file.classes[node.name] = OurClass(node.name, file, node)
        files[".".join(path.relative_to(ROOT).with_suffix("").parts)] = file
    return files


def bases(cls: OurClass, files: dict[str, OurFile]) -> Iterator["OurClass | str"]:
    """What a class of ours derives from, near and far: classes of ours, and dotted names of vLLM's."""
    for base in cls.node.bases:
        name = _last(base) or ""
        path = cls.file.imported.get(name, "")
        if name in cls.file.classes:
            ours = cls.file.classes[name]
        else:
            module, _, inner = path.rpartition(".")
            ours = files[module].classes.get(inner) if module in files else None
        if ours is not None:
            yield ours
            yield from bases(ours, files)
        elif path.startswith("vllm."):
            yield path
