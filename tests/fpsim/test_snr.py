"""The snr of gradients, its averages, and the law of noise alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fpsim.weights.snr import Average, Rule, false_prune_rate, moments_of_parts, threshold_of_rate


def parts_of_gradients(mean: float, variance: float, parts: int, weights: int, seed: int) -> torch.Tensor:
    """(parts, weights): normal parts whose sum has the mean and the variance."""
    drawn = torch.randn(parts, weights, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean / parts + drawn * math.sqrt(variance / parts)


def test_moments_are_those_of_numpy() -> None:
    samples = torch.randn(32, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = samples / 32  # each sample's part of the mean gradient
    mean_square, variance = moments_of_parts(parts.sum(0), parts.square().sum(0), 32)
    np.testing.assert_allclose(mean_square, samples.mean(0).numpy() ** 2)
    np.testing.assert_allclose(variance, samples.numpy().var(0, ddof=1) / 32)


def test_moments_by_hand() -> None:
    """Parts 1 and 3: g = 4; two chunk gradients 2 and 6 of variance 8, that of their mean 4."""
    mean_square, variance = moments_of_parts(torch.tensor(4.0), torch.tensor(10.0), 2)
    assert (mean_square, variance) == (16.0, 4.0)


def test_one_part_has_no_variance() -> None:
    with pytest.raises(ValueError, match=r"two parts or more \(got 1\)"):
        moments_of_parts(torch.ones(1), torch.ones(1), 1)


@pytest.mark.parametrize("rule", ["moments", "ratio"])
@pytest.mark.parametrize("parts", [8, 32])
def test_averages_of_a_known_signal(rule: Rule, parts: int) -> None:
    """mean^2 / variance = 4: the moments tend to 4 + 1, the ratios to (K - 1) / (K - 3) of that; 5 standard errors."""
    signal, variance, weights = 3.0, 2.25, 20_000
    average = Average(rule, 0.9)
    for step in range(60):
        h = parts_of_gradients(signal, variance, parts, weights, seed=step)
        average.add(*moments_of_parts(h.sum(0), h.square().sum(0), parts))
    snr = average.snr().numpy()
    if rule == "ratio":
        assert abs(snr.mean() - 5 * (parts - 1) / (parts - 3)) < 5 * snr.std() / math.sqrt(weights)
    else:
        assert average.first is not None
        assert average.second is not None
        left = 1 - 0.9**60
        for moment, expected in ((average.first, signal**2 + variance), (average.second, variance)):
            values = moment.numpy() / left
            assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(weights)
        assert abs(np.median(snr) - 5) < 0.5


def test_ema_of_a_known_signal() -> None:
    """The averaged gradient's own ratio: mean^2 / variance * (1 + beta) / (1 - beta) + 1, here 0.25 * 19 + 1 = 5.75."""
    weights, beta = 50_000, 0.9
    average = Average("ema", beta)
    for step in range(120):
        average.add(parts_of_gradients(0.5, 1.0, 1, weights, seed=step)[0])
    assert average.first is not None
    assert average.second is not None
    mean_square = average.first.square().mean()
    noise = (average.second - average.first.square()).mean() * (1 - beta) / (2 * beta)
    assert abs(float(mean_square / noise) - 5.75) < 0.1


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_ema_is_calibrated_from_its_first_steps(steps: int) -> None:
    """Noise alone: the mean square of the average is the noise that the rule attributes to it."""
    average = Average("ema", 0.9)
    for step in range(steps):
        average.add(parts_of_gradients(0.0, 1.0, 1, 200_000, seed=step)[0])
    weight = 1 - 0.9**steps
    assert average.first is not None
    assert average.second is not None
    square = (average.first / weight).square()
    spread = (average.second / weight - square).clamp(min=0)
    calibration = float((average.snr() * spread / square).median())  # the factor that the rule takes
    assert abs(float(square.mean()) / (float(spread.mean()) / calibration) - 1) < 0.02


