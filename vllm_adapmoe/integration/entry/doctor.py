"""Checks of `adapmoe doctor` that need vLLM: the installation, and whether a model can be served."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.metrics.stats import SchedulerStats

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.doctor.finding import Finding
from vllm_adapmoe.integration.compat import METHOD
from vllm_adapmoe.integration.entry.model_check import feature_checks, weight_bits
from vllm_adapmoe.integration.entry.switch import WORKERS
from vllm_adapmoe.integration.entry.version_check import SUPPORTED, is_supported, remedy
from vllm_adapmoe.integration.left_out import REMEDY, left_out
from vllm_adapmoe.integration.loading.identity import load_identity, source_files
from vllm_adapmoe.integration.loading.model_files import config_folder
from vllm_adapmoe.integration.loading.pack_store import open_valid, pack_folder, pack_names
from vllm_adapmoe.planning.checkpoint_size import measure_checkpoint
from vllm_adapmoe.printable import reason
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file import PackMissing
from vllm_adapmoe.store.folder import others_who_may_write
from vllm_adapmoe.store.host_memory import host_memory
from vllm_adapmoe.units import GiB

GROUPS = ("vllm.platform_plugins", "vllm.general_plugins", "vllm.stat_logger_plugins")
SECTION = "Installation"
IN_PART = {"load_format", "speculative_config", "enable_expert_parallel"}
"""Settings that work with some values or on some devices."""


def device_type() -> str:
    """Returns vLLM's device type: `cpu`, `cuda`, or one that the method does not run on."""
    return current_platform.device_type


def check_installation() -> Iterator[Finding]:
    """Checks vLLM's version and metadata, the plugin's entry points, its edits of vLLM, and the device type."""
    packages = importlib.metadata.packages_distributions().get("vllm", [])
    names = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    text = f"vLLM {vllm.__version__} ({names})"
    if is_supported(vllm.__version__):
        yield Finding(SECTION, "ok", f"{text}; {SUPPORTED} are supported")
    else:
        yield Finding(SECTION, "note", f"{text}; {SUPPORTED} are tested", f"if it fails, {remedy()}")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            SECTION, "problem", "vllm serve looks up a distribution named vllm, and there is none",
            "pip install --no-deps the folder patches/vllm-cpu-metadata of the plugin's repository",
        )  # fmt: skip
    groups = {entry.group for entry in importlib.metadata.entry_points(name=METHOD)}
    missing = [group for group in GROUPS if group not in groups]
    if missing:
        yield Finding(
            SECTION, "problem", f"entry points are missing: {', '.join(missing)}", "install vllm-adapmoe again with pip"
        )
    reason = left_out()
    if reason is not None:
        yield Finding(
            SECTION, "problem", reason, REMEDY,
            fails=f"{reason}: --moe-method and LLM(moe_method=...) are unknown to vLLM, and it silently "
            "serves with every expert resident if only additional_config enables the cache",
        )  # fmt: skip
        return
    fields = {"moe_method": EngineArgs, "worker_stats": SchedulerStats}
    absent = [
        f"{cls.__name__}.{name}"
        for name, cls in fields.items()
        if name not in {f.name for f in dataclasses.fields(cls)}
    ]
    if absent:
        yield Finding(
            SECTION, "problem", f"vLLM has loaded without the plugin: no {', '.join(absent)}",
            "install vllm-adapmoe again with pip",
        )  # fmt: skip
    elif not missing:
        yield Finding(SECTION, "ok", "vLLM finds the plugin, and accepts --moe-method and --adapmoe-config")
    if device_type() not in WORKERS:
        yield Finding(
            SECTION, "problem", f"vLLM runs on {device_type() or 'no device'} here",
            f"install vLLM for one of {', '.join(WORKERS)}: the plugin runs on those",
        )  # fmt: skip


def check_model(model: str, revision: str | None, store_dir: Path | None) -> Iterator[Finding]:
    """Runs the checks of a server start on a model and reports its sizes; yields nothing if the plugin is left out."""
    if left_out() is not None:
        return
    settings = {} if store_dir is None else {"store_dir": str(store_dir), "store": "file"}
    section = f"Model {model}"
    try:
        method: dict[str, Any] = {"moe_method": METHOD, "adapmoe_config": settings}
        config = EngineArgs(model=model, revision=revision, skip_tokenizer_init=True, **method).create_engine_config()
    except AdapMoEError as error:
        yield Finding(section, "problem", str(error), fails=f"serving {model}: {error}")
        return
    except Exception as error:  # vLLM and transformers raise errors of any type for a model they do not know
        text = reason(error, lines=2)[:300]
        yield Finding(section, "problem", f"vLLM cannot load it: {text}", "try vllm serve without --moe-method")
        return
    yield from _sizes(section, config)
    yield from _pack(section, config, AdapMoEConfig.parse(settings))
    names = {setting.partition("=")[0].partition(" ")[0] for _, setting, _ in feature_checks(config)} - IN_PART
    refused = f"with any model: {', '.join(sorted(names))}; some methods of speculative decoding, and some load formats"
    yield Finding(section, "ok", "passes the checks of a start", fails=refused)


def _sizes(section: str, config: Any) -> Iterator[Finding]:
    model = config.model_config
    try:
        _, size = measure_checkpoint(config_folder(model.model, model.revision), model.dtype, weight_bits(model))
    except AdapMoEError as error:
        yield Finding(
            section, "ok", f"{model.architectures[0]}: the number of experts is known only when it loads ({error})"
        )
        return
    top_k, layers, nbytes = size.top_k, size.num_layers, size.expert_bytes
    total = size.experts * nbytes
    text = (
        f"{model.architectures[0]}: {size.num_experts} experts, {top_k} per token, in {layers} layers: "
        f"{total / GiB:.2f} GiB of experts, {nbytes / 2**20:.1f} MiB each"
    )
    if device_type() == "cpu":
        room, where = host_memory().available, "memory"
    else:
        room, where = current_platform.get_device_total_memory(), "device memory"
    if total < room:
        works = f"{total / GiB:.2f} GiB of experts in {room / GiB:.2f} GiB of {where}: they may all fit"
        yield Finding(section, "ok", text, works=works)
    else:
        min_bytes = (top_k or 1) * layers * nbytes
        works = f"{total / GiB:.2f} GiB of experts with {room / GiB:.2f} GiB of {where}: most are fetched on demand"
        yield Finding(
            section,
            "note",
            text,
            f"{min_bytes / GiB:.2f} GiB hold the experts that one token needs in every layer",
            works=works,
        )


def _pack(section: str, config: Any, settings: AdapMoEConfig) -> Iterator[Finding]:
    try:
        sources = source_files(config.model_config, config.load_config, download=False)
        path = pack_folder(settings, sources) / pack_names(settings, config)[0]
        open_valid(path, load_identity(config), sources).close()
    except PackMissing:
        yield Finding(section, "ok", f"not packed yet: the first start with store=file writes {path}")
    except (StoreError, AdapMoEError) as error:
        yield Finding(section, "note", str(error), "the first start packs again, or reports what to do")
    else:
        yield Finding(section, "ok", f"packed already in {path}")
        writers = others_who_may_write(path)
        if writers is not None:
            yield Finding(
                section, "note", f"{path} can be replaced by {writers}", "chmod go-w, or set another store_dir"
            )
