"""The emulator against the definition in exact arithmetic, over generated formats, every mode and both carriers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import accel
from accel.formats import POLICIES, Format
from accel.rounding import FLUSHES, OVERFLOWS, ROUNDINGS
from fpsim.conformance import differing, random_words
from tests.conformance.reference import largest_code, magnitude_of, min_normal, rounded, value_of

Floats = npt.NDArray[Any]

SPECIALS = {
    np.float32: [0x0, 0x1, 0x7FFFFF, 0x800000, 0x800001, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF],
    np.float64: [0x0, 0x1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0x7FEFFFFFFFFFFFFF,
                 0x7FF0000000000000, 0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0x36A0000000000000, 0x47EFFFFFFFFFFFFF],
}  # fmt: skip


@st.composite
def any_format(draw: st.DrawFn) -> Format:
    e, m, policy = draw(st.integers(0, 8)), draw(st.integers(0, 23)), draw(st.sampled_from(sorted(POLICIES)))
    signed, subnormals, alpha_codes = draw(st.booleans()), draw(st.sampled_from([True, True, False])), False
    if policy == "integer":
        e = 0
    if policy == "scale":
        m, signed, subnormals = 0, False, True
    elif policy in ("fnuz", "p3109"):
        signed = True
    if policy != "integer" and signed:
        alpha_codes = draw(st.sampled_from([False, False, True]))
    bias = draw(st.integers((1 << e) - 129, 150 - m))
    try:
        return Format("any", e, m, bias, policy, subnormals, signed, alpha_codes)
    except ValueError:
        assume(False)
        raise


def near_boundaries(fmt: Format, dtype: type, random: np.random.Generator) -> Floats:
    """Values of the format, midpoints and points between, each with its neighbours in `dtype`; specials; both signs."""
    last = largest_code(fmt)
    codes = {0, 1, last - 1, last, last + 1, *random.integers(0, last + 1, 10).tolist()} - {-1}
    lower = [magnitude_of(fmt, code) for code in codes]
    width = [magnitude_of(fmt, code + 1) - value for code, value in zip(codes, lower, strict=True)]
    shares = [0, 0.5, *random.random(2).tolist()]
    exact = [
        low + size * int(share * 2**30) / 2**30 for low, size in zip(lower, width, strict=True) for share in shares
    ]
    exact += [min_normal(fmt) / 2, min_normal(fmt) * int(random.integers(1, 1 << 30)) / 2**30]
    word = np.uint32 if dtype is np.float32 else np.uint64
    sign = np.array(1, word) << np.array(8 * dtype().nbytes - 1, word)
    with np.errstate(over="ignore", under="ignore"):
        points = np.array([float(value) for value in exact]).astype(dtype).view(word)
    near = (points[:, None] + np.array([-2, -1, 0, 1, 2]).astype(word)).reshape(-1)
    patterns = random.integers(0, int(sign), 8, word)
    magnitudes = np.concatenate([near[near < sign], patterns, np.array(SPECIALS[dtype], word)])
    return (magnitudes | random.integers(0, 2, magnitudes.size, word) * sign).view(dtype)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    fmt=any_format(),
    dtype=st.sampled_from([np.float32, np.float64]),
    rounding=st.sampled_from(ROUNDINGS),
    overflow=st.sampled_from(OVERFLOWS),
    flush=st.sampled_from([False, *FLUSHES]),
    random_bits=st.integers(1, 32),
    seed=st.integers(0, 2**64 - 1),
)
@example(Format("widest", 8, 23, 127, "ieee"), np.float32, "stochastic", "ieee", False, 32, 0)
@example(Format("widest", 8, 23, 127, "ieee"), np.float64, "stochastic", "ieee", False, 32, 0)
@example(Format("top", 0, 3, -127, "finite"), np.float32, "nearest_even", "saturate", False, 32, 0)
@example(Format("fixed", 0, 4, 1, "fn"), np.float32, "nearest_even", "ieee", "output", 32, 0)
@example(Format("powers", 5, 0, 15, "finite"), np.float32, "nearest_even", "ieee", False, 32, 0)
@example(Format("even powers", 7, 0, 64, "p3109"), np.float64, "nearest_even", "ieee", False, 32, 0)
@example(Format("scale", 8, 0, 127, "scale", signed=False), np.float32, "nearest_even", "ieee", False, 32, 0)
@example(Format("one scale", 1, 0, 149, "scale", signed=False), np.float64, "nearest_even", "ieee", False, 32, 0)
@example(Format("just narrow", 5, 7, 30 - 109, "ieee"), np.float32, "nearest_even", "ieee", False, 32, 0)
@example(Format("too wide", 5, 7, 30 - 110, "ieee"), np.float32, "nearest_even", "ieee", False, 32, 0)
@example(Format("21 bits", 5, 21, 15, "ieee"), np.float32, "nearest_even", "ieee", False, 32, 0)
@example(Format("22 bits", 5, 22, 15, "ieee"), np.float32, "nearest_even", "ieee", False, 32, 0)
@example(Format("lowest", 4, 3, 127, "fn"), np.float32, "nearest_even", "saturate", False, 32, 0)
@example(Format("below float32", 8, 3, 128, "fnuz"), np.float32, "stochastic", "ieee", False, 5, 0)
@example(Format("int2", 0, 1, 0, "integer"), np.float32, "down", "ieee", False, 32, 0)
@example(Format("unsigned", 4, 3, 7, "ieee", signed=False), np.float32, "up", "ieee", False, 32, 0)
def test_every_format_equals_the_exact_definition(
    fmt: Format, dtype: type, rounding: str, overflow: str, flush: bool | str, random_bits: int, seed: int
) -> None:
    x = near_boundaries(fmt, dtype, np.random.default_rng(seed))
    words = random_words(x.size, seed, stream=2, step=3, offset=5)
    expected = np.array(
        [
            rounded(fmt, value, rounding, overflow, word, random_bits, flush)
            for value, word in zip(x.tolist(), words.tolist(), strict=True)
        ],
        dtype,
    )
    options: dict[str, Any] = {"rounding": rounding, "overflow": overflow, "flush_subnormals": flush, "seed": seed}
    options |= {"stream": 2, "step": 3, "offset": 5, "random_bits": random_bits}
    actual = accel.quantize(x, fmt, **options)
    assert actual.dtype == dtype
    wrong = np.flatnonzero(differing(actual, expected))
    assert not wrong.size, [(x[i].hex(), actual[i].hex(), expected[i].hex()) for i in wrong[:3]]

    known = np.ones(x.shape, bool) if fmt.has_nan else ~np.isnan(x)
    encoded = accel.encode(np.where(known, x, dtype(0)), fmt, **options)
    meant = np.array([value_of(fmt, code) for code in encoded.tolist()], np.float32)
    wrong = np.flatnonzero(differing(meant, expected.astype(np.float32)) & known)
    assert not wrong.size, [(x[i].hex(), hex(encoded[i]), expected[i].hex()) for i in wrong[:3]]
    is_zero = (meant == 0) & known
    assert bool(((encoded[is_zero] & ~np.array(fmt.sign_code, encoded.dtype)) == 0).all())
    decoded = accel.decode(encoded, fmt, alpha=1.0 if fmt.alpha_codes else None)
    assert not differing(decoded, meant).any()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(fmt=any_format(), seed=st.integers(0, 2**32 - 1))
def test_codes_decode_to_the_definition_and_back(fmt: Format, seed: int) -> None:
    """Random codes and the extreme ones: decode equals the definition, encode gives the codes of the numbers back."""
    alpha_codes = [] if fmt.alpha_code is None else [fmt.alpha_code, fmt.alpha_code | fmt.sign_code]
    last = (1 << fmt.bits) - 1
    chosen = np.random.default_rng(seed).integers(0, last + 1, 60).tolist()
    extremes = [0, 1, last, last - 1, last // 2, last // 2 + 1, fmt.max_code, fmt.max_code | fmt.sign_code]
    codes = [code for code in {*chosen, *extremes} if 0 <= code <= last and code not in alpha_codes]
    expected = np.array([value_of(fmt, code) for code in codes], np.float32)
    decoded = accel.decode(np.array(codes, np.uint32), fmt, alpha=1.0 if fmt.alpha_codes else None)
    assert not differing(decoded, expected).any()
    assert not differing(accel.quantize(decoded, fmt, overflow="ieee"), expected).any()
    is_number = np.isfinite(expected) & ((expected != 0) | fmt.subnormals)
    again = accel.encode(decoded[is_number], fmt)
    assert again.tolist() == np.array(codes)[is_number].tolist()


@pytest.mark.parametrize("bias", [15, 16])
def test_ties_between_powers_of_two_go_up_except_in_p3109(bias: int) -> None:
    ties = np.array([1.5, 3, 6, -0.75, 0.375], np.float32)
    powers = {"exponent_bits": 5, "mantissa_bits": 0, "bias": bias}
    larger = np.array([2, 4, 8, -1, 0.5], np.float32)
    even = np.array([2, 2, 8, -0.5, 0.5] if bias == 15 else [1, 4, 4, -1, 0.25], np.float32)
    for policy, expected in (("finite", larger), ("fn", larger), ("fnuz", larger), ("p3109", even)):
        fmt = powers | {"policy": policy}
        np.testing.assert_array_equal(accel.quantize(ties, fmt), expected)
        np.testing.assert_array_equal(accel.decode(accel.encode(ties, fmt), fmt), expected)
