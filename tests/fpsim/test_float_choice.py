"""The choice of a float against simulation in NumPy and ml_dtypes, quadrature, and properties."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.integrate import quad
from scipy.stats import expon, norm

import accel
from fpsim import figures, float_choice, lognormal
from fpsim.cli import main
from fpsim.float_choice import Laplace, Lognormal, Normal

COUNT = 200_000
DISTRIBUTIONS = [Lognormal(0.3), Lognormal(2.0), Lognormal(9.0), Normal(2.0**-5), Normal(3.0), Laplace(0.7)]
# The widths at which the next number of exponent bits takes over, in steps of 0.01: closed form, and real formats.
STEPS = {
    3: ([0.76], [0.87]),
    4: ([0.59, 1.44], [0.75, 1.48]),
    5: ([0.50, 1.14, 2.73], [0.65, 1.39, 2.72]),
    6: ([0.44, 0.97, 2.21, 5.23], [0.58, 1.24, 2.50, 5.13]),
    7: ([0.40, 0.86, 1.90, 4.29], [0.51, 1.11, 2.29, 4.58]),
    8: ([0.36, 0.78, 1.70, 3.72, 8.37], [0.46, 1.07, 2.20, 4.17, 8.64]),
}

ENDINGS = ("json", "csv", "png", "svg")


def draw(distribution: float_choice.Distribution, count: int = COUNT) -> np.ndarray:
    generator, parameter = np.random.default_rng(7), float(distribution.values)
    if isinstance(distribution, Lognormal):
        return np.exp2(parameter * generator.standard_normal(count))
    if isinstance(distribution, Normal):
        return np.abs(parameter * generator.standard_normal(count))
    return generator.exponential(parameter, count)


def density(distribution: float_choice.Distribution) -> Callable[[float], float]:
    """Of log2|x|."""
    parameter = float(distribution.values)
    if isinstance(distribution, Lognormal):
        return lambda log2: norm.pdf(log2, scale=parameter)
    magnitude = expon(scale=parameter).pdf if isinstance(distribution, Laplace) else None
    return lambda log2: (
        (magnitude(2.0**log2) if magnitude else 2 * norm.pdf(2.0**log2, scale=parameter)) * 2.0**log2 * np.log(2)
    )


def by_the_number(x: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The source's float from a list of its numbers: the nearest of each x by search, no arithmetic shared."""
    half = 2 ** (exponent_bits - 1)
    numbers = [2.0**e * (1 + m / 2**mantissa_bits) for e in range(-half, half) for m in range(2**mantissa_bits)]
    listed = np.array([*numbers, 2.0**half])
    above = np.clip(np.searchsorted(listed, x), 1, len(listed) - 1)
    nearest = np.where(x - listed[above - 1] < listed[above] - x, listed[above - 1], listed[above])
    return np.select([x < 2.0**-half, x >= 2.0**half], [0.0, 2.0**half], nearest)


def steps(best: np.ndarray, sigma: np.ndarray) -> list[float]:
    assert np.isin(np.diff(best), (0, 1)).all()
    return [float(value) for value in sigma[1:][np.diff(best) == 1]]


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(1, 2), (2, 0), (3, 1), (3, 4), (5, 2), (7, 0)])
def test_the_model_float_is_the_nearest_of_its_numbers(exponent_bits: int, mantissa_bits: int) -> None:
    x = draw(Lognormal(3.0), 20_000)
    rounded = float_choice.model_float(-x, exponent_bits, mantissa_bits)
    np.testing.assert_array_equal(rounded, by_the_number(x, exponent_bits, mantissa_bits))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(1, 1), (2, 0), (3, 4), (4, 3), (5, 2)])
