"""Block formats against the rules read aloud in exact arithmetic, and hand-computed blocks."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
from accel.block_formats import BlockFormat

Floats = npt.NDArray[np.float32]
BLOCKS = ["mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "bfp8", "bfp5"]


def scale_exponent(amax: float, fmt: BlockFormat) -> int:
    """The exponent of a power-of-two scale, from the rule's text, with exact integers in the place of logarithms."""
    lowest, highest = -fmt.scale.bias, fmt.scale.max_exponent
    if amax == 0:
        return lowest
    if math.isinf(amax):
        exact, emax = Fraction(2) ** 128, fmt.element.max_exponent
    else:
        exact, emax = Fraction(amax), fmt.element.max_exponent
    if fmt.scale_rule == "rceil":
        exact, emax = exact / Fraction(fmt.element.max), 0
    if fmt.scale_rule == "even" and not math.isinf(amax):
        kept = fmt.element.mantissa_bits - (fmt.element.exponent_bits == 0)
        unit = Fraction(2) ** (max(floor_log2(exact), -126) - kept)
        exact = math.floor(exact / unit + Fraction(1, 2)) * unit
        if exact == 0:
            return lowest
    exponent = floor_log2(exact)
    if fmt.scale_rule in ("ceil", "rceil") and exact != Fraction(2) ** exponent:
        exponent += 1
    return min(max(exponent - emax, lowest), highest)


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def expected_block(x: Floats, fmt: BlockFormat, tensor_scale: np.float32, **options: Any) -> tuple[Floats, int]:
    """One block rounded with its scale, and the scale's code."""
    amax = np.abs(x).max()
    with np.errstate(all="ignore"):
        if math.isnan(amax):
            return np.full(x.shape, np.nan, np.float32), int(fmt.scale.nan_code or 0)
        if fmt.scale_rule == "amax":
            wanted = np.float32(np.float32(amax / np.float32(fmt.element.max)) / tensor_scale)
            wanted = max(wanted, np.float32(fmt.scale.min_normal))
            code = int(accel.encode(np.full(1, wanted), fmt.scale)[0])
            scale = np.float32(fmt.scale.codes()[code] * tensor_scale)
        else:
            exponent = scale_exponent(float(amax), fmt)
            code, scale = exponent + fmt.scale.bias, np.float32(2.0**exponent)
        return accel.quantize(x / scale, fmt.element, **options) * scale, code


