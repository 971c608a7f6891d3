"""`accel.matmul` against exact rational arithmetic, NumPy's float16 and torch, element by element, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel
from accel.datapath.units import INT32

# --- the reference: one rounding of the exact sum ---------------------------------------------------------------------


def rounded(x: Fraction, negative_zero: bool, fmt: accel.Format, rounding: str, overflow: str) -> float:
    """An exact number in a format. negative_zero: the sign of x = 0."""
    if x == 0:
        return -0.0 if negative_zero else 0.0
    sign, magnitude = (-1, -x) if x < 0 else (1, x)
    exponent = math.floor(math.log2(magnitude.numerator) - math.log2(magnitude.denominator))
    exponent += (magnitude >= Fraction(2) ** (exponent + 1)) - (magnitude < Fraction(2) ** exponent)
    unit = Fraction(2) ** (max(exponent, fmt.min_exponent) - fmt.mantissa_bits)
    count, rest = divmod(magnitude, unit)
    if rounding == "nearest_even" and (2 * rest > unit or (2 * rest == unit and count % 2)):
        count += 1
    value = count * unit
    if value > Fraction(fmt.max):
        if overflow == "saturate" or rounding == "toward_zero":
            value = Fraction(fmt.max)
        else:
            return sign * math.inf if fmt.infinity_code is not None else math.nan
    return math.copysign(float(value), sign)


def not_finite(x: float, fmt: accel.Format, overflow: str) -> float:
    if math.isnan(x):
        return x
    if overflow == "saturate":
        return math.copysign(fmt.max, x)
    return x if fmt.infinity_code is not None else math.nan


def add(acc: float, x: float | Fraction, is_negative: bool, fmt: accel.Format, unit: accel.Mac) -> float:
    if not math.isfinite(acc) or (isinstance(x, float) and not math.isfinite(x)):
        return not_finite(acc + (x if isinstance(x, float) else 0.0), fmt, unit.overflow)
    both_negative = math.copysign(1, acc) < 0 and is_negative
    return rounded(Fraction(acc) + Fraction(x), both_negative, fmt, unit.rounding, unit.overflow)


def product(a: float, b: float, unit: accel.Mac) -> tuple[float | Fraction, bool]:
    """(a b, whether it has a minus sign)."""
    is_negative = (math.copysign(1, a) < 0) != (math.copysign(1, b) < 0)
    if not (math.isfinite(a) and math.isfinite(b)):
        x: float | Fraction = a * b
    else:
        x = Fraction(a) * Fraction(b)
    if unit.product is not None:
        if isinstance(x, float):
            return not_finite(x, unit.product, unit.overflow), is_negative
        x = rounded(x, is_negative, unit.product, "nearest_even", unit.overflow)
    return x, is_negative


def power_of(x: float) -> Fraction | None:
    return None if x == 0 else Fraction(2) ** (math.frexp(x)[1] - 1)


def aligned(acc: float, pairs: list[tuple[float, float]], unit: accel.Mac) -> float | Fraction:
    products = [product(a, b, unit)[0] for a, b in pairs]
    if not all(math.isfinite(x) for x in (acc, *products)):
        return acc + sum(float(x) for x in products)
    finite = [math.isfinite(a) and math.isfinite(b) for a, b in pairs]
    powers: list[Any] = [
        power_of(a) * power_of(b) if is_finite else power_of(float(x))  # type: ignore[operator]
        for (a, b), is_finite, x in zip(pairs, finite, products, strict=True)
        if a and b
    ]
    powers += [] if acc == 0 else [power_of(acc)]
    if not powers:
        return 0.0
    assert unit.fraction_bits is not None
    quantum = max(powers) / 2**unit.fraction_bits
    return sum((math.trunc(Fraction(x) / quantum) * quantum for x in (acc, *products)), Fraction(0))


def dot(a: list[float], b: list[float], unit: accel.Mac) -> float:
    inner = unit.accumulator
    assert isinstance(inner, accel.Format)
    outer = unit.outer or inner
    chunk = unit.chunk or len(a)
    total = 0.0
    for first in range(0, len(a), chunk):
        acc = 0.0
        last = min(first + chunk, len(a))
        for k in range(first, last, unit.terms):
            pairs = list(zip(a[k : min(k + unit.terms, last)], b[k : min(k + unit.terms, last)], strict=True))
            if unit.terms == 1:
                acc = add(acc, *product(*pairs[0], unit), inner, unit)
            else:
                x = aligned(acc, pairs, unit)
                acc = add(0.0, x, False, inner, unit)
        total = add(total, acc, math.copysign(1, acc) < 0, outer, unit) if unit.chunk else acc
    return total


def reference(a: torch.Tensor, b: torch.Tensor, unit: accel.Mac) -> torch.Tensor:
    rows, columns = a.tolist(), b.t().tolist()
    return torch.tensor([[dot(row, column, unit) for column in columns] for row in rows], dtype=torch.float64).float()


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal bits, NaN canonical on one side."""
    y = torch.where(y.isnan(), torch.tensor(math.nan), y)
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


