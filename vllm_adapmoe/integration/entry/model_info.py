"""Which model an engine serves, as far as its configuration tells."""

from pathlib import Path

from vllm.config import ModelConfig, VllmConfig

from vllm_adapmoe.integration.entry.compat import profiled_settings
from vllm_adapmoe.profile.model_profile import ModelInfo, ModelProfile

MENTIONS = ("expert", "moe")


def model_info(model: ModelConfig) -> ModelInfo:
    """Returns the model, as a profile names it, before it is built: without its hash and its number of MoE layers."""
    return ModelInfo(
        name=Path(model.model).name,
        architecture=model.architectures[0],
        hidden_size=model.get_hidden_size(),
        num_layers=0,
        num_experts=model.get_num_experts() or 0,
        top_k=model.get_num_experts_per_tok() or 0,
    )


def profiled(profile: ModelProfile, path: str) -> dict[str, object]:
    """Returns what a worker needs to know of a profile, to compare it with the model that is built."""
    return {"path": path, "model": profile.model.model_dump()}


def check_profile(vllm_config: VllmConfig, built: dict[str, int]) -> None:
    """Compares the layers that are built with those that the profile is of, as far as the configuration did not tell.

    Raises:
        AdapMoEError: it is the profile of another model.
    """
    settings = profiled_settings(vllm_config)
    if settings is None:
        return
    model = vllm_config.model_config
    told = {"num_experts": model.get_num_experts(), "top_k": model.get_num_experts_per_tok()}
    mine = ModelInfo.model_validate(settings["model"])
    counts = built | {key: count for key, count in told.items() if count}
    mine.check_same(mine.model_copy(update=counts), settings["path"])


def expert_sizes(model: ModelConfig) -> tuple[int, int] | None:
    """Hidden and intermediate size of a routed expert; None where the configuration does not tell."""
    config = model.hf_text_config
    hidden = getattr(config, "hidden_size", None)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    return (hidden, inner) if isinstance(hidden, int) and isinstance(inner, int) else None


def mentions_experts(model: ModelConfig) -> bool:
    """Whether anything in a model's configuration, however deep, has to do with experts; if not, it has none."""

    def names(settings: object) -> bool:
        if isinstance(settings, dict):
            return any(
                any(word in str(key).lower() for word in MENTIONS) or names(its) for key, its in settings.items()
            )
        return isinstance(settings, list) and any(map(names, settings))

    return bool(model.get_num_experts()) or names(model.hf_config.to_dict())


def most_experts(model: ModelConfig) -> int | None:
    """Returns how many routed experts a model has at most, over all layers; None where its configuration gives none.

    How many of its layers have experts is seen when it is built.
    """
    experts = model.get_num_experts()
    return model.get_total_num_hidden_layers() * experts if experts else None