@pytest.mark.parametrize(("batch", "rate"), [(8, 0.650), (32, 0.675), (128, 0.681)])
def test_one_step_of_noise_follows_f(batch: int, rate: float) -> None:
    """The numbers of the design, equal to 2 t(1) - 1, and to the share among 400,000 weights of no signal."""
    assert false_prune_rate(1.0, "moments", 0.0, batch, steps=1) == pytest.approx(rate, abs=7e-4)
    assert false_prune_rate(1.0, "ratio", 0.0, batch, steps=1) == pytest.approx(2 * stats.t.cdf(1, batch - 1) - 1)
    h = parts_of_gradients(0.0, 1.0, batch, 400_000, seed=batch)
    average = Average("moments", 0.0)
    average.add(*moments_of_parts(h.sum(0), h.square().sum(0), batch))
    measured = float((average.snr() <= 1).double().mean())
    assert abs(measured - 2 * stats.t.cdf(1, batch - 1) + 1) < 5 * math.sqrt(rate * (1 - rate) / 400_000)


@pytest.mark.parametrize(
    ("rule", "beta", "parts", "rate"),
    [("ratio", 0.9, 8, 0.265), ("ratio", 0.99, 8, 0.005), ("moments", 0.9, 2, 0.53), ("moments", 0.9, 32, 0.55)],
)
def test_rates_of_averages(rule: Rule, beta: float, parts: int, rate: float) -> None:
    """Of the design, found by simulation of its own: .265 and .005 for ratios, .50 to .56 for moments."""
    assert false_prune_rate(1.0, rule, beta, parts) == pytest.approx(rate, abs=0.035 if rule == "moments" else 0.008)


def test_rate_of_averaged_moments_by_the_characteristic_function() -> None:
    """sum w g^2 <= sum w Sigma as a weighted sum of chi-squares: Imhof's integral (1961), K = 4, beta = .5, 3 steps."""
    coefficients = np.array([c for w in (1, 0.5, 0.25) for c in (w, -w / 3, -w / 3, -w / 3)])

    def integrand(u: float) -> float:
        angle = 0.5 * np.arctan(coefficients * u).sum()
        return float(math.sin(angle) / (u * np.prod((1 + (coefficients * u) ** 2) ** 0.25)))

    above = 0.5 + integrate.quad(integrand, 0, np.inf, limit=500)[0] / math.pi
    assert false_prune_rate(1.0, "moments", 0.5, 4, steps=3) == pytest.approx(1 - above, abs=0.008)


@pytest.mark.parametrize(("rule", "parts"), [("moments", 4), ("ratio", 8), ("ema", None)])
@pytest.mark.parametrize("steps", [1, 5, None])
def test_thresholds_invert_rates(rule: Rule, parts: int | None, steps: int | None) -> None:
    if rule == "ema" and steps == 1:
        pytest.skip("ema needs two steps")
    threshold = threshold_of_rate(0.3, rule, 0.8, parts, steps)
    assert false_prune_rate(threshold, rule, 0.8, parts, steps) == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize(("rule", "parts"), [("ratio", 3), ("ratio", None), ("moments", 1)])
def test_too_few_parts_are_refused(rule: Rule, parts: int | None) -> None:
    with pytest.raises(ValueError, match=rule):
        false_prune_rate(1.0, rule, 0.9, parts)


def test_dead_and_noiseless_weights() -> None:
    average = Average("moments", 0.9)
    average.add(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert average.snr().tolist() == [0.0, math.inf, 0.0]


@pytest.mark.parametrize(("rule", "before"), [("moments", 0), ("ratio", 0), ("ema", 1)])
def test_no_snr_before_there_is_one(rule: Rule, before: int) -> None:
    average = Average(rule, 0.9)
    for _ in range(before):
        average.add(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=f"no snr after {before} steps"):
        average.snr()


def test_a_step_without_measured_noise_counts_at_most_what_float32_can_tell() -> None:
    """The variance is a difference: where rounding leaves 0 of it, a ratio is not taken for infinite for ever."""
    average = Average("ratio", 0.5)
    signal = torch.tensor([1.0, 1.0, 0.0])
    average.add(signal, torch.tensor([0.0, 0.0, 0.0]))
    average.add(signal, torch.tensor([0.0, 1.0, 1.0]))
    expected = torch.tensor([2.0**23, (2.0**23 / 2 + 1) / 1.5, 0.0])
    assert torch.allclose(average.snr(), expected)
    assert average.snr().isfinite().all()
