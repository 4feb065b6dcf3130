"""Compares what the plugin does with vLLM, as far as reading both tells, with one vLLM."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import Parameter

from packaging.version import Version

from vllm_adapmoe.integration.compat import EDITED, REBOUND, SHIMS
from vllm_adapmoe.integration.entry.edits import EngineFields, StatsFields
from vllm_adapmoe.integration.entry.vllm_names import needs

from .ours import Function, OurClass, OurFile, bases, read_ours
from .signatures import constructor, is_static, misfit, narrower, signature
from .tree import OPEN, Definition, Member, Tree, _last, own_members

ADDED = {*EngineFields.__dataclass_fields__, *StatsFields.__dataclass_fields__}
"""Fields that our edits give vLLM's classes."""


@dataclass(frozen=True, order=True)
class Damage:
    """Something of ours that does not fit a vLLM."""

    kind: str
    place: str
    """File and line of ours."""
    what: str


class Scan:
    """The plugin against one vLLM."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.files = read_ours()
        self.overridden: dict[tuple[str, str], str] = {}
        """(class of ours, method) -> where we have it: methods that take the place of vLLM's."""
        self.checked = 0

    def damage(self, reference: Tree | None = None) -> list[Damage]:
        """Everything that does not fit; `reference`: a vLLM that we fit, to know what we take the place of."""
        found = [*self._names(), *self._edits(), *self.class_damage(), *self._uses(), *self._shims(), *self._rebound()]
        if reference is not None:
            known = Scan(reference)
            list(known.class_damage())
            for (cls, method), place in known.overridden.items():
                if (cls, method) not in self.overridden:
                    found.append(Damage("override", place, f"{cls}.{method} takes the place of nothing"))
        return sorted(set(found))

    # What we import, and its attributes

    def _names(self) -> Iterator[Damage]:
        for file in self.files.values():
            for ways in needs(file.path):
                self.checked += 1
                gone = [[use for use in way if self.tree.find(use.path) is None] for way in ways]
                if all(gone):
                    yield Damage("name", f"{file.name}:{gone[0][0].line}", f"{gone[0][0].path} is missing")

    def _edits(self) -> Iterator[Damage]:
        for module, names in EDITED.items():
            for name in names:
                self.checked += 1
                if self.tree.find(f"{module}.{name}") is None:
                    yield Damage("edit", "edits.py", f"{module}.{name} is missing")

    def _shims(self) -> Iterator[Damage]:
        """Shims are needed by the versions that they say."""
        if self.tree.version == "unknown":
            return
        for shim in SHIMS:
            self.checked += 1
            is_old, has_old = Version(self.tree.version) < Version(shim.before), self.tree.find(shim.old) is not None
            if is_old != has_old:
                yield Damage("shim", "compat.py", f"{shim.name}: {shim.old} is {'there' if has_old else 'missing'}")

    def _rebound(self) -> Iterator[Damage]:
        """Functions of theirs that we run with another meaning of some names use these."""
        for path, names in REBOUND.items():
            self.checked += 1
            found = self.tree.find(path)
            node = None if found is None else found.node
            used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} if node is not None else set()
            for name in sorted(names - used):
                yield Damage("rebound", "slot_kernels.py", f"{path} does not use {name}")

    # What we derive from

    def class_damage(self) -> Iterator[Damage]:
        for file in self.files.values():
            for cls in file.classes.values():
                theirs = self._theirs(cls)
                if theirs:
                    yield from self._overrides(cls, theirs)
                    yield from self._abstract(cls, theirs)

    def _theirs(self, cls: OurClass) -> list[Definition]:
        """VLLM's classes that a class of ours derives from."""
        found = [self.tree.find(base) for base in bases(cls, self.files) if isinstance(base, str)]
        return [one for one in found if one is not None and one.kind == "class"]

    def _members(self, theirs: list[Definition]) -> dict[str, Member]:
        return {name: member for one in reversed(theirs) for name, member in self.tree.members(one).items()}

    def _ours(self, cls: OurClass) -> list[OurClass]:
        return [cls, *(base for base in bases(cls, self.files) if isinstance(base, OurClass))]

    def _overrides(self, cls: OurClass, theirs: list[Definition]) -> Iterator[Damage]:
        members = self._members(theirs)
        for name, method in cls.methods.items():
            member = members.get(name)
            if member is None or member.owner.kind == "external" or name == "__init__":
                continue
            self.overridden[cls.name, name] = place = f"{cls.file.name}:{method.lineno}"
            self.checked += 1
            if not isinstance(member.node, Function):
                yield Damage("override", place, f"{cls.name}.{name} takes the place of an attribute")
                continue
            ours_is_property = any(_last(one) in ("property", "cached_property") for one in method.decorator_list)
            if ours_is_property != (member.kind == "property"):
                yield Damage("override", place, f"{cls.name}.{name}: one of the two is a property")
                continue
            if isinstance(method, ast.AsyncFunctionDef) != isinstance(member.node, ast.AsyncFunctionDef):
                yield Damage("override", place, f"{cls.name}.{name}: one of the two is async")
            why = narrower(signature(method, not is_static(method)), signature(member.node, not is_static(member.node)))
            if why is not None:
                yield Damage("override", place, f"{member.owner.name}.{name}: {why}")

    def _abstract(self, cls: OurClass, theirs: list[Definition]) -> Iterator[Damage]:
        have = {name for one in self._ours(cls) for name in one.methods}
        for name, member in self._members(theirs).items():
            self.checked += member.is_abstract
            if member.is_abstract and name not in have:
                place = f"{cls.file.name}:{cls.node.lineno}"
                yield Damage("abstract", place, f"{cls.name} has no {member.owner.name}.{name}")

    # What our functions do

    def _uses(self) -> Iterator[Damage]:
        for file in self.files.values():
            for function, cls in file.functions():
                yield from self._in_function(file, function, cls)

    def _in_function(self, file: OurFile, function: Function | ast.Module, cls: OurClass | None) -> Iterator[Damage]:
        theirs = [] if cls is None else self._theirs(cls)
        types = Types(self.tree, file, function)
        members = self._members(theirs) if theirs else {}
        above = set(members) | ADDED
        for one in self._ours(cls)[1:] if cls is not None and theirs else ():
            above |= _names_in(one)
        known = above if cls is None else above | _names_in(cls)
        for node in ast.walk(function):
            place = f"{file.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                if theirs and isinstance(node.value, ast.Name) and node.value.id == "self" and OPEN not in known:
                    self.checked += 1
                    if node.attr not in known:
                        yield Damage("attribute", place, f"{cls.name}.{node.attr} is missing")  # type: ignore[union-attr]
                elif theirs and _is_super(node.value) and OPEN not in known:
                    self.checked += 1
                    if node.attr not in above:
                        yield Damage("attribute", place, f"super().{node.attr} is missing")
                else:
                    yield from self._attribute(node, types, place)
            elif isinstance(node, ast.Call):
                yield from self._call(node, types, members, place)

    def _attribute(self, node: ast.Attribute, types: "Types", place: str) -> Iterator[Damage]:
        of = types.of(node.value)
        if of is None or of.kind != "class" or node.attr in ADDED:
            return
        self.checked += 1
        if self.tree.attribute(of, node.attr) is None:
            yield Damage("attribute", place, f"{of.name}.{node.attr} is missing")

    def _call(self, node: ast.Call, types: "Types", members: dict[str, Member], place: str) -> Iterator[Damage]:
        called: Definition | None
        bound = False
        if isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            member = members.get(node.func.attr)
            called = (
                None if member is None else Definition("function", node.func.attr, member.owner.module, member.node)
            )
            bound = True
        elif isinstance(node.func, ast.Attribute) and (of := types.of(node.func.value)) is not None:
            called, bound = self.tree.attribute(of, node.func.attr), of.kind == "class"
        else:
            called, bound = types.named(node.func)
        if called is None:
            return
        if called.kind == "class":
            fits = constructor(self.tree, called)
            if (
                fits is not None
                and node.args
                and all(one.kind is Parameter.KEYWORD_ONLY for one in fits.parameters.values())
            ):
                return
        elif called.kind == "function" and isinstance(called.node, Function):
            fits = signature(called.node, bound and not is_static(called.node))
        else:
            return
        if fits is None:
            return
        self.checked += 1
        keywords = [one for one in node.keywords if one.arg not in ADDED]
        why = misfit(ast.Call(node.func, node.args, keywords), fits)
        if why is not None:
            yield Damage("call", place, f"{called.name}: {why}")