def check(x: Floats, fmt: BlockFormat, **options: Any) -> None:
    """x: 2-D, blocks along the last axis."""
    tensor_scale = np.float32(1)
    if fmt.tensor_scale:
        finite = np.minimum(np.abs(x[~np.isnan(x)]), np.finfo(np.float32).max)
        largest = finite.max() if finite.size else np.float32(0)
        if largest > 0:
            tensor_scale = max(np.float32(largest / np.float32(fmt.element.max * fmt.scale.max)), np.float32(2.0**-126))
    values = accel.quantize(x, fmt, **options)
    encoded = accel.encode(x, fmt, **options)
    decoded = accel.decode(encoded, fmt).numpy()
    assert np.array_equal(values, decoded, equal_nan=True)
    for row, start in itertools.product(range(x.shape[0]), range(0, x.shape[1], fmt.block_size)):
        piece = slice(start, start + fmt.block_size)
        expected, code = expected_block(x[row, piece], fmt, tensor_scale, **options)
        np.testing.assert_array_equal(values[row, piece], expected)
        assert int(encoded.scales[row, start // fmt.block_size]) == code


def samples(shape: tuple[int, int], seed: int) -> Floats:
    """Magnitudes over many octaves, powers of two and their neighbours, zeros, subnormals."""
    random = np.random.default_rng(seed)
    x = (random.normal(0, 1, shape) * 2.0 ** random.integers(-30, 30, (shape[0], 1))).astype(np.float32)
    powers = (2.0 ** random.integers(-140, 127, shape)).astype(np.float32).view(np.uint32)
    near = (powers + random.integers(-1, 2, shape).astype(np.uint32)).view(np.float32)
    x = np.where(random.random((shape[0], 1)) < 0.3, near, x)
    x[random.random(shape) < 0.1] = 0
    x[0] = 0
    return x


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_blocks_follow_the_rule(name: str, rule: str) -> None:
    if name == "nvfp4":
        rule = "amax"
    fmt = accel.format({"base": name, "scale_rule": rule})
    assert isinstance(fmt, BlockFormat)
    for seed, length in ((0, 96), (1, 70), (2, 5)):
        check(samples((40, length), seed), fmt)
        check(samples((40, length), seed), fmt, overflow="ieee", rounding="toward_zero")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    element=st.sampled_from(["e2m1", "e4m3fn", "e5m2", "int8", "e0m4", "e3m0", "e5m2fnuz", "binary8p3"]),
    block_size=st.integers(1, 70),
    rule=st.sampled_from(["floor", "ceil", "even", "rceil"]),
    length=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_any_block_size_and_length(element: str, block_size: int, rule: str, length: int, seed: int) -> None:
    fmt = accel.format({"element": element, "block_size": block_size, "scale_rule": rule})
    assert isinstance(fmt, BlockFormat)
    check(samples((5, length), seed), fmt)


def test_a_block_of_mxfp4_by_hand() -> None:
    """amax = 10 = 1.25 * 2^3, emax of e2m1 is 2: scale 2^1. 10/2 = 5 ties to 4, 9/2 = 4.5 to 4, 0.4/2 = .2 to 0."""
    x = torch.tensor([10.0, 9.0, -3.0, 0.4, 1.0, -0.6] + [0.0] * 26)
    encoded = accel.encode(x, "mxfp4")
    assert encoded.scales.tolist() == [128]
    assert encoded.codes[:6].tolist() == [0b0110, 0b0110, 0b1011, 0b0000, 0b0001, 0b1001]
    assert accel.quantize(x, "mxfp4")[:6].tolist() == [8.0, 8.0, -3.0, 0.0, 1.0, -1.0]
    assert accel.decode(encoded, "mxfp4")[:6].tolist() == [8.0, 8.0, -3.0, 0.0, 1.0, -1.0]


def test_a_block_of_nvfp4_by_hand() -> None:
    """Tensor amax 2688 = 6 * 448: tensor scale 1. Second block: amax 3, wanted scale .5, exact in e4m3fn."""
    x = torch.tensor([2688.0] + [0.0] * 15 + [3.0, 0.6] + [0.0] * 14)
    encoded = accel.encode(x, "nvfp4")
    assert encoded.tensor_scale is not None
    assert encoded.tensor_scale.tolist() == [1.0]
    assert accel.decode(encoded.scales, "e4m3fn").tolist() == [448.0, 0.5]
    assert accel.quantize(x, "nvfp4")[[0, 16, 17]].tolist() == [2688.0, 3.0, 0.5]
    assert accel.quantize(x, "nvfp4", scale=2.0)[[0, 16, 17]].tolist() == [2688.0 * 2 / 2, 3.0, 0.5]


def test_special_values_of_blocks() -> None:
    x = torch.zeros(4, 32)
    x[0, 3], x[1, 0], x[2, 5] = math.nan, math.inf, 2.0**-149
    encoded = accel.encode(x, "mxfp8_e4m3fn")
    assert encoded.scales.flatten().tolist() == [255, 128 - 8 + 127, 0, 0]
    values = accel.quantize(x, "mxfp8_e4m3fn")
    assert bool(values[0].isnan().all())
    assert values[1, 0] == 448.0 * 2.0**120
    assert bool((values[3] == 0).all())
    nvfp4 = accel.quantize(torch.cat([torch.tensor([math.nan]), torch.full((31,), 6.0)]), "nvfp4")
    assert bool(nvfp4[:16].isnan().all())
    assert nvfp4[16:].tolist() == [6.0] * 16


@pytest.mark.parametrize("rounding", ["nearest_even", "up"])
def test_integer_codes_of_a_nan_block_do_not_depend_on_its_payload(rounding: str) -> None:
    x = torch.ones(32)
    x[:2] = torch.tensor([0x7FC00055, -0x3FFFAB], dtype=torch.int32).view(torch.float32)
    assert x[:2].isnan().all()
    encoded = accel.encode(x, "mxint8", rounding=rounding)
    assert encoded.codes.tolist() == [0] * 32
    assert accel.decode(encoded, "mxint8").isnan().all()


def test_scales_next_to_powers_of_two_take_the_exponent_from_the_bits() -> None:
    """floor(log2(x)) in float32 is off by one just below a power of two: the scale would be twice as large."""
    for exponent in range(-100, 100, 7):
        below = np.nextafter(np.float32(2.0**exponent), np.float32(0))
        codes = accel.encode(torch.full((32,), float(below)), "mxfp8_e4m3fn").scales.tolist()
        assert codes == [exponent - 1 - 8 + 127]


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "mxfp8_e5m2"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "up"])
def test_blocks_along_any_axis_pieces_threads_and_layouts(name: str, rounding: str, restored_threads: None) -> None:
    """Along another axis, the values are those of the transposed tensor; draws go by row-major index."""
    x = torch.from_numpy(samples((6 * 50, 20), 3)).view(6, 50, 20)
    for axis in (0, 1, -1):
        fmt = {"base": name, "axis": axis, "block_size": 7}
        last = {"base": name, "block_size": 7}
        if rounding != "stochastic":
            expected = accel.quantize(x.movedim(axis, -1).contiguous(), last, rounding=rounding).movedim(-1, axis)
            assert torch.equal(accel.quantize(x, fmt, rounding=rounding), expected)
        values = accel.quantize(x, fmt, rounding=rounding, seed=2)
        encoded = accel.encode(x, fmt, rounding=rounding, seed=2)
        assert torch.equal(accel.decode(encoded, fmt), values)
        for other in (x.transpose(0, 2).contiguous().transpose(0, 2), x.repeat_interleave(2, 1)[:, ::2]):
            assert torch.equal(accel.quantize(other, fmt, rounding=rounding, seed=2), values)
            again = accel.encode(other, fmt, rounding=rounding, seed=2)
            assert torch.equal(again.codes, encoded.codes)
            assert torch.equal(again.scales, encoded.scales)
    long = torch.from_numpy(samples((700, 100), 4))
    options = {"rounding": rounding, "seed": 5}
    whole = accel.quantize(long, name, scale=1.0 if name == "nvfp4" else None, **options)
    torch.set_num_threads(1)
    pieces = [
        accel.quantize(part, name, scale=1.0 if name == "nvfp4" else None, offset=100 * start, **options)
        for start, part in zip(range(0, 700, 100), long.split(100), strict=True)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_ragged_blocks_are_short_padded_or_refused() -> None:
    x = torch.from_numpy(samples((3, 70), 0))
    drawn = {"rounding": "stochastic", "seed": 3}
    for options in ({}, {"element": "int8"}, {"element": "int16"}):
        fmt = {"base": "mxfp4", "padding": "zeros", **options}
        assert torch.equal(accel.decode(accel.encode(x, fmt, **drawn), fmt), accel.quantize(x, fmt, **drawn))
    short, padded = accel.encode(x, "mxfp4"), accel.encode(x, {"base": "mxfp4", "padding": "zeros"})
    assert (short.codes.shape, padded.codes.shape) == ((3, 70), (3, 96))
    assert torch.equal(short.scales, padded.scales)
    assert torch.equal(padded.codes[:, :70], short.codes)
    assert not bool(padded.codes[:, 70:].any())
    assert torch.equal(accel.decode(padded, {"base": "mxfp4", "padding": "zeros"}), accel.quantize(x, "mxfp4"))
    for operation in (accel.quantize, accel.encode):
        with pytest.raises(ValueError, match=r"axis -1 of x has 70 elements, no multiple of block_size 32"):
            operation(x, {"base": "mxfp4", "padding": "refuse"})
    assert accel.quantize(x[:, :64], {"base": "mxfp4", "padding": "refuse"}).shape == (3, 64)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (2, 1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.5)
    for name in ("mxfp4", "nvfp4"):
        assert torch.equal(accel.quantize(x, name), x)
        assert torch.equal(accel.decode(accel.encode(x, name), name), x)


def test_16_bit_tensors_are_rounded_from_their_values() -> None:
    x = torch.from_numpy(samples((4, 64), 6)[1:]).bfloat16()
    assert torch.equal(accel.quantize(x, "mxfp4"), accel.quantize(x.float(), "mxfp4").bfloat16())


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3).double(), {}, TypeError, "x must be float32, float16 or bfloat16 for the block format 'mxfp4'"),
        (torch.ones(3), {"scale": 2.0}, ValueError, "'mxfp4' takes as scale none: its blocks have their own"),
        (torch.ones(3), {"fmt": {"base": "mxfp4", "axis": 1}}, ValueError, "axis 1 is out of range for x of shape"),
        (torch.ones(3), {"fmt": "nvfp4", "scale": torch.ones(3)}, ValueError, "takes as scale one number"),
        (torch.ones(3), {"fmt": "nvfp4", "scale": -1.0}, ValueError, "scale must be positive and finite"),
    ],
)
def test_what_blocks_do_not_take(x: torch.Tensor, options: Any, error: type[Exception], message: str) -> None:
    for operation in (accel.quantize, accel.encode):
        with pytest.raises(error, match=message):
            operation(x, **({"fmt": "mxfp4"} | options))