# --- operands -------------------------------------------------------------------------------------------------------


def normal(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=g)


def wide(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """Exponents far apart."""
    return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-40, 40, shape, generator=g))


def cancelling(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """Large numbers come and go, small ones stay."""
    x = torch.randn(shape, generator=g)
    x[..., ::3] *= 2.0**14
    flat = x.view(-1)
    flat[1::4] = -flat[::4][: len(flat[1::4])]
    return x


def overflowing(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=g).mul(2).sub(0.7) * torch.exp2(torch.randint(4, 12, shape, generator=g))


def tiny(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """Products about the smallest numbers of fp16 and e5m2, and below."""
    return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-14, -7, shape, generator=g))


def tiniest(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    """Products about the smallest numbers of float32, subnormal ones among the operands."""
    return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-150, -40, shape, generator=g).double()).float()


def special(shape: tuple[int, int], g: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=g)
    kinds = torch.randint(0, 60, shape, generator=g)
    for number, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan)):
        x[kinds == number] = value
    return x


KINDS: list[Callable[..., torch.Tensor]] = [normal, wide, cancelling, overflowing, tiny, tiniest, special]
OPERANDS = ("e4m3fn", "e5m2", "bf16", "fp16", None)  # None: float32 as drawn
UNITS: list[dict[str, Any]] = [
    {"accumulator": "fp32"},
    {"accumulator": "bf16"},
    {"accumulator": "fp16"},
    {"accumulator": "fp16", "overflow": "saturate"},
    {"accumulator": "e8m13"},
    {"accumulator": "e5m2"},
    {"accumulator": "e4m3fn"},
    {"accumulator": "e4m3fn", "overflow": "saturate"},
    {"accumulator": "fp16", "rounding": "toward_zero"},
    {"accumulator": "e8m13", "rounding": "toward_zero"},
    {"accumulator": "fp32", "rounding": "toward_zero"},
    {"accumulator": "fp16", "chunk": 16},
    {"accumulator": "fp16", "chunk": 16, "outer": "fp32"},
    {"accumulator": "fp16", "chunk": 1000},
    {"accumulator": "e8m7", "chunk": 7, "outer": "e8m13", "rounding": "toward_zero"},
    {"accumulator": "fp32", "product": "bf16"},
    {"accumulator": "fp16", "product": "e5m2", "chunk": 10},
    {"accumulator": "e8m13", "terms": 32, "fraction_bits": 13, "rounding": "toward_zero"},
    {"accumulator": "fp32", "terms": 4, "fraction_bits": 24},
    {"accumulator": "fp32", "terms": 8, "fraction_bits": 3, "chunk": 16},
    {"accumulator": "fp32", "terms": 4, "fraction_bits": 10, "product": "fp16", "overflow": "saturate"},
    {"accumulator": "bf16", "rounding": "toward_zero", "overflow": "saturate"},
    {"accumulator": "e6m9", "rounding": "toward_zero", "overflow": "saturate"},
    {"accumulator": {"exponent_bits": 4, "mantissa_bits": 3, "bias": 15}},
    {"accumulator": {"exponent_bits": 4, "mantissa_bits": 9, "bias": 18}, "overflow": "saturate"},
    {"accumulator": {"exponent_bits": 8, "mantissa_bits": 3, "bias": 140}},
]


