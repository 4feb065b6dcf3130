"""Implements `adapmoe plan`: tokens per second by memory for one model, for each number of bits per expert weight."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.planning.checkpoint_size import has_weights, measure_checkpoint, measure_step
from vllm_adapmoe.planning.from_trace import TraceReplay
from vllm_adapmoe.planning.link import measure_disk, measure_link, measure_weights
from vllm_adapmoe.planning.memory_plan import (
    Estimate,
    ModelSize,
    Reserve,
    Speed,
    budgets,
    closed_form,
    curves_of,
    has_statistics,
    slots_for,
)
from vllm_adapmoe.planning.token_time import LAYER_KERNELS
from vllm_adapmoe.precision.formats import PRECISIONS
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.units import GiB, parse_bytes

ALLOCATIONS = ("pool", "uniform", "profile", "trace")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Question:
    """Options of `adapmoe plan` as they were given."""

    model: Path
    profile: Path | None = None
    trace: Path | None = None
    memory: str | None = None
    reserve: str | None = None
    dtype: str = "auto"
    expert_bits: Sequence[float] = ()
    """Bits per weight of a routed expert, one variant each; empty: those of the dtype."""
    link: str = "auto"
    """Link bandwidth, 1e9 bytes per second; `auto`: measured."""
    compute: float | None = None
    """Compute time per layer, ms; None: estimated from this machine's memory bandwidth."""
    max_loss_increase: float | None = None
    allocation: str = "pool"
    store_dir: Path | None = None
    max_model_len: int | None = None
    """Maximum tokens per request; None: the model's maximum."""
    precisions: Sequence[float] = ()
    """Values of the key `precision`, 16, 8 or 4, one variant each; in place of `expert_bits`."""
    host: str | None = None
    """Host memory for experts beside a GPU (`host_gb`); None: all of them are in host memory, or slots are."""
    disk: str = "auto"
    """Bandwidth of reading the packed file, with `host`, 1e9 bytes per second; `auto`: measured."""

    @property
    def on_cpu(self) -> bool:
        """Whether quantised experts are planned in the format of vLLM's x86 kernels: not with a link or a GPU."""
        return self.link == "auto" and not torch.cuda.is_available()