class Types:
    """Which of vLLM's classes the expressions in a function have, as far as annotations tell."""

    def __init__(self, tree: Tree, file: OurFile, function: Function | ast.Module) -> None:
        self.tree = tree
        self.file = file
        self._of_name: dict[str, Definition] = {}
        self._assigned: set[str] = set()
        for inner in ast.walk(function):
            if isinstance(inner, Function):
                for one in [*inner.args.posonlyargs, *inner.args.args, *inner.args.kwonlyargs]:
                    self._assigned.add(one.arg)
                    found = self._annotated(one.annotation)
                    if found is not None:
                        self._of_name[one.arg] = found
        stores = [
            node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                for target, value in _pairs(node.targets[0], node.value):
                    if (
                        isinstance(target, ast.Name)
                        and stores.count(target.id) == 1
                        and target.id not in self._assigned
                    ):
                        found = self.of(value)
                        if found is not None:
                            self._of_name[target.id] = found
        self._assigned |= set(stores)

    def of(self, node: ast.expr) -> Definition | None:
        """The class of an expression's value; None where that is not known."""
        if isinstance(node, ast.Name):
            if node.id in self._of_name or node.id in self._assigned:
                return self._of_name.get(node.id)
            found = self._imported(node.id)
            if found is not None and found.kind == "variable" and found.module is not None:
                return found.module.annotated(getattr(found.node, "annotation", None))
            return None
        if isinstance(node, ast.Attribute):
            of = self.of(node.value)
            member = None if of is None or of.kind != "class" else self.tree.members(of).get(node.attr)
            if member is None or member.kind == "method" or member.owner.module is None:
                return None
            return _class(member.owner.module.annotated(member.annotation))
        if isinstance(node, ast.Call):
            called, _ = self.named(node.func)
            if called is None and isinstance(node.func, ast.Attribute):
                of = self.of(node.func.value)
                called = None if of is None else self.tree.attribute(of, node.func.attr)
            if called is not None and called.kind == "class":
                return called
            if called is not None and isinstance(called.node, Function) and called.module is not None:
                return _class(called.module.annotated(called.node.returns))
        return None

    def named(self, node: ast.expr) -> tuple[Definition | None, bool]:
        """What a dotted name of an import stands for, and whether it is called with its object or class bound."""
        if isinstance(node, ast.Name) and node.id not in self._assigned:
            return self._imported(node.id), False
        if isinstance(node, ast.Attribute):
            of, _ = self.named(node.value)
            if of is None or of.kind == "external":
                return None, False
            found = self.tree.attribute(of, node.attr)
            decorators = (
                {_last(one) for one in getattr(found.node, "decorator_list", ())} if found is not None else set()
            )
            return found, "classmethod" in decorators
        return None, False

    def _imported(self, name: str) -> Definition | None:
        path = self.file.imported.get(name, "")
        return self.tree.find(path) if path.split(".")[0] == "vllm" else None

    def _annotated(self, node: ast.expr | None) -> Definition | None:
        """The class of vLLM that an annotation of ours names."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            sides = [
                one for one in (node.left, node.right) if not (isinstance(one, ast.Constant) and one.value is None)
            ]
            return self._annotated(sides[0]) if len(sides) == 1 else None
        found = self._imported(node.id) if isinstance(node, ast.Name) else None
        return _class(found)


@cache
def _names_in(cls: OurClass) -> set[str]:
    return set(own_members(Definition("class", cls.name, None, cls.node)))


def _class(found: Definition | None) -> Definition | None:
    return found if found is not None and found.kind == "class" else None


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _last(node.func) == "super"


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]