def drawn(kind: Callable[..., torch.Tensor], fmt: str | None, shape: tuple[int, int], seed: int) -> torch.Tensor:
    x = kind(shape, torch.Generator().manual_seed(seed))
    return x if fmt is None else accel.quantize(x, fmt, overflow="ieee")


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_unit_rounds_exact_sums_once(unit: dict[str, Any], kind: Callable[..., torch.Tensor]) -> None:
    described = accel.mac(unit)
    for number, fmt in enumerate(OPERANDS):
        a, b = drawn(kind, fmt, (3, 45), number), drawn(kind, fmt, (45, 5), 100 + number)
        found, expected = accel.matmul(a, b, described), reference(a, b, described)
        assert same(found, expected), (fmt, found, expected)


@pytest.mark.parametrize(
    "fmt", ["e5m0", "e2m1", "e4m3p3109", {"exponent_bits": 5, "mantissa_bits": 6, "subnormals": False}], ids=str
)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
def test_formats_without_a_grid_round_as_quantize_does(fmt: Any, rounding: str) -> None:
    """Without subnormals or mantissa, step by step in float64, in which these sums are exact."""
    a, b = drawn(normal, "e4m3fn", (5, 60), 1), drawn(normal, "e4m3fn", (60, 7), 2)
    if fmt == "e4m3p3109":
        with pytest.raises(ValueError, match="accumulator must be a signed floating-point format with -0"):
            accel.mac({"accumulator": fmt})
        return
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for k in range(60):
        total = expected + torch.outer(a[:, k].double(), b[k].double())
        expected = accel.quantize(total, fmt, rounding=rounding, overflow="ieee")
    assert same(accel.matmul(a, b, {"accumulator": fmt, "rounding": rounding}), expected.float())


@pytest.mark.parametrize("name", ["fp32", "bf16-acc", "fp16-acc", "fp22", "hopper-fp8"])
@pytest.mark.parametrize("length", [1, 2, 31, 257, 4096])
def test_presets_at_any_length(name: str, length: int) -> None:
    for number, (kind, fmt) in enumerate(((normal, "e4m3fn"), (cancelling, "bf16"), (wide, None))):
        a, b = drawn(kind, fmt, (1, length), number), drawn(kind, fmt, (length, 2), 50 + number)
        assert same(accel.matmul(a, b, name), reference(a, b, accel.mac(name)))


def test_every_way_to_sum_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheap steps where they are exact, the dear one where nothing else is."""
    from accel.datapath import products

    taken: list[str] = []
    original = products._kind
    monkeypatch.setattr(products, "_kind", lambda *given: taken.append(original(*given)) or taken[-1])
    cases = [
        ("fp16-acc", normal, "e4m3fn", "narrow"),
        ("fp16-acc", overflowing, "e4m3fn", "narrow_infinite"),
        ("fp22", normal, "e4m3fn", "wide"),
        ("fp32", normal, "bf16", "wide"),
        ("fp16-acc", overflowing, "fp16", "wide_infinite"),
        ("fp22", wide, None, "odd"),
        ("fp16-acc", special, "e5m2", "narrow_infinite"),
    ]
    for name, kind, fmt, expected in cases:
        accel.matmul(drawn(kind, fmt, (3, 45), 1), drawn(kind, fmt, (45, 5), 2), name)
        assert taken[-1] == expected, (name, kind, fmt)


@pytest.mark.parametrize(
    ("unit", "kind", "fmt", "expected"),
    [
        ("hopper-fp8", normal, "e4m3fn", "narrow"),
        ({"base": "hopper-fp8", "rounding": "nearest_even", "chunk": 64}, cancelling, "e5m2", "narrow"),
        ({"accumulator": "fp32", "terms": 16, "fraction_bits": 24}, normal, "e4m3fn", "wide"),
        ({"accumulator": "fp16", "terms": 4, "fraction_bits": 10}, overflowing, "fp16", "narrow"),
        ({"accumulator": "fp16", "terms": 4, "fraction_bits": 10, "overflow": "saturate"}, wide, None, "wide"),
        ("hopper-fp8", special, "e5m2", None),
    ],
)
def test_fused_dots_in_tiles_are_those_element_by_element(
    unit: Any, kind: Any, fmt: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loops over tiles, in float32 and float64, for finite operands; several tiles, the last ones partly filled."""
    from accel.datapath import products

    taken: list[str] = []
    original = products._fused_kind
    monkeypatch.setattr(products, "_fused_kind", lambda *given: taken.append(original(*given)) or taken[-1])
    a, b = drawn(kind, fmt, (9, 101), 1), drawn(kind, fmt, (101, 70), 2)
    found = accel.matmul(a, b, unit)
    assert taken == ([] if expected is None else [expected])
    described = accel.mac(unit)
    for row, column in ((0, 0), (8, 69), (4, 63), (3, 64)):
        assert same(found[row, column], reference(a[row : row + 1], b[:, column : column + 1], described)[0, 0])


