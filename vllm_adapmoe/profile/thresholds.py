"""Chooses the gating threshold for the user's limit from a profile."""

from vllm_adapmoe.config import AdapMoEError, GatingConfig
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.profile.model_profile import ModelProfile


def plan_gating(gating: GatingConfig, profile: ModelProfile, precision: int = 16) -> GatingPlan | None:
    """Returns the gating plan with its threshold; None if gating is off.

    `max_loss_increase` pays for the rounding of `precision` first, as far as the profile knows what it costs.

    Raises:
        AdapMoEError: the profile lacks what is needed, or no threshold meets the limit.
    """
    if gating.mode == "off":
        return None
    nats_per_token = None
    if gating.threshold is not None:
        threshold = gating.threshold
    elif gating.target_experts is not None:
        threshold = profile.threshold_for_experts(gating.target_experts)
    else:
        assert gating.max_loss_increase is not None
        threshold = profile.threshold_for_loss(gating.max_loss_increase, precision)
        if gating.mode == "batch":
            nats_per_token = profile.gating_budget(gating.max_loss_increase, precision) / profile.loss_scale
    return GatingPlan(
        rule=gating.mode,
        threshold=threshold,
        nats_per_token=nats_per_token,
        sensitivity=[layer.sensitivity for layer in profile.layers],
        loss_scale=profile.loss_scale,
    )


def describe(plan: GatingPlan, profile: ModelProfile, precision: int = 16) -> str:
    """Returns one line for the log: the threshold, and the experts and loss that the profile predicts for it."""
    text = f"Adaptive gating ({plan.rule}): threshold {plan.threshold:.4g} nats"
    if plan.rule == "batch":
        text += " for each fetch saved"
        if plan.nats_per_token is not None:
            text += f", or more while tokens lose less than {plan.nats_per_token * profile.loss_scale:.4g} nats"
        text += "; outputs depend on the batch and on the cache"
    try:
        experts = profile.layer_experts(plan.threshold)
    except AdapMoEError:
        return text + "; the profile has no statistics to predict experts and loss from"
    figures = ", ".join(f"{value:.2f}" for value in experts)
    text += "; predicted" + (" at batch 1 with no expert resident" if plan.rule == "batch" else "")
    text += f": {sum(experts) / len(experts):.2f} of {profile.model.top_k} experts per token (by layer {figures})"
    if profile.base_loss:
        text += f", loss {profile.loss_increase(plan.threshold) / profile.base_loss:+.2%}"
        if precision != 16:
            rounding = profile.rounding_loss(precision)
            known = "not measured (adapmoe calibrate --precision)"
            if rounding is not None:
                known = f"{rounding / profile.base_loss:+.2%}"
            text += f"; precision={precision}: {known}"
    return text
