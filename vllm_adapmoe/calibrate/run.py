"""Implements `adapmoe calibrate`: measures a model on text and writes its ModelProfile."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from vllm_adapmoe.calibrate.fisher import Fisher, fits_in_memory
from vllm_adapmoe.calibrate.progress import Progress
from vllm_adapmoe.calibrate.text import data_hash, read_sequences
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.prefetch.heads import NextTokenHeads, heads_path
from vllm_adapmoe.profile import statistics
from vllm_adapmoe.profile.model_profile import (
    MAX_LAYERS,
    Confirmation,
    DataInfo,
    LayerProfile,
    ModelInfo,
    ModelProfile,
    RoundingCost,
)
from vllm_adapmoe.profile.next_token import layers_at_a_time
from vllm_adapmoe.profile.statistics import Sums, digits

Method = Literal["fisher", "forward", "auto"]
GROUP_TOKENS = 4096
"""Tokens per piece of work: the most that is lost when a calibration is killed, and the unit of standard errors."""
CONFIRMED_DROPS = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7)
"""Points at which predictions are confirmed, as shares of the top_k - 1 experts that a token can lose."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """What to calibrate: a model, the text to do it on, and how."""

    model: Path
    """Checkpoint folder."""
    data: Path
    """A text file, or a folder of `*.txt`."""
    output: Path
    """File for the profile."""
    method: Method = "auto"
    """`fisher` differentiates the loss with transformers. `forward` perturbs the routing weights of one layer at a time
    in vLLM and needs no more memory than serving; unlike a gradient, it includes the effect of later layers routing
    differently. `auto` is `fisher` if the model fits in memory."""
    tokens: int = 65_536
    """Maximum number of tokens to use of the data."""
    sequence_length: int = 256
    """Tokens per sequence."""
    seed: int = 0
    """Random seed for the choice of sequences."""
    cache: dict[str, Any] = field(default_factory=dict)
    """`adapmoe_config` of the engine; empty: as many slots as memory allows."""
    precisions: Sequence[Literal[8, 4]] = ()
    """Values of the key `precision` whose cost to measure, each with an engine of its own."""


def calibrate(spec: CalibrationSpec) -> ModelProfile:
    """Measures a model on text and writes its profile.

    After an interruption the same call resumes; the same arguments give the same file.

    Raises:
        AdapMoEError: no text, no routed experts, one expert per token, or a model that the method cannot measure.
    """
    # In one process the engine sees all requests of a group at once and runs the same steps every time.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_adapmoe.integration.measure.engine import check_settings, describe_model

    info = describe_model(spec.model)
    for precision in spec.precisions:
        check_settings(spec.model, spec.cache | {"precision": precision})
    if info.top_k == 1:
        raise AdapMoEError(f"model={str(spec.model)!r} uses one expert per token, so gating has no expert to drop")
    method = spec.method
    if method == "auto":
        method = "fisher" if fits_in_memory(spec.model) else "forward"
    spec = replace(spec, method=method)
    length = spec.sequence_length
    sequences = read_sequences(spec.model, spec.data, length, max(2, spec.tokens // length), spec.seed)
    size = max(1, min(GROUP_TOKENS // length, len(sequences) // 2))
    groups = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    versions = _versions(method)
    described = DataInfo(
        hash=data_hash(sequences),
        sequences=len(sequences),
        sequence_length=length,
        tokens=sum(len(ids) - 1 for ids in sequences),
        seed=spec.seed,
    )
    settings = {"model": info.model_dump(), "data": described.model_dump(), "method": method, "versions": versions}
    sums = len(groups) * 4096  # numbers of a layer's histograms and counts, per expert
    max_bytes = 8 * (info.num_layers or MAX_LAYERS) * info.num_experts * (2 * info.hidden_size + sums) + (1 << 28)
    progress = Progress(spec.output.with_name(spec.output.name + ".partial"), settings, max_bytes)
    if progress.resumed:
        tqdm.write(f"resuming from {progress.path}: {len(progress.done)} pieces are done")
    if method == "fisher":
        _differentiate(spec.model, groups, progress)
    layers, info = _serve(spec, groups, progress, info)
    for precision in spec.precisions:
        _round(spec, precision, groups, progress)
    profile = _confirmed(
        ModelProfile(
            method=method,
            source=f"adapmoe calibrate --method {method}",
            model=info,
            data=described,
            versions=versions,
            base_loss=_base_loss(groups, progress),
            rounding=[_rounding_cost(precision, groups, progress) for precision in spec.precisions],
            layers=layers,
        ),
        groups,
        progress,
    )
    if describe_model(spec.model).hash != info.hash:
        raise AdapMoEError(f"model={str(spec.model)!r} has changed while it was calibrated; start again")
    heads = _heads(progress, len(layers))
    profile = profile.model_copy(update={"heads": heads.save(heads_path(spec.output))})
    profile.save(spec.output)
    progress.finish()
    return profile


def _pieces(name: str, groups: list, progress: Progress, action: str) -> Iterator[tuple[str, Any]]:
    """Yields the groups whose piece `name` is not done yet, under a progress bar."""
    with tqdm(total=len(groups), desc=action, unit="group") as bar:
        for number, group in enumerate(groups):
            piece = f"{name}/{number}"
            if piece not in progress.done:
                yield piece, group
            bar.update()


def _differentiate(model: Path, groups: list, progress: Progress) -> None:
    if all(f"fisher/{number}" in progress.done for number in range(len(groups))):
        return
    fisher = Fisher(model)
    for piece, group in _pieces("fisher", groups, progress, "Sensitivities"):
        progress.add(piece, fisher.sums(group))


def _serve(
    spec: CalibrationSpec, groups: list, progress: Progress, info: ModelInfo
) -> tuple[list[LayerProfile], ModelInfo]:
    """Runs all measurements in vLLM; returns the profile's layers, and `info` completed by what the engine reports."""
    from vllm_adapmoe.integration.measure.losses import prefill_losses

    with _engine(spec) as engine:
        built = engine.call("experts_built")
        info = info.model_copy(update={key: count for key, count in built.items() if not getattr(info, key)})
        engine.call("start_probe")
        for piece, group in _pieces("routing", groups, progress, "Routing"):
            engine.call("probe_layer", True)
            loss = prefill_losses(engine, group).nats.sum()
            layers = engine.call("read_probe")
            sums = {
                f"{index}.{key}": np.array(value) for index, layer in enumerate(layers) for key, value in layer.items()
            }
            progress.add(piece, {"loss": np.array(loss)} | sums)
        count = 1 + max(int(key.split(".")[0]) for key in progress.done["routing/0"] if "." in key)
        if spec.method == "forward":
            for piece, group in _pieces("forward", groups, progress, f"Sensitivities, {count} layers"):
                losses = np.zeros((2, count))
                for layer in range(count):
                    for row, step in enumerate((1.0, -1.0)):
                        engine.call("probe_layer", False, layer, step)
                        losses[row, layer] = prefill_losses(engine, group).nats.sum()
                progress.add(piece, {"there": losses[0], "back": losses[1]})
        at_a_time = layers_at_a_time(info.hidden_size)
        for first in range(0, count, at_a_time):
            piece = f"heads/{first}"
            if piece in progress.done:
                continue
            fitted = list(range(first, min(first + at_a_time, count)))
            engine.call("fit_heads", fitted + [-1] * (first == 0))
            for group in tqdm(groups, desc=f"Next-token heads, {len(fitted)} of {count} layers", unit="group"):
                prefill_losses(engine, group)
            progress.add(piece, {index: np.array(head) for index, head in engine.call("read_heads").items()})
        engine.call("probe_layer", False)
        layers = _layers(groups, progress, spec.method, count)
        draft = ModelProfile(
            method="forward" if spec.method == "forward" else "fisher",
            source="",
            model=info,
            layers=layers,
        )
        for place, threshold in enumerate(_thresholds(draft)):
            plan = {"rule": "token", "threshold": threshold, "sensitivity": [layer.sensitivity for layer in layers]}
            engine.call("set_gating", plan)
            for piece, group in _pieces(f"confirm{place}", groups, progress, f"Confirming {place + 1}"):
                progress.add(piece, {"loss": np.array(prefill_losses(engine, group).nats.sum())})
    return layers, info