def test_float16_is_numpys() -> None:
    """NumPy's float16 rounds a product and then a sum; so does a unit with products of fp16."""
    a, b = drawn(normal, "fp16", (4, 300), 1), drawn(normal, "fp16", (300, 6), 2)
    expected = np.zeros((4, 6), np.float16)
    for k in range(300):
        expected = expected + np.multiply.outer(a[:, k].numpy(), b[k].numpy()).astype(np.float16)
    found = accel.matmul(a, b, {"accumulator": "fp16", "product": "fp16"})
    assert np.array_equal(found.numpy(), expected.astype(np.float32))
    narrow = drawn(normal, "e4m3fn", (4, 300), 3), drawn(normal, "e4m3fn", (300, 6), 4)  # products are exact in fp16
    expected = np.zeros((4, 6), np.float16)
    for k in range(300):
        expected = expected + np.multiply.outer(narrow[0][:, k].numpy(), narrow[1][k].numpy()).astype(np.float16)
    assert np.array_equal(accel.matmul(*narrow, "fp16-acc").numpy(), expected.astype(np.float32))


def test_integers_are_exact() -> None:
    for length in (5, 700, 5000):
        a = torch.randint(-128, 128, (7, length)).float()
        b = torch.randint(-128, 128, (length, 9)).float()
        found = accel.matmul(a, b, "int8")
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), a.long() @ b.long())
    extreme = torch.full((1, 131071), -128.0)
    assert int(accel.matmul(extreme, extreme.t(), "int8")) == 131071 * 16384
    with pytest.raises(ValueError, match="mac 'int8': a sum of 131072 products could overflow an int32"):
        accel.matmul(torch.zeros(1, 131072), torch.zeros(131072, 1), "int8")


def test_operands_are_rounded_into_their_formats() -> None:
    a, b = torch.randn(3, 20) * 300, torch.randn(20, 4)
    unit = {"accumulator": "fp32", "a": "e4m3fn", "b": "e5m2"}
    expected = accel.matmul(accel.quantize(a, "e4m3fn"), accel.quantize(b, "e5m2"), "fp32")
    assert same(accel.matmul(a, b, unit), expected)


def test_what_a_reader_found() -> None:
    """Infinite operands that saturate, and formats that lie below 1 or below float32's normal numbers."""
    saturated = {"accumulator": "bf16", "overflow": "saturate", "rounding": "toward_zero"}
    a, b = torch.tensor([[math.inf, -1.0]]), torch.tensor([[1.0], [2.0**-30]])
    assert float(accel.matmul(a, b, saturated)) == (2 - 2.0**-6) * 2.0**127
    low = {"exponent_bits": 4, "mantissa_bits": 3, "bias": 15}
    assert float(accel.matmul(torch.ones(1, 1), torch.full((1, 1), 0.5), {"accumulator": low})) == 0.5
    tiny = {"exponent_bits": 8, "mantissa_bits": 3, "bias": 140}
    a, b = torch.full((1, 2), 2.0**-64), torch.tensor([[1.5 * 2.0**-68], [1.5 * 2.0**-72]])
    assert float(accel.matmul(a, b, {"accumulator": tiny})) == 13 * 2.0**-135
    with pytest.raises(ValueError, match="mac 'int8': a holds a NaN"):
        accel.matmul(torch.tensor([[math.nan, 1.0]]), torch.ones(2, 1), "int8")
    assert accel.mac({"base": {"accumulator": "fp16", "chunk": 8}, "chunk": None}).chunk is None
    assert accel.mac({"base": "hopper-fp8", "terms": 1, "fraction_bits": None}).terms == 1


