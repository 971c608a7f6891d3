"""The snr that training measures, on a problem whose gradients have a known mean and covariance.

A linear layer without bias whose loss is its output: the gradient of a sample is the sample. Samples are normal, four
groups of weights differ in the ratio of mean to deviation, and weight k of one group is correlated with weight k of the
others; the weights of one group are independent, so a mean over them has the standard error of a mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fpsim.emulation import emulate
from fpsim.weights.snr import Average, false_prune_rate

WEIGHTS = 4096  # of a group
MANY = 1 << 15
BATCH = 32
BETA = 0.9
TRUE_SNR = (0.0, 0.5, 4.0, 25.0)  # mean^2 over the variance of the mean of a batch, by group
DEVIATIONS = (1.0, 3.0, 0.2, 1.0)
CORRELATIONS = 0.6 * np.eye(4) + 0.4
PARTS = {"per_sample": BATCH, "microbatch": 4, "ema": None}
CONFIDENCE = 4.5  # standard errors: 1 in 150,000


def samples(count: int, snr: tuple[float, ...], generator: torch.Generator) -> torch.Tensor:
    """(count, groups * WEIGHTS): the gradients of samples in a batch of BATCH."""
    groups = len(snr)
    mixing = torch.linalg.cholesky(torch.from_numpy(CORRELATIONS[:groups, :groups])).float()
    drawn = torch.einsum("ij,bjk->bik", mixing, torch.randn(count, groups, WEIGHTS, generator=generator))
    deviations = torch.tensor(DEVIATIONS[:groups]).view(groups, 1)
    means = deviations * (torch.tensor(snr).view(groups, 1) / BATCH).sqrt()
    return (means + deviations * drawn).flatten(1)


def average_after(estimator: str, steps: int, options: dict[str, Any]) -> Average:
    """What training with emulation has averaged of the layer's gradient."""
    model = nn.Sequential(nn.Linear(len(TRUE_SNR) * WEIGHTS, 1, bias=False))
    spec = {"weight_pruning": {"name": "snr", "estimator": estimator, "beta": BETA, "burn_in": 10_000, **options}}
    handle = emulate(model, {**spec, "ledger": {"every_steps": 10_000}})
    generator = torch.Generator().manual_seed(11)
    parts = PARTS[estimator] if estimator == "microbatch" else 1
    for _ in range(steps):
        model.zero_grad()
        for some in samples(BATCH, TRUE_SNR, generator).chunk(parts or 1):
            (model(some).sum() / BATCH).backward()
        handle.step()
    assert handle.weight_pruning is not None
    return handle.weight_pruning._averages["0"]


@pytest.mark.parametrize("estimator", PARTS)
def test_every_estimator_finds_the_true_snr(estimator: str) -> None:
    """Means over a group of both averages have the ratio snr + 1 (ema: of the averaged gradient, which is `gain` times
    that of one step), within the confidence interval of a ratio of means."""
    steps = 60
    average = average_after(estimator, steps, {})
    assert average.first is not None
    assert average.second is not None
    first, second = average.first.double().view(4, -1), average.second.double().view(4, -1)
    gain = 1.0
    if estimator == "ema":
        weight = 1 - BETA**steps
        q = (1 + BETA**steps) * (1 - BETA) / (weight * (1 + BETA))
        signal = (first / weight).square()
        first, second = signal * (1 - q) / q, second / weight - signal
        gain = 1 / q
    for group, true in enumerate(TRUE_SNR):
        expected = true * gain + 1
        signal, noise = first[group], second[group]
        error = float((signal - expected * noise).std() / noise.mean() / WEIGHTS**0.5)
        assert abs(float(signal.mean() / noise.mean()) - expected) < CONFIDENCE * error
        assert error < 0.03 * expected  # the interval is narrow enough to tell
    ratios = average.snr().view(4, -1)
    assert torch.allclose(ratios.double(), first / second, rtol=1e-4)


def test_the_source_s_average_of_ratios_tends_to_the_mean_of_f() -> None:
    """(K - 1) / (K - 3) of snr + 1; with samples as parts the mean's variance is finite."""
    average = average_after("per_sample", 60, {"average": "ratio"})
    for ratios, true in zip(average.snr().double().view(4, -1), TRUE_SNR, strict=True):
        expected = (true + 1) * (BATCH - 1) / (BATCH - 3)
        assert abs(float(ratios.mean()) - expected) < CONFIDENCE * float(ratios.std()) / WEIGHTS**0.5


# --- how often noise alone is pruned ----------------------------------------------------------------------------------


def share_pruned(batch: int, estimator: str, steps: int, parts: int = 1) -> tuple[int, int]:
    """(weights whose snr is not above 1 after so many steps, weights) where no gradient has a mean."""
    model = nn.Sequential(nn.Linear(MANY, 1, bias=False))
    handle = emulate(model, {"weight_pruning": {"name": "snr", "estimator": estimator, "burn_in": steps}})
    generator = torch.Generator().manual_seed(batch + steps)
    for _ in range(steps + 1):
        model.zero_grad()
        for some in torch.randn(batch, MANY, generator=generator).chunk(parts):
            (model(some).sum() / batch).backward()
        handle.step()
    assert handle.weight_pruning is not None
    (row,) = handle.weight_pruning.rows
    return row["layers"][0]["snr_at_most_threshold"], MANY


@pytest.mark.parametrize("batch", [8, 32, 128])
def test_one_step_follows_f(batch: int) -> None:
    """F(1, B - 1), which is the square of Student's t of B - 1 degrees: P(F <= 1) = 2 T(1) - 1."""
    pruned, numel = share_pruned(batch, "per_sample", steps=1)
    law = 2 * stats.t.cdf(1, batch - 1) - 1
    assert stats.binomtest(pruned, numel, law).pvalue > 1e-4
    assert stats.binomtest(pruned, numel, law - 0.02).pvalue < 1e-4  # the test can tell


@pytest.mark.parametrize(("estimator", "batch", "parts"), [("per_sample", 16, 1), ("microbatch", 16, 4), ("ema", 8, 1)])
def test_averages_follow_the_simulated_law(estimator: str, batch: int, parts: int) -> None:
    steps = 40
    pruned, numel = share_pruned(batch, estimator, steps, parts)
    rule, counted = ("ema", None) if estimator == "ema" else ("moments", batch if parts == 1 else parts)
    law = false_prune_rate(1.0, rule, BETA, counted, steps=steps)  # type: ignore[arg-type]
    assert abs(pruned / numel - law) < CONFIDENCE * (law * (1 - law) / numel) ** 0.5 + 0.002  # the law is simulated
