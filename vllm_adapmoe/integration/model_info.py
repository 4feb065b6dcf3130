"""Describes the model that an engine serves, by its configuration."""

from pathlib import Path

from vllm.config import ModelConfig, VllmConfig

from vllm_adapmoe.integration.settings import ProfiledModel
from vllm_adapmoe.model_folder import model_name
from vllm_adapmoe.profile.model_profile import ModelInfo

MENTIONS = ("expert", "moe")
DRAFTS_WITHOUT_MODEL = {"ngram", "ngram_gpu", "suffix"}
"""Methods of speculative decoding that draft without a model."""


def model_info(model: ModelConfig) -> ModelInfo:
    """Returns the model's `ModelInfo`, as in a profile, but without hash and number of MoE layers: it is not built."""
    return ModelInfo(
        name=model_name(Path(model.model)),
        architecture=model.architectures[0],
        hidden_size=model.get_hidden_size(),
        num_layers=0,
        num_experts=model.get_num_experts() or 0,
        top_k=model.get_num_experts_per_tok() or 0,
    )


def check_profile(profiled: ProfiledModel, model: ModelConfig, built: dict[str, int]) -> None:
    """Compares the built layers with the profile's model, where the configuration was not enough to compare.

    Raises:
        AdapMoEError: the profile is for another model.
    """
    configured = {"num_experts": model.get_num_experts(), "top_k": model.get_num_experts_per_tok()}
    counts = built | {key: count for key, count in configured.items() if count}
    profiled.model.check_same(profiled.model.model_copy(update=counts), profiled.path)


def expert_sizes(model: ModelConfig) -> tuple[int, int] | None:
    """Returns hidden and intermediate size of a routed expert; None if the configuration does not have them."""
    config = model.hf_text_config
    hidden = getattr(config, "hidden_size", None)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    return (hidden, inner) if isinstance(hidden, int) and isinstance(inner, int) else None


def mentions_experts(model: ModelConfig) -> bool:
    """Returns whether any key in a model's configuration, at any depth, mentions experts; if none does, it has none."""

    def names(settings: object) -> bool:
        if isinstance(settings, dict):
            return any(
                any(word in str(key).lower() for word in MENTIONS) or names(value) for key, value in settings.items()
            )
        return isinstance(settings, list) and any(map(names, settings))

    return bool(model.get_num_experts()) or names(model.hf_config.to_dict())


def drafter_of(vllm_config: VllmConfig) -> ModelConfig | None:
    """Returns the draft model of speculative decoding; None if nothing is drafted, or without a model."""
    speculative = vllm_config.speculative_config
    return None if speculative is None or speculative.method in DRAFTS_WITHOUT_MODEL else speculative.draft_model_config


def max_experts(model: ModelConfig) -> int | None:
    """Returns an upper bound of a model's routed experts over all layers; None if its configuration gives no count.

    How many of its layers are MoE layers is known only when it is built.
    """
    experts = model.get_num_experts()
    return model.get_total_num_hidden_layers() * experts if experts else None
