"""What a user may set: `additional_config["adapmoe"]`, validated."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

BUDGETS = ("cache_gb", "cache_fraction", "cache_experts")


class AdapMoEError(ValueError):
    """A mistake the user can mend; the message is one line naming the key, the value and the remedy."""


class AdapMoEConfig(BaseModel):
    """Expert cache of one worker. At most one budget may be set; none means: as many experts as memory allows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    cache_gb: float | None = Field(None, gt=0, strict=True)
    """Memory for expert slots per worker, GiB."""
    cache_fraction: float | None = Field(None, gt=0, le=1, strict=True)
    """Slots as a share of all routed experts of the model."""
    cache_experts: int | None = Field(None, ge=1, strict=True)
    """Slots in all, over every layer."""
    store: Literal["auto", "host", "file"] = "auto"
    """Where the backing copy of every expert lives: host memory or a packed file. `auto`: host memory beside a
    GPU, the file on the CPU."""
    store_dir: str | None = None
    """Folder of packed files; default `adapmoe` in vLLM's cache folder."""

    @model_validator(mode="after")
    def one_budget(self) -> Self:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            values = ", ".join(f"{key}={getattr(self, key)}" for key in given)
            raise ValueError(f"{values} are {len(given)} budgets for one cache; keep one of them")
        return self

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Validates what a user gave: None, a mapping, a JSON object as text, or the path of a JSON file.

        Raises:
            AdapMoEError: unreadable file, malformed JSON, unknown key, wrong type or impossible value.
        """
        if isinstance(value, cls):
            return value
        given = {} if value is None else _read(value) if isinstance(value, str | Path) else value
        if not isinstance(given, dict):
            raise AdapMoEError(
                f"adapmoe_config={given!r} is not a mapping of keys; pass a dict, a JSON object or a file"
            )
        try:
            return cls(**given)
        except ValidationError as error:
            raise AdapMoEError(_one_line(error, cls)) from None

    def transport(self) -> dict[str, Any]:
        """The plain JSON form carried to every process in `additional_config["adapmoe"]`."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _read(value: str | Path) -> Any:
    text = str(value)
    if text.lstrip().startswith("{"):
        source = "adapmoe_config"
    else:
        source = f"adapmoe_config file {text!r}"
        try:
            text = Path(text).read_text()
        except OSError as error:
            raise AdapMoEError(f"{source} cannot be read ({error.strerror}); pass a readable JSON file") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapMoEError(f"{source} is not valid JSON ({error}); mend it there") from None


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"adapmoe_config key {key!r} is not known; known keys: {', '.join(model.model_fields)}"
    if not key:
        return "adapmoe_config: " + first["msg"].removeprefix("Value error, ")
    return f"adapmoe_config {key}={first['input']!r} is not usable: {first['msg'][0].lower()}{first['msg'][1:]}"