def _engine(spec: CalibrationSpec, **cache: Any) -> Any:
    from vllm_adapmoe.integration.measure.engine import Engine

    return Engine(
        spec.model,
        spec.cache | cache,
        enforce_eager=True,
        max_model_len=spec.sequence_length + 1,
        max_num_batched_tokens=max(GROUP_TOKENS, spec.sequence_length + 1),
    )


def _round(spec: CalibrationSpec, precision: int, groups: list, progress: Progress) -> None:
    """Measures the loss with experts of `precision` bits."""
    from vllm_adapmoe.integration.measure.losses import prefill_losses

    name = f"precision{precision}"
    if all(f"{name}/{number}" in progress.done for number in range(len(groups))):
        return
    with _engine(spec, precision=precision) as engine:
        for piece, group in _pieces(name, groups, progress, f"Experts of {precision} bits"):
            progress.add(piece, {"loss": np.array(prefill_losses(engine, group).nats.sum())})


def _rounding_cost(precision: Literal[8, 4], groups: list, progress: Progress) -> RoundingCost:
    rise = _column(groups, progress, f"precision{precision}", "loss") - _column(groups, progress, "routing", "loss")
    measured, error = ratio(rise, _tokens(groups))
    return RoundingCost(precision=precision, measured_loss_increase=digits(measured), measured_stderr=digits(error))


