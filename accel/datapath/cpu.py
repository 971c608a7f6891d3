"""Matrix products of a datapath on the CPU: loops over tiles of the result, compiled for each kind of step.

An operand is packed into strips: ROWS rows of `a`, COLUMNS columns of `b`, of which a tile of the result is made. Each
element of the result is summed in the order of K, whatever the tiles and threads. One loop serves several steps:
`kernel` and `part` bind the names in capitals.
"""

# ruff: noqa: F821  names that are bound

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from accel.datapath.steps import (
    Grid,
    fused,
    limited,
    odd_sum,
    power_below,
    to_infinity,
    to_largest,
    to_nearest,
    to_nearest_or_beyond,
    to_zero,
)
from accel.kernels import cpu
from accel.kernels.arguments import Fields
from accel.kernels.jit import Kernel, kernel, part, scalar
from accel.random import draw_one, round_keys
from accel.rounding import Parameters, nearest_value, stochastic_value
from accel.words import LOW_WORD, WORD_BITS, bits_of

ROWS, COLUMNS = 4, 64
GRID_FIELDS, VALUE_FIELDS = len(Grid._fields), len(Parameters._fields)
TWO_GRIDS, TWO_VALUES, THREE_VALUES = 2 * GRID_FIELDS, 2 * VALUE_FIELDS, 3 * VALUE_FIELDS
OUTER_WORDS = 1 << 62  # numbers of the words of outer accumulators follow this one
UNDRAWN, NAN = np.uint32(0), np.float32(np.nan)
MAGNITUDE, FRACTION, HIDDEN, ZERO = np.uint32(0x7FFFFFFF), np.uint32(0x7FFFFF), np.uint32(1 << 23), np.uint32(0)
FRACTION_BITS = np.uint32(23)
PRODUCTS_OF_AN_ELEMENT = 16  # that take as long as an element of an elementwise operation
EXTENT = 1 << 14  # elements of an operand that are looked through at once
NONE = -1000


# --- an accumulator on a grid ---------------------------------------------------------------------------------------


def _step(acc, a, b, grid):  # type: ignore[no-untyped-def]
    """The accumulator after one more product, of finite operands and with no sum out of range."""
    return ROUND(fused(a, b, acc), grid)


def _infinite_step(acc, a, b, grid):  # type: ignore[no-untyped-def]
    return to_infinity(to_nearest_or_beyond(fused(a, b, acc), grid), grid)


def _saturated_step(acc, a, b, grid):  # type: ignore[no-untyped-def]
    return to_largest(to_nearest_or_beyond(fused(a, b, acc), grid), grid)


def _limited_step(acc, a, b, grid):  # type: ignore[no-untyped-def]
    x = fused(a, b, acc)
    return limited(ROUND(x, grid), x, grid)


def _odd_step(acc, a, b, grid):  # type: ignore[no-untyped-def]
    x = odd_sum(acc, a * b)
    return limited(ROUND(x, grid), x, grid)


def _add(acc, x, grid):  # type: ignore[no-untyped-def]
    total = odd_sum(acc, x)
    return limited(ROUND(total, grid), total, grid)


def _accumulate(acc, a, b, grid):  # type: ignore[no-untyped-def]
    """acc = a b of a strip and a panel, from 0: (K, ROWS) and (K, COLUMNS) make ROWS * COLUMNS, flat."""
    for i in range(ROWS * COLUMNS):
        acc[i] = 0
    for k in range(b.shape[0]):
        line = b[k]
        a_0, a_1, a_2, a_3 = REAL(a[k, 0]), REAL(a[k, 1]), REAL(a[k, 2]), REAL(a[k, 3])
        for c in range(COLUMNS):
            value = REAL(line[c])
            acc[c] = STEP(acc[c], a_0, value, grid)
            acc[c + COLUMNS] = STEP(acc[c + COLUMNS], a_1, value, grid)
            acc[c + 2 * COLUMNS] = STEP(acc[c + 2 * COLUMNS], a_2, value, grid)
            acc[c + 3 * COLUMNS] = STEP(acc[c + 3 * COLUMNS], a_3, value, grid)


