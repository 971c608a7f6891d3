"""Scales: each kind against its definition in exact arithmetic, the boundaries of the powers of two, the channels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import accel
from fpsim.float_choice import best_exponent_bits
from fpsim.scales import (
    SAMPLE,
    best_format,
    channel_means_log2,
    largest_magnitude,
    log2_moments,
    sample,
    scale_of,
)

FIXED = settings(derandomize=True, deadline=None)
FORMATS = ("e4m3fn", "e5m2", "e2m1", "e3m2", "bf16")
KINDS = ("amax", "power_of_two", "lognormal_mean")
SCALE_FLOOR = 2.0**-126
MAGNITUDES = st.floats(2.0**-149, 2.0**120, width=32, exclude_min=False)


def scale(x: Tensor, fmt: str, kind: str, dim: int | None = None) -> Tensor:
    result = scale_of(x, accel.format(fmt), kind, largest_magnitude(x, dim), dim)
    assert result is not None
    exact = torch.as_tensor(result, dtype=torch.float64)
    assert torch.equal(exact.float().double(), exact)  # a float32 number
    return exact.float()


def smallest_power_of_two(ratio: Fraction) -> float:
    """The smallest 2^k >= ratio, by search from an estimate, in exact arithmetic."""
    exponent = math.floor(math.log2(ratio.numerator) - math.log2(ratio.denominator)) - 2
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("x", [torch.tensor([3.0, -7.0]), torch.zeros(2), torch.tensor([1e38])])
def test_none_is_no_scale(x: Tensor) -> None:
    assert scale_of(x, accel.format("e4m3fn"), "none", largest_magnitude(x)) is None


@pytest.mark.parametrize("fmt", FORMATS)
@FIXED
@given(magnitude=MAGNITUDES, sign=st.sampled_from([-1.0, 1.0]))
@example(magnitude=131.0, sign=1.0)  # 131 / 448 rounds down so far that 131 over it rounds to 448 + 2^-15
def test_amax_is_the_rounded_quotient_or_the_next_number_where_that_is_too_small(
    fmt: str, magnitude: float, sign: float
) -> None:
    x = torch.tensor([0.0, sign * magnitude, 0.0])
    largest = Fraction(accel.format(fmt).max)
    nearest = np.float32(max(float(Fraction(magnitude) / largest), SCALE_FLOOR))
    fits = np.float32(float(Fraction(magnitude) / Fraction(float(nearest)))) <= largest  # the float32 quotient
    expected = float(nearest if fits else np.nextafter(nearest, np.float32(np.inf)))
    assert float(scale(x, fmt, "amax")) == expected
    assert float(scale(x[:, None].expand(3, 2), fmt, "amax", 1)[0, 0]) == expected
    assert float(x.abs().max() / torch.tensor(expected)) <= largest


@pytest.mark.parametrize("fmt", FORMATS)
@FIXED
@given(magnitude=MAGNITUDES, sign=st.sampled_from([-1.0, 1.0]))
def test_power_of_two_is_the_smallest_that_fits(fmt: str, magnitude: float, sign: float) -> None:
    x = torch.tensor([sign * magnitude, 0.0])
    expected = max(smallest_power_of_two(Fraction(magnitude) / Fraction(accel.format(fmt).max)), SCALE_FLOOR)
    assert float(scale(x, fmt, "power_of_two")) == expected


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("exponent", [-100, -20, -1, 0, 1, 7, 100])
def test_power_of_two_at_and_around_the_boundary(fmt: str, exponent: int) -> None:
    exponent = -abs(exponent) if fmt == "bf16" else exponent  # bf16 reaches the end of float32
    boundary = np.float32(accel.format(fmt).max * 2.0**exponent)
    above, below = np.nextafter(boundary, np.float32(np.inf)), np.nextafter(boundary, np.float32(0))
    assert float(scale(torch.tensor([boundary]), fmt, "power_of_two")) == max(2.0**exponent, SCALE_FLOOR)
    assert float(scale(torch.tensor([below]), fmt, "power_of_two")) == max(2.0**exponent, SCALE_FLOOR)
    if np.isfinite(above):
        assert float(scale(torch.tensor([above]), fmt, "power_of_two")) == max(2.0 ** (exponent + 1), SCALE_FLOOR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_zeros_have_scale_one(kind: str, dim: int | None) -> None:
    assert (scale(torch.zeros(3, 4), "e5m2", kind, dim) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_tensor_has_scale_one(kind: str) -> None:
    assert float(scale(torch.zeros(0, 3), "e5m2", kind)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-38, 1e30, 1e38])
@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2"])
def test_extreme_tensors_get_positive_finite_scales(kind: str, magnitude: float, fmt: str) -> None:
    x = torch.tensor([magnitude, -magnitude])
    found = float(scale(x, fmt, kind))
    assert SCALE_FLOOR <= found <= 2.0**127
    assert torch.isfinite(accel.quantize(x, fmt, scale=found)).all()
    assert float(scale(x.expand(3, 2).contiguous(), fmt, kind, 0)[0, 0]) == found


def test_lognormal_mean_centres_the_mean_exponent() -> None:
    """e5m2's normal numbers span 2^-14 to 57344 = 1.75 2^15: centre (-14 + 15.807) / 2 = 0.904."""
    x = torch.tensor([2.0**-20, -(2.0**-24), 0.0, 2.0**-22])  # mean of log2|x| over the nonzeros: -22
    assert float(scale(x, "e5m2", "lognormal_mean")) == 2.0**-23  # round(-22 - 0.904)