def _tokens(groups: list) -> np.ndarray:
    """Returns the tokens with a loss in each group, `[groups]`, float64."""
    return np.array([sum(len(ids) - 1 for ids in group) for group in groups], dtype=float)


def _heads(progress: Progress, count: int) -> NextTokenHeads:
    heads = {
        int(index): head.astype(np.float32)
        for piece, part in progress.done.items()
        if piece.startswith("heads/")
        for index, head in part.items()
    }
    return NextTokenHeads([heads[index] for index in range(count)], heads[-1])


def _thresholds(profile: ModelProfile) -> list[float]:
    top_k = profile.model.top_k
    return [profile.threshold_for_experts(top_k - share * (top_k - 1)) for share in CONFIRMED_DROPS]


def _column(groups: list, progress: Progress, name: str, key: str) -> np.ndarray:
    """Returns the sums `key` of the pieces `name`, `[groups, ...]`."""
    return np.stack([progress.done[f"{name}/{number}"][key] for number in range(len(groups))])


def _layers(groups: list, progress: Progress, method: str, count: int) -> list[LayerProfile]:
    base = _column(groups, progress, "routing", "loss")
    layers = []
    for index in range(count):
        routing: Sums = {}
        for number in range(len(groups)):
            part = progress.done[f"routing/{number}"]
            prefix = f"{index}."
            statistics.add(routing, {k.removeprefix(prefix): v for k, v in part.items() if k.startswith(prefix)})
        if method == "fisher":
            cost = _column(groups, progress, "fisher", "cost")[:, index]
            second = _column(groups, progress, "fisher", "second")[:, index]
            sensitivity, error = ratio(second, cost)
        else:
            # Dropping moves the layer's output by d. The same weights moved the other way move it by -d, and the mean
            # of the two changes of the loss is the second-order part, without the noise of the first-order one.
            cost = _column(groups, progress, "routing", f"{index}.half_cost")
            forth = _column(groups, progress, "forward", "there")[:, index] - base
            back = _column(groups, progress, "forward", "back")[:, index] - base
            sensitivity, error = ratio((forth + back) / 2, cost)
            # With little data the estimate for an insensitive layer may be negative: the sensitivity is small.
            sensitivity = max(sensitivity, error)
        layers.append(
            LayerProfile(
                sensitivity=digits(sensitivity),
                sensitivity_stderr=digits(error),
                **statistics.routing_profile(routing),  # type: ignore[arg-type]
            )
        )
    return layers


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """Returns the ratio of two sums over groups and its standard error (delta method; groups are independent).

    Args:
        numerator: `[groups]`.
        denominator: `[groups]`, positive; all zeros for a layer with one expert per token, which cannot drop any.
    """
    if not denominator.any():
        return 0.0, 0.0
    value = numerator.sum() / denominator.sum()
    if len(numerator) < 2:
        return float(value), float("inf")
    residuals = numerator - value * denominator
    return float(value), float(residuals.std(ddof=1) / denominator.mean() / len(numerator) ** 0.5)