# --- stochastic sums ------------------------------------------------------------------------------------------------


def test_stochastic_sums_are_neighbours_of_the_exact_ones_and_unbiased() -> None:
    """One product onto 1: 1 + 2^-12 lies a quarter of the way from 1 to the next number of fp16."""
    a = torch.tensor([[1.0, 2.0**-12]]).expand(200, 2)
    b = torch.ones(2, 100)
    found = accel.matmul(a, b, {"base": "fp16-acc", "rounding": "stochastic"}, seed=3)
    up = found == 1 + 2.0**-10
    assert bool((up | (found == 1)).all())
    assert abs(float(up.float().mean()) - 0.25) < 4.5 * (0.25 * 0.75 / up.numel()) ** 0.5


def test_words_depend_on_the_element_and_the_place_in_k_alone() -> None:
    unit = {"base": "fp16-acc", "rounding": "stochastic", "chunk": 32}
    a, b = torch.randn(2, 6, 70), torch.randn(70, 130)
    whole = accel.matmul(a, b, unit, seed=1, stream=2, step=3)
    assert same(accel.matmul(a[1], b, unit, seed=1, stream=2, step=3, offset=6 * 130), whole[1])
    assert same(accel.matmul(a[0, :2], b, unit, seed=1, stream=2, step=3), whole[0, :2])
    for change in ({"seed": 2}, {"stream": 1}, {"step": 4}):
        assert not same(accel.matmul(a, b, unit, **{"seed": 1, "stream": 2, "step": 3, **change}), whole)


# --- shapes, strides, threads ---------------------------------------------------------------------------------------

SEVERAL: list[Any] = ["fp16-acc", "fp32", "hopper-fp8", {"base": "fp16-acc", "rounding": "stochastic"}, "int8"]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 9), columns=st.integers(0, 130), length=st.integers(0, 40),
    batch=st.sampled_from([(), (2,), (2, 3)]), unit=st.sampled_from(SEVERAL), seed=st.integers(0, 100),
)  # fmt: skip
def test_any_shape_is_the_sum_of_its_elements(
    rows: int, columns: int, length: int, batch: tuple[int, ...], unit: Any, seed: int
) -> None:
    """Each element equals that of its row and column alone, whatever tiles it lies in."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(*batch, rows, length, generator=g), torch.randn(length, columns, generator=g)
    found = accel.matmul(a, b, unit)
    assert found.shape == (*batch, rows, columns)
    if not found.numel():
        return
    place = tuple(int(torch.randint(0, size, (1,), generator=g)) for size in found.shape)
    number = int(np.ravel_multi_index(place, found.shape))
    row, column = a[place[:-1]][None], b[:, place[-1]][:, None]
    assert torch.equal(accel.matmul(row, column, unit, offset=number)[0, 0], found[place])


@pytest.mark.parametrize("unit", SEVERAL, ids=str)
def test_strides_and_threads_do_not_matter(unit: Any) -> None:
    a, b = torch.randn(3, 64, 90), torch.randn(3, 90, 200)
    expected = accel.matmul(a, b, unit)
    transposed = a.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.randn(3, 180, 400)[:, ::2, ::2].copy_(b)
    assert torch.equal(accel.matmul(transposed, spread, unit), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(accel.matmul(a, b, unit), expected)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(accel.matmul(a.numpy(), b.numpy(), unit), expected.numpy())


# --- as an operator of torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", SEVERAL, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_keeps_the_rules_of_torch(unit: Any) -> None:
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes: torch's own check of operators."""
    text = accel.datapath.products.text_of(unit)
    for a, b in (
        (torch.randn(2, 3, 5), torch.randn(5, 4)),
        (torch.randn(3, 5, requires_grad=unit != "int8"), torch.randn(4, 5).t()),
    ):
        results = torch.library.opcheck(torch.ops.accel.matmul.default, (a, b, text, 1, 2, 3, 4))
        assert set(results.values()) == {"SUCCESS"}


