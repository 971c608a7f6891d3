"""Seven fitted distributions, their Kolmogorov-Smirnov statistic and its null distribution; the modes of log2|x|."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fpsim.distributions import FAMILIES, Family, best, compare, critical_value, modes, p_value

COUNT = 4096


def draw(name: str, seed: int = 0, count: int = COUNT) -> np.ndarray:
    random = np.random.default_rng([seed, list(FAMILIES).index(name)])
    z = FAMILIES[name].standard.rvs(size=count, random_state=random)
    return np.exp(1.5 * z - 3) * random.choice([-1.0, 1.0], count) if FAMILIES[name].of_logs else 2e-5 * z + 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_nearest_to_its_own_distribution(name: str) -> None:
    found = compare(draw(name))
    assert best(found).family == name
    assert found[name].p_value > 0.01
    assert max(found[other].p_value for other in FAMILIES if other != name) < 0.01


@pytest.mark.parametrize("sample", ["normal", "lognormal", "cauchy"])
def test_the_statistic_is_that_of_scipy(sample: str) -> None:
    x = draw(sample)
    for fitted in compare(x).values():
        assert fitted.statistic == pytest.approx(stats.kstest(x, fitted.cdf).statistic, abs=1e-12)


def test_the_parameters_are_those_of_scipy() -> None:
    x = draw("logistic")
    found = compare(x)
    for name in ("normal", "laplace", "uniform", "logistic"):
        expected = FAMILIES[name].standard.fit(x)
        assert (found[name].location, found[name].scale) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    low, median, high = np.quantile(x, [0.25, 0.5, 0.75])
    assert (found["cauchy"].location, found["cauchy"].scale) == pytest.approx((median, (high - low) / 2))
    logs = np.log(np.abs(x))
    assert (found["lognormal"].location, found["lognormal"].scale) == pytest.approx((logs.mean(), logs.std()))
    assert found["loglaplace"].location == pytest.approx(np.median(logs))


def test_the_logistic_fit_is_the_maximum_of_the_likelihood_on_heavy_tails() -> None:
    x = draw("cauchy")
    found = compare(x)["logistic"]
    assert (found.location, found.scale) == pytest.approx(stats.logistic.fit(x), rel=1e-3, abs=1e-7)


def test_equal_terms() -> None:
    """Of |x| alone D is twice that of the signed x: a lognormal of |x| must not be held against a normal of x."""
    magnitudes = np.abs(draw("normal"))
    signed = np.concatenate([magnitudes, -magnitudes])
    assert compare(magnitudes)["lognormal"].statistic == pytest.approx(2 * compare(signed)["lognormal"].statistic)
    positive = compare(magnitudes)["lognormal"]
    logs = (np.log(magnitudes) - positive.location) / positive.scale
    assert positive.negative_share == 0
    assert positive.statistic == pytest.approx(stats.kstest(logs, "norm").statistic)
    assert compare(np.abs(draw("normal")) + 1)["normal"].negative_share == 0


def test_zeros_and_units_change_nothing() -> None:
    x = draw("lognormal")
    expected = {name: fitted.statistic for name, fitted in compare(x).items()}
    for same in (np.concatenate([x, np.zeros(1000)]), x * 2.0**900, torch.from_numpy(x).reshape(64, 64)):
        assert {name: fitted.statistic for name, fitted in compare(same).items()} == pytest.approx(expected, rel=1e-9)


def test_critical_values_are_those_of_lilliefors() -> None:
    """Lilliefors' table as corrected by Stephens (1974): .895 and 1.035 over sqrt(n) - .01 + .85 / sqrt(n)."""
    for count in (20, 100, 4096):
        modified = np.sqrt(count) - 0.01 + 0.85 / np.sqrt(count)
        assert critical_value("normal", count) * modified == pytest.approx(0.895, rel=0.04)
        assert critical_value("normal", count, level=0.01) * modified == pytest.approx(1.035, rel=0.05)
        assert critical_value("lognormal", count, negative_share=0) * modified == pytest.approx(0.895, rel=0.04)
    assert critical_value("laplace", 4096, level=0.05) < stats.kstwo.ppf(0.95, 4096)


@pytest.mark.parametrize("name", ["normal", "lognormal"])
def test_p_values_are_uniform_under_the_hypothesis(name: str) -> None:
    values = [compare(draw(name, seed, 300))[name].p_value for seed in range(1, 61)]
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_a_p_value_is_never_zero() -> None:
    assert p_value("normal", 0.9, 100) == 1 / 2000
    assert p_value("normal", 0.0, 100) == 1.0
    assert np.isnan(p_value("normal", np.nan, 100))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(100), "x must have at least 8 nonzeros, got 0"),
        (np.ones(7), "x must have at least 8 nonzeros, got 7"),
        (np.full(9, np.nan), "x must be finite, got 9 NaN"),
        (np.ones(0), "x must have at least one element"),
    ],
)
def test_bad_tensors_are_refused(x: np.ndarray, message: str) -> None:
    for function in (compare, modes):
        with pytest.raises(ValueError, match=message):
            function(x)


def test_a_single_magnitude_has_no_lognormal_fit() -> None:
    found = compare(np.array([1.0, -1.0] * 8))
    assert np.isnan(found["lognormal"].statistic)
    assert np.isnan(found["loglaplace"].p_value)
    assert found["normal"].statistic > 0.3
    assert best(found).statistic > 0
    assert modes(np.full(20, 3.0)).kind == "one mode"


@pytest.mark.parametrize(
    ("weight", "means", "sigmas"),
    [(0.2, (-14.0, -8.0), (1.0, 1.5)), (0.5, (-24.0, -20.0), (1.0, 1.0)), (0.03, (-30.0, -18.0), (1.0, 2.0))],
)
def test_two_modes_are_found(weight: float, means: tuple[float, float], sigmas: tuple[float, float]) -> None:
    random = np.random.default_rng(0)
    lower = random.random(COUNT) < weight
    logs = np.where(lower, means[0], means[1]) + np.where(lower, *sigmas) * random.standard_normal(COUNT)
    x = np.concatenate([np.exp2(logs) * random.choice([-1.0, 1.0], COUNT), np.zeros(500)])
    found = modes(x)
    assert found.kind == "two modes"
    assert found.weights == pytest.approx((weight, 1 - weight), abs=0.03)
    assert found.means == pytest.approx(means, abs=0.3)
    assert found.sigmas == pytest.approx(sigmas, rel=0.25)
    assert found == modes(x)


def test_one_mode_is_not_two() -> None:
    """No false positive among 10 samples of each distribution; a lognormal never has a second component."""
    for name in ("normal", "laplace", "lognormal"):
        kinds = {modes(draw(name, seed, 512)).kind for seed in range(10)}
        assert "two modes" not in kinds
        if name == "lognormal":
            assert kinds == {"one mode"}


def test_sixty_layers_take_seconds() -> None:
    layers = [draw("lognormal", seed) for seed in range(60)]
    assert [best(compare(layer)).family for layer in layers] == ["lognormal"] * 60


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_distribution_functions_are_scipys(family: Family) -> None:
    z = np.array([-np.inf, -700, -40, -8, -1.5, -1, -1e-9, 0, 1e-9, 0.25, 0.5, 1, 1.5, 8, 40, 700, np.inf])
    np.testing.assert_allclose(family.cdf(z), family.standard.cdf(z), rtol=1e-14, atol=1e-16)
