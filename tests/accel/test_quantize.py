from __future__ import annotations

import itertools
import math

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

import accel
from accel.formats import Format
from accel.kernels import cpu

Floats = npt.NDArray[np.float32]
FP8 = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
SPECIALS = np.array(
    [0x0, 0x1, 0x7FFFFF, 0x800000, 0x800001, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF],
    np.uint32,
)


def words(count: int, offset: int = 0, seed: int = 0, stream: int = 0, step: int = 0) -> npt.NDArray[np.uint32]:
    out = np.empty(count, np.uint32)
    cpu.random_words.serial(0, count, out, offset, np.uint64(seed), np.uint64(stream), np.uint64(step))
    return out


def same_bits(actual: Floats, expected: Floats) -> bool:
    """Equal bit for bit, all NaNs being one."""
    nan = np.isnan(expected)
    return bool(np.all(np.where(nan, np.isnan(actual), actual.view(np.uint32) == expected.view(np.uint32))))


def landmarks(fmt: Format) -> Floats:
    """Every value of a format, every midpoint, their float32 neighbours, overflow, specials; both signs."""
    finite = fmt.codes()[: fmt.max_code + 1].astype(np.float64)
    beyond = 2 * finite[-1] - finite[-2]
    values = np.append(finite, [beyond, 2 * beyond])
    with np.errstate(over="ignore"):
        points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32).view(np.uint32)
    near = (points[:, None] + np.array([-2, -1, 0, 1, 2]).astype(np.uint32)).reshape(-1)
    magnitudes = np.concatenate([near[near < 0x80000000], SPECIALS])
    return np.concatenate([magnitudes, magnitudes | 0x80000000]).view(np.float32)


def check_against_ml_dtypes(name: str, dtype: npt.DTypeLike, x: Floats) -> None:
    fmt = accel.format(name)
    with np.errstate(over="ignore", invalid="ignore"):
        official = x.astype(dtype)
        expected = official.astype(np.float32)
    assert same_bits(accel.quantize(x, name, overflow="ieee"), expected)
    codes = accel.encode(x, name, overflow="ieee")
    number = ~np.isnan(expected)
    assert np.array_equal(codes[number], official.view(codes.dtype)[number])
    assert bool(np.isnan(fmt.codes()[codes[~number]]).all())
    assert same_bits(accel.decode(codes, name), expected)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", FP8)
def test_2_to_the_26_patterns_equal_ml_dtypes(name: str, part: int) -> None:
    """Every 64th pattern of all 2^32, the last six bits taking all their values in turn."""
    for start in range(part << 24, (part + 1) << 24, 1 << 22):
        index = np.arange(start, start + (1 << 22), dtype=np.uint32)
        check_against_ml_dtypes(name, FP8[name], (index * 64 + index * 37 % 64).view(np.float32))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FP8)
def test_all_patterns_equal_ml_dtypes(name: str) -> None:
    for start in range(0, 1 << 32, 1 << 23):
        check_against_ml_dtypes(name, FP8[name], np.arange(start, start + (1 << 23)).astype(np.uint32).view(np.float32))


def test_landmarks_and_samples_equal_ml_dtypes(official: tuple[str, npt.DTypeLike]) -> None:
    """Finite inputs only where the format has no NaN: ml_dtypes maps a NaN to -0 there."""
    name, dtype = official
    samples = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    x = np.concatenate([landmarks(accel.format(name)), samples])
    check_against_ml_dtypes(name, dtype, x if accel.format(name).has_nan else x[np.isfinite(x)])