def _base_loss(groups: list, progress: Progress) -> float:
    return digits(_column(groups, progress, "routing", "loss").sum() / _tokens(groups).sum())


def _confirmed(profile: ModelProfile, groups: list, progress: Progress) -> ModelProfile:
    """Returns the profile with its predictions compared to measured losses, and scaled to fit them."""
    base = _column(groups, progress, "routing", "loss")
    tokens = _tokens(groups)
    confirmed = []
    for place, threshold in enumerate(_thresholds(profile)):
        measured, error = ratio(_column(groups, progress, f"confirm{place}", "loss") - base, tokens)
        confirmed.append(
            Confirmation(
                threshold=digits(threshold),
                mean_experts=digits(profile.mean_experts(threshold)),
                predicted_loss_increase=digits(profile.unscaled_loss_increase(threshold)),
                measured_loss_increase=digits(measured),
                measured_stderr=digits(error),
            )
        )
    return profile.model_copy(update={"loss_scale": digits(loss_scale(confirmed)), "confirmed": confirmed})


def loss_scale(confirmed: list[Confirmation]) -> float:
    """Returns measured over predicted loss increase, over all confirmations together.

    This is one number although the ratio rises with the threshold: a curve fits the calibration text better but other
    text worse, because whether small drops gain or lose depends on the text.

    Raises:
        AdapMoEError: the measured loss did not rise.
    """
    measured = sum(point.measured_loss_increase for point in confirmed)
    if measured <= 0:
        raise AdapMoEError(
            f"dropping experts changed the loss by {confirmed[-1].measured_loss_increase:+.4f} nats "
            f"({confirmed[-1].measured_stderr:.4f} standard error): too little text to calibrate on; "
            "give more --data and --tokens"
        )
    return measured / sum(point.predicted_loss_increase for point in confirmed)


def _versions(method: str) -> dict[str, str]:
    from importlib.metadata import version

    packages = ("vllm-adapmoe", "vllm", "torch", *(("transformers",) if method == "fisher" else ()))
    return {package: version(package) for package in packages}


def print_profile(profile: ModelProfile, show: Callable[..., None]) -> None:
    """Shows a table of the layers and a table of the confirmations."""
    from rich.table import Table

    table = Table(title=f"{profile.model.name}: sensitivity by {profile.method}")
    for column in ("layer", "S_l", "±", "next gate"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(profile.layers):
        nearest = layer.predictions[0].recall if layer.predictions else None
        table.add_row(
            str(index), f"{layer.sensitivity:.4f}", f"{layer.sensitivity_stderr:.4f}",
            "" if nearest is None else f"{nearest:.1%}",
        )  # fmt: skip
    show(table)
    table = Table(title=f"Increase of the loss, {profile.base_loss:.4f} nats")
    for column in ("threshold", "experts", "predicted", "measured", "±"):
        table.add_column(column, justify="right")
    base = profile.base_loss or 1
    for point in profile.confirmed:
        table.add_row(
            f"{point.threshold:.3g}", f"{point.mean_experts:.2f}",
            f"{profile.loss_scale * point.predicted_loss_increase / base:+.3%}",
            f"{point.measured_loss_increase / base:+.3%}", f"{point.measured_stderr / base:.3%}",
        )  # fmt: skip
    for cost in profile.rounding:
        table.add_row(
            "", f"{cost.precision} bit", "", f"{cost.measured_loss_increase / base:+.3%}",
            f"{cost.measured_stderr / base:.3%}",
        )  # fmt: skip
    show(table)
