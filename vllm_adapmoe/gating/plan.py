"""GatingPlan: what the front end made of `gating` and `profile`, in plain numbers for every worker."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class GatingPlan(BaseModel):
    """A rule and its numbers. `weight` and `count` are what `adapmoe evaluate` compares with; no user sets them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["token", "batch", "weight", "count"]
    sensitivity: list[Annotated[float, Field(ge=0)]]
    """Per MoE layer, nats per token."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """`token` and `batch`: nats; `weight`: share of a token's weight."""
    nats_per_token: Annotated[float, Field(gt=0)] | None = None
    """`batch`: what a token may lose in all layers together, before the profile's scale; the threshold then follows
    (`LossBudget`). None: the threshold stays."""
    experts: Annotated[float, Field(ge=1)] | None = None
    """`count`: experts that a token keeps, on average over tokens."""
    loss_scale: Annotated[float, Field(gt=0)] = 1.0
    """The profile's: what gates count as loss, times this, is what the profile predicts."""
