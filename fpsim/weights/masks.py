"""Which weights stay: masks (True: kept) from the snr of their gradients, from their magnitudes, or from both.

Everything is by layer name: {layer: tensor}. With scope "global" a share is of all weights together, with "layer" of
those of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "layer"]
Tensors = Mapping[str, Tensor]
Masks = dict[str, Tensor]


def keep_largest(values: Tensors, removed: Mapping[str, int], scope: Scope) -> Masks:
    """Keeps all but the `removed[layer]` smallest values; with scope "global" as many as all those together.

    The cut-off is the value of the last that is removed: what equals it goes, too.
    """
    if scope == "layer":
        return {name: value > _kth(value.flatten(), removed[name]) for name, value in values.items()}
    everything = torch.cat([value.flatten() for value in values.values()])
    cut = _kth(everything, sum(removed.values()))
    return {name: value > cut for name, value in values.items()}


def _kth(values: Tensor, count: int) -> float:
    """The value of the `count`-th smallest, below all of them for 0."""
    return float(values.kthvalue(count).values) if count else -1.0


def keep_by_snr(
    snr: Tensors, weights: Tensors, threshold: float, scope: Scope, agreement: Literal["both", "either"]
) -> Masks:
    """Algorithm 1 of the source: keep by snr > threshold, and by |theta| > gamma for the same sparsity.

    gamma: the magnitude of which as many weights are not larger as have snr <= threshold. agreement: a weight goes
    where "both" say so (the source's words) or where "either" does (its formula: the product of the two masks).
    """
    by_snr = {name: ratio > threshold for name, ratio in snr.items()}
    removed = {name: int((~kept).sum()) for name, kept in by_snr.items()}
    by_magnitude = keep_largest({name: weight.abs() for name, weight in weights.items()}, removed, scope)
    if agreement == "both":
        return {name: kept | by_magnitude[name] for name, kept in by_snr.items()}
    return {name: kept & by_magnitude[name] for name, kept in by_snr.items()}


def keep_share(weights: Tensors, sparsity: float, scope: Scope) -> Masks:
    """Keeps the largest magnitudes: all but the share `sparsity`, rounded to a whole number of weights."""
    sizes = {name: weight.numel() for name, weight in weights.items()}
    magnitudes = {name: weight.abs() for name, weight in weights.items()}
    if scope == "layer":
        return keep_largest(magnitudes, {name: round(sparsity * size) for name, size in sizes.items()}, scope)
    return keep_largest(magnitudes, {"": round(sparsity * sum(sizes.values()))}, scope)


def ramp(step: int, begin: int, end: int, final: float) -> float:
    """The sparsity of a cubic ramp: 0 up to step `begin`, `final` from `end` on (Zhu & Gupta 2017; DPF, eq. in sec. 4).

    s_t = s_f (1 - (1 - (t - begin) / (end - begin))^3).
    """
    if step >= end:
        return final
    return final * (1 - (1 - max(step - begin, 0) / (end - begin)) ** 3)
