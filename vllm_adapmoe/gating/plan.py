"""GatingPlan: the gating rule and its numbers, derived from `gating` and `profile`, for every worker."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class GatingPlan(BaseModel):
    """A gating rule and its numbers. `weight` and `count` are baselines of `adapmoe evaluate`, not user options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["token", "batch", "weight", "count"]
    sensitivity: list[Annotated[float, Field(ge=0)]]
    """Sensitivity of each MoE layer, nats per token."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """Threshold of the rule. `token` and `batch`: nats; `weight`: share of a token's weight."""
    nats_per_token: Annotated[float, Field(gt=0)] | None = None
    """`batch`: maximum loss per token in all layers together, before the profile's scale; the threshold is adapted to
    it (`LossBudget`). None: the threshold is fixed."""
    experts: Annotated[float, Field(ge=1)] | None = None
    """`count`: mean number of experts that a token keeps."""
    loss_scale: Annotated[float, Field(gt=0)] = 1.0
    """The profile's loss scale: loss counted by the gates, times this, is the predicted loss."""