def _on_a_grid(start, stop, a, b, out, strips, panels, chunk, *fields):  # type: ignore[no-untyped-def]
    """Tiles start .. stop of out = a b, matrix by matrix: `strips` (K, ROWS) of a and `panels` (K, COLUMNS) of b each.

    out: whole tiles, one below the other and side by side. chunk: beyond K where there is no outer accumulator.
    """
    inner, outer = Grid(*fields[:GRID_FIELDS]), Grid(*fields[GRID_FIELDS:TWO_GRIDS])
    length = a.shape[1]
    acc, sums = np.empty(ROWS * COLUMNS, REAL), np.empty(ROWS * COLUMNS)
    for tile in range(start, stop):
        strip, across = tile // panels, tile % panels
        panel = strip // strips * panels + across
        for i in range(ROWS * COLUMNS):
            sums[i] = 0
        for first in range(0, length, chunk):
            ACCUMULATE(acc, a[strip, first : first + chunk], b[panel, first : first + chunk], inner)
            for i in range(ROWS * COLUMNS):
                sums[i] = acc[i] if chunk > length else ADD(sums[i], np.float64(acc[i]), outer)
        for r in range(ROWS):
            for c in range(COLUMNS):
                value = np.float32(sums[r * COLUMNS + c])
                out[strip * ROWS + r, across * COLUMNS + c] = value if value == value else NAN


# --- fused dot products of finite operands, on a grid -----------------------------------------------------------------


def _aligned_dots(acc, a, b, terms, fraction, grid, power, plain, inverse, units):  # type: ignore[no-untyped-def]
    """acc (COLUMNS) after all products of a (K) and b (K, COLUMNS), `terms` at once, from 0: `aligned_sum` of each."""
    for c in range(COLUMNS):
        acc[c] = 0
    for first in range(0, a.size, terms):
        last = min(first + terms, a.size)
        for c in range(COLUMNS):
            power[c], plain[c] = power_below(acc[c]), acc[c]
        for k in range(first, last):
            left = REAL(a[k])
            left_power = power_below(left)
            for c in range(COLUMNS):
                right = REAL(b[k, c])
                both = left_power * power_below(right)
                power[c] = both if both > power[c] else power[c]
                plain[c] += left * right
        for c in range(COLUMNS):
            inverse[c] = REAL(1) / (power[c] * fraction) if power[c] > REAL(0) else REAL(0)
            units[c] = WHOLE(acc[c] * inverse[c]) if abs(acc[c]) < REAL(np.inf) else WHOLE(0)
        for k in range(first, last):
            left = REAL(a[k])
            for c in range(COLUMNS):
                units[c] += WHOLE(left * REAL(b[k, c]) * inverse[c])  # toward zero
        for c in range(COLUMNS):
            is_sum = (power[c] > REAL(0)) & (abs(acc[c]) < REAL(np.inf))
            x = REAL(units[c]) * (power[c] * fraction) if is_sum else plain[c]
            acc[c] = limited(ROUND(x, grid), x, grid)


def _aligned(start, stop, a, b, out, strips, panels, chunk, terms, fraction, *fields):  # type: ignore[no-untyped-def]
    """Tiles start .. stop of out = a b, as `_on_a_grid`. fraction: 2^-fraction_bits."""
    inner, outer = Grid(*fields[:GRID_FIELDS]), Grid(*fields[GRID_FIELDS:TWO_GRIDS])
    length = a.shape[1]
    acc, power, plain = np.empty(COLUMNS, REAL), np.empty(COLUMNS, REAL), np.empty(COLUMNS, REAL)
    inverse, units, sums = np.empty(COLUMNS, REAL), np.empty(COLUMNS, WHOLE), np.empty(COLUMNS)
    row = np.empty(length, np.float32)
    for tile in range(start, stop):
        strip, across = tile // panels, tile % panels
        panel = strip // strips * panels + across
        for r in range(ROWS):
            for k in range(length):
                row[k] = a[strip, k, r]
            for c in range(COLUMNS):
                sums[c] = 0
            for first in range(0, length, chunk):
                piece = b[panel, first : first + chunk]
                DOTS(acc, row[first : first + chunk], piece, terms, fraction, inner, power, plain, inverse, units)
                for c in range(COLUMNS):
                    sums[c] = acc[c] if chunk > length else ADD(sums[c], np.float64(acc[c]), outer)
            for c in range(COLUMNS):
                value = np.float32(sums[c])
                out[strip * ROWS + r, across * COLUMNS + c] = value if value == value else NAN


