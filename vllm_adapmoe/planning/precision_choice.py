"""Chooses the bits per expert weight for `precision: auto`: pure arithmetic."""

from collections.abc import Mapping

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.planning.memory_plan import ModelSize, Speed, closed_form, curves_of
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.units import GiB

LINK_ALONE = Speed(link=1.0, layer_seconds=1e-9)
"""Computing takes no time: fewer bytes per token are more tokens per second, whatever the link and the kernels are, for
vLLM's kernels read fewer bytes, too."""


def choose_precision(
    sizes: Mapping[int, ModelSize], room: int, profile: ModelProfile | None, max_loss_increase: float | None
) -> tuple[int, str]:
    """Returns the widest precision at which every expert fits, else the one that fetches the least bytes per token.

    Bytes per token are those of the closed form, with the gating that the limit of the loss still pays for.

    Args:
        sizes: the model's sizes for each precision that can be used, 16 among them.
        room: bytes for the slots of one worker.
        profile: the model's profile; None: there is none.
        max_loss_increase: relative loss increase that rounding and gating may cause together; None: no limit.

    Returns:
        The precision, and the reason in words, for the log.

    Raises:
        AdapMoEError: the loss is limited, and the profile has no loss, or does not say what a precision costs that is
            to be considered.
    """
    if max_loss_increase is not None:
        assert profile is not None
        profile.gating_budget(max_loss_increase)  # or there is no loss to compare with
    fetched: dict[int, float] = {}
    for precision in sorted(sizes, reverse=True):
        size = sizes[precision]
        threshold = 0.0
        if max_loss_increase is not None:
            assert profile is not None
            rounding = profile.rounding_loss(precision)
            if rounding is None:
                raise AdapMoEError(
                    f"precision=auto with gating.max_loss_increase={max_loss_increase}: the profile does not say what "
                    f"precision={precision} costs; make it again with adapmoe calibrate --precision 8,4, or set "
                    "precision"
                )
            if rounding >= max_loss_increase * (profile.base_loss or 0.0):
                continue
            threshold = profile.threshold_for_loss(max_loss_increase, precision)
        nbytes = size.experts * size.expert_bytes
        if nbytes <= room:
            return precision, f"all experts fit, {nbytes / GiB:.3f} GiB of {room / GiB:.3f}"
        slots = max(size.top_k, room // size.expert_bytes)
        fetched[precision] = closed_form(size, curves_of(size, profile, threshold), slots, LINK_ALONE).fetched_bytes
    best = min(fetched, key=lambda precision: fetched[precision])
    nbytes = sizes[best].experts * sizes[best].expert_bytes
    limit = "" if max_loss_increase is None else f", of those within a loss increase of {max_loss_increase:.2%}"
    return best, (
        f"{nbytes / GiB:.3f} GiB of experts do not fit {room / GiB:.3f}, and fewest bytes are to be fetched per "
        f"token{limit}"
    )
