"""Thresholds: the empirical rule solves its equation exactly, the lognormal rule up to its model; hand cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fpsim import lognormal
from fpsim.gradients import thresholds

FIXED = settings(derandomize=True, deadline=None)
SPARSITIES = st.floats(0, 0.999)
SAMPLES = hnp.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.one_of(st.just(0.0), st.sampled_from([1.0, -2.0, 3.0]), st.floats(-(2.0**100), 2.0**100, width=32)),
)


@FIXED
@given(SAMPLES, SPARSITIES)
def test_empirical_solves_the_equation_exactly(sample: np.ndarray, sparsity: float) -> None:
    alpha = thresholds.empirical(sample, sparsity)
    zero_share = float(np.mean(sample == 0))
    if zero_share >= sparsity:
        assert alpha == 0.0
    else:
        assert alpha > 0
        assert thresholds.expected_sparsity(sample, alpha) == pytest.approx(sparsity, rel=0, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 4.0, 15.0])
@pytest.mark.parametrize("sparsity", [0.41, 0.8, 0.99])
def test_empirical_is_exact_on_a_full_size_sample(sigma: float, sparsity: float) -> None:
    generator = np.random.default_rng(3)
    sample = generator.lognormal(-10, sigma, 4096) * (generator.random(4096) < 0.6)
    alpha = thresholds.empirical(sample, sparsity)
    assert alpha > 0
    assert thresholds.expected_sparsity(sample, alpha) == pytest.approx(sparsity, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("sample", "sparsity", "alpha"),
    [
        ([1.0], 0.5, 2.0),  # 1 - 1/a = 1/2
        ([1.0, -3.0], 0.25, 2.0),  # (1 - 1/a) / 2 = 1/4
        ([1.0, 3.0], 1 / 3, 3.0),  # a equals a magnitude
        ([3.0, 1.0], 0.5, 4.0),  # (2 - 4/a) / 2 = 1/2
        ([0.0, 0.0, 1.0, 4.0], 0.625, 2.0),  # (2 + 1 - 1/a) / 4 = 5/8
        ([2.0, 2.0, 2.0, 2.0], 0.75, 8.0),  # ties
        ([0.0, 0.0, 1.0, 4.0], 0.5, 0.0),  # as sparse as asked already
        ([0.0, 0.0, 0.0, 4.0], 0.5, 0.0),
        ([0.0, 0.0], 0.9, 0.0),
        ([1.0, 2.0], 0.0, 0.0),
    ],
)
def test_empirical_by_hand(sample: list[float], sparsity: float, alpha: float) -> None:
    assert thresholds.empirical(np.array(sample, dtype=np.float32), sparsity) == pytest.approx(alpha, rel=1e-15)


@pytest.mark.parametrize("zero_share", [0.0, 0.5])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_both_rules_agree_on_lognormal_data(sigma: float, zero_share: float) -> None:
    generator = np.random.default_rng(5)
    count = 100_000
    sample = generator.lognormal(-10, sigma, count) * generator.choice([-1, 1], count)
    sample[: int(zero_share * count)] = 0
    alpha = thresholds.lognormal(sample, 0.8)
    assert thresholds.expected_sparsity(sample, alpha) == pytest.approx(0.8, abs=0.005)
    assert alpha == pytest.approx(thresholds.empirical(sample, 0.8), rel=0.01 * (1 + sigma), abs=0)


def test_lognormal_is_fit_then_required_sparsity_then_threshold() -> None:
    sample = np.array([0, np.e, -(np.e**3), 0], dtype=np.float64)  # mu = 2, sigma = 1, half zeros: .9 asks .8
    assert thresholds.lognormal(sample, 0.9) == pytest.approx(float(lognormal.threshold(0.8, 2, 1)), rel=1e-12)


@pytest.mark.parametrize(
    ("sample", "sparsity", "alpha"),
    [
        ([0.0, 0.0], 0.9, 0.0),
        ([0.0, 0.0, 1.0, 4.0], 0.5, 0.0),
        ([1.0, 2.0], 0.0, 0.0),
        ([3.0, -3.0], 0.75, 12.0),  # one magnitude: m / (1 - S)
        ([0.0, 3.0], 0.75, 6.0),  # half zeros: .5 of the nonzeros
    ],
)
def test_lognormal_degenerate_samples(sample: list[float], sparsity: float, alpha: float) -> None:
    assert thresholds.lognormal(np.array(sample, dtype=np.float32), sparsity) == pytest.approx(alpha, rel=1e-14)


@FIXED
@given(SAMPLES, SPARSITIES)
def test_lognormal_always_gives_a_finite_threshold(sample: np.ndarray, sparsity: float) -> None:
    alpha = thresholds.lognormal(sample, sparsity)
    assert np.isfinite(alpha)
    assert (alpha > 0) == (float(np.mean(sample == 0)) < sparsity)


def test_expected_sparsity_by_hand() -> None:
    sample = np.array([[0.0, -1.0], [2.0, 8.0]], dtype=np.float32)
    assert thresholds.expected_sparsity(sample, 0) == 0.25
    assert thresholds.expected_sparsity(sample, 4) == (1 + 0.75 + 0.5 + 0) / 4
    assert thresholds.expected_sparsity(sample, 5e-324) == 0.25


@pytest.mark.parametrize("rule", [thresholds.empirical, thresholds.lognormal])
@pytest.mark.parametrize(
    ("sample", "sparsity", "message"),
    [
        ([1.0, np.nan], 0.5, "x must be finite, got 1 NaN"),
        ([], 0.5, "x must have at least one element"),
        ([1.0, 2.0], 1.0, r"sparsity must be in \[0, 1\), got 1\.0"),
        ([1.0, 2.0], -0.5, r"sparsity must be in \[0, 1\), got -0\.5"),
    ],
)
def test_bad_input_is_named(
    rule: Callable[[np.ndarray, float], float], sample: list[float], sparsity: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rule(np.array(sample), sparsity)


@pytest.mark.parametrize("alpha", [-1.0, np.nan, np.inf])
def test_expected_sparsity_refuses_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be finite and >= 0, got {alpha}"):
        thresholds.expected_sparsity(np.ones(2), alpha)