def test_exact_error_agrees_with_simulation(
    distribution: float_choice.Distribution, exponent_bits: int, mantissa_bits: int
) -> None:
    x = draw(distribution)
    errors = np.abs(by_the_number(x, exponent_bits, mantissa_bits) - x) / x
    exact = float_choice.grid_error(float_choice.model_grid(exponent_bits, mantissa_bits), distribution)
    assert abs(errors.mean() - exact) < 5 * errors.std() / np.sqrt(COUNT) + 1e-6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e4m3", "float8_e4m3"), ("e3m4", "float8_e3m4"), ("e4m3fn", "float8_e4m3fn"), ("e5m2", "float8_e5m2"),
        ("e3m2", "float6_e3m2fn"), ("e2m3", "float6_e2m3fn"), ("e2m1", "float4_e2m1fn"),
    ],
)  # fmt: skip
def test_error_of_real_formats_agrees_with_ml_dtypes(
    distribution: float_choice.Distribution, name: str, dtype: str
) -> None:
    x, fmt = draw(distribution), accel.format(name)
    error, k = float_choice.scaled_error(fmt, distribution)
    for exponent in (k, k - 2, k + 3):
        scaled = np.minimum(x / 2.0**exponent, fmt.max)
        rounded = scaled.astype(getattr(ml_dtypes, dtype)).astype(np.float64) * 2.0**exponent
        errors = np.abs(rounded - x) / x
        exact = float_choice.grid_error(float_choice.format_grid(fmt), distribution, exponent)
        assert abs(errors.mean() - exact) < 5 * errors.std() / np.sqrt(COUNT) + 1e-6
        assert exact >= error - 1e-11


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_exact_error_equals_quadrature(distribution: float_choice.Distribution) -> None:
    grid = float_choice.format_grid(accel.format("e3m2"))
    weight, edges, values = density(distribution), [*grid.edges, 90.0], grid.values
    total = quad(weight, -90, edges[0], points=[-30, -10], limit=200)[0]
    for low, value, high in zip(edges[:-1], values, edges[1:], strict=True):
        total += quad(lambda y, v=value: (2 ** (v - y) - 1) * weight(y), low, value)[0]
        total += quad(lambda y, v=value: (1 - 2 ** (v - y)) * weight(y), value, high, limit=200)[0]
    assert float_choice.grid_error(grid, distribution) == pytest.approx(total, abs=1e-9)


def test_the_formula_is_near_the_exact_error_where_the_tensor_is_wide() -> None:
    sigma = np.array([0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0])
    worst = {}
    for mantissa_bits in range(7):
        for exponent_bits in range(1, 9):
            exact = float_choice.grid_error(float_choice.model_grid(exponent_bits, mantissa_bits), Lognormal(sigma))
            formula = lognormal.relative_error(exponent_bits, mantissa_bits, sigma)
            worst[exponent_bits, mantissa_bits] = np.abs(formula - exact).max()
    assert max(error for (_, m), error in worst.items() if m > 0) < 0.002
    assert 0.01 < max(error for (_, m), error in worst.items() if m == 0) < 0.012


def test_the_formula_by_hand_and_in_its_limits() -> None:
    log2 = np.log(2)
    expected = 0.6826894921370859 / (8 * log2 * 2) + 2 * norm.sf(1) - 4 * np.exp(2 * log2**2) * norm.sf(1 + 2 * log2)
    assert lognormal.relative_error(2, 1, 2.0) == pytest.approx(expected, rel=1e-12)
    assert lognormal.relative_error(8, 5, 1.0) == pytest.approx(1 / (8 * log2 * 32), rel=1e-12)
    assert lognormal.relative_error(1, 5, 1e9) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(lognormal.relative_error(32, 0, [0.01, 1e4])).all()
    # 1/x has a finite mean above t for every distribution: the formula is a share
    errors = float_choice.closed_form_error([[1], [4]], 3, Normal(np.exp2([-200.0, -3, 0, 3, 200])))
    assert errors.shape == (2, 5)
    assert ((errors >= 0) & (errors <= 1)).all()


@pytest.mark.parametrize("bits", STEPS)
def test_where_exponent_bits_take_over(bits: int) -> None:
    sigma = np.arange(30, 900) / 100
    for model, expected in zip(("closed_form", "numeric"), STEPS[bits], strict=True):
        found = steps(lognormal.best_exponent_bits(bits, sigma, model), sigma)
        assert found == pytest.approx(expected, abs=0.0101), model


def test_policies_move_the_step_from_e3m4_to_e4m3() -> None:
    sigma = np.arange(150, 260) / 100
    for policy, expected in (("finite", 2.20), ("fn", 2.19), ("ieee", 1.95)):
        found = steps(lognormal.best_exponent_bits(8, sigma, policy=policy), sigma)
        assert found == pytest.approx([expected], abs=0.0101)


def test_a_normal_wants_fewer_exponent_bits_the_wider_it_is() -> None:
    sigma = np.exp2(np.arange(-14, 1))
    best = float_choice.best_exponent_bits_of(Normal(sigma), 8, "closed_form")
    assert (np.diff(best) <= 0).all()
    assert best[0] > best[-1]


@pytest.mark.parametrize("kind", [Normal, Laplace])
def test_a_scale_makes_the_width_of_a_normal_irrelevant(kind: type[float_choice.Distribution]) -> None:
    wide = float_choice.errors_of(kind(np.exp2([-300.0, -20, 0, 5])), 6)
    np.testing.assert_allclose(wide, wide[[2, 2, 2, 2]], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["e1m1", "e2m0", "e4m1", "e3m4", "e5m2", "int4"])
