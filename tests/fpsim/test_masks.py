"""Masks of weights, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fpsim.weights.masks import keep_by_snr, keep_largest, keep_share, ramp

WEIGHTS = {"a": torch.tensor([[0.1, -0.9], [0.3, -0.2]]), "b": torch.tensor([0.05, -0.8, 0.4, 0.6])}
SNR = {"a": torch.tensor([[0.5, 0.2], [3.0, 0.9]]), "b": torch.tensor([2.0, 5.0, 1.0, 1.5])}


def pruned(masks: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: torch.nonzero(~mask.flatten()).flatten().tolist() for name, mask in masks.items()}


def test_both_must_agree() -> None:
    """snr <= 1: a 0, 1, 3 and b 2. The four smallest magnitudes: b 0 (.05), a 0 (.1), a 3 (.2), a 2 (.3)."""
    assert pruned(keep_by_snr(SNR, WEIGHTS, 1.0, "global", "both")) == {"a": [0, 3], "b": []}


def test_either_is_enough() -> None:
    assert pruned(keep_by_snr(SNR, WEIGHTS, 1.0, "global", "either")) == {"a": [0, 1, 2, 3], "b": [0, 2]}


def test_scope_layer() -> None:
    """Three of a: .1, .2, .3; one of b: .05."""
    assert pruned(keep_by_snr(SNR, WEIGHTS, 1.0, "layer", "both")) == {"a": [0, 3], "b": []}
    assert pruned(keep_by_snr(SNR, WEIGHTS, 1.0, "layer", "either")) == {"a": [0, 1, 2, 3], "b": [0, 2]}


def test_no_noise_prunes_nothing() -> None:
    assert pruned(keep_by_snr(SNR, WEIGHTS, 0.0, "global", "either")) == {"a": [], "b": []}


@pytest.mark.parametrize(
    ("scope", "expected"), [("global", {"a": [0, 2, 3], "b": [0]}), ("layer", {"a": [0, 3], "b": [0, 2]})]
)
def test_half_of_the_weights_go(scope: str, expected: dict[str, list[int]]) -> None:
    assert pruned(keep_share(WEIGHTS, 0.5, scope)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (1.0, 8), (0.3, 2), (0.32, 3)])
def test_shares_are_rounded_to_weights(sparsity: float, count: int) -> None:
    assert sum(map(len, pruned(keep_share(WEIGHTS, sparsity, "global")).values())) == count


def test_ties_go_together() -> None:
    assert pruned(keep_largest({"a": torch.tensor([1.0, 1.0, 2.0])}, {"a": 1}, "layer")) == {"a": [0, 1]}


def test_ramp() -> None:
    """s_f (1 - (1 - t/T)^3): .8 (1 - 1/8) = .7 half-way; by hand at a quarter: .8 (1 - 27/64)."""
    assert [ramp(t, 100, 300, 0.8) for t in (0, 100, 150, 200, 300, 1000)] == pytest.approx(
        [0, 0, 0.8 * (1 - 27 / 64), 0.7, 0.8, 0.8]
    )
    assert ramp(0, 0, 0, 0.8) == 0.8