def run_plan(question: Question, checkpoint_hash: Callable[[Path], str]) -> dict[str, Any]:
    """Computes sizes, speeds and estimates for each number of bits.

    Args:
        question: options of the command.
        checkpoint_hash: hashes the model's weights; called if the profile has a hash and the folder has weights.

    Raises:
        AdapMoEError: an unusable option, or a budget that cannot work.
    """
    dtype = _dtype(question.dtype)
    if any(bits <= 0 for bits in question.expert_bits):
        raise AdapMoEError(f"--expert-bits {question.expert_bits[0]:g} is not usable; more than 0, e.g. 16, 8 or 4.5")
    if question.precisions and question.expert_bits:
        raise AdapMoEError("--precision and --expert-bits both set the size of the experts; set only one of them")
    if unknown := [value for value in question.precisions if value not in PRECISIONS]:
        raise AdapMoEError(f"--precision {unknown[0]:g} is not known; use 16, 8 or 4")
    if question.disk != "auto" and question.host is None:
        raise AdapMoEError(f"--disk={question.disk} has no effect without --host; add it, or remove --disk")
    if question.host is not None and question.on_cpu:
        raise AdapMoEError(
            f"--host={question.host} is for experts between a GPU and the disk; set --link to plan for one, e.g. "
            "--link 25, or raise --memory"
        )
    profile = None if question.profile is None else ModelProfile.load(question.profile)
    info, _ = measure_checkpoint(question.model, dtype, (question.expert_bits or [16.0])[0])
    if profile is not None:
        profile.check(info, str(question.profile))
        if profile.model.hash is not None and has_weights(question.model):
            profile.check(info.model_copy(update={"hash": checkpoint_hash(question.model)}), str(question.profile))
    reserve = _reserve(question, dtype)
    if question.allocation == "profile" and not has_statistics(profile):
        raise AdapMoEError("--allocation=profile needs a --profile with routing statistics; see adapmoe calibrate")
    _check_loss_limit(question, profile)
    weights_gbps, compute_source = None, "as given"
    if question.compute is None:
        weights, source = measure_weights()
        weights_gbps, compute_source = (
            weights / 1e9,
            f"a lower bound: {'' if question.on_cpu else f'{LAYER_KERNELS} kernels a layer, '}reading weights at the "
            f"speed of {source}",
        )
    variants = []
    chosen: list[tuple[float | None, int | None]] = [(bits, None) for bits in question.expert_bits]
    chosen += [(None, int(precision)) for precision in question.precisions]
    for bits, precision in chosen or [(None, None)]:
        variants.append(_variant(question, dtype, bits, precision, profile, reserve, weights_gbps))
    return {
        "plan": "memory",
        "model": str(question.model),
        "profile": None if question.profile is None else str(question.profile),
        "memory": None if question.memory is None else parse_bytes("--memory", question.memory),
        "reserve": asdict(reserve),
        "basis": _basis(question, profile),
        "allocation": question.allocation,
        "compute": {"ms_per_layer": question.compute, "weights_gbps": weights_gbps, "source": compute_source},
        "max_loss_increase": question.max_loss_increase,
        "variants": variants,
    }


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise AdapMoEError(f"--dtype {name} is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _reserve(question: Question, dtype: torch.dtype | None) -> Reserve:
    if question.reserve is None:
        _, size = measure_checkpoint(question.model, dtype, (question.expert_bits or [16.0])[0])
        return Reserve.of_gpu(size, measure_step(question.model, dtype, question.max_model_len))
    if question.max_model_len is not None:
        raise AdapMoEError(
            f"--max-model-len={question.max_model_len} sets the KV cache of the default reserve, which --reserve="
            f"{question.reserve} replaces; set only one of them"
        )
    return Reserve(parse_bytes("--reserve", question.reserve))


def _check_loss_limit(question: Question, profile: ModelProfile | None) -> None:
    if question.max_loss_increase is None:
        return
    if profile is None or not has_statistics(profile) or profile.base_loss is None:
        have = "no profile is given" if profile is None else f"profile={str(question.profile)!r} has constants only"
        raise AdapMoEError(
            f"--max-loss-increase={question.max_loss_increase} cannot be planned: {have}; omit it, or set a "
            "profile that adapmoe calibrate made"
        )
    if question.max_loss_increase <= 0:
        raise AdapMoEError(f"--max-loss-increase={question.max_loss_increase} is not usable; more than 0, e.g. 0.005")


def _gating(question: Question, profile: ModelProfile | None, precision: int) -> dict[str, float | None] | None:
    """Returns what gating may drop at this precision, whose own cost counts, too.

    None without a limit of the loss, and beside other precisions for one that exceeds it alone.
    """
    if question.max_loss_increase is None:
        return None
    assert profile is not None and profile.base_loss is not None
    rounding = profile.rounding_loss(precision)
    increase = None if rounding is None else rounding / profile.base_loss
    if increase is not None and increase >= question.max_loss_increase:
        if len(question.precisions) == 1:
            raise AdapMoEError(
                f"--max-loss-increase={question.max_loss_increase} leaves nothing for gating: --precision {precision} "
                f"alone increases the loss by {increase:.2%}; allow more, or use more bits"
            )
        return None
    threshold = profile.threshold_for_loss(question.max_loss_increase, precision)
    return {
        "threshold": threshold,
        "mean_experts": profile.mean_experts(threshold),
        "rounding_loss_increase": increase,
    }


def _basis(question: Question, profile: ModelProfile | None) -> str:
    if question.trace is not None:
        return "replay of a trace, prompts included, with the server's decisions and defaults"
    text = "closed form: every expert equally likely, independent of the previous token, no prefetch, fixed shares"
    if not has_statistics(profile):
        text += "; assumed, without a profile that has routing statistics"
    return text


def _variant(
    question: Question,
    dtype: torch.dtype | None,
    bits: float | None,
    precision: int | None,
    profile: ModelProfile | None,
    reserve: Reserve,
    weights_gbps: float | None,
) -> dict[str, Any]:
    _, size = measure_checkpoint(question.model, dtype, bits, precision, question.on_cpu)
    gating = _gating(question, profile, precision or 16)
    threshold = None if gating is None else gating["threshold"]
    requested = None
    if question.memory is not None:
        requested = slots_for(size, parse_bytes("--memory", question.memory), reserve)
    link, link_source = _link(question, size)
    layer_seconds = None if question.compute is None else question.compute / 1e3
    tier = _tier(question, size)
    speed = Speed(link, layer_seconds, (weights_gbps or 0) * 1e9)
    if tier is not None:
        speed = replace(speed, host_experts=tier["experts"], disk=tier["disk_gbps"] * 1e9)
    decided_by = None
    if not question.on_cpu:
        decided_by = "device" if tier is None or tier["experts"] == size.experts else "host"
        speed = speed.decided_on_device() if decided_by == "device" else speed.decided_on_host()
    replayed = None
    if question.trace is not None:
        loads = None
        if question.allocation == "profile":
            loads = [curve.tolist() for curve in curves_of(size, profile)]
        replayed = TraceReplay.load(question.trace, size, speed, question.allocation, loads)
    limits = [None] if threshold is None else [None, threshold]
    estimates: list[list[Estimate]] = []
    slots_of_rows = budgets(size, requested)
    for limit in limits:
        if replayed is None:
            curves = curves_of(size, profile, limit or 0.0)
            estimates.append([closed_form(size, curves, slots, speed, question.allocation) for slots in slots_of_rows])
        else:
            sensitivity = None if limit is None or profile is None else [layer.sensitivity for layer in profile.layers]
            estimates.append(replayed.estimates(slots_of_rows, sensitivity, limit or 0.0))
    points = []
    for number, slots in enumerate(slots_of_rows):
        points.append(
            {
                "slots": slots,
                "resident": slots / size.experts,
                "memory": reserve.memory(size, slots),
                "asked": slots == requested,
                "ungated": asdict(estimates[0][number]),
                "gated": asdict(estimates[1][number]) if threshold is not None else None,
            }
        )
    return {
        "expert_bits": bits,
        "precision": precision,
        "size": asdict(size),
        "gating": gating,
        "link": {"gbps": link / 1e9, "source": link_source},
        "decode": {"decided_by": decided_by, "fetch_gbps": speed.link / 1e9, "layer_us": speed.decide_seconds * 1e6},
        "host": tier,
        "points": points,
        "config": None if requested is None else _config(question, requested, precision),
    }


def _link(question: Question, size: ModelSize) -> tuple[float, str]:
    if question.link == "auto":
        return measure_link(size.expert_bytes, question.store_dir)
    return _bandwidth("--link", question.link, "25"), "as given"


def _tier(question: Question, size: ModelSize) -> dict[str, Any] | None:
    """Returns how many experts host memory holds, and the disk's bandwidth; None without `--host`."""
    if question.host is None:
        return None
    nbytes = parse_bytes("--host", question.host)
    if question.disk == "auto":
        disk, source = measure_disk(size.expert_bytes, question.store_dir)
    else:
        disk, source = _bandwidth("--disk", question.disk, "3"), "as given"
    if nbytes < size.expert_bytes:
        raise AdapMoEError(
            f"--host={question.host} holds no expert of {size.expert_bytes / GiB:.4f} GiB; raise it, or remove it"
        )
    experts = min(size.experts, nbytes // size.expert_bytes)
    return {"bytes": nbytes, "experts": experts, "disk_gbps": disk / 1e9, "source": source}


def _bandwidth(option: str, text: str, example: str) -> float:
    """Parses a bandwidth in 1e9 bytes per second; returns bytes per second."""
    try:
        gbps = float(text)
    except ValueError:
        gbps = 0.0
    if not 0 < gbps < 1e6:
        raise AdapMoEError(f"{option}={text} is not usable; auto, or 1e9 bytes per second, e.g. {example}")
    return gbps * 1e9


def _config(question: Question, slots: int, precision: int | None) -> dict[str, Any]:
    """Returns the `adapmoe_config` for the given memory."""
    config: dict[str, Any] = {"cache_experts": slots, "allocation": question.allocation}
    if precision is not None:
        config["precision"] = precision
    if question.host is not None:
        config["host_gb"] = parse_bytes("--host", question.host) / GiB
    if question.store_dir is not None:
        config["store_dir"] = str(question.store_dir)
    if question.profile is not None and (question.max_loss_increase or question.allocation == "profile"):
        config["profile"] = str(question.profile)
    if question.max_loss_increase is not None:
        config["gating"] = {"mode": "token", "max_loss_increase": question.max_loss_increase}
    AdapMoEConfig.parse(config)
    return config


def config_of(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the `--adapmoe-config` with absolute paths, from a result with one variant and --memory."""
    config = result["variants"][0]["config"]
    return config | {key: str(Path(config[key]).resolve()) for key in ("profile", "store_dir") if key in config}
