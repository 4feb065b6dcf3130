"""Routing statistics of one MoE layer as sums over tokens: uses, dropping costs, predictions of later layers."""

import numpy as np
import torch

from vllm_adapmoe.gating.rules import drop_costs
from vllm_adapmoe.profile.model_profile import EDGES, DropHistogram, Prediction

LOOKAHEAD = 4

Sums = dict[str, np.ndarray]
"""Sums by name, float64. Those of two parts of the data are added key by key."""


def add(total: Sums, part: Sums) -> None:
    """Adds `part` to `total`."""
    for key, value in part.items():
        total[key] = total[key] + value if key in total else value


def half(top_k: int) -> int:
    """Returns the number of experts kept when a layer is perturbed to measure it; for top-2, one."""
    return max(1, top_k // 2)


def routing_sums(weights: torch.Tensor, ids: torch.Tensor, num_experts: int) -> Sums:
    """Returns the routing sums of one step of one layer.

    Args:
        weights: `[tokens, top_k]`, float32.
        ids: `[tokens, top_k]`.
        num_experts: experts of the layer.
    """
    tokens, top_k = ids.shape
    costs = drop_costs(weights.sort(dim=-1, descending=True).values)
    falls = costs[:, :-1] - costs[:, 1:]
    bins = torch.bucketize(costs, torch.from_numpy(EDGES), right=True)
    histogram, fall_histogram = torch.zeros(2, top_k - 1, len(EDGES) + 1, dtype=torch.float64)
    for index in range(top_k - 1):
        histogram[index] = torch.bincount(bins[:, index], minlength=len(EDGES) + 1)
        fall_histogram[index] = torch.bincount(bins[:, index], falls[:, index], minlength=len(EDGES) + 1)
    used = torch.zeros(tokens, num_experts).scatter_(1, ids.long(), 1)
    sums = {
        "tokens": torch.tensor(tokens),
        "half_cost": costs[:, half(top_k) - 1].sum(),
        "dropped": histogram,
        "falls": fall_histogram,
        "uses": used.sum(0),
    }
    return {key: value.double().numpy() for key, value in sums.items()}


def prediction_sums(predicted: torch.Tensor, ids: torch.Tensor, lookahead: int) -> Sums:
    """Returns the sums of correct predictions by rank, stored with the layer whose input they were made from.

    Args:
        predicted: `[tokens, top_k]`, best first.
        ids: `[tokens, top_k]`, the experts that the later layer used.
        lookahead: layers between the two.
    """
    right = (predicted.unsqueeze(-1) == ids.unsqueeze(1)).any(-1).double().sum(0)
    return {f"right_{lookahead}": right.numpy(), f"foretold_{lookahead}": np.array(float(len(ids)))}


def dropped(sums: Sums) -> list[DropHistogram]:
    """Returns the histograms of dropping costs, for keeping 1 .. top_k - 1 experts."""
    tokens = int(sums["tokens"])
    return [DropHistogram.of(*rows, tokens) for rows in zip(sums["dropped"], sums["falls"], strict=True)]


def routing_profile(sums: Sums) -> dict[str, object]:
    """Returns the fields of a LayerProfile that follow from routing sums."""
    predictions = [
        Prediction(
            lookahead=distance,
            recall=digits(
                sums[f"right_{distance}"].mean() / sums[f"foretold_{distance}"]
            ),  # of the later layer's top-k
            precision=[digits(value) for value in sums[f"right_{distance}"] / sums[f"foretold_{distance}"]],
        )
        for distance in range(1, LOOKAHEAD + 1)
        if f"right_{distance}" in sums
    ]
    return {
        "dropped": dropped(sums),
        "popularity": [digits(value) for value in sums["uses"] / float(sums["tokens"])],
        "predictions": predictions,
    }


def digits(value: float) -> float:
    """Rounds to six digits, for a profile."""
    return float(f"{value:.6g}")
