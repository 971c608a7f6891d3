"""Statistics of log2|x| against float64, on any layout and any number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import accel
from accel import Log2Statistics, log2_statistics


def in_float64(x: np.ndarray) -> tuple[int, float, float]:
    values = np.abs(x[np.isfinite(x) & (x != 0)].astype(np.float64))
    logs = np.log2(values)
    return values.size, float(logs.mean()) if values.size else math.nan, float(logs.std()) if values.size else math.nan


def lognormal(count: int, sigma: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        return (np.exp(-9 + sigma * rng.standard_normal(count)) * rng.choice([-1, 1], count)).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.0, 0.05, 2.0, 15.0])
@pytest.mark.parametrize("count", [100_003, 1 << 20])
def test_mean_and_deviation_of_large_tensors(sigma: float, count: int) -> None:
    x = lognormal(count, sigma)
    x[::9] = 0
    found, (nonzeros, mean, std) = log2_statistics(x), in_float64(x)
    assert found.nonzeros == nonzeros
    assert found.mean == pytest.approx(mean, abs=2e-8)
    assert found.std == pytest.approx(std, rel=2e-8, abs=2e-7)


EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 2.0**-126, 2.0**-126 - 2.0**-149, 1.0, -2.0, 3.4028235e38]


@settings(derandomize=True, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(0, 200),
        elements=st.one_of(st.sampled_from(EDGES), st.floats(width=32, allow_nan=False), st.floats(0.5, 2, width=32)),
    )
)
def test_any_elements(x: np.ndarray) -> None:
    found, (nonzeros, mean, std) = log2_statistics(x), in_float64(x)
    assert (found.numel, found.nonzeros, found.not_finite) == (x.size, nonzeros, int((~np.isfinite(x)).sum()))
    assert found.mean == pytest.approx(mean, rel=0, abs=1.5e-7, nan_ok=True)
    assert found.std == pytest.approx(std, rel=1e-6, abs=2e-3, nan_ok=True)
    if x.size:
        assert found.zero_share == np.mean(x == 0)


def test_every_mantissa_to_a_tenth_of_a_millionth() -> None:
    """One by one, so that no mean hides an error: 4096 mantissas of each of some exponents."""
    mantissas = np.arange(0, 1 << 23, 1 << 11, dtype=np.uint32)
    for exponent in (1, 64, 126, 127, 128, 254):
        x = (mantissas | np.uint32(exponent << 23)).view(np.float32)
        errors = [log2_statistics(x[i : i + 1]).mean - math.log2(x[i]) for i in range(0, x.size, 16)]
        assert np.abs(errors).max() < 1e-7


def test_threads_and_layouts_give_the_same_bits() -> None:
    x = torch.from_numpy(lognormal(6 * 40_000, 3.0)).view(6, 400, 100)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(log2_statistics(x))
        assert found[0] == found[1] == log2_statistics(x.numpy())
    finally:
        torch.set_num_threads(before)
    strided = x.transpose(0, 2)
    assert log2_statistics(strided) == log2_statistics(strided.contiguous())
    assert log2_statistics(x.bfloat16()) == log2_statistics(x.bfloat16().float())
    assert log2_statistics(x.double()) == found[0]


def test_nothing_to_measure() -> None:
    for x in (torch.zeros(0), torch.zeros(5), torch.tensor([torch.nan, torch.inf, 0.0])):
        found = log2_statistics(x)
        assert found.nonzeros == 0
        assert math.isnan(found.mean)
        assert math.isnan(found.std)
    assert log2_statistics(torch.tensor(-8.0)) == Log2Statistics(1, 1, 0, 3.0, 0.0)


def test_what_is_refused() -> None:
    for x in ([1.0], torch.ones(3, dtype=torch.int32), np.ones(3, np.int64)):
        with pytest.raises((TypeError, ValueError), match="x must be"):
            log2_statistics(x)  # type: ignore[arg-type]
    assert accel.log2_statistics is log2_statistics
