"""Everything that depends on the version of vLLM: the edits that no registration can make.

`patches/` holds the same as diffs for vLLM itself. Where vLLM has the fields already, nothing is edited here.
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@dataclasses.dataclass
class EngineFields:
    """M1: what `EngineArgs` gains, so that flags, `LLM(...)` and Ray's engine arguments accept it."""

    moe_method: str | None = None
    adapmoe_config: dict[str, Any] | str | None = None


@dataclasses.dataclass
class StatsFields:
    """M2: what `SchedulerStats` gains, to carry counters of the worker to the front end."""

    worker_stats: dict[str, float | list[float]] | None = None


def adapmoe_settings(vllm_config: Any) -> Any:
    """What `additional_config["adapmoe"]` holds; None where the method is off."""
    additional = vllm_config.additional_config
    return additional.get("adapmoe") if isinstance(additional, dict) else None


def gating_settings(vllm_config: Any) -> Any:
    """What `additional_config["adapmoe_gating"]` holds: the front end's `GatingPlan`; None where nothing is gated."""
    additional = vllm_config.additional_config
    return additional.get("adapmoe_gating") if isinstance(additional, dict) else None


def expected_loads_settings(vllm_config: Any) -> Any:
    """What `additional_config["adapmoe_expected_loads"]` holds: of each layer, loads by slots; None without a profile's
    allocation."""
    additional = vllm_config.additional_config
    return additional.get("adapmoe_expected_loads") if isinstance(additional, dict) else None


def heads_settings(vllm_config: Any) -> Any:
    """What `additional_config["adapmoe_heads"]` holds: path and hash of the profile's next-token heads, if any."""
    additional = vllm_config.additional_config
    return additional.get("adapmoe_heads") if isinstance(additional, dict) else None


def requests_of_step(runner: Any, scheduler_output: Any) -> list[tuple[str, int, int]]:
    """Id, first position and rows of each request of the step under way, in the order of its rows."""
    scheduled = scheduler_output.num_scheduled_tokens
    if hasattr(runner, "req_states"):  # model runner V2, which keeps its batch to itself while the model runs
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        names = sort_batch_req_ids(scheduled, scheduler_output.scheduled_spec_decode_tokens, runner.decode_query_len)
        states = runner.req_states
        computed = [states.num_computed_tokens_np[states.req_id_to_index[name]] for name in names]
    else:
        batch = runner.input_batch
        there = [(name, batch.num_computed_tokens_cpu[i]) for i, name in enumerate(batch.req_ids) if name in scheduled]
        names, computed = [name for name, _ in there], [count for _, count in there]
    return [(name, int(count), scheduled[name]) for name, count in zip(names, computed, strict=True)]


def marlin_takes_mxfp4_with_quantised_activations() -> bool:
    """Whether Marlin may be set for MXFP4 experts whose checkpoint quantises activations too: from 0.32 on."""
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    return hasattr(mxfp4, "_warn_on_bf16_fallback")


def add_fields(cls: Any, fields: type) -> bool:
    """Adds the fields of the dataclass `fields` to the dataclass `cls` as keyword arguments.

    Running `dataclass()` over `cls` again would lose its default factories, so the new fields are put beside the old
    and `__init__` is wrapped. Returns whether anything was missing.
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
    """M1 on `vllm.engine.arg_utils`: fields, flags, and the call that applies them."""
    base, derived = module.EngineArgs, module.AsyncEngineArgs
    if not add_fields(base, EngineFields):
        return
    add_fields(derived, EngineFields)
    add_cli_args, create_engine_config = base.add_cli_args, base.create_engine_config

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(title="MoE method", description="How routed experts are held and run.")
        group.add_argument(
            "--moe-method", default=None, help="Name of an installed MoE method plugin, for instance adapmoe."
        )
        group.add_argument(
            "--adapmoe-config",
            default=None,
            help="Configuration of the adapmoe method: a JSON file, a JSON object, or single keys as in "
            "--adapmoe-config.cache_gb 8",
        )
        return parser

    @functools.wraps(create_engine_config)
    def with_moe_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create_engine_config(self, *args, **kwargs)
        if self.moe_method or self.adapmoe_config is not None or adapmoe_settings(config) is not None:
            from vllm_adapmoe.integration.switch import switch_on

            switch_on(self, config)
        return config

    base.add_cli_args = staticmethod(with_flags)
    base.create_engine_config = with_moe_method


def edit_scheduler_stats(module: ModuleType) -> None:
    """M2 on `vllm.v1.metrics.stats`."""
    add_fields(module.SchedulerStats, StatsFields)


EDITS: dict[str, Callable[[ModuleType], None]] = {
    "vllm.engine.arg_utils": edit_engine_args,
    "vllm.v1.metrics.stats": edit_scheduler_stats,
}


class _EditedSpec(ModuleSpec):
    """Spec of a module that is edited as soon as its import ends, also when that import is already under way."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value and self.name in sys.modules:
            EDITS[self.name](sys.modules[self.name])


class _EditFinder(MetaPathFinder):
    """Finds the modules to edit as everyone else does, and marks their specs."""

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
    """Arranges every edit, now or when its module is imported. Once per process, however often it is called."""
    if any(isinstance(finder, _EditFinder) for finder in sys.meta_path):
        return
    for name, edit in EDITS.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        if getattr(module.__spec__, "_initializing", False):
            module.__spec__.__class__ = _EditedSpec
        else:
            edit(module)
    sys.meta_path.insert(0, _EditFinder())