def test_lognormal_mean_makes_room_for_the_largest() -> None:
    """e4m3fn ends at 448: with the mean in the middle 2^20 would not fit, so amax decides: 2^20 / 448 < 2^12."""
    x = torch.full((1000,), 2.0**-10)
    x[3] = 2.0**20
    assert float(scale(x, "e4m3fn", "lognormal_mean")) == 2.0**12


@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2"])
def test_lognormal_mean_against_numpy(fmt: str) -> None:
    generator = np.random.default_rng(2)
    described = accel.format(fmt)
    middle = (np.log2(described.min_normal) + np.log2(described.max)) / 2
    for center, sigma in ((-30, 0.5), (-10, 1.0), (0, 2.0), (20, 1.5)):
        x = (2.0**center * generator.lognormal(0, sigma, 3000) * generator.choice([-1, 0, 1], 3000)).astype(np.float32)
        logs = np.log2(np.abs(x[x != 0]).astype(np.float64))
        fits = 2.0 ** np.ceil(np.log2(np.abs(x).max() / described.max))
        assert float(scale(torch.from_numpy(x), fmt, "lognormal_mean")) == max(
            2.0 ** np.round(logs.mean() - middle), fits
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_largest_magnitude(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        x = torch.randn(64, generator=generator).exp()
        divided = x / scale(x, "e5m2", kind)
        assert float(divided.max()) <= accel.format("e5m2").max


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "dim", "scale_shape"),
    [
        ((5, 6), 0, (5, 1)),  # weight of a linear layer, and of a convolution
        ((5, 3, 2, 2), 0, (5, 1, 1, 1)),
        ((3, 5, 2, 2), 1, (1, 5, 1, 1)),  # weight of a transposed convolution; input of a convolution
        ((4, 6), 1, (1, 6)),  # input of a linear layer
        ((2, 4, 6), -1, (1, 1, 6)),
    ],
)
def test_channel_scales_are_the_scales_of_the_channels(
    kind: str, shape: tuple[int, ...], dim: int, scale_shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).exp() * 1e-3
    x.select(dim, 1).zero_()
    x.select(dim, 0).mul_(1000)
    found = scale(x, "e4m3fn", kind, dim)
    assert found.shape == scale_shape
    quantized = accel.quantize(x, "e4m3fn", scale=found)
    for channel in range(x.shape[dim]):
        piece = x.select(dim, channel)
        alone = scale(piece, "e4m3fn", kind)
        assert float(found.select(dim, channel)) == float(alone)
        expected = accel.quantize(piece.contiguous(), "e4m3fn", scale=float(alone))
        assert torch.equal(quantized.select(dim, channel), expected)
    assert len(found.unique()) > 1


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_largest_magnitude_shows_what_is_not_finite(special: float) -> None:
    x = torch.tensor([[1.0, 2.0], [special, 0.0]])
    assert not math.isfinite(largest_magnitude(x))
    assert torch.isfinite(torch.as_tensor(largest_magnitude(x, 0))).flatten().tolist() == [True, False]