def test_the_scale_is_the_best_of_all(name: str) -> None:
    fmt = accel.format(name)
    grid = float_choice.format_grid(fmt)
    for distribution in (Lognormal(np.array([0.05, 0.31, 0.9, 2.1, 4.4, 11.0])), Normal(0.01), Laplace(5.0)):
        error, exponent = float_choice.scaled_error(fmt, distribution)
        everywhere = [float_choice.grid_error(grid, distribution, k) for k in range(-90, 90)]
        np.testing.assert_allclose(error, np.min(everywhere, axis=0), rtol=0, atol=1e-10)
        np.testing.assert_array_equal(error, float_choice.grid_error(grid, distribution, exponent))


def test_arrays_broadcast_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma = np.array([0.5, 2.0, 6.0])
    best = lognormal.best_exponent_bits([[4], [8]], sigma)
    assert best.dtype == np.int64
    assert best.shape == (2, 3)
    assert best[1, 2] == lognormal.best_exponent_bits(8, 6.0)
    assert lognormal.best_exponent_bits(8, 6.0).shape == ()
    assert lognormal.relative_error([[2], [3]], 1, sigma).shape == (2, 3)
    monkeypatch.setattr(float_choice, "NUMBERS_AT_ONCE", 1)
    np.testing.assert_array_equal(lognormal.best_exponent_bits([[4], [8]], sigma), best)


def test_narrow_and_wide_floats() -> None:
    for model in float_choice.MODELS:
        assert lognormal.best_exponent_bits(2, [0.05, 30.0], model).tolist() == [1, 1]
    assert lognormal.best_exponent_bits(16, 90.0, "closed_form") > 8
    assert lognormal.best_exponent_bits(11, [1.0, 60.0]).tolist()[1] == 8
    assert np.isinf(float_choice.errors_of(Lognormal(1.0), 6, policy="ieee")[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lognormal.relative_error(0, 3, 1), r"exponent_bits must be an integer from 1 to 32, got 0\.0"),
        (lambda: lognormal.relative_error(4, [2.5, 3], 1), r"mantissa_bits must be an integer from 0 to 32, got 2\.5"),
        (lambda: lognormal.relative_error(4, 3, -1), r"sigma_log2 must be finite and > 0, got -1\.0"),
        (lambda: lognormal.best_exponent_bits(1, 1), r"bits must be an integer from 2 to 16, got 1\.0"),
        (lambda: lognormal.best_exponent_bits(33, 1, "closed_form"), r"bits must be an integer from 2 to 32, got 33"),
        (lambda: lognormal.best_exponent_bits(8, np.nan), "sigma_log2 must be finite and > 0, got nan"),
        (lambda: lognormal.best_exponent_bits(8, 1, "exact"), "model must be one of numeric, closed_form, got 'exact'"),
        (lambda: lognormal.best_exponent_bits(8, 1, policy="x"), "policy must be one of finite, .* got 'x'"),
        (lambda: Normal([1, 0]), r"sigma must be finite and > 0, got 0\.0"),
        (lambda: Laplace(np.inf), "mean must be finite and > 0, got inf"),
        (lambda: float_choice.model_float(1.0, 11, 0), "exponent_bits must be an integer from 1 to 10"),
        (lambda: float_choice.model_grid(3, 16), "mantissa_bits must be an integer from 0 to 15"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["fpsim", "reproduce", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", ["fig3a", "fig3b", "fig3c"])
def test_reproduce_writes_numbers_and_a_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures.float_choice, "SAMPLES", 1000)
    monkeypatch.setattr(figures.float_choice, "SIGMAS_3B", np.array([0.5, 1.0, 4.0]))
    monkeypatch.setattr(figures.float_choice, "LOG2_SIGMAS_3C", np.array([-16.0, 0.0, 16.0]))
    folder = tmp_path / "made" / "here"
    assert run(monkeypatch, name, "--output", folder) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [str(folder / f"{name}.{end}") for end in ENDINGS]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.{end}" for end in sorted(ENDINGS)]
    written = json.loads((folder / f"{name}.json").read_text())
    assert written["figure"] == name
    with (folder / f"{name}.csv").open(encoding="utf-8") as table:
        read = list(csv.DictReader(table))
    assert [list(row.values()) for row in read] == [[str(value) for value in row.values()] for row in written["rows"]]
    assert imread(folder / f"{name}.png").shape[2] == 4


def test_an_unknown_figure_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "fig3x", "--output", tmp_path) == 2
    message = "unknown figure 'fig3x' (allowed: fig3a, fig3b, fig3c, fig2, fig4, table1, fig5-right, "
    assert message in capsys.readouterr().err
