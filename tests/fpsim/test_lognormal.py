"""Lognormal mathematics against quadrature in 20 digits, the source's numbers, simulation and closed-form limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fpsim import lognormal

# (sigma, z) with alpha = exp(mu + sigma z): both extremes of the stated range, and between.
GRID = [
    (0.05, -2.0),
    (0.05, 1.0),
    (0.05, 138.0),
    (0.5, -3.0),
    (0.5, 1.5769),
    (1.0, 2.369),
    (1.0, 40.0),
    (2.0, -1.0),
    (3.0, 2.0),
    (4.0, 6.0),
    (15.0, -2.3),
    (15.0, 0.5),
    (15.0, 3.1),
    (15.0, 20.0),
]
MU = -7.5
FIXED = settings(derandomize=True, deadline=None)


def expectation(function: Callable[[mpmath.mpf], mpmath.mpf], low: float, high: float) -> mpmath.mpf:
    """E[function(t); low < t < high] for a standard normal t, by quadrature in pieces of one unit.

    The tolerance of quad is absolute, so the integrand is divided by a first estimate.
    """
    pieces = [low, *[mpmath.mpf(k) for k in range(int(np.floor(low)) + 1, int(np.ceil(high)))], high]
    estimate = mpmath.quad(lambda t: function(t) * mpmath.npdf(t), pieces, maxdegree=3)
    return estimate * mpmath.quad(lambda t: function(t) * mpmath.npdf(t) / estimate, pieces)


@pytest.fixture(autouse=True)
def twenty_digits() -> object:
    with mpmath.workdps(20):
        yield


@pytest.mark.parametrize(("sigma", "z"), GRID)
def test_sparsity_and_shares_equal_quadrature(sigma: float, z: float) -> None:
    s = mpmath.mpf(sigma)
    sparsity = expectation(lambda t: 1 - mpmath.exp(s * (t - z)), -16, min(z, 16))
    at_alpha = expectation(lambda t: mpmath.exp(s * (t - z)), -16, min(z, sigma + 16))
    alpha = np.exp(MU + sigma * z)
    assert lognormal.sparsity(alpha, MU, sigma) == pytest.approx(float(sparsity), rel=1e-10, abs=0)
    zero, raised, kept = lognormal.symbol_shares(alpha, MU, sigma)
    assert zero == lognormal.sparsity(alpha, MU, sigma)
    assert raised == pytest.approx(float(at_alpha), rel=1e-10, abs=0)
    assert kept == pytest.approx(float(mpmath.ncdf(-z)), rel=1e-10, abs=0)
    assert zero + raised + kept == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("sigma", "z"), GRID)
def test_cosine_equals_quadrature(sigma: float, z: float) -> None:
    s, peak = mpmath.mpf(sigma), 2 * sigma  # of x^2 times the density
    square = expectation(lambda t: mpmath.exp(2 * s * t), peak - 16, peak + 16)
    pruned = expectation(lambda t: mpmath.exp(s * (t + z)), -16, min(z, sigma + 16))
    kept = expectation(lambda t: mpmath.exp(2 * s * t), max(z, peak - 16), max(z, peak) + 16)
    expected = mpmath.sqrt(square / (pruned + kept))
    cosine = lognormal.cosine(np.exp(MU + sigma * z), MU, sigma)
    assert cosine == pytest.approx(float(expected), rel=1e-10, abs=0)


@pytest.mark.parametrize(("sigma", "z"), GRID)
def test_mean_squared_error_equals_quadrature(sigma: float, z: float) -> None:
    s = mpmath.mpf(sigma)
    squared = expectation(
        lambda t: mpmath.exp(2 * MU + s * t) * (mpmath.exp(s * z) - mpmath.exp(s * t)), -16, min(z, 2 * sigma + 16)
    )
    error = lognormal.mean_squared_error(np.exp(MU + sigma * z), MU, sigma)
    assert error == pytest.approx(float(squared), rel=1e-10, abs=0)


@pytest.mark.parametrize(
    ("sigma", "sparsity", "alpha", "at_alpha", "kept", "cosine"),
    [
        (1.0, 0.85, 10.687, 0.1411, 0.0089, 0.6279),
        (2.0, 0.85, 26.692, 0.0997, 0.0503, 0.9928),
        (0.5, 0.50, 2.200, 0.4426, 0.0574, 0.7953),
    ],
)
def test_published_points(
    sigma: float, sparsity: float, alpha: float, at_alpha: float, kept: float, cosine: float
) -> None:
    solved = lognormal.threshold(sparsity, MU, sigma)
    assert solved / np.exp(MU) == pytest.approx(alpha, abs=5.01e-4)
    shares = lognormal.symbol_shares(solved, MU, sigma)
    np.testing.assert_allclose(shares, (sparsity, at_alpha, kept), rtol=0, atol=5.01e-5)
    assert lognormal.cosine(solved, MU, sigma) == pytest.approx(cosine, abs=5.01e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_simulated_pruning_agrees_within_five_standard_errors(sigma: float, sparsity: float) -> None:
    generator = np.random.default_rng(int(100 * sparsity + 1000 * sigma))
    count = 200_000
    alpha = float(lognormal.threshold(sparsity, MU, sigma))
    x = generator.lognormal(MU, sigma, count)
    raised = np.where(generator.random(count) * alpha < x, alpha, 0.0)
    pruned = np.where(x < alpha, raised, x)
    observed = [pruned == 0, (pruned == alpha) & (x < alpha), x >= alpha]
    for happened, share in zip(observed, lognormal.symbol_shares(alpha, MU, sigma), strict=True):
        assert abs(np.mean(happened) - share) < 5 * np.sqrt(share * (1 - share) / count)
    squared_errors = (pruned - x) ** 2
    mean = lognormal.mean_squared_error(alpha, MU, sigma)
    assert abs(np.mean(squared_errors) - mean) < 5 * np.std(squared_errors) / np.sqrt(count)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 2.0, 4.0, 15.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.85, 0.99])
def test_simulated_cosines_agree_within_five_standard_errors(sigma: float, sparsity: float) -> None:
    """By importance: 1 / cos^2 = E[max(alpha x, x^2)] / E[x^2] is a mean of max(alpha / x, 1) where x^2 weights x."""
    generator, count = np.random.default_rng(int(100 * sparsity + 1000 * sigma)), 200_000
    alpha = float(lognormal.threshold(sparsity, 0.0, sigma))
    logs = 2 * sigma**2 + sigma * generator.standard_normal(count)
    ratios = np.maximum(alpha * np.exp(-logs), 1.0)
    cosine = float(lognormal.cosine(alpha, 0.0, sigma))
    assert abs(ratios.mean() - cosine**-2) <= 5 * ratios.std() / np.sqrt(count) + 1e-6
    kept, share = logs > sigma * norm.ppf(sparsity), lognormal.top_k_cosine(sparsity, sigma) ** 2
    assert abs(kept.mean() - share) <= 5 * np.sqrt(share * (1 - share) / count) + 1e-4


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("sparsity", [0.3, 0.85])
def test_measured_cosine_is_that_of_pruned_tensors(sigma: float, sparsity: float) -> None:
    generator = np.random.default_rng(5)
    x = generator.lognormal(MU, sigma, 400_000) * generator.choice([-1.0, 1.0], 400_000)
    alpha = float(lognormal.threshold(sparsity, MU, sigma))
    measured = lognormal.measured_cosine(x, alpha)
    assert measured == pytest.approx(float(lognormal.cosine(alpha, MU, sigma)), rel=0.02)
    pruned = np.where(np.abs(x) >= alpha, x, np.sign(x) * alpha * (generator.random(x.size) * alpha < np.abs(x)))
    drawn = (x @ pruned) / np.linalg.norm(x) / np.linalg.norm(pruned)
    assert measured == pytest.approx(float(drawn), rel=0.005)
    assert lognormal.top_k_cosine(sparsity, sigma) > measured


def test_measured_cosine_by_hand() -> None:
    assert lognormal.measured_cosine([3.0, 0.0, -4.0], 0) == 1
    assert lognormal.measured_cosine(torch.tensor([[1.0, -4.0]]), 2.0) == pytest.approx(np.sqrt(17 / 18))
    assert lognormal.measured_cosine([1e-200, -4e-200], 2e-200) == pytest.approx(np.sqrt(17 / 18))
    assert np.isnan(lognormal.measured_cosine([0.0, 0.0], 1.0))


def test_top_k_cosine_in_closed_cases() -> None:
    assert lognormal.top_k_cosine(0, 1.0) == 1
    np.testing.assert_allclose(lognormal.top_k_cosine(0.5, [1e-9, 1.0]), np.sqrt([0.5, norm.cdf(2.0)]), rtol=1e-8)


def test_threshold_is_found_on_all_of_the_stated_range() -> None:
    sigma, sparsity = np.meshgrid(np.geomspace(0.05, 15, 200), np.append(np.linspace(0.01, 0.99, 99), [0.995, 0.999]))
    alpha = lognormal.threshold(sparsity, 0.0, sigma)
    assert (np.diff(alpha, axis=0) > 0).all()
    np.testing.assert_allclose(lognormal.sparsity(alpha, 0.0, sigma), sparsity, rtol=1e-11)


@FIXED
@given(
    sparsity=st.floats(0.01, 0.999),
    sigma=st.floats(0.05, 15),
    mu=st.floats(-40, 10),
)
def test_threshold_inverts_sparsity(sparsity: float, sigma: float, mu: float) -> None:
    assert lognormal.sparsity(lognormal.threshold(sparsity, mu, sigma), mu, sigma) == pytest.approx(sparsity, rel=1e-11)


@FIXED
@given(sigma=st.floats(0.05, 15), position=st.floats(0.001, 0.999), mu=st.floats(-40, 10))
def test_sparsity_inverts_threshold(sigma: float, position: float, mu: float) -> None:
    low, high = np.log(lognormal.threshold([0.01, 0.999], mu, sigma))
    alpha = np.exp(low + position * (high - low))
    assert lognormal.threshold(lognormal.sparsity(alpha, mu, sigma), mu, sigma) == pytest.approx(
        alpha, rel=1e-10, abs=0
    )


def test_threshold_in_closed_form_when_nothing_is_kept() -> None:
    mean = np.exp(MU + 0.05**2 / 2)
    assert lognormal.threshold(0.999, MU, 0.05) == pytest.approx(mean / 0.001, rel=1e-10, abs=0)


def test_threshold_outside_the_stated_range_still_inverts() -> None:
    sparsity, sigma = np.meshgrid([1e-200, 1e-6, 0.5, 0.999999], [1e-4, 1e-2, 20.0])
    alpha = lognormal.threshold(sparsity, MU, sigma)
    assert (np.diff(alpha, axis=1) > 0).all()
    np.testing.assert_allclose(lognormal.sparsity(alpha, MU, sigma), sparsity, rtol=1e-6)


def test_nothing_is_pruned_at_alpha_zero() -> None:
    assert lognormal.threshold(0, MU, 2.0) == 0
    assert lognormal.sparsity(0, MU, 2.0) == 0
    assert lognormal.symbol_shares(0, MU, 2.0) == (0, 0, 1)
    assert lognormal.cosine(0, MU, 2.0) == 1
    assert lognormal.mean_squared_error(0, MU, 2.0) == 0


def test_extreme_alpha_keeps_limits() -> None:
    alpha = np.array([5e-324, 1e-100, 1e100, 1e300])
    sigma = np.array([[0.05], [15.0]])
    share, cosine = lognormal.sparsity(alpha, MU, sigma), lognormal.cosine(alpha, MU, sigma)
    np.testing.assert_allclose(share, [[0, 0, 1, 1]] * 2, atol=1e-40)
    assert ((share >= 0) & (share <= 1)).all()
    assert ((cosine >= 0) & (cosine <= 1)).all()
    np.testing.assert_array_equal(cosine[:, :2], 1)


def test_scalars_and_arrays_broadcast_alike() -> None:
    mu, sigma = np.array([-3.0, 0.0, 2.0]), np.array([[0.5], [3.0]])
    alpha = lognormal.threshold(0.8, mu, sigma)
    assert alpha.shape == (2, 3)
    assert alpha.dtype == np.float64
    assert alpha[1, 2] == lognormal.threshold(0.8, 2.0, 3.0)
    for function in (lognormal.sparsity, lognormal.cosine, lognormal.mean_squared_error):
        assert function(alpha, mu, sigma).shape == (2, 3)
        assert function(alpha, mu, sigma)[1, 0] == function(alpha[1, 0], -3.0, 3.0)
    np.testing.assert_allclose(lognormal.threshold([0, 0.8], 2.0, 3.0), [0, alpha[1, 2]])


def test_required_sparsity_by_hand() -> None:
    np.testing.assert_allclose(
        lognormal.required_sparsity(0.8, [0.0, 0.5, 0.75, 0.8, 0.9, 1.0]), [0.8, 0.6, 0.2, 0.0, 0.0, 0.0], atol=1e-15
    )


def test_fit_by_hand() -> None:
    fitted = lognormal.fit(np.array([[np.e, 0.0], [-(np.e**3), -0.0]], dtype=np.float64))
    assert (fitted.mu, fitted.sigma) == pytest.approx((2.0, 1.0), rel=1e-15)
    assert (fitted.zero_share, fitted.count) == (0.5, 4)


def test_fit_recovers_the_distribution() -> None:
    count = 100_000
    fitted = lognormal.fit(np.random.default_rng(1).lognormal(-12, 3, count).astype(np.float32))
    assert abs(fitted.mu + 12) < 5 * 3 / np.sqrt(count)
    assert abs(fitted.sigma - 3) < 5 * 3 / np.sqrt(2 * count)


def test_fit_is_stable_for_nearly_equal_magnitudes() -> None:
    assert lognormal.fit(np.full(1001, 1e-30)).sigma == 0
    spread = lognormal.fit(1e-30 * (1 + 1e-9 * np.array([1.0, -1.0]))).sigma
    assert spread == pytest.approx(1e-9, rel=1e-4, abs=0)


def test_fit_of_zeros_only() -> None:
    fitted = lognormal.fit(np.zeros((2, 3), dtype=np.float32))
    assert np.isnan([fitted.mu, fitted.sigma]).all()
    assert (fitted.zero_share, fitted.count) == (1.0, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fit_takes_torch_tensors(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, -2.0], [0.0, 4.0]], dtype=dtype, requires_grad=True)
    assert lognormal.fit(tensor) == lognormal.fit([1.0, -2.0, 0.0, 4.0])


def test_import_does_not_need_torch() -> None:
    code = "import sys, fpsim.lognormal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lognormal.fit([1.0, np.nan, -np.inf]), "x must be finite, got 1 NaN and 1 infinite of 3 elements"),
        (lambda: lognormal.fit([]), "x must have at least one element"),
        (lambda: lognormal.sparsity([1.0, -2.0], 0, 1), r"alpha must be finite and >= 0, got -2\.0"),
        (lambda: lognormal.measured_cosine([1.0], -1), r"alpha must be finite and >= 0, got -1\.0"),
        (lambda: lognormal.top_k_cosine(1, 1), r"sparsity must be in \[0, 1\), got 1\.0"),
        (lambda: lognormal.top_k_cosine(0.5, 0), r"sigma must be finite and > 0, got 0\.0"),
        (lambda: lognormal.cosine(np.nan, 0, 1), "alpha must be finite and >= 0, got nan"),
        (lambda: lognormal.mean_squared_error(1, np.inf, 1), "mu must be finite, got inf"),
        (lambda: lognormal.symbol_shares(1, 0, 0), r"sigma must be finite and > 0, got 0\.0"),
        (lambda: lognormal.threshold(0.5, 0, [1, -1]), r"sigma must be finite and > 0, got -1\.0"),
        (lambda: lognormal.threshold(1, 0, 1), r"sparsity must be in \[0, 1\), got 1\.0"),
        (lambda: lognormal.threshold(-0.1, 0, 1), r"sparsity must be in \[0, 1\), got -0\.1"),
        (lambda: lognormal.required_sparsity(1.5, 0), r"sparsity must be in \[0, 1\), got 1\.5"),
        (lambda: lognormal.required_sparsity(0.5, 1.1), r"zero_share must be in \[0, 1\], got 1\.1"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
