"""Counters of steps: every counter has a metric, and ranks add up."""

import re
from dataclasses import fields

import numpy as np
from conftest import ROOT

from vllm_adapmoe.policy.cache_stats import CacheStats
from vllm_adapmoe.scheduling.counters import METRICS, StepCounters, over_ranks


def test_every_counter_has_a_metric():
    assert list(METRICS) == [field.name for field in fields(StepCounters)]
    assert {field.name for field in fields(CacheStats)} <= set(METRICS)
    assert len({metric.name for metric in METRICS.values()}) == len(METRICS)
    for name, metric in METRICS.items():
        assert metric.by_layer == name.startswith("layer_")


def test_numbers_of_ranks_are_added_but_the_longest_wait_counts():
    ranks = [
        StepCounters(hits=hits, stall_seconds=stall, slots=4, layer_hits=[hits, 1])
        for hits, stall in ((3, 0.5), (5, 0.25))
    ]
    total = over_ranks(ranks)
    assert total.counted() == {"hits": 8, "stall_seconds": 0.5, "slots": 8, "layer_hits": [8, 2]}
    assert total.with_vector(np.arange(5.0)).counted() == {
        "hits": 0, "stall_seconds": 1, "slots": 2, "layer_hits": [3, 4]
    }  # fmt: skip


def test_the_dashboard_shows_every_metric():
    dashboard = (ROOT / "examples" / "grafana" / "adapmoe.json").read_text()
    endings = {"counter": r"_total\b", "gauge": r"\b", "histogram": r"_(sum|bucket)\b"}
    missing = [
        metric.name
        for metric in METRICS.values()
        if not re.search(f"vllm:adapmoe_{metric.name}{endings[metric.kind]}", dashboard)
    ]
    assert missing == []