def test_largest_magnitude_of_negatives() -> None:
    assert float(largest_magnitude(torch.tensor([-5.0, 2.0]))) == 5
    channels = torch.as_tensor(largest_magnitude(torch.tensor([[-5.0, 2.0], [3.0, -1.0]]), 1))
    assert channels.tolist() == [[5, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_one_dimension_has_one_scale(kind: str) -> None:
    x = torch.tensor([2.0**-12, 2.0**-20, 0.0])
    assert torch.equal(scale(x, "e5m2", kind, 0), scale(x, "e5m2", kind))


def test_sample_takes_small_tensors_whole_and_fixed_positions_of_large_ones() -> None:
    small = torch.arange(SAMPLE).reshape(64, -1)
    assert torch.equal(sample(small), small.reshape(-1))
    large = torch.arange(300 * 200).reshape(300, 200)
    taken = sample(large)
    assert taken.shape == (SAMPLE,)
    assert torch.equal(taken, sample(large.clone()))
    assert int(taken.max()) < large.numel()
    assert len(taken.unique()) == SAMPLE
    for stride in (2, 3, 16, 64, 200):  # every residue of every stride is met as often as another
        shares = torch.bincount(taken % stride, minlength=stride) / SAMPLE * stride
        assert float((shares - 1).abs().max()) < 0.35


def test_mean_log2_of_a_large_tensor_is_that_of_its_sample() -> None:
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) + 0.5
    assert log2_moments(sample(x))[0] == pytest.approx(float(sample(x).double().log2().mean()), abs=1e-12)
    assert log2_moments(sample(x))[0] == pytest.approx(float(x.double().log2().mean()), abs=0.02)


def test_lognormal_mean_of_a_tensor_whose_nonzeros_the_sample_misses() -> None:
    positions = torch.arange(100_000)
    missed = int(torch.ones(100_000).index_fill(0, sample(positions), 0).nonzero()[0])
    x = torch.zeros(100_000)
    x[missed] = 2.0**-27
    assert float(accel.quantize(x, "e5m2", scale=scale(x, "e5m2", "lognormal_mean"))[missed]) == 2.0**-27


def test_lognormal_mean_without_nonzeros_in_the_sample_is_the_power_of_two() -> None:
    assert float(log2_moments(torch.zeros(5))[0]) == -math.inf
    channels = torch.tensor([[0.0, 2.0**-3], [0.0, 2.0**-5]])
    assert channel_means_log2(channels, 1).tolist() == [[-math.inf, -4.0]]
    for fmt in ("e4m3fn", "e5m2", "e2m1"):
        x = torch.tensor([3.0, -7.0])
        described = accel.format(fmt)
        without = scale_of(torch.zeros(2), described, "lognormal_mean", largest_magnitude(x))
        assert without == scale_of(x, described, "power_of_two", largest_magnitude(x))


@pytest.mark.parametrize("kind", ["power_of_two", "lognormal_mean"])
@pytest.mark.parametrize("dim", [None, 0])
def test_scales_end_at_the_ends_of_float32(kind: str, dim: int | None) -> None:
    """A format that reaches only to 2^-16: 2^127 over it is out of float32; below, 2^-149 over 57344 is as well."""
    tiny = accel.format({"exponent_bits": 4, "mantissa_bits": 3, "bias": 31, "policy": "fn"})
    assert tiny.max < 2.0**-15
    large, small = torch.tensor([[2.0**127, 1.0]]), torch.tensor([[2.0**-149, 0.0]])
    for x, fmt, expected in ((large, tiny, 2.0**127), (small, accel.format("e5m2"), 2.0**-126)):
        found = scale_of(x, fmt, kind, largest_magnitude(x, dim), dim)
        assert found is not None
        assert float(found) == expected


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3fn", "e3m2", "e2m1"])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 4.0])
def test_lognormal_error_rounds_with_the_least_error(fmt: str, sigma: float) -> None:
    """Against every scale 2^k on the tensor itself: no other is better by more than a sample can tell."""
    x = torch.exp2(torch.randn(4096, generator=torch.Generator().manual_seed(1)).double() * sigma - 21.3).float()
    chosen = float(scale(x, fmt, "lognormal_error"))
    exponents = range(round(math.log2(chosen)) - 6, round(math.log2(chosen)) + 7)
    errors = {k: relative_error_at(x, fmt, 2.0**k) for k in exponents}
    assert errors[round(math.log2(chosen))] <= 1.05 * min(errors.values()) + 1e-3
    assert math.log2(chosen).is_integer()


def relative_error_at(x: Tensor, fmt: str, at: float) -> float:
    rounded = accel.quantize(x, fmt, scale=at).double()
    return float(((rounded - x.double()).abs() / x.double()).mean())


def test_lognormal_error_lets_the_tail_saturate() -> None:
    x = torch.exp2(torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 3.0)
    given, holds_all = float(scale(x, "e4m3fn", "lognormal_error")), float(scale(x, "e4m3fn", "power_of_two"))
    assert given < holds_all
    assert relative_error_at(x, "e4m3fn", given) < 0.6 * relative_error_at(x, "e4m3fn", holds_all)


def test_lognormal_error_without_nonzeros_in_the_sample_is_the_power_of_two() -> None:
    x = torch.zeros(100_000)
    x[7] = 3.0
    assert not bool(sample(x).any())
    assert scale(x, "e5m2", "lognormal_error") == scale(x, "e5m2", "power_of_two")


def test_a_number_is_the_scale() -> None:
    assert scale_of(torch.zeros(3), accel.format("e5m2"), 0.25, 0.0) == 0.25
    assert scale_of(torch.ones(3), accel.format("e5m2"), 0.25, 1.0) == 0.25


@pytest.mark.parametrize("policy", ["finite", "fn", "ieee"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_best_format_has_the_best_exponent_bits(bits: int, policy: str) -> None:
    for steps in (4, 16, 40, 100):
        found = best_format(bits, policy, steps)
        assert found.exponent_bits == best_exponent_bits(bits, steps / 16, policy=policy)
        assert (found.bits, found.policy) == (bits, policy)


@pytest.mark.parametrize("policy", ["finite", "fn", "ieee", "fnuz", "p3109"])
def test_every_best_format_can_be_built(policy: str) -> None:
    for bits in range(3, 9):
        for steps in (1, 16, 64, 160, 640):
            assert best_format(bits, policy, steps).bits == bits
