"""`matmul`: a matrix product as a described multiply-accumulate unit computes it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from accel import launch
from accel.arguments import as_tensor, checked_words
from accel.datapath import cpu, units
from accel.datapath.cpu import Extent
from accel.datapath.steps import Grid
from accel.datapath.units import AnyMac, Mac
from accel.formats import Format
from accel.kernels.arguments import Fields
from accel.operations import AnyArray, quantize, signed
from accel.rounding import parameters

LARGEST_INT32, LARGEST_WORD = (1 << 31) - 1, (1 << 64) - 1
FLOAT32_BITS, FLOAT64_BITS = 24, 53
SHORT_32, SHORT_64 = 11, 25  # significant bits p with 2 p + 2 <= 24 and 53


def matmul(
    a: AnyArray, b: AnyArray, mac: AnyMac, *, seed: int = 0, stream: int = 0, step: int = 0, offset: int = 0
) -> Any:
    """a b as the unit `mac` computes it: (..., M, K) times (..., K, N), leading dimensions broadcast.

    a, b: float32 tensors or arrays on one device, in any strides. mac: a Mac, its name, or a mapping (see `accel.mac`).
    Returns float32, values of the (outer) accumulator's format, NaN canonical; int32 for an accumulator "int32".
    seed, stream, step, offset: of the random words of stochastic sums, which depend on the element of the result
    (row-major number, plus offset) and on its place in K.
    Gradients of tensors are products of the same unit, which takes the operands as they come, with the words of the
    streams after this one; none pass through int32. Raises ValueError for operands of other shapes, dtypes or devices,
    for a NaN among integers, and where an int32 could overflow. Floats are IEEE 754's: results are others under
    `torch.set_flush_denormal(True)`.
    """
    checked_words(seed, stream, step, offset)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.ops.accel.matmul(a, b, text_of(mac), signed(seed), stream, step, offset)
    result = multiply(
        as_tensor(a, "a").detach(), as_tensor(b, "b").detach(), units.mac(mac), seed, stream, step, offset
    )
    return result.numpy() if isinstance(a, np.ndarray) else result


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    unit: Mac,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    between: int | None = None,
) -> torch.Tensor:
    """`matmul` of tensors, without gradient. between: from the number of the first element of a matrix of the result to
    that of the next one, None for its size."""
    batch, is_empty = _checked(a, b)
    left = a if unit.a is None else quantize(a, unit.a)
    right = b if unit.b is None else quantize(b, unit.b)
    if unit.is_integer:
        return _integer_product(left, right, unit)
    words = np.uint64(seed & LARGEST_WORD), np.uint64(stream), np.uint64(step)
    result = torch.zeros(*batch, a.shape[-2], b.shape[-1], device=a.device)
    if is_empty:
        return result
    if b.ndim == 2 and between is None:  # one matrix, of all rows
        left, right, out = left.reshape(1, -1, a.shape[-1]), right[None], result.view(1, -1, b.shape[-1])
    else:
        left, right = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (left, right))
        out = result.view(-1, *result.shape[-2:])
    _product(left, right, unit, out, offset, out[0].numel() if between is None else between, words)
    return result


def _checked(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Size, bool]:
    """The leading dimensions of the result, and whether nothing is multiplied."""
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.float32 or x.ndim < 2:
            raise ValueError(
                f"{name} must be a float32 tensor of two or more dimensions (got {x.dtype}, {x.ndim} dimensions)"
            )
    if a.device != b.device:
        raise ValueError(f"a is on {a.device}, b on {b.device}")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a has {a.shape[-1]} columns, b has {b.shape[-2]} rows: K must be the same")
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        message = f"leading dimensions do not broadcast (got {tuple(a.shape)} and {tuple(b.shape)})"
        raise ValueError(message) from None
    return batch, not (math.prod(batch) and a.shape[-2] and a.shape[-1] and b.shape[-1])


def backend(x: torch.Tensor) -> ModuleType:
    """The loops for a tensor's device (see `launch.loops_for`)."""
    return launch.loops_for(x, cpu, "accel.datapath.cuda")


def _integer_product(a: torch.Tensor, b: torch.Tensor, unit: Mac) -> torch.Tensor:
    """Exact sums of exact products, formed in floats that hold them."""
    assert unit.a is not None
    assert unit.b is not None
    largest = a.shape[-1] * 2 ** (unit.a.mantissa_bits + unit.b.mantissa_bits)
    if largest > LARGEST_INT32:
        raise ValueError(f"mac {unit.name!r}: a sum of {a.shape[-1]} products could overflow an int32")
    for name, operand in (("a", a), ("b", b)):
        if bool(operand.isnan().any()):
            raise ValueError(f"mac {unit.name!r}: {name} holds a NaN, which integers do not have")
    if largest <= 1 << FLOAT32_BITS:
        return torch.matmul(a, b).to(torch.int32)
    return torch.matmul(a.double(), b.double()).to(torch.int32)