@pytest.mark.parametrize(("name", "overflow"), [("e4m3fn", "saturate"), ("e5m2", "ieee")])
def test_codes_are_torch_float8_storage(name: str, overflow: str) -> None:
    dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    x = torch.from_numpy(landmarks(accel.format(name)))
    expected = x.to(dtype)
    encoded = accel.encode(x, name, overflow=overflow)
    number = ~torch.isnan(x)
    assert torch.equal(encoded[number], expected.view(torch.uint8)[number])
    assert bool(torch.isnan(encoded.view(dtype).float()[~number]).all())
    assert torch.equal(accel.quantize(x[number], name, overflow=overflow), expected.float()[number])


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("e4m3fn", gfloat.formats.format_info_ocp_e4m3),
        ("e5m2", gfloat.formats.format_info_ocp_e5m2),
        ("e3m2", gfloat.formats.format_info_ocp_e3m2),
        ("e2m3", gfloat.formats.format_info_ocp_e2m3),
        ("e2m1", gfloat.formats.format_info_ocp_e2m1),
        ("fp16", gfloat.formats.format_info_binary16),
    ],
)
@pytest.mark.parametrize("random_bits", [None, 1, 3, 8, 20, 32])
def test_roundings_equal_gfloat(name: str, info: gfloat.FormatInfo, random_bits: int | None) -> None:
    samples = np.random.default_rng(1).normal(0, 4, 4000).astype(np.float32) ** 5
    x = np.concatenate([landmarks(accel.format(name))[:4000], samples])
    x = x[~np.isnan(x)]
    if random_bits is None:
        expected = gfloat.round_ndarray(info, x.astype(np.float64), sat=True)
        actual = accel.quantize(x, name)
    else:
        drawn = (words(x.size, seed=9) >> np.uint32(32 - random_bits)).astype(np.int64)
        mode = gfloat.RoundMode.StochasticFastest
        expected = gfloat.round_ndarray(info, x.astype(np.float64), mode, True, drawn, random_bits)
        actual = accel.quantize(x, name, rounding="stochastic", random_bits=random_bits, seed=9)
    # gfloat keeps more than the 32 fraction bits of the definition; below 2^-32 of a step the two may differ by design.
    fmt = accel.format(name)
    defined = np.abs(x) >= fmt.min_subnormal * 2.0**-8 if random_bits else np.ones(x.shape, bool)
    assert same_bits(actual[defined], expected[defined].astype(np.float32))


@pytest.mark.parametrize("bias", [15, 16])
def test_ties_between_powers_of_two_go_up(bias: int) -> None:
    fmt = {"exponent_bits": 5, "mantissa_bits": 0, "bias": bias}
    ties = np.array([1.5, 3, 6, -0.75, 0.375], np.float32)
    np.testing.assert_array_equal(accel.quantize(ties, fmt), np.array([2, 4, 8, -1, 0.5], np.float32))
    np.testing.assert_array_equal(accel.decode(accel.encode(ties, fmt), fmt), np.array([2, 4, 8, -1, 0.5], np.float32))


def test_hand_computed_e4m3fn() -> None:
    x = [0.3, 17.0, 19.0, 464.0, 465.0, 2.0**-10, 2.0**-10 * 1.001, -math.inf, 1e-30]
    saturated = [0.3125, 16.0, 20.0, 448.0, 448.0, 0.0, 2.0**-9, -448.0, 0.0]
    ieee = [*saturated[:4], math.nan, *saturated[5:7], math.nan, 0.0]
    np.testing.assert_array_equal(accel.quantize(torch.tensor(x), "e4m3fn").numpy(), np.float32(saturated))
    np.testing.assert_array_equal(accel.quantize(torch.tensor(x), "e4m3fn", overflow="ieee").numpy(), np.float32(ieee))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e2m1", "e0m7", "fp16"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_values_of_the_format_are_fixed_points(name: str, rounding: str) -> None:
    codes = accel.format(name).codes()
    values = codes[np.isfinite(codes)]
    assert same_bits(accel.quantize(values, name, rounding=rounding, seed=1), values)


@pytest.mark.parametrize("x", [1.3, -17.9, 2.0**-9 * 0.1, -(2.0**-9) * 1.7, 447.0, 2.0**-20])
def test_stochastic_rounding_is_unbiased(x: float) -> None:
    """The mean lies within 5 standard errors of x; the two values are the neighbours of x."""
    count = 1 << 18
    rounded = accel.quantize(np.full(count, x, np.float32), "e4m3fn", rounding="stochastic", seed=3)
    low, high = rounded.min(), rounded.max()
    assert low <= x <= high
    up = (float(np.float32(x)) - low) / (high - low)
    standard_error = math.sqrt(up * (1 - up) / count)
    assert abs(float((rounded == high).mean()) - up) < 5 * standard_error


