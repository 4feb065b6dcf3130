"""Edits of vLLM that no plugin hook offers: fields of `EngineArgs` and `SchedulerStats`, and a check of CPU kernels.

`patches/` holds the same changes as diffs for vLLM itself. Nothing is edited if vLLM already has the fields, or lacks
what would be edited: stock vLLM then runs unchanged.
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

from vllm_adapmoe.integration.compat import (
    CPU_MOE,
    EDITED,
    QUANTISED_ON_CPU,
    is_switched_on,
    routes_for_quantised_experts,
    runs_quantised_experts,
)


@dataclasses.dataclass
class EngineFields:
    """M1: fields added to `EngineArgs`, so that flags, `LLM(...)` and Ray's engine arguments accept them."""

    moe_method: str | None = None
    adapmoe_config: dict[str, Any] | str | list[dict[str, Any] | str] | None = None
    """Configuration as dict, JSON text or file; entries of a list are merged, later keys win."""


@dataclasses.dataclass
class StatsFields:
    """M2: fields added to `SchedulerStats`, to carry the worker's counters to the front end."""

    worker_stats: dict[str, float | list[float]] | None = None


def add_fields(cls: Any, fields: type) -> bool:
    """Adds the fields of the dataclass `fields` to the dataclass `cls` as keyword arguments.

    Running `dataclass()` over `cls` again would lose its default factories, so the new fields are registered beside
    the old and `__init__` is wrapped. Returns whether any field was missing.
    """
    missing = {field.name: field for field in dataclasses.fields(fields) if field.name not in cls.__dataclass_fields__}
    if not missing:
        return False
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, field in missing.items():
            setattr(self, name, kwargs.pop(name, field.default))
        original(self, *args, **kwargs)

    cls.__init__ = __init__
    cls.__dataclass_fields__ = cls.__dataclass_fields__ | missing
    for name, field in missing.items():
        setattr(cls, name, field.default)
        cls.__annotations__[name] = field.type
    return True


def edit_engine_args(module: ModuleType) -> None:
    """Applies M1 to `vllm.engine.arg_utils`: adds fields and flags, and switches the method on in the configuration."""
    base, derived = module.EngineArgs, module.AsyncEngineArgs
    if not add_fields(base, EngineFields):
        return
    add_fields(derived, EngineFields)
    add_cli_args, create_engine_config = base.add_cli_args, base.create_engine_config

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(title="MoE method", description="How routed experts are stored and run.")
        group.add_argument(
            "--moe-method", default=None, help="Name of an installed MoE method plugin, for instance adapmoe."
        )
        group.add_argument(
            "--adapmoe-config",
            # vLLM's parser collects all single keys into one more such argument and appends it.
            action="append",
            default=None,
            help="Configuration of the adapmoe method: a JSON file, a JSON object, or single keys, e.g. "
            "--adapmoe-config.cache_gb 8. May be repeated: later ones win, single keys over all.",
        )
        return parser

    @functools.wraps(create_engine_config)
    def with_moe_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create_engine_config(self, *args, **kwargs)
        if self.moe_method or self.adapmoe_config is not None or is_switched_on(config):
            from vllm_adapmoe.integration.entry.checked_switch import switch_on

            switch_on(self, config)
        return config

    base.add_cli_args = staticmethod(with_flags)
    base.create_engine_config = with_moe_method


def edit_scheduler_stats(module: ModuleType) -> None:
    """Applies M2 to `vllm.v1.metrics.stats`."""
    add_fields(module.SchedulerStats, StatsFields)


def edit_cpu_moe(module: ModuleType) -> None:
    """Applies M3 and M4 to vLLM's CPU kernels: those for quantised experts without AMX, and with more routers."""
    patched = hasattr(module, "_runs_x86_quantized_experts")
    for name in QUANTISED_ON_CPU:
        kernel = getattr(module, name)
        if not patched:
            kernel._supports_current_device = staticmethod(runs_quantised_experts)
        kernel._supports_routing_method = staticmethod(routes_for_quantised_experts)


EDITS: dict[str, Callable[[ModuleType], None]] = {
    "vllm.engine.arg_utils": edit_engine_args,
    "vllm.v1.metrics.stats": edit_scheduler_stats,
    CPU_MOE: edit_cpu_moe,
}


def edit_module(name: str) -> None:
    """Edits an imported module of vLLM, unless it lacks what would be edited."""
    module = sys.modules[name]
    try:
        attrgetter(*EDITED[name])(module)
    except AttributeError:
        return
    EDITS[name](module)


class _EditedSpec(ModuleSpec):
    """A spec that edits its module as soon as the import ends, even if the import has already begun."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value and self.name in sys.modules:
            edit_module(self.name)


class _EditFinder(MetaPathFinder):
    """Finds the modules to edit through the other finders, and replaces the class of their specs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in EDITS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            spec.__class__ = _EditedSpec
        return spec


def install_edits() -> None:
    """Applies every edit now, or when its module is imported. Further calls in a process do nothing."""
    if any(isinstance(finder, _EditFinder) for finder in sys.meta_path):
        return
    for name in EDITS:
        module = sys.modules.get(name)
        if module is None:
            continue
        if getattr(module.__spec__, "_initializing", False):
            module.__spec__.__class__ = _EditedSpec
        else:
            edit_module(name)
    sys.meta_path.insert(0, _EditFinder())