def test_codes_of_blocks_and_block_formats_go_together() -> None:
    codes = accel.encode(torch.ones(4), "mxfp4")
    for wrong, fmt in ((codes, "e2m1"), (codes.codes, "mxfp4")):
        with pytest.raises(TypeError, match="BlockCodes and block formats go together"):
            accel.decode(wrong, fmt)
    with pytest.raises(ValueError, match="out is for scalar formats"):
        accel.encode(torch.ones(4), "mxfp4", out=torch.zeros(4, dtype=torch.uint8))


def test_pruning_in_blocks_keeps_alpha() -> None:
    x = torch.from_numpy(samples((8, 64), 9)) * 1e-3
    alpha = 0.01
    pruned = accel.prune(x, alpha, seed=4)
    rounded, counts = accel.prune_quantize(x, alpha, "mxfp4", seed=4)
    is_alpha = pruned.abs() == torch.tensor(alpha)
    assert torch.equal(rounded[is_alpha], pruned[is_alpha])
    assert torch.equal(rounded[~is_alpha], accel.quantize(pruned, "mxfp4", seed=4)[~is_alpha])
    assert int(counts.nonzeros.sum()) == int((rounded.view(torch.int32) != 0).sum())
    assert int(counts.alphas.sum()) == int((rounded.abs() == torch.tensor(alpha)).sum())
