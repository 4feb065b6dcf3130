"""ModelProfile: calibration results of one model, as versioned JSON; see `adapmoe calibrate`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.files import BadFile, read_json

BINS_PER_DECADE = 32
EDGES = np.logspace(-6, 2, 8 * BINS_PER_DECADE + 1)
"""Edges of the histograms of dropping costs: the first bin is below the first edge, the last above the last."""

FILE_BYTES, FILE_VALUES = 64 << 20, 2_000_000
"""Maximum bytes and JSON values of a profile. 60 layers of 384 experts with top-8 take 2.4 MiB and 157,000 values, with
`FORMER_KEYS` 9 MiB and 500,000."""
MAX_LAYERS, MAX_EXPERTS, MAX_TOP_K = 1024, 65_536, 256
"""Maximum sizes of a profiled model: computations on a profile take time and memory in proportion to them."""

FORMER_KEYS = {"loss_change", "loss_change_stderr", "co_use", "output_norm", "reuse"}
"""Keys of a layer that earlier versions wrote and no decision used; they are ignored in profiles."""

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
"""Non-negative number, bounded far above any measurement so that products of several stay finite."""
Positive = Annotated[float, Field(ge=1e-9, le=1e9)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Text = Annotated[str, Field(max_length=1000)]
Histogram = Field(max_length=len(EDGES) + 1, fail_fast=True)
First = Field(fail_fast=True)
"""Stops at the first error of a list: millions of errors would take more memory than the file."""


class Strict(BaseModel):
    """Base model that refuses unknown keys, NaN and later changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DropHistogram(Strict):
    """Distribution over tokens of the cost c of keeping the first m experts (`gating.drop_costs`)."""

    tokens: Annotated[list[Share], Histogram]
    """Share of tokens in each bin of `EDGES`; trailing empty bins are left out."""
    costs: Annotated[list[NotNegative], Histogram]
    """Decrease of c when one more expert is kept: from the tokens in each bin, as a mean over all tokens."""

    @model_validator(mode="after")
    def shares(self) -> Self:
        if sum(self.tokens) > 1.001:  # with a margin for rounding
            raise ValueError(f"shares of tokens add up to {sum(self.tokens):.4g}, more than all")
        return self

    @classmethod
    def of(cls, costs: np.ndarray, falls: np.ndarray, tokens: int) -> Self:
        """Returns the histogram from bins `[len(EDGES) + 1]` summed over `tokens` tokens."""
        end = int(np.flatnonzero(costs)[-1]) + 1 if costs.any() else 0
        return cls(tokens=_rounded(costs[:end] / tokens), costs=_rounded(falls[:end] / tokens))

    def below(self, limit: float) -> tuple[float, float]:
        """Returns the share of tokens with c < limit, and their part of the mean decrease of c; linear within a bin."""
        if limit <= 0:
            return 0.0, 0.0
        place = float(np.interp(np.log(limit), np.log(EDGES), np.arange(1, len(EDGES) + 1)))
        if limit > EDGES[-1]:
            place = len(EDGES) + 1
        whole = int(place)
        part = place - whole
        return tuple(  # type: ignore[return-value]
            sum(values[:whole]) + (part * values[whole] if whole < len(values) else 0.0)
            for values in (self.tokens, self.costs)
        )


class Prediction(Strict):
    """Quality of predicting a later layer's experts by applying its gate to this layer's input."""

    lookahead: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    recall: Share
    """Share of the later layer's experts that are among the top_k predicted."""
    precision: Annotated[list[Share], First]
    """Precision by rank: how often the best, second best, .. predicted expert is used by the later layer."""


class LayerProfile(Strict):
    """Calibration results of one MoE layer. Lists over experts are in the order of their ids."""

    sensitivity: NotNegative
    """Sensitivity S_l, nats per token per unit of dropping cost (see `gating`)."""
    sensitivity_stderr: NotNegative | None = None
    dropped: Annotated[list[DropHistogram], First] | None = None
    """Cost histograms for keeping the first 1, 2, .. top_k - 1 experts."""
    popularity: Annotated[list[Share], First] | None = None
    """Share of tokens that use each expert; sums to top_k."""
    predictions: Annotated[list[Prediction], First] | None = None

    @model_validator(mode="before")
    @classmethod
    def without_former_keys(cls, content: Any) -> Any:
        """Drops `FORMER_KEYS` from a file."""
        return (
            {key: content[key] for key in content if key not in FORMER_KEYS} if isinstance(content, dict) else content
        )


