"""Several settings of one configuration, merged: a file, then single keys."""

from collections.abc import Mapping
from typing import Any

BUDGETS = ("cache_gb", "cache_fraction", "cache_experts")
LIMITS = ("threshold", "target_experts", "max_loss_increase")


def merged(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of both, key by key and nested keys included; where both have one, that of `later`.

    Of keys that exclude each other the later one is meant: a budget replaces a budget of another kind, a limit of
    gating another limit, and `gating.mode=off` every limit. What one of both holds against itself stays, for the
    validation to name.
    """
    result = dict(base)
    _drop_replaced(result, later, BUDGETS)
    for key, value in later.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            nested = dict(base[key])
            if key == "gating":
                _drop_replaced(nested, value, (*LIMITS, *(("mode",) if value.get("mode") == "off" else ())))
            value = merged(nested, value)
        result[key] = value
    return result


def _drop_replaced(settings: dict[str, Any], later: Mapping[str, Any], exclusive: tuple[str, ...]) -> None:
    if any(later.get(key) is not None for key in exclusive):
        for key in exclusive:
            settings.pop(key, None)
