"""Switches the method on in an engine's configuration, whichever way it was requested."""

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.compat import METHOD
from vllm_adapmoe.integration.entry.model_check import check_model, check_packs
from vllm_adapmoe.integration.entry.moe_backend import set_moe_backend
from vllm_adapmoe.integration.loading.identity import model_hash
from vllm_adapmoe.integration.model_info import model_info
from vllm_adapmoe.integration.scheduler.scheduler import is_cache_aware
from vllm_adapmoe.integration.settings import EngineSettings, HeadsFile, ProfiledModel
from vllm_adapmoe.prefetch.heads import NextTokenHeads, heads_path
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.profile.shipped import find_profile
from vllm_adapmoe.profile.thresholds import describe, plan_gating

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

WORKERS = {
    "cpu": "vllm_adapmoe.integration.worker.worker.AdapMoECPUWorker",
    "cuda": "vllm_adapmoe.integration.worker.worker.AdapMoEWorker",
}
SCHEDULERS = {
    False: "vllm_adapmoe.integration.scheduler.scheduler.ExpertCacheScheduler",
    True: "vllm_adapmoe.integration.scheduler.scheduler.ExpertCacheAsyncScheduler",
}


def switch_on(engine_args: Any, vllm_config: VllmConfig) -> None:
    """Writes `moe_method` and `adapmoe_config` to `additional_config["adapmoe"]`, and sets worker and scheduler.

    Raises:
        AdapMoEError: settings are contradictory or unknown, or the model or a feature cannot work with them.
    """
    config = _requested(engine_args, vllm_config)
    if config.profile is not None:
        config = config.model_copy(update={"profile": str(find_profile(config.profile))})
    if engine_args.worker_cls != "auto":
        raise AdapMoEError(
            f"worker_cls={engine_args.worker_cls!r} conflicts with moe_method={METHOD!r}, which sets it; remove one"
        )
    device = current_platform.device_type
    if device not in WORKERS:
        raise AdapMoEError(f"moe_method={METHOD!r} does not run on {device}; it runs on {', '.join(WORKERS)}")
    check_model(config, vllm_config)
    profile = _profile(config, vllm_config)
    if config.precision == "auto":
        # Imports the worker's modules, which the front end does not need otherwise.
        from vllm_adapmoe.integration.entry.precision_choice import resolve_precision

        config = resolve_precision(config, vllm_config, profile)
    check_packs(config, vllm_config)
    if device == "cuda":
        set_moe_backend(config, vllm_config)
    settings = EngineSettings(config=config) if profile is None else _follow_profile(config, profile)
    settings.write(vllm_config)
    vllm_config.parallel_config.worker_cls = WORKERS[device]
    if device == "cuda":
        _prepare_graphs(vllm_config)
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
    elif not is_cache_aware(scheduler.scheduler_cls):
        logger.warning(
            "scheduler_cls=%s is not one of %s: there will be no vllm:adapmoe metrics, and an expert that cannot be "
            "read ends the engine instead of the request; derive it from one of them or remove it",
            scheduler.scheduler_cls, ", ".join(SCHEDULERS.values()),
        )  # fmt: skip


def _prepare_graphs(vllm_config: VllmConfig) -> None:
    """Adds our ops to vLLM's `splitting_ops`; the worker decides later which MoE blocks use them."""
    from vllm_adapmoe.integration.layers.graph_break import OPS

    compilation = vllm_config.compilation_config
    if compilation.splitting_ops:
        compilation.splitting_ops += [op for op in OPS if op not in compilation.splitting_ops]


def _profile(config: AdapMoEConfig, vllm_config: VllmConfig) -> ModelProfile | None:
    """Reads and checks the profile in the front end, whose machine has the file."""
    if config.profile is None:
        return None
    if config.gating.mode != "off" and (vllm_config.model_config.get_num_experts_per_tok() or 2) < 2:
        raise AdapMoEError("gating has nothing to drop: this model uses one expert per token; remove gating")
    profile = ModelProfile.load(config.profile)
    info = model_info(vllm_config.model_config)
    profile.check(info, config.profile)  # cheap checks before hashing the weights
    if profile.model.hash is not None:
        value = model_hash(vllm_config.model_config, vllm_config.load_config)
        profile.check(info.model_copy(update={"hash": value}), config.profile)
    return profile


def _follow_profile(config: AdapMoEConfig, profile: ModelProfile) -> EngineSettings:
    """Returns the settings and what the profile adds: gating plan, expected loads by slots, and next-token heads."""
    assert config.profile is not None
    plan = plan_gating(config.gating, profile, config.bits)
    loads = heads = None
    if plan is not None:
        logger.info("%s", describe(plan, profile, config.bits))
    if config.allocation == "profile":
        threshold = plan.threshold if plan is not None and plan.rule == "token" else 0.0
        ahead = config.prefetch.max_experts if config.prefetch.lookahead else 0
        loads = [curve.tolist() for curve in curves_of_profile(profile, threshold, ahead)]
    if profile.heads is not None:
        path, model = heads_path(config.profile).resolve(), profile.model
        shape = (model.num_layers, model.hidden_size, model.num_experts)
        NextTokenHeads.load(path, profile.heads, *shape)
        heads = HeadsFile(path=str(path), hash=profile.heads, shape=shape)
    elif config.eviction == "next_token":
        raise AdapMoEError(
            f"eviction=next_token: profile={config.profile!r} has no next-token heads; make it again with "
            "adapmoe calibrate"
        )
    elif plan is None and config.allocation != "profile":
        raise AdapMoEError(
            f"profile={config.profile!r} has no next-token heads, so it has no effect while gating.mode=off and "
            f"allocation={config.allocation}; set gating, remove it, or make it again with adapmoe calibrate"
        )
    profiled = ProfiledModel(path=config.profile, model=profile.model)
    return EngineSettings(config=config, gating=plan, expected_loads=loads, heads=heads, profiled=profiled)


def _requested(engine_args: Any, vllm_config: VllmConfig) -> AdapMoEConfig:
    additional = _additional(vllm_config)
    method, given = engine_args.moe_method, engine_args.adapmoe_config
    if method not in (None, METHOD):
        raise AdapMoEError(f"moe_method={method!r} is not known; use {METHOD!r} or leave it out")
    if given is not None and method is None:
        raise AdapMoEError(f"adapmoe_config={given!r} is set but moe_method is not; add moe_method={METHOD!r}")
    config = AdapMoEConfig.parse(given)
    if METHOD not in additional:
        return config
    plain = AdapMoEConfig.parse(additional[METHOD])
    if given is not None and config != plain:
        raise AdapMoEError(
            f"adapmoe_config={given!r} and additional_config[{METHOD!r}]={additional[METHOD]!r} differ; keep one"
        )
    return plain


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        raise AdapMoEError(f"additional_config={additional!r} is not a dict; moe_method={METHOD!r} needs one")
    return additional