@pytest.mark.parametrize("random_bits", [1, 2, 5])
def test_few_random_bits_truncate_the_probability(random_bits: int) -> None:
    """P(up) = floor(f 2^k) / 2^k: here f = 0.7."""
    count = 1 << 16
    rounded = accel.quantize(
        np.full(count, 16 + 2 * 0.7, np.float32), "e4m3fn", rounding="stochastic", random_bits=random_bits, seed=4
    )
    expected = math.floor(0.7 * 2**random_bits) / 2**random_bits
    assert abs(float((rounded == 18).mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("operation", [accel.quantize, accel.encode])
def test_bits_do_not_depend_on_pieces_or_threads(operation: object, rounding: str, restored_threads: None) -> None:
    x = torch.from_numpy(np.random.default_rng(2).normal(0, 10, 100_003).astype(np.float32))
    options = {"rounding": rounding, "seed": 11, "stream": 5, "step": 6}
    torch.set_num_threads(1)
    whole = operation(x, "e4m3fn", offset=1000, **options)  # type: ignore[operator]
    torch.set_num_threads(2)
    assert torch.equal(operation(x, "e4m3fn", offset=1000, **options), whole)  # type: ignore[operator]
    for pieces in (7, 100):
        cuts = np.linspace(0, x.numel(), pieces + 1).astype(int).tolist()
        parts = [
            operation(x[low:high], "e4m3fn", offset=1000 + low, **options)  # type: ignore[operator]
            for low, high in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole)


SCALE_SHAPES: list[tuple[int, ...]] = [
    (), (1,), (1, 1, 1, 1), (5,), (4, 1), (4, 5), (3, 1, 1), (3, 1, 5), (3, 4, 5), (2, 1, 1, 1), (2, 1, 4, 1),
    (1, 3, 1, 1), (2, 3, 4, 5), (2, 1, 1, 5),
]  # fmt: skip


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("shape", SCALE_SHAPES)
def test_scales_of_every_shape_broadcast(shape: tuple[int, ...], rounding: str) -> None:
    random = np.random.default_rng(3)
    x = random.normal(0, 3, (2, 3, 4, 5)).astype(np.float32)
    scale = np.asarray(random.random(shape) + 0.1, np.float32)
    options = {"rounding": rounding, "seed": 1}
    divided = (x / scale).astype(np.float32)
    expected = accel.quantize(divided, "e4m3fn", **options) * scale
    assert same_bits(accel.quantize(x, "e4m3fn", scale=scale, **options), expected)
    for view in (torch.from_numpy(scale), torch.from_numpy(scale).expand(x.shape)):
        assert same_bits(accel.quantize(torch.from_numpy(x), "e4m3fn", scale=view, **options).numpy(), expected)
    expected_codes = accel.encode(divided, "e4m3fn", **options)
    np.testing.assert_array_equal(accel.encode(x, "e4m3fn", scale=scale, **options), expected_codes)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_scales_of_rows_that_cross_chunks_and_threads(rounding: str) -> None:
    x = np.random.default_rng(4).normal(0, 3, (7, 14_321)).astype(np.float32)
    scale = np.float32([0.5, 1, 2, 3, 5, 7, 11])[:, None]
    expected = accel.quantize(x / scale, "e3m4", rounding=rounding) * scale
    assert same_bits(accel.quantize(x, "e3m4", rounding=rounding, scale=scale), expected)


def test_every_code_of_a_wide_format_round_trips() -> None:
    codes = np.random.default_rng(5).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    values = accel.decode(codes, "fp32")
    assert same_bits(values, codes.view(np.float32))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(accel.encode(values, "fp32")[number], codes[number])
    tf32 = accel.encode(values[number], "tf32")
    assert same_bits(accel.decode(tf32, "tf32"), accel.quantize(values[number], "tf32"))
    np.testing.assert_array_equal(
        tf32 << 13 & 0x7FFFFFFF, accel.quantize(values[number], "tf32").view(np.uint32) & 0x7FFFFFFF
    )
