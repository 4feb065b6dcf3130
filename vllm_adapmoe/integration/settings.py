"""EngineSettings: what the front end decides for all processes of an engine, in vLLM's `additional_config`."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from vllm_adapmoe.config import AdapMoEConfig
from vllm_adapmoe.gating.plan import GatingPlan
from vllm_adapmoe.integration.compat import METHOD
from vllm_adapmoe.profile.model_profile import ModelInfo


class ProfiledModel(BaseModel):
    """The model that a profile is of, for the workers to compare with the one that they build."""

    path: str
    """Path of the profile, for error messages."""
    model: ModelInfo


class HeadsFile(BaseModel):
    """A file of next-token heads; too big to send with the configuration, so every worker reads it."""

    path: str
    hash: str
    shape: tuple[int, int, int]
    """Numbers of MoE layers, hidden size and experts."""


class EngineSettings(BaseModel):
    """Settings of one engine: the front end writes them once, every process reads them once.

    `VllmConfig.additional_config` is pickled into every process and is part of the compile cache's key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: AdapMoEConfig
    """The user's configuration; key `adapmoe` of `additional_config`, where others are `adapmoe_gating` and so on."""
    gating: GatingPlan | None = None
    """None: no gating."""
    expected_loads: list[list[float]] | None = None
    """Expected loads of each layer by number of slots; None unless `allocation=profile`."""
    heads: HeadsFile | None = None
    """None: the profile has none, or there is no profile."""
    profiled: ProfiledModel | None = None
    """None: no profile."""

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """Reads the settings of an engine that the method is switched on for."""
        additional = vllm_config.additional_config
        return cls.model_validate({name: additional[key] for name, key in _keys().items() if key in additional})

    def write(self, vllm_config: Any) -> None:
        """Adds the settings to vLLM's configuration, as plain JSON."""
        settings = self.model_dump(mode="json", exclude_none=True) | {"config": self.config.transport()}
        keys = _keys()
        added = {keys[name]: value for name, value in settings.items()}
        vllm_config.additional_config = {**vllm_config.additional_config, **added}


def _keys() -> dict[str, str]:
    """Returns the key in `additional_config` of each field of `EngineSettings`."""
    return {name: METHOD if name == "config" else f"{METHOD}_{name}" for name in EngineSettings.model_fields}
