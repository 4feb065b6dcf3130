"""The Python of one vLLM, read and not imported: from a wheel, or from a folder that holds the package."""

import ast
import importlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

OPEN = "*"
"""In the members of a class: there may be more, for not all of its bases can be read."""


@dataclass(frozen=True, eq=False)
class Definition:
    """What a name stands for: module, class, function, variable, or (`external`) something of another package."""

    kind: str
    name: str
    module: "Module | None" = None
    node: ast.AST | None = None


@dataclass(frozen=True, eq=False)
class Member:
    """Of a class: a method, a property, a field, or an attribute that a method sets."""

    kind: str
    node: ast.AST
    owner: Definition
    annotation: ast.expr | None = None

    @property
    def is_abstract(self) -> bool:
        return any(_last(one) == "abstractmethod" for one in getattr(self.node, "decorator_list", ()))


class Tree:
    """A vLLM.

    Args:
        path: a wheel, the folder `vllm`, or the folder that it is in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._wheel = zipfile.ZipFile(path) if path.is_file() else None
        self._names = set(self._wheel.namelist()) if self._wheel is not None else set()
        self._root = path.parent if path.name == "vllm" and (path / "__init__.py").exists() else path
        self._modules: dict[str, Module | None] = {}
        self._members: dict[ast.AST | None, dict[str, Member]] = {}
        if self.module("vllm") is None:
            raise FileNotFoundError(f"{path} holds no Python package vllm; name a wheel or an unpacked one")

    @cached_property
    def version(self) -> str:
        """As its metadata says, or the file that its build writes."""
        written = self._text("vllm/_version.py") or ""
        found = re.search(r"^(?:__version__ = )?version = ['\"]([^'\"]+)", written, re.M)
        found = found or re.search(r"^__version__.*= ['\"]([^'\"]+)", written, re.M)
        return found[1] if found else "unknown"

    def _text(self, name: str) -> str | None:
        if self._wheel is not None:
            return self._wheel.read(name).decode() if name in self._names else None
        file = self._root / name
        return file.read_text() if file.is_file() else None

    def module(self, name: str) -> "Module | None":
        """A module by its dotted name; None where there is none."""
        if name not in self._modules:
            base = name.replace(".", "/")
            text, is_package = self._text(f"{base}/__init__.py"), True
            if text is None:
                text, is_package = self._text(f"{base}.py"), False
            self._modules[name] = None if text is None else Module(self, name, text, is_package)
        return self._modules[name]

    def find(self, path: str) -> Definition | None:
        """What a dotted name leads to; `external` where it leads to what cannot be read; None: to nothing."""
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:count]))
            if module is not None:
                found: Definition | None = Definition("module", module.name, module)
                for name in parts[count:]:
                    found = None if found is None else self.attribute(found, name)
                return found
        return None

    def attribute(self, of: Definition, name: str) -> Definition | None:
        """An attribute of a module, of a class or of an instance of it."""
        if of.kind == "module":
            assert of.module is not None
            return of.module.lookup(name)
        if of.kind == "variable":
            assert of.module is not None
            of = of.module.annotated(getattr(of.node, "annotation", None)) or Definition("external", of.name)
        if of.kind != "class":
            return Definition("external", name)
        members = self.members(of)
        if name in members:
            member = members[name]
            return Definition(
                "function" if member.kind == "method" else "variable", name, member.owner.module, member.node
            )
        return Definition("external", name) if OPEN in members else None

    def members(self, cls: Definition) -> dict[str, Member]:
        """Of a class and its bases, by name."""
        if cls.node in self._members:
            return self._members[cls.node]
        found: dict[str, Member] = self._members.setdefault(cls.node, {})
        for base in self.ancestors(cls):
            if base.kind == "external":
                names = _members_elsewhere(base.name)
                for name in [OPEN] if names is None else names:
                    found.setdefault(name, Member("method", ast.Pass(), base))
                continue
            for name, member in own_members(base).items():
                found.setdefault(name, member)
        return found

    def ancestors(self, cls: Definition) -> Iterator[Definition]:
        """A class and its bases, the nearest first."""
        seen, waiting = set(), [cls]
        while waiting:
            one = waiting.pop(0)
            if id(one.node) in seen and one.node is not None:
                continue
            seen.add(id(one.node))
            yield one
            if one.kind == "class":
                assert one.module is not None
                waiting = [one.module.base(base) for base in one.node.bases] + waiting  # type: ignore[attr-defined]


@cache
def parse(text: str) -> ast.Module:
    """Several trees have most of their files in common, and parsing is what takes long."""
    return ast.parse(text)


class Module:
    """One file, and what its names stand for."""

    def __init__(self, tree: Tree, name: str, text: str, is_package: bool) -> None:
        self.tree = tree
        self.name = name
        self.package = name if is_package else name.rpartition(".")[0]
        self.ast = parse(text)
        self._names: dict[str, ast.AST] = {}
        self._only_typing: dict[str, ast.AST] = {}
        self._stars: list[str] = []
        self._looking: set[str] = set()
        self._note(self.ast.body, self._names)

    def _note(self, body: list[ast.stmt], names: dict[str, ast.AST]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names[node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*":
                        assert isinstance(node, ast.ImportFrom)
                        self._stars.append(self._from(node))
                    else:
                        names.setdefault(alias.asname or alias.name.split(".")[0], node)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for one in ast.walk(target):
                        if isinstance(one, ast.Name):
                            names.setdefault(one.id, node)
            elif isinstance(node, ast.If) and _last(node.test) == "TYPE_CHECKING":
                self._note(node.body, self._only_typing)
                self._note(node.orelse, names)
            else:
                for block in ("body", "orelse", "finalbody"):
                    self._note(getattr(node, block, []), names)
                for handler in getattr(node, "handlers", []):
                    self._note(handler.body, names)

    def _from(self, node: ast.ImportFrom) -> str:
        """The module that a `from ... import` names."""
        if not node.level:
            return node.module or ""
        package = self.package.split(".")
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def lookup(self, name: str) -> Definition | None:
        """What one of the module's names stands for at run time."""
        node = self._names.get(name)
        if node is None and "__getattr__" in self._names:
            node = self._only_typing.get(name)
        return self._define(name, node)

    def _lookup_type(self, name: str) -> Definition | None:
        """The same for annotations."""
        return self._define(name, self._names.get(name) or self._only_typing.get(name))

    def _define(self, name: str, node: ast.AST | None) -> Definition | None:
        if name in self._looking:
            return None
        self._looking.add(name)
        try:
            if isinstance(node, ast.ClassDef):
                return Definition("class", name, self, node)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return Definition("function", name, self, node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                return self._imported(name, node)
            if node is not None:
                return Definition("variable", name, self, node)
            module = self.tree.module(f"{self.name}.{name}")
            if module is not None:
                return Definition("module", module.name, module)
            for star in self._stars:
                of = self.tree.module(star)
                found = None if of is None else of.lookup(name)
                if found is not None:
                    return found
            return None
        finally:
            self._looking.discard(name)

    def _imported(self, name: str, node: ast.Import | ast.ImportFrom) -> Definition | None:
        (alias,) = [one for one in node.names if (one.asname or one.name.split(".")[0]) == name][:1]
        if isinstance(node, ast.Import):
            path = alias.name if alias.asname else name
        else:
            path = f"{self._from(node)}.{alias.name}"
        return self.tree.find(path) if path.split(".")[0] == "vllm" else Definition("external", path)

    def base(self, node: ast.expr) -> Definition:
        """What a class derives from."""
        return self.annotated(node) or Definition("external", "")

    def annotated(self, node: ast.expr | None) -> Definition | None:
        """The class that an annotation names, None aside; None where it names none or several."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            sides = [
                one for one in (node.left, node.right) if not (isinstance(one, ast.Constant) and one.value is None)
            ]
            return self.annotated(sides[0]) if len(sides) == 1 else None
        if isinstance(node, ast.Subscript):
            return self.annotated(node.slice if _last(node.value) == "Optional" else node.value)
        if isinstance(node, ast.Name):
            found = self._lookup_type(node.id) or Definition("external", f"builtins.{node.id}")
            return found if found.kind in ("class", "external") else None
        if isinstance(node, ast.Attribute):
            of = self._lookup_type(node.value.id) if isinstance(node.value, ast.Name) else None
            if of is None or of.kind == "external":
                return Definition("external", f"{of.name}.{node.attr}" if of is not None else "")
            return self.tree.attribute(of, node.attr)
        return None


def own_members(cls: Definition) -> dict[str, Member]:
    """What the body of a class, and its methods, give it."""
    assert isinstance(cls.node, ast.ClassDef)
    found: dict[str, Member] = {}
    decorators = {_last(one.func if isinstance(one, ast.Call) else one) for one in cls.node.decorator_list}
    if decorators & {"dataclass", "config"}:
        found["__dataclass_fields__"] = Member("field", cls.node, cls)
    for node in _statements(cls.node.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_property = any(_last(one) in ("property", "cached_property", "setter") for one in node.decorator_list)
            found[node.name] = Member("property" if is_property else "method", node, cls, node.returns)
            for name, member in _set_by(node, cls):
                found.setdefault(name, member)
            if node.name == "__getattr__":
                found[OPEN] = Member("method", node, cls)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = Member("field", node, cls, node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for one in ast.walk(target):
                    if isinstance(one, ast.Name):
                        found[one.id] = Member("field", node, cls)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = Member("field", node, cls)
    return found


def _set_by(method: ast.FunctionDef | ast.AsyncFunctionDef, cls: Definition) -> Iterator[tuple[str, Member]]:
    """Attributes that a method gives its object, with what is known of their type."""
    arguments = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
    if not arguments:
        return
    owner, annotations = arguments[0].arg, {one.arg: one.annotation for one in arguments}
    for node in ast.walk(method):  # those whose type is known, for whoever comes first stays
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            yield node.target.attr, Member("attribute", node, cls, node.annotation)
        if isinstance(node, ast.Assign):
            known = node.value.func if isinstance(node.value, ast.Call) else annotations.get(_last(node.value) or "")
            for target in node.targets if known is not None else ():
                if isinstance(target, ast.Attribute):
                    yield target.attr, Member("attribute", node, cls, known)
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _last(node.value) == owner:
            yield node.attr, Member("attribute", node, cls)
        is_set = isinstance(node, ast.Call) and _last(node.func) in ("setattr", "__setattr__") and len(node.args) > 2
        if is_set and isinstance(node.args[1], ast.Constant):
            yield str(node.args[1].value), Member("attribute", node, cls)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, block, []))
        else:
            yield node


def _members_elsewhere(path: str) -> list[str] | None:
    """Of a class of another package; None where it cannot be looked at."""
    module, _, name = path.rpartition(".")
    if module in ("typing", "abc", "enum") or module.split(".")[0] in ("torch", "builtins"):
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return None
        names = dir(cls) + list(getattr(cls, "__annotations__", ()))
        return [*names, "name", "value"] if module == "enum" else names
    return None


def _last(node: ast.AST | None) -> str | None:
    """The last part of a dotted name."""
    return getattr(node, "attr", None) or getattr(node, "id", None)
