from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import accel
from accel.formats import POLICIES, Format
from accel.presets import ALIASES, PRESETS, to_mapping, to_text


def test_limits_equal_the_official_ones(official: tuple[str, npt.DTypeLike]) -> None:
    name, dtype = official
    fmt, info = accel.format(name), ml_dtypes.finfo(dtype)
    assert fmt.bits == info.bits
    assert fmt.max == float(info.max)
    assert fmt.min_normal == float(info.smallest_normal)
    assert fmt.min_subnormal == float(info.smallest_subnormal)
    assert fmt.eps == float(info.eps)


def test_code_tables_equal_the_official_ones(official: tuple[str, npt.DTypeLike]) -> None:
    name, dtype = official
    fmt = accel.format(name)
    codes = np.arange(1 << fmt.bits, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)
    expected = codes.view(dtype).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(fmt.codes()), nan)
    np.testing.assert_array_equal(fmt.codes().view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def exact_value(fmt: Format, code: int) -> Fraction | str:
    """The definition, read aloud: a number, or "inf" or "nan"."""
    sign, magnitude = divmod(code, 1 << (fmt.exponent_bits + fmt.mantissa_bits)) if fmt.signed else (0, code)
    e, m = divmod(magnitude, 1 << fmt.mantissa_bits)
    e_top, m_top = (1 << fmt.exponent_bits) - 1, (1 << fmt.mantissa_bits) - 1
    match fmt.policy:
        case "ieee" if e == e_top:
            return "nan" if m else "inf"
        case "fn" | "scale" if (e, m) == (e_top, m_top):
            return "nan"
        case "fnuz" | "p3109" if sign and magnitude == 0:
            return "nan"
        case "p3109" if (e, m) == (e_top, m_top):
            return "inf"
        case "scale":
            return Fraction(2) ** (e - fmt.bias)
        case "integer" if sign:
            magnitude -= 1 << fmt.mantissa_bits
            return magnitude * Fraction(2) ** (1 - fmt.bias - fmt.mantissa_bits)
    if e == 0 and not fmt.subnormals:
        return Fraction(0)
    fraction = Fraction(m, 1 << fmt.mantissa_bits) + (1 if e else 0)
    return (-1) ** sign * fraction * Fraction(2) ** (max(e, 1) - fmt.bias)


@st.composite
def any_format(draw: st.DrawFn) -> Format:
    policy = draw(st.sampled_from(sorted(POLICIES)))
    e = 0 if policy == "integer" else draw(st.integers(0, 8))
    m = 0 if policy == "scale" else draw(st.integers(0, 7))
    bias = draw(st.integers(max(-127, (1 << e) - 129), 150 - m))
    is_scale = policy == "scale"
    signed, subnormals = not is_scale and draw(st.booleans()), is_scale or draw(st.booleans())
    try:
        return Format("any", e, m, bias, policy, subnormals, signed)
    except ValueError:
        assume(False)
        raise


@settings(max_examples=60, deadline=None)
@given(any_format())
def test_generated_tables_follow_the_definition(fmt: Format) -> None:
    exact = [exact_value(fmt, code) for code in range(1 << fmt.bits)]
    table = fmt.codes()
    assert table.dtype == np.float32
    for code, (value, expected) in enumerate(zip(table.tolist(), exact, strict=True)):
        if expected == "nan":
            assert np.isnan(value)
        elif expected == "inf":
            assert value == (-np.inf if code & fmt.sign_code else np.inf)
        else:
            assert Fraction(value) == expected
            negative = bool(code & fmt.sign_code) and (expected != 0 or fmt.has_negative_zero)
            assert bool(np.signbit(table[code])) == negative
    numbers = [value for value in exact if isinstance(value, Fraction)]
    assert Fraction(fmt.max) == max(numbers)
    assert Fraction(fmt.min_subnormal) == min(value for value in numbers if value > 0)
    assert fmt.has_nan == ("nan" in exact)
    assert fmt.has_infinity == ("inf" in exact)
    assert exact[fmt.max_code] == max(numbers)
    assert fmt.nan_code is None or exact[fmt.nan_code] == "nan"
    assert fmt.infinity_code is None or exact[fmt.infinity_code] == "inf"
    assert Fraction(fmt.min) == min(numbers)
    assert fmt.has_negative_zero == (fmt.signed and fmt.policy in ("ieee", "fn", "finite"))


@pytest.mark.parametrize(
    ("spec", "exponent_bits", "mantissa_bits", "bias", "policy"),
    [
        ("e1m6", 1, 6, 0, "finite"),
        ("e2m5", 2, 5, 1, "ieee"),
        ("e7m0", 7, 0, 63, "finite"),
        ("e0m7", 0, 7, 1, "finite"),
        ("e3m3", 3, 3, 3, "finite"),
        ("e6m9", 6, 9, 31, "ieee"),
        ("e2m5fn", 2, 5, 1, "fn"),
        ("e3m4fnuz", 3, 4, 4, "fnuz"),
        ("e0m7fnuz", 0, 7, 1, "fnuz"),
    ],
)
def test_any_exmy_has_the_documented_defaults(
    spec: str, exponent_bits: int, mantissa_bits: int, bias: int, policy: str
) -> None:
    assert accel.format(spec) == Format(spec, exponent_bits, mantissa_bits, bias, policy)


def test_mappings_describe_the_same_formats_as_names() -> None:
    assert accel.format({"exponent_bits": 4, "mantissa_bits": 3}) == PRESETS["e4m3"]
    described = {"name": "e4m3b11fnuz", "exponent_bits": 4, "mantissa_bits": 3, "bias": 11, "policy": "fnuz"}
    assert accel.format(described) == PRESETS["e4m3b11fnuz"]
    flushing = accel.format({"exponent_bits": 5, "mantissa_bits": 2, "subnormals": False})
    assert (flushing.min_subnormal, flushing.min_normal) == (2.0**-14, 2.0**-14)
    assert accel.format(flushing) is flushing


def test_aliases_and_listing() -> None:
    assert accel.format("bfloat16") is accel.format("e8m7") is PRESETS["bf16"]
    assert set(ALIASES.values()) <= set(PRESETS)
    assert [fmt.name for fmt in accel.formats()] == list(PRESETS)
    for fmt in accel.formats():
        assert accel.format(to_text(fmt)) == fmt == accel.format(to_mapping(fmt))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("e4m3f", r"unknown format 'e4m3f' \(did you mean 'e4m3fn'\?\); allowed: fp32"),
        ("e9m3", "exponent_bits must be an integer from 0 to 8 .got 9."),
        ("e4m24", "mantissa_bits must be an integer from 0 to 23 .got 24."),
        ("e0m0", "must be at least 1"),
        ("e8m23fnuz", r"not carried by float32: its values are multiples of 2\^-150"),
        ({"exponent_bits": 8, "mantissa_bits": 0, "policy": "finite"}, r"not carried by float32.*2\^128"),
        ({"exponent_bits": 8, "mantissa_bits": 1, "policy": "scale"}, "'scale' needs mantissa_bits = 0, signed: false"),
        ({"exponent_bits": 1, "mantissa_bits": 3, "policy": "integer"}, "'integer' needs exponent_bits = 0 .got 1."),
        ({"exponent_bits": 4, "mantissa_bits": 3, "policy": "fnuz", "signed": False}, "an unsigned format lacks"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "signed": 1}, "signed must be true or false .got 1."),
        (
            {"base": "uint8", "alpha_codes": True},
            "alpha_codes need a signed format of policy ieee, fn, fnuz, finite or",
        ),
        ("int1", "integers of 2 to 24 bits are carried .got 1."),
        ("uint24", "integers of 1 to 23 bits are carried .got 24."),
        ("bfp1", "block floating point has elements of 2 to 24 bits .got 1."),
        ('{"exponent_bits": 4', "a format's JSON is not valid"),
        ({"element": "e2m1"}, "block_size is missing"),
        ({"element": "e2m1", "block_size": 0}, "block_size must be an integer from 1 to 1048576 .got 0."),
        ({"element": "e2m1", "block_size": -32}, "block_size must be an integer from 1 to 1048576 .got -32."),
        ({"element": "mxfp4", "block_size": 2}, "element must be a scalar format .got the block format 'mxfp4'."),
        ({"element": "uint8", "block_size": 2}, "element must be a signed format"),
        (
            {"element": "e2m1", "block_size": 2, "scale": "e4m3fn"},
            "scale_rule 'floor' does not go with a scale of policy",
        ),
        ({"base": "mxfp4", "scale_rule": "flor"}, "unknown scale_rule 'flor' .did you mean 'floor'"),
        ({"base": "mxfp4", "padding": "zero"}, "unknown padding 'zero' .did you mean 'zeros'"),
        ({"base": "mxfp4", "axis": 1.0}, "axis must be an integer or null .got 1.0."),
        ({"base": "mxfp4", "tensor_scale": True}, "tensor_scale goes with scale_rule 'amax' alone"),
        ({"base": "mxfp4", "exponent_bits": 3}, "unknown key 'exponent_bits'"),
        ({"exponent_bits": 4}, "mantissa_bits is missing"),
        ({"exponent_bits": 4, "mantissa_bit": 3}, "unknown key 'mantissa_bit' .did you mean 'mantissa_bits'"),
        ({"exponent_bits": "4", "mantissa_bits": 3}, "exponent_bits must be an integer from 0 to 8 .got '4'."),
        ({"exponent_bits": True, "mantissa_bits": 3}, "exponent_bits must be an integer"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "bias": 7.0}, "bias must be an integer .got 7.0."),
        ({"exponent_bits": 4, "mantissa_bits": 3, "subnormals": "no"}, "subnormals"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "policy": "iee"}, "unknown policy 'iee' .did you mean 'ieee'"),
        ({"exponent_bits": 4, "mantissa_bits": 0, "policy": "ieee"}, "needs exponent_bits >= 1 and mantissa_bits >= 1"),
        ({"exponent_bits": 0, "mantissa_bits": 4, "policy": "ieee"}, "needs exponent_bits >= 1"),
        ({"exponent_bits": 0, "mantissa_bits": 4, "subnormals": False}, "exponent_bits = 0 has only subnormals"),
        ({"exponent_bits": 1, "mantissa_bits": 0, "policy": "fn"}, "leaves no finite number besides zero"),
        (
            {"exponent_bits": 1, "mantissa_bits": 3, "policy": "ieee", "subnormals": False},
            "leaves no finite number besides zero",
        ),
        ({"exponent_bits": 5, "mantissa_bits": 2, "bias": -98}, r"not carried by float32.* to 2\^128"),
        (5, "a format is a name, a mapping or a Format .got int."),
    ],
)
def test_what_is_not_a_format_is_refused(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accel.format(spec)  # type: ignore[arg-type]


def test_the_widest_ranges_that_float32_carries_are_accepted() -> None:
    assert Format("wide", 8, 23, 127, "ieee").min_subnormal == 2.0**-149
    assert Format("high", 5, 2, -97, "ieee").max == 1.75 * 2.0**127
    assert Format("fixed", 0, 3, -127, "finite").max == 7 * 2.0**125
    with pytest.raises(ValueError, match="not carried"):
        Format("higher", 5, 2, -98, "ieee")


def test_tables_of_wide_formats_are_refused() -> None:
    assert accel.format("bf16").codes().shape == (1 << 16,)
    with pytest.raises(ValueError, match="at most 16 bits"):
        accel.format("tf32").codes()