# --- any format, any rounding, products that are rounded, fused dot products -----------------------------------------


@scalar
def _product(a, b, has_product, product):  # type: ignore[no-untyped-def]
    x = np.float64(a) * np.float64(b)
    return nearest_value(x, UNDRAWN, product) if has_product else x


def aligned_sum(acc, a, b, fraction, has_product, product):  # type: ignore[no-untyped-def]
    """acc and the products of two short rows, cut to multiples of `fraction` times the largest power among them."""
    power = power_below(np.float64(acc))
    plain = acc
    for k in range(a.size):
        x = _product(a[k], b[k], has_product, product)
        both = power_below(np.float64(a[k])) * power_below(np.float64(b[k]))
        both = both if both < np.inf else power_below(np.float64(x))
        power = both if both > power else power
        plain += x
    if power == 0 or not abs(plain) < np.inf:
        return plain  # zeros alone, or an infinity or a NaN among them
    quantum = power * fraction
    inverse = 1.0 / quantum
    units = np.int64(acc * inverse)  # toward zero
    for k in range(a.size):
        units += np.int64(_product(a[k], b[k], has_product, product) * inverse)
    return np.float64(units) * quantum


def element_of(left, right, chunk, terms, fraction, has_product, words, stream, step, keys, inner, outer, product):  # type: ignore[no-untyped-def]
    """One element of a product: of a row and a column. words: number of the random word of its first product."""
    length = left.size
    total, draw = 0.0, UNDRAWN
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        acc = 0.0
        for k in range(first, last, terms):
            if DRAWS:
                draw = draw_one(words + k, stream, step, keys)
            if terms == 1:
                x = odd_sum(acc, _product(left[k], right[k], has_product, product))
            else:
                group = min(k + terms, last)
                x = ALIGNED_SUM(acc, left[k:group], right[k:group], fraction, has_product, product)
            acc = VALUE(x, draw, inner)
        if chunk > length:
            total = acc
        else:
            if DRAWS:
                draw = draw_one(OUTER_WORDS + words + first, stream, step, keys)
            total = VALUE(odd_sum(total, acc), draw, outer)
    value = np.float32(total)
    return value if value == value else NAN


def _by_code(start, stop, a, b, out, chunk, terms, fraction, has_product, number, seed, stream, step, *fields):  # type: ignore[no-untyped-def]
    """Elements start .. stop of out = a b, flat. a: (M, K); b: (N, K), transposed.

    number: of the first element of out. chunk: beyond K where there is no outer accumulator. fraction:
    2^-fraction_bits of a fused dot product.
    """
    inner, outer = Parameters(*fields[:VALUE_FIELDS]), Parameters(*fields[VALUE_FIELDS:TWO_VALUES])
    product = Parameters(*fields[TWO_VALUES:THREE_VALUES])
    columns, keys = b.shape[0], round_keys(seed & LOW_WORD, seed >> WORD_BITS)
    for element in range(start, stop):
        row, column = element // columns, element % columns
        words = (number + element) * a.shape[1]
        out[row, column] = ELEMENT(
            a[row], b[column], chunk, terms, fraction, has_product, words, stream, step, keys, inner, outer, product
        )


# --- what is in an operand ------------------------------------------------------------------------------------------


