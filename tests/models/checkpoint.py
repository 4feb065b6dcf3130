"""Writes a tiny random checkpoint of an architecture, by transformers' model or, where there is none, by vLLM's."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.models.families import ALIASES, FAMILIES, CannotMake
from tests.models.mirror import save_mirror
from tests.models.own_configs import CONFIGS, REASONS, register
from tests.models.tiny_config import tiny_config


def save_checkpoint(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Makes the checkpoint and returns its folder.

    Raises:
        CannotMake: transformers has no such model; the message is the reason for the table.
    """
    cls = getattr(transformers, ALIASES.get(architecture, architecture), None)
    if architecture in CONFIGS:
        folder.mkdir()
        register(architecture, folder)
        save_mirror(folder)
        return folder
    if cls is None or getattr(cls, "config_class", None) is None:
        reason = "transformers has no model class, and there is no configuration in tests/models/own_configs.py"
        raise CannotMake(REASONS.get(architecture, reason))
    config = tiny_config(cls.config_class, **FAMILIES.get(architecture, {}))
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=torch.bfloat16)
    randomise(model)
    model.save_pretrained(folder)
    edit_config(folder, architectures=[architecture])
    return folder


def randomise(model: PreTrainedModel) -> None:
    """Draws weights far enough apart that rounding does not change what is chosen."""
    for name, parameter in model.named_parameters():
        # The default 0.02 leaves logits so close together that any rounding changes the argmax.
        if parameter.dim() > 1 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("correction_bias", "expert_bias")) and tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1)


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys, indent=2))