class ModelInfo(Strict):
    """The profiled model. `hash` is the hash of all its bytes (`SourceFiles`); None: only the shape is known."""

    name: Text
    hash: Text | None = None
    architecture: Text
    hidden_size: Annotated[int, Field(ge=0, le=1 << 24)]
    num_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)]
    """Number of MoE layers. This and the numbers below are 0 if the configuration lacks them and the model is not built
    yet."""
    num_experts: Annotated[int, Field(ge=0, le=MAX_EXPERTS)]
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)]

    def check_same(self, model: "ModelInfo", path: str) -> None:
        """Checks that a profile of this model, in the file `path`, fits `model`.

        Raises:
            AdapMoEError: names the first known property that differs.
        """
        keys: tuple[str, ...] = ("architecture", "num_layers", "num_experts", "top_k", "hidden_size")
        if self.hash is not None and model.hash is not None:
            keys = (*keys, "hash")
        for key in keys:
            own, other = getattr(self, key), getattr(model, key)
            if own != other and other != 0:
                raise AdapMoEError(
                    f"profile={path!r} is for another model ({self.name}): {key} is {own}, this model's is {other}; "
                    "make one with adapmoe calibrate"
                )


class DataInfo(Strict):
    """Calibration data."""

    hash: Text
    sequences: Count
    sequence_length: Count
    tokens: Count
    """Number of tokens with a loss."""
    seed: int


class Confirmation(Strict):
    """Measured loss of one threshold, on the calibration data with every layer gated."""

    threshold: float
    mean_experts: float
    predicted_loss_increase: Annotated[float, Field(gt=0, le=1e9)]
    """Predicted loss increase, nats per token: the sum over layers of S_l times the mean cost of what was dropped."""
    measured_loss_increase: float
    measured_stderr: NotNegative


class RoundingCost(Strict):
    """Measured cost of one value of the key `precision`, on the calibration data, without gating."""

    precision: Literal[8, 4]
    """Bits per expert weight."""
    measured_loss_increase: float
    """Nats per token; may be negative, within the standard error."""
    measured_stderr: NotNegative