def _extents(start, stop, words, extents):  # type: ignore[no-untyped-def]
    """Of the float32 with these bit patterns, a row for each EXTENT of them: their most significant bits, the largest
    exponent, minus the smallest exponent of a last bit, and whether one is not finite; zeros and those do not count
    otherwise."""
    for block in range(start, stop):
        piece = words[block * EXTENT : (block + 1) * EXTENT]
        bits, high, low, is_special = 0, NONE, NONE, 0
        for i in range(piece.size):
            magnitude = piece[i] & MAGNITUDE
            field = np.int32(magnitude >> FRACTION_BITS)
            significand = (magnitude & FRACTION) | (HIDDEN if field > 0 else ZERO)
            exponent = (field if field > 0 else np.int32(1)) - np.int32(127)
            last = np.int32(np.int32(significand) & -np.int32(significand))
            trailing = np.int32(bits_of(np.float32(last)) >> FRACTION_BITS) - np.int32(127)
            is_number = (magnitude != ZERO) & (field < 255)
            bits = max(bits, 24 - trailing if is_number else 0)
            high = max(high, exponent if is_number else NONE)
            low = max(low, 23 - trailing - exponent if is_number else NONE)
            is_special = max(is_special, 1 if field == 255 else 0)
        extents[block, 0], extents[block, 1], extents[block, 2], extents[block, 3] = bits, high, low, is_special


# --- kernels --------------------------------------------------------------------------------------------------------

MODES = {"nearest": to_nearest, "zero": to_zero}
STEPS = {  # kind: (step, carrier, modes)
    "narrow": (_step, np.float32, ("nearest",)),
    "narrow_infinite": (_infinite_step, np.float32, ("nearest",)),
    "narrow_saturated": (_saturated_step, np.float32, ("nearest",)),
    "wide": (_step, np.float64, ("nearest", "zero")),
    "wide_infinite": (_infinite_step, np.float64, ("nearest",)),
    "wide_saturated": (_saturated_step, np.float64, ("nearest",)),
    "wide_limited": (_limited_step, np.float64, ("nearest", "zero")),
    "odd": (_odd_step, np.float64, ("nearest", "zero")),
}
ADD_OF = {mode: part(_add, f"add_{mode}", ROUND=function) for mode, function in MODES.items()}
ON_A_GRID: dict[tuple[str, str], Kernel] = {}
STEP_OF: dict[tuple[str, str], Any] = {}
for _kind, (_body, _real, _modes) in STEPS.items():
    for _mode in _modes:
        _name = f"{_kind}_{_mode}"
        STEP_OF[_kind, _mode] = part(_body, f"{_name}_step", ROUND=MODES[_mode])
        _sums = part(_accumulate, f"{_name}_accumulate", STEP=STEP_OF[_kind, _mode], REAL=_real)
        ON_A_GRID[_kind, _mode] = kernel(_on_a_grid, f"matmul_{_name}", ACCUMULATE=_sums, ADD=ADD_OF[_mode], REAL=_real)
ALIGNED: dict[tuple[str, str], Kernel] = {}
for _mode, _round in MODES.items():
    for _kind, _real, _whole in (("narrow", np.float32, np.int32), ("wide", np.float64, np.int64)):
        _name = f"aligned_{_kind}_{_mode}"
        _dots = part(_aligned_dots, f"{_name}_dots", ROUND=_round, REAL=_real, WHOLE=_whole)
        ALIGNED[_kind, _mode] = kernel(
            _aligned, f"matmul_{_name}", DOTS=_dots, ADD=ADD_OF[_mode], REAL=_real, WHOLE=_whole
        )
VALUES: dict[str, dict[str, Any]] = {  # how sums are rounded by code
    "nearest": {"VALUE": nearest_value, "DRAWS": False},
    "stochastic": {"VALUE": stochastic_value, "DRAWS": True},
}
_ALIGNED_SUM = scalar(aligned_sum)
BY_CODE = {
    mode: kernel(
        _by_code,
        f"matmul_by_code_{mode}",
        ELEMENT=part(element_of, f"element_{mode}", ALIGNED_SUM=_ALIGNED_SUM, **names),
    )
    for mode, names in VALUES.items()
}
EXTENTS = kernel(_extents)