def _product(
    a: torch.Tensor, b: torch.Tensor, unit: Mac, out: torch.Tensor, first: int, between: int,
    words: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    """Matrix products (G, M, K) times (G, K, N) into `out`, whose matrices begin with the numbers first + g between."""
    length = a.shape[2]
    chunk = length + 1 if unit.chunk is None else min(unit.chunk, length)
    accumulator = unit.accumulator
    assert isinstance(accumulator, Format)
    outer = unit.outer or accumulator
    loops, is_fused = backend(a), unit.terms > 1
    is_by_code = (
        unit.rounding == "stochastic"
        or unit.product is not None
        or (is_fused and loops is not cpu)
        or not (_has_grid(accumulator) and _has_grid(outer))
    )
    extents = None if is_by_code else (loops.extent(a), loops.extent(b))
    if extents is None or (is_fused and (extents[0].is_special or extents[1].is_special)):
        for number, (one, other, target) in enumerate(zip(a, b, out, strict=True)):
            _by_code(one, other, unit, target, first + number * between, words, chunk)
        return
    kind = (_fused_kind if is_fused else _kind)(unit, accumulator, length, *extents)
    mode = "nearest" if unit.rounding == "nearest_even" else "zero"
    real: Any = np.float32 if kind.startswith("narrow") else np.float64
    inner = grid_of(accumulator, unit.rounding, unit.overflow, real)
    grids = inner, grid_of(outer, unit.rounding, unit.overflow, np.float64)
    if unit.fraction_bits is None:
        loops.on_a_grid(kind, mode, a, b, out, chunk, *grids)
    else:
        loops.aligned(kind, mode, a, b, out, chunk, unit.terms, 2.0**-unit.fraction_bits, *grids)


def _by_code(
    a: torch.Tensor, b: torch.Tensor, unit: Mac, out: torch.Tensor, first: int, words: tuple[Any, Any, Any], chunk: int
) -> None:
    """One matrix product into `out`, whose first element has the number `first`."""
    accumulator = unit.accumulator
    assert isinstance(accumulator, Format)
    sums = [_values(fmt, unit.rounding, unit) for fmt in (accumulator, unit.outer or accumulator)]
    product = _values(unit.product or accumulator, "nearest_even", unit)
    fraction = 2.0 ** -(unit.fraction_bits or 0)
    options = chunk, unit.terms, fraction, unit.product is not None, first, *words
    mode = "stochastic" if unit.rounding == "stochastic" else "nearest"
    backend(a).by_code(mode, a, b, out, options, *sums, product)


def _values(fmt: Format, rounding: str, unit: Mac) -> Fields:
    return parameters(fmt, rounding, unit.overflow, unit.random_bits, False, True)


def _has_grid(fmt: Format) -> bool:
    return fmt.subnormals and fmt.mantissa_bits > 0


def _kind(unit: Mac, fmt: Format, length: int, a: Extent, b: Extent) -> str:
    """The cheapest step that rounds each sum of the products of a and b once (see accel/datapath/steps.py)."""
    is_nearest, p = unit.rounding == "nearest_even", fmt.mantissa_bits + 1
    bits, low, is_special = a.bits + b.bits, a.low + b.low, a.is_special or b.is_special
    products = a.high + b.high + 2  # every product is below 2^products
    sums = products + math.ceil(math.log2(length)) + 1  # rounded sums stay below 2^sums
    limit = _limit(unit, fmt) if is_special or sums > fmt.max_exponent else ""
    if limit:  # a sum may become the largest number, and go on from there
        sums, low = max(sums, fmt.max_exponent + 2), min(low, fmt.max_exponent - fmt.mantissa_bits)
    is_short = is_nearest and bits <= p
    top = max(products, min(sums, fmt.max_exponent + 1) if limit else sums)
    reaches = top + FLOAT32_BITS - fmt.mantissa_bits <= 127  # what is added to round stays in the range of float32
    is_normal = a.low + b.low >= -149 and fmt.min_exponent >= -126
    if is_short and p <= SHORT_32 and is_normal and reaches and limit != "_limited":
        return f"narrow{limit}"
    if (is_short and p <= SHORT_64) or sums - low <= FLOAT64_BITS:
        return f"wide{limit}"
    return "odd"


def _fused_kind(unit: Mac, fmt: Format, length: int, a: Extent, b: Extent) -> str:
    """Whether float32 holds every product, power and sum of aligned units exactly ("narrow"), or float64 must ("wide").

    Numbers are multiples of 2^low or of the last bit that alignment keeps of one, so they never come near the end of
    float32 below; above, the largest is what is added to round a sum.
    """
    assert unit.fraction_bits is not None
    sums = a.high + b.high + 2 + math.ceil(math.log2(length)) + 1
    low = min(a.low, a.high) + min(b.low, b.high) - 2 * unit.fraction_bits
    units = unit.fraction_bits + 2 + math.ceil(math.log2(unit.terms + 1))
    is_in_range = low >= -120 and max(sums, 0) + FLOAT32_BITS <= 120 and fmt.min_exponent >= -126
    return "narrow" if a.bits + b.bits <= FLOAT32_BITS and units <= FLOAT32_BITS and is_in_range else "wide"


def _limit(unit: Mac, fmt: Format) -> str:
    """The cheapest way to end a sum that leaves the format, as a suffix of the kind of step."""
    if unit.rounding != "nearest_even":
        return "_limited"
    if unit.overflow == "saturate" or (fmt.infinity_code is None and not fmt.has_nan):
        return "_saturated"
    is_full = fmt.max == (2 - 2.0**-fmt.mantissa_bits) * 2.0**fmt.max_exponent
    return "_infinite" if is_full and fmt.infinity_code is not None and fmt.max_exponent >= 0 else "_limited"


@cache
def grid_of(fmt: Format, rounding: str, overflow: str, real: Any) -> Grid:
    """The numbers of a format with a grid (see `Grid`), in the carrier's type."""
    ends = torch.tensor([2.0**1000, math.inf], dtype=torch.float64)
    beyond, infinite = quantize(ends, fmt, rounding=rounding, overflow=overflow).tolist()
    fraction, largest = (23, 127) if real is np.float32 else (52, 1023)
    numbers = {
        "least": 2.0**fmt.min_exponent,
        "top": 2.0**fmt.max_exponent,
        "shifter": 1.5 * 2.0 ** (fraction - fmt.mantissa_bits),
        "unit": 2.0**-fmt.mantissa_bits,
        "largest": fmt.max,
        "beyond": beyond,
        "infinite": infinite,
        "up": 2.0 ** (largest - max(fmt.max_exponent, 0)),
        "down": 2.0 ** (max(fmt.max_exponent, 0) - largest),
    }
    return Grid(**{key: real(number) for key, number in numbers.items()})


# --- as an operator of torch (see accel/operators.py) -----------------------------------------------------------------

_library = torch.library.Library("accel", "FRAGMENT")
_library.define("matmul(Tensor a, Tensor b, str mac, SymInt seed, SymInt stream, SymInt step, SymInt offset) -> Tensor")


@torch.compiler.assume_constant_result
def text_of(spec: AnyMac) -> str:
    """A unit as a text, which operators take."""
    return _text(units.mac(spec))


@cache
def _text(unit: Mac) -> str:
    return json.dumps(units.to_description(unit))


@cache
def _unit(text: str) -> Mac:
    return units.mac(json.loads(text))


def _matmul(a: torch.Tensor, b: torch.Tensor, mac: str, seed: int, stream: int, step: int, offset: int) -> torch.Tensor:
    return multiply(a, b, _unit(mac), seed, stream, step, offset)


def _fake(a: torch.Tensor, b: torch.Tensor, mac: str, *_: Any) -> torch.Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=result_dtype(_unit(mac)))


def result_dtype(unit: Mac) -> torch.dtype:
    """What `matmul` returns."""
    return torch.int32 if unit.is_integer else torch.float32


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a, b, *ctx.options = inputs
    ctx.save_for_backward(a, b)
    if not output.is_floating_point():
        ctx.mark_non_differentiable(output)


def _backward(ctx: Any, gradient: torch.Tensor) -> Any:
    (a, b), (mac, seed, stream, *rest) = ctx.saved_tensors, ctx.options
    plain, last = replace(_unit(mac), a=None, b=None), 1 << 32
    da, db = None, None
    if ctx.needs_input_grad[0]:
        da = torch.ops.accel.matmul(gradient, b.mT, _text(plain), seed, (stream + 1) % last, *rest).sum_to_size(a.shape)
    if ctx.needs_input_grad[1]:
        db = torch.ops.accel.matmul(a.mT, gradient, _text(plain), seed, (stream + 2) % last, *rest).sum_to_size(b.shape)
    return da, db, None, None, None, None, None


for _device in ("CPU", "CUDA"):
    _library.impl("matmul", _matmul, _device)
torch.library.register_fake("accel::matmul", _fake, lib=_library)
torch.library.register_autograd("accel::matmul", _backward, setup_context=_setup, lib=_library)