def test_gradients_are_products_of_the_same_unit() -> None:
    unit = {"accumulator": "e8m3", "a": "e4m3fn", "b": "e5m2", "rounding": "stochastic"}
    a, b, dc = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 4)
    accel.matmul(a, b, unit, seed=3, stream=8, step=2).backward(dc)
    plain = {"accumulator": "e8m3", "rounding": "stochastic"}
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, accel.matmul(dc, b.detach().t(), plain, seed=3, stream=9, step=2))
    assert torch.equal(b.grad, accel.matmul(a.detach().mT, dc, plain, seed=3, stream=10, step=2).sum(0))
    assert not accel.matmul(a, b, "int8").requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_gives_the_same_bits() -> None:
    unit = {"base": "fp16-acc", "chunk": 4, "outer": "fp32"}

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (accel.matmul(a * 2, b, unit) * a[:, :4]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(7, n, generator=generator, requires_grad=True) for n in (7, 4))
        function(a, b).backward()
        grads.append((a.grad, b.grad))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# --- descriptions and mistakes ----------------------------------------------------------------------------------------


def test_presets_are_what_they_say() -> None:
    for unit in accel.macs():
        assert accel.mac(unit.name) == unit
        assert accel.mac(accel.datapath.units.to_description(unit)) == unit
        assert unit.name in accel.datapath.units.SOURCES
    assert accel.mac("fp22").accumulator == accel.format("e8m13")
    assert accel.mac("int8").accumulator == INT32
    hopper = accel.mac("hopper-fp8")
    assert (hopper.terms, hopper.fraction_bits, hopper.rounding) == (32, 13, "toward_zero")
    assert accel.mac({"base": "hopper-fp8", "chunk": 128, "outer": "fp32"}).terms == 32


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("fp17", "unknown mac 'fp17'"),
        (17, "a mac is a name, a mapping or a Mac (got int)"),
        ({"rounding": "nearest_even"}, "mac: accumulator is missing"),
        ({"accumulator": "fp32", "chunks": 4}, "mac: unknown key 'chunks' (did you mean 'chunk'?)"),
        ({"accumulator": "fp99"}, "mac: accumulator: "),
        ({"accumulator": "mxfp4"}, "mac: accumulator must be a scalar format (got the block format 'mxfp4')"),
        ({"accumulator": "int8"}, "accumulator must be a signed floating-point format with -0"),
        ({"accumulator": "e4m3fnuz"}, "accumulator must be a signed floating-point format with -0"),
        ({"accumulator": "fp32", "rounding": "up"}, "unknown rounding 'up'"),
        ({"accumulator": "fp32", "overflow": "wrap"}, "unknown overflow 'wrap'"),
        ({"accumulator": "fp32", "terms": 4}, "terms above 1 and fraction_bits go together"),
        ({"accumulator": "fp32", "terms": 65, "fraction_bits": 4}, "terms must be an integer from 1 to 64 (got 65)"),
        ({"accumulator": "fp32", "terms": 4, "fraction_bits": 41}, "fraction_bits must be an integer from 1 to 40"),
        ({"accumulator": "fp32", "terms": 4, "fraction_bits": 9, "chunk": 6}, "chunk must be a multiple of terms"),
        ({"accumulator": "fp32", "chunk": 0}, "chunk must be an integer of 1 or more (got 0)"),
        ({"accumulator": "fp32", "outer": "fp32"}, "outer needs a chunk"),
        (
            {"accumulator": "fp32", "rounding": "stochastic", "random_bits": 32},
            "random_bits may be 26 for an accumulator of 24",
        ),
        ({"accumulator": "int32"}, "a must be an integer format of 8 bits or fewer (got None)"),
        ({"base": "int8", "rounding": "toward_zero"}, "rounding is for floating-point accumulators"),
        ({"base": "int8", "a": "fp16"}, "a must be an integer format of 8 bits or fewer (got 'fp16')"),
    ],
)
def test_units_that_cannot_be(unit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        accel.mac(unit)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), "a has 3 columns, b has 4 rows: K must be the same"),
        (
            torch.zeros(3),
            torch.zeros(3, 2),
            "a must be a float32 tensor of two or more dimensions (got torch.float32, 1",
        ),
        (torch.zeros(2, 3), torch.zeros(3, 2).double(), "b must be a float32 tensor"),
        (torch.zeros(2, 2, 3), torch.zeros(3, 3, 2), "leading dimensions do not broadcast"),
    ],
)
def test_operands_that_do_not_fit(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        accel.matmul(a, b, "fp32")