# --- launchers: the same names as in cuda.py --------------------------------------------------------------------------


class Extent(NamedTuple):
    """What is in an operand: the most significant bits of a number, the exponent of the largest (or above), that of the
    smallest last bit, and whether an infinity or a NaN is there. All 0 but the last for zeros alone."""

    bits: int
    high: int
    low: int
    is_special: bool


def extent(x: torch.Tensor) -> Extent:
    """Of a float32 tensor."""
    words = x.contiguous().view(-1).numpy().view(np.uint32)
    found = np.zeros((-(-words.size // EXTENT), 4), np.int64)
    cpu.run(EXTENTS, len(found), words, found, threads=torch.get_num_threads(), align=1, elements=EXTENT)
    bits, high, low, is_special = found.max(axis=0).tolist()
    return Extent(bits, high, -low, bool(is_special)) if bits else Extent(0, 0, 0, bool(is_special))


def on_a_grid(
    kind: str, mode: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, chunk: int, inner: Grid, outer: Grid
) -> None:
    """out = a b, (G, M, K) times (G, K, N), by the step `kind` of STEPS, rounding to `mode` of MODES.

    chunk: beyond K for no outer accumulator.
    """
    _in_tiles(ON_A_GRID[kind, mode], a, b, out, chunk, *inner, *outer)


def aligned(
    kind: str, mode: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, chunk: int, terms: int, fraction: float,
    inner: Grid, outer: Grid,
) -> None:  # fmt: skip
    """The same by fused dot products of `terms`, for finite operands."""
    _in_tiles(ALIGNED[kind, mode], a, b, out, chunk, terms, type(inner.least)(fraction), *inner, *outer)


def _in_tiles(loop: Kernel, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *options: Any) -> None:
    """out = a b by a loop over tiles of packed operands; turned round where fewer of them are partly empty: a product
    has the same bits as that of its factors in the other order."""
    if _in_whole_tiles(b.shape[2], a.shape[1]) < _in_whole_tiles(a.shape[1], b.shape[2]):
        a, b, out = b.mT, a.mT, out.mT
    matrices, rows, length = a.shape
    columns = b.shape[2]
    strips, panels = -(-rows // ROWS), -(-columns // COLUMNS)
    below, beside = strips * ROWS - rows, panels * COLUMNS - columns
    by_strip = (pad(a, [0, 0, 0, below]) if below else a).unflatten(1, (strips, ROWS))
    by_panel = (pad(b, [0, beside]) if beside else b).unflatten(2, (panels, COLUMNS))
    packed = by_strip.transpose(2, 3).flatten(0, 1).contiguous(), by_panel.transpose(1, 2).flatten(0, 1).contiguous()
    whole = torch.empty(matrices * strips * ROWS, panels * COLUMNS)
    arguments = (*(x.numpy() for x in (*packed, whole)), strips, panels, *options)
    elements = ROWS * COLUMNS * length // PRODUCTS_OF_AN_ELEMENT
    tiles = matrices * strips * panels
    cpu.run(loop, tiles, *arguments, threads=torch.get_num_threads(), align=1, elements=elements)
    out.copy_(whole.view(matrices, strips * ROWS, -1)[:, :rows, :columns])


def _in_whole_tiles(rows: int, columns: int) -> int:
    return -(-rows // ROWS) * ROWS * -(-columns // COLUMNS) * COLUMNS


def by_code(
    mode: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, options: tuple[Any, ...], *fields: Fields
) -> None:
    """One matrix, (M, K) times (K, N), by the units that `_by_code` is for. options: its arguments from `chunk` to
    `step`; fields: of the accumulator, the outer one, and the product."""
    arguments = (a.contiguous().numpy(), b.t().contiguous().numpy(), out.numpy(), *options)
    flat = (field for one in fields for field in one)
    threads = torch.get_num_threads()
    cpu.run(BY_CODE[mode], out.numel(), *arguments, *flat, threads=threads, align=1, elements=a.shape[1])
