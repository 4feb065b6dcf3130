"""Merges several configurations: a file, then single keys."""

from collections.abc import Mapping
from typing import Any

BUDGETS = ("cache_gb", "cache_fraction", "cache_experts")
LIMITS = ("threshold", "target_experts", "max_loss_increase")


def merged(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two configurations key by key, nested keys included; `later` wins where both set a key.

    Among mutually exclusive keys the later one wins too: a budget replaces a budget of another kind, a gating limit
    another limit, and `gating.mode=off` every limit. Conflicts within one configuration remain, for validation to
    report.
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
