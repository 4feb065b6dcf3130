"""Signatures of functions that were read, to bind calls to and to compare."""

import ast
from inspect import Parameter, Signature

from .tree import Definition, Tree, _last


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> Signature:
    """Of a function; `bound`: as a method, without its object or class."""
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    free = len(positional) - len(args.defaults)
    parameters = [
        Parameter(
            one.arg,
            Parameter.POSITIONAL_ONLY if index < len(args.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=Parameter.empty if index < free else None,
        )
        for index, one in enumerate(positional)
    ]
    if bound and parameters:
        parameters = parameters[1:]
    if args.vararg is not None:
        parameters.append(Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    for one, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        value = Parameter.empty if default is None else None
        parameters.append(Parameter(one.arg, Parameter.KEYWORD_ONLY, default=value))
    if args.kwarg is not None:
        parameters.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def is_static(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(_last(one) == "staticmethod" for one in node.decorator_list)


def misfit(call: ast.Call, of: Signature) -> str | None:
    """Why a call does not fit a signature; None: it does."""
    stars = any(isinstance(one, ast.Starred) for one in call.args) or any(one.arg is None for one in call.keywords)
    args = [None for one in call.args if not isinstance(one, ast.Starred)]
    keywords = {one.arg: None for one in call.keywords if one.arg is not None}
    try:
        (of.bind_partial if stars else of.bind)(*args, **keywords)
    except TypeError as error:
        return str(error)
    return None


def narrower(ours: Signature, theirs: Signature) -> str | None:
    """Which call that `theirs` takes `ours` would not; None: it takes all of them."""
    mine, kinds = list(ours.parameters.values()), {one.kind for one in ours.parameters.values()}
    any_positional, any_keyword = Parameter.VAR_POSITIONAL in kinds, Parameter.VAR_KEYWORD in kinds
    positional = [one for one in mine if one.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    known, used = {one.name: one for one in mine}, 0
    for one in theirs.parameters.values():
        if one.kind is Parameter.VAR_POSITIONAL:
            if not any_positional:
                return f"*{one.name} is not taken"
        elif one.kind is Parameter.VAR_KEYWORD:
            if not any_keyword:
                return f"**{one.name} is not taken"
        elif one.kind is Parameter.KEYWORD_ONLY:
            if one.name not in known and not any_keyword:
                return f"{one.name} is not taken"
        elif used < len(positional):
            if positional[used].name != one.name and one.kind is not Parameter.POSITIONAL_ONLY:
                return f"{one.name} comes where we have {positional[used].name}"
            if one.default is not Parameter.empty and positional[used].default is Parameter.empty:
                return f"{one.name} is optional"
            used += 1
        elif not (any_positional and (any_keyword or one.kind is Parameter.POSITIONAL_ONLY)):
            return f"{one.name} is not taken"
    more = [one for one in positional[used:] + [one for one in mine if one.kind is Parameter.KEYWORD_ONLY]]
    for one in more:
        if one.default is Parameter.empty and one.name not in theirs.parameters:
            return f"{one.name} is not given"
    return None


def constructor(tree: Tree, cls: Definition) -> Signature | None:
    """Of a class that is read: its `__init__`, or one with its annotated fields; None where it cannot be told."""
    fields: dict[str, Parameter] = {}
    for base in reversed(list(tree.ancestors(cls))):
        if base.kind == "external":
            continue
        assert isinstance(base.node, ast.ClassDef)
        for node in base.node.body:
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__new__"):
                if base is cls or base.node is cls.node:
                    return signature(node, bound=True)
                return None
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if "ClassVar" in ast.dump(node.annotation):
                    continue
                default = Parameter.empty if node.value is None or _is_required(node.value) else None
                fields[node.target.id] = Parameter(node.target.id, Parameter.KEYWORD_ONLY, default=default)
    if not fields or ("__dataclass_fields__" not in tree.members(cls) and not _is_struct(tree, cls)):
        return None
    return Signature(list(fields.values()))


def _is_required(value: ast.expr) -> bool:
    """Whether `field(...)` gives no default."""
    if not isinstance(value, ast.Call) or _last(value.func) not in ("field", "Field"):
        return False
    names = {one.arg for one in value.keywords}
    return (not value.args and not names & {"default", "default_factory"}) or names == {"kw_only"}


def _is_struct(tree: Tree, cls: Definition) -> bool:
    return any(base.kind == "external" and base.name.endswith("Struct") for base in tree.ancestors(cls))