class ModelProfile(Strict):
    """Calibration results of one model. Losses are in nats per token."""

    format: Literal[1] = 1
    method: Literal["fisher", "forward", "published"]
    source: Text
    """Source of the figures, in words."""
    model: ModelInfo
    data: DataInfo | None = None
    versions: dict[Text, Text] = {}
    base_loss: Positive | None = None
    """Mean loss of the ungated model on the calibration data."""
    loss_scale: Positive = 1.0
    """Factor that predictions are multiplied by: measured over predicted loss increase of `confirmed`."""
    confirmed: Annotated[list[Confirmation], First] = []
    rounding: Annotated[list[RoundingCost], Field(max_length=2)] = []
    """Costs of the values of `precision` that were measured (`adapmoe calibrate --precision`)."""
    heads: Text | None = None
    """Hash of the next-token heads beside the profile (`heads.NextTokenHeads`); None: there are none."""
    layers: Annotated[list[LayerProfile], First]

    @model_validator(mode="after")
    def consistent(self) -> Self:
        model = self.model
        if not 1 <= model.top_k <= model.num_experts:
            raise ValueError(f"model.top_k={model.top_k} of model.num_experts={model.num_experts}")
        if len(self.layers) != model.num_layers:
            raise ValueError(f"{len(self.layers)} layers, but model.num_layers={model.num_layers}")
        if not self.layers:
            raise ValueError("no layers")
        if len({cost.precision for cost in self.rounding}) < len(self.rounding):
            raise ValueError("a precision has two costs in rounding")
        for index, layer in enumerate(self.layers):
            # Layers may differ in top-k; the model's is the largest.
            if layer.dropped is not None and len(layer.dropped) > model.top_k - 1:
                raise ValueError(f"layer {index} has {len(layer.dropped)} histograms for top-{model.top_k}")
            if layer.popularity is not None and len(layer.popularity) != model.num_experts:
                raise ValueError(
                    f"layer {index} has popularity of {len(layer.popularity)} of {model.num_experts} experts"
                )
            for prediction in layer.predictions or ():
                if len(prediction.precision) > model.top_k:
                    raise ValueError(
                        f"layer {index} has a precision of {len(prediction.precision)} ranks of {model.top_k}"
                    )
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads and validates a profile.

        Raises:
            AdapMoEError: unreadable, in another format, or inconsistent.
        """
        try:
            return cls.model_validate(read_json(os.path.expanduser(path), FILE_BYTES, FILE_VALUES))
        except BadFile as problem:
            raise AdapMoEError(f"profile={str(path)!r} {problem}; make one with adapmoe calibrate") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "file"
            raise AdapMoEError(
                f"profile={str(path)!r} is not a profile of format 1: {place}: {first['msg'].lower()}; "
                "make one with adapmoe calibrate"
            ) from None

    def save(self, path: Path) -> None:
        """Writes the JSON atomically. Equal profiles give equal files."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")
        temporary.replace(path)

    def check(self, model: ModelInfo, path: str) -> None:
        """Checks that the profile is of this model: by its shape, and by its hash if both have one.

        Raises:
            AdapMoEError: names what differs.
        """
        self.model.check_same(model, path)

    # Predictions

    def layer_experts(self, threshold: float) -> list[float]:
        """Returns the mean number of experts that a token keeps in each layer."""
        return [
            1 + sum(1 - histogram.below(_limit(threshold, layer))[0] for histogram in self._dropped(layer))
            for layer in self.layers
        ]

    def mean_experts(self, threshold: float) -> float:
        """Returns the mean number of experts kept, over layers and tokens."""
        return float(np.mean(self.layer_experts(threshold)))

    def loss_increase(self, threshold: float) -> float:
        """Returns the predicted increase of the mean token loss, nats: the sum over layers, times `loss_scale`."""
        return self.loss_scale * self.unscaled_loss_increase(threshold)

    def unscaled_loss_increase(self, threshold: float) -> float:
        """Returns the sum over layers of S_l times the mean cost of what tokens drop.

        A token that keeps m experts has the cost c_m, the sum of the decreases of c from m to top_k; c_j is below the
        limit for every j >= m and for no other, so the mean is a sum over the histograms.
        """
        return sum(
            layer.sensitivity * sum(histogram.below(_limit(threshold, layer))[1] for histogram in self._dropped(layer))
            for layer in self.layers
        )

    def threshold_for_experts(self, target: float) -> float:
        """Returns the lowest threshold that keeps at most `target` experts on average.

        Raises:
            AdapMoEError: `target` below one or above top_k, or no histograms in the profile.
        """
        if not 1 <= target <= self.model.top_k:
            raise AdapMoEError(
                f"gating target_experts={target} is not possible; choose a number from 1 to top_k={self.model.top_k}"
            )
        return self._bisect(lambda threshold: self.mean_experts(threshold) > target)[1]

    def rounding_loss(self, precision: int) -> float | None:
        """Returns the loss increase of quantising the experts to `precision` bits, nats; None: it was not measured."""
        if precision == 16:
            return 0.0
        costs = {cost.precision: max(0.0, cost.measured_loss_increase) for cost in self.rounding}
        return costs.get(precision)  # type: ignore[call-overload]

    def gating_budget(self, share: float, precision: int = 16) -> float:
        """Returns what `precision` leaves to gating of a loss increase of `share` of the base loss, nats.

        A `precision` whose cost was not measured takes nothing of it.

        Raises:
            AdapMoEError: the profile has no base loss, or nothing is left.
        """
        if self.base_loss is None:
            raise AdapMoEError(
                f"gating max_loss_increase={share} needs a calibrated profile, this one is {self.method}; set threshold"
            )
        spent = self.rounding_loss(precision) or 0.0
        left = share * self.base_loss - spent
        if left <= 0:
            raise AdapMoEError(
                f"gating max_loss_increase={share} leaves nothing to drop experts for: precision={precision} alone "
                f"increases the loss by {spent / self.base_loss:.2%}; allow more, or use more bits"
            )
        return left

    def threshold_for_loss(self, share: float, precision: int = 16) -> float:
        """Returns the highest threshold with a predicted loss increase of at most `share` of the base loss.

        Args:
            share: relative increase that gating and the rounding of `precision` may cause together.
            precision: bits per expert weight.

        Raises:
            AdapMoEError: as `gating_budget`.
        """
        budget = self.gating_budget(share, precision)
        return self._bisect(lambda threshold: self.loss_increase(threshold) <= budget)[0]

    def _bisect(self, low_enough: Callable[[float], bool]) -> tuple[float, float]:
        low, high = -30.0, 10.0  # exponents of ten
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if low_enough(10**middle) else (low, middle)
        return 10**low, 10**high

    def _dropped(self, layer: LayerProfile) -> Sequence[DropHistogram]:
        if layer.dropped is None:
            raise AdapMoEError(
                f"this profile ({self.source}) has no distribution of costs to choose a threshold from; "
                "set gating threshold, or make a profile with adapmoe calibrate"
            )
        return layer.dropped


def _limit(threshold: float, layer: LayerProfile) -> float:
    return threshold / layer.sensitivity if layer.sensitivity else float("inf") if threshold else 0.0


def _rounded(values: np.ndarray) -> list[float]:
    """Rounds to seven digits: more is noise, and would make files large."""
    return [float(f"{value:.7g}") for value in values.tolist()]
