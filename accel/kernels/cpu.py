"""CPU loops over the scalar functions, and how they are spread over threads.

Every loop takes a piece [start, stop) of flat, contiguous arrays, whose first element has number `first` in the whole
tensor. `run` cuts the work into one piece a thread; since random words depend only on the element's number, the bits do
not depend on the cut. Inner loops run over slices that start at index 0: only then does the compiler know that no index
is negative, and vectorises.

One loop serves several scalar functions: `kernel` binds the names in capitals and `transform`, `rescaled`. A format
comes last, as the fields of its parameters.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from accel import block_scaling, rounding, rounding_fast
from accel.block_formats import BlockFormat
from accel.block_scaling import AMAX, BlockParameters, amax_scale, power_of_two_scale
from accel.kernels.arguments import Fields, Key, Layout, Scales, Table
from accel.kernels.jit import Kernel, config, kernel, part, scalar
from accel.random import philox4x32
from accel.rounding import Parameters, prune_stochastic, value_of
from accel.rounding_fast import FastParameters, IntegerParameters, fast_stochastic_normal_value
from accel.words import LOW_WORD, bits_of, has_exact_inverse, inverse_power

CHUNK = 4096  # elements whose random words are held at once, and the block of the counts
LINE_BYTES = 64  # of a cache
AHEAD = 1024  # elements between those that are rounded and those that are fetched: a page of memory
PIECE = 1024  # elements that several loops in a row pass over, small enough to stay in the nearest cache
STRETCH = 256  # elements of an inner loop that adds up or picks out
GROUP = 64  # elements that 16 calls of the generator serve
SERIAL_BELOW = 1 << 15  # elements for which waking a second thread costs more than it saves

MAGNITUDE = rounding.MAGNITUDE_32
INFINITY = block_scaling.INFINITY
UNSIGNED_ONE = np.uint64(1)
NONZERO, NONZERO_ALPHA = np.uint32(1), np.uint32(1 << 16 | 1)
LOW_HALF = np.uint32((1 << 16) - 1)

# Where parameters of several kinds follow one another: a parallel loop takes no tuple but its last, flat one.
VALUE_FIELDS = len(Parameters._fields)
BLOCK_FIELDS = len(BlockParameters._fields)
ELEMENT_FIELDS = BLOCK_FIELDS + VALUE_FIELDS

MAX_THREADS: int = config.NUMBA_NUM_THREADS

_launching = threading.Lock()  # numba's fallback threading layer is not safe to enter from two threads
_forked = False


def _mark_forked() -> None:
    global _forked, _launching
    _forked, _launching = True, threading.Lock()


os.register_at_fork(after_in_child=_mark_forked)  # OpenMP aborts in a forked child: stay serial there


def run(loop: Kernel, size: int, *arguments: Any, threads: int, align: int = CHUNK, elements: int = 1) -> None:
    """Call `loop` on pieces that cover [0, size), cut at multiples of `align`, on at most `threads` threads.

    elements: how many elements of the tensor each of the `size` items stands for.
    """
    pieces = min(threads, MAX_THREADS, size * elements // SERIAL_BELOW)
    if pieces < 2 or _forked:
        if size:
            loop.serial(0, size, *arguments)
        return
    length = -(-size // (pieces * align)) * align
    bounds = np.array([min(piece * length, size) for piece in range(pieces + 1)])
    with _launching:
        before = numba.get_num_threads()
        numba.set_num_threads(pieces)
        try:
            loop.parallel(arguments, bounds)
        finally:
            numba.set_num_threads(before)


# --- random words and scales of a chunk -----------------------------------------------------------------------------


@intrinsic
def prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    """Have the GROUP elements from array[index] on, which may be past the end, come into the cache."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array_type, index = signature.args[0], arguments[1]
        data = context.make_array(array_type)(context, builder, arguments[0]).data
        number = ir.IntType(32)
        elements = LINE_BYTES // context.get_abi_sizeof(context.get_data_type(array_type.dtype))
        for step in range(0, GROUP, elements):
            place = builder.gep(data, [builder.add(index, index.type(step))])
            place = builder.bitcast(place, ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
            hint = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(hint, [place, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, index), emit


@scalar
def fill_draws(draws, index, count, seed, stream, step, source, target):  # type: ignore[no-untyped-def]
    """Random words of the elements index .. index + count (rounded out to groups of 64); returns where `index` lies."""
    first = index // GROUP
    groups = (index + count + GROUP - 1) // GROUP - first
    k0, k1 = seed & LOW_WORD, seed >> np.uint64(32)
    stream, step = stream & LOW_WORD, step & LOW_WORD
    for g in range(groups):
        counter = np.uint64((first + g) * 16)
        low, high = counter & LOW_WORD, counter >> np.uint64(32)
        base = g * GROUP
        prefetch(source, base)
        prefetch(target, base)
        for j in range(16):
            w0, w1, w2, w3 = philox4x32(low | np.uint64(j), high, stream, step, k0, k1)
            draws[base + j] = np.uint32(w0)
            draws[base + 16 + j] = np.uint32(w1)
            draws[base + 32 + j] = np.uint32(w2)
            draws[base + 48 + j] = np.uint32(w3)
    return index - first * GROUP


@scalar
def copy(source, target):  # type: ignore[no-untyped-def]
    """In a loop: an assignment of a slice to a slice compiles numba's texts of errors too, for seconds."""
    for i in range(source.size):
        target[i] = source[i]


@scalar
def fill_factors(factors, index, count, scales, row_length):  # type: ignore[no-untyped-def]
    """The scale of each of the elements index .. index + count: rows of `row_length` elements take `scales` in turn.

    Returns whether a multiplication by the inverse is the same as a division, for all of them.
    """
    if scales.size == 1:
        factors[:count] = scales[0]
        return has_exact_inverse(scales[0])
    is_exact = row_length > 1
    filled = 0
    while filled < count:
        row = (index + filled) // row_length
        span = min((row + 1) * row_length - index - filled, count - filled)
        if row_length == 1:
            row = row % scales.size
            span = min(scales.size - row, count - filled)
            copy(scales[row : row + span], factors[filled : filled + span])
        else:
            factors[filled : filled + span] = scales[row % scales.size]
            is_exact = is_exact and has_exact_inverse(scales[row % scales.size])
        filled += span
    return is_exact


@kernel
def random_words(start, stop, out, offset, seed, stream, step):  # type: ignore[no-untyped-def]
    draws = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        count = min(CHUNK, stop - low)
        skip = fill_draws(draws, offset + low, count, seed, stream, step, out[low:], out[low:])
        copy(draws[skip : skip + count], out[low : low + count])


# --- rounding -------------------------------------------------------------------------------------------------------


@scalar
def scaled_back(value, factor):  # type: ignore[no-untyped-def]
    return value * factor


@scalar
def unchanged(code, factor):  # type: ignore[no-untyped-def]
    return code


def _round(start, stop, x, first, scales, row_length, out, offset, seed, stream, step, *fields):  # type: ignore[no-untyped-def]
    """out = transform(x / scale), rescaled; no scales: no division."""
    p = PARAMETERS(*fields)  # noqa: F821
    draws = np.empty(CHUNK + GROUP, np.uint32)
    factors = np.empty(CHUNK, x.dtype)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = 0
        if DRAWS:  # noqa: F821
            skip = fill_draws(draws, offset + first + low, high - low, seed, stream, step, x[low:], out[low:])
        source, target, drawn = x[low:high], out[low:high], draws[skip : skip + high - low]
        if scales.size == 0:
            round_plain(source, target, drawn, p)  # noqa: F821
        elif scales.size == 1:
            round_by_one(source, target, drawn, scales[0], p)  # noqa: F821
        else:
            is_exact = fill_factors(factors, first + low, high - low, scales, row_length)
            round_scaled(source, target, drawn, factors[: high - low], is_exact, p)  # noqa: F821


# Loops without draws go by groups and fetch what comes later; where there are draws, SPAN is a whole chunk, which
# `fill_draws` has fetched.


def _round_plain(source, target, drawn, p):  # type: ignore[no-untyped-def]
    for base in range(0, source.size, SPAN):  # noqa: F821
        x, out, draws = source[base : base + SPAN], target[base : base + SPAN], drawn[base : base + SPAN]  # noqa: F821
        prefetch(source, base + AHEAD)
        prefetch(target, base + AHEAD)
        for i in range(x.size):
            out[i] = transform(x[i], draws[i], p)  # noqa: F821


def _round_by_one(source, target, drawn, factor, p):  # type: ignore[no-untyped-def]
    is_exact = has_exact_inverse(factor)
    inverse = inverse_power(factor)
    for base in range(0, source.size, SPAN):  # noqa: F821
        x, out, draws = source[base : base + SPAN], target[base : base + SPAN], drawn[base : base + SPAN]  # noqa: F821
        prefetch(source, base + AHEAD)
        prefetch(target, base + AHEAD)
        if is_exact:
            for i in range(x.size):
                out[i] = rescaled(transform(x[i] * inverse, draws[i], p), factor)  # noqa: F821
        else:
            for i in range(x.size):
                out[i] = rescaled(transform(x[i] / factor, draws[i], p), factor)  # noqa: F821


def _round_scaled(source, target, drawn, factors, is_exact, p):  # type: ignore[no-untyped-def]
    for base in range(0, source.size, SPAN):  # noqa: F821
        x, out, draws = source[base : base + SPAN], target[base : base + SPAN], drawn[base : base + SPAN]  # noqa: F821
        scales = factors[base : base + SPAN]  # noqa: F821
        prefetch(source, base + AHEAD)
        prefetch(target, base + AHEAD)
        if is_exact:
            for i in range(x.size):
                scaled = x[i] * inverse_power(scales[i])
                out[i] = rescaled(transform(scaled, draws[i], p), scales[i])  # noqa: F821
        else:
            for i in range(x.size):
                out[i] = rescaled(transform(x[i] / scales[i], draws[i], p), scales[i])  # noqa: F821


def _round_sixteens(source, target, drawn, scales, size, is_exact, p):  # type: ignore[no-untyped-def]
    """The same with a scale for each block of `size` elements, a multiple of 16: no array of a scale an element."""
    sixteens, count = np.uint64(size // 16), np.uint64(16)
    begin = np.uint64(0)
    for k in range(scales.size):
        scale = scales[k]
        inverse = inverse_power(scale)
        for _ in range(sixteens):
            if begin % np.uint64(GROUP) == np.uint64(0):
                prefetch(source, np.int64(begin) + AHEAD)
                prefetch(target, np.int64(begin) + AHEAD)
            if is_exact:
                for i in range(count):
                    scaled = source[begin + i] * inverse
                    target[begin + i] = rescaled(transform(scaled, drawn[begin + i], p), scale)  # noqa: F821
            else:
                for i in range(count):
                    scaled = source[begin + i] / scale
                    target[begin + i] = rescaled(transform(scaled, drawn[begin + i], p), scale)  # noqa: F821
            begin += count


def _round_blocks(  # type: ignore[no-untyped-def]
    start, stop, x, length, block_size, tensor_scale, out, scale_codes, blocks_a_row,
    offset, seed, stream, step, *fields,
):  # fmt: skip
    """The same with a scale for each block of `block_size` elements, rows of `length` elements starting new blocks.

    scale_codes: the scales' codes in the order of the blocks, nothing where it is empty.
    """
    b, s = BlockParameters(*fields[:BLOCK_FIELDS]), Parameters(*fields[BLOCK_FIELDS:ELEMENT_FIELDS])
    p = PARAMETERS(*fields[ELEMENT_FIELDS:])  # noqa: F821
    chunk = max(PIECE, block_size)
    draws, factors = np.empty(chunk + GROUP, np.uint32), np.empty(chunk, np.float32)
    fold_a, fold_b = np.empty(chunk, np.uint32), np.empty(chunk, np.uint32)
    largest, codes, scales = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.float32)
    period = block_size if length % block_size == 0 else length  # after which blocks begin anew
    low = start
    block = start // length * blocks_a_row + start % length // block_size
    while low < stop:
        rest = stop - low if period == block_size else min(stop - low, period - low % period)
        size = min(block_size, rest)
        blocks = min(rest // size, chunk // size)
        high = low + blocks * size
        largest_of_blocks(x[low:high], size, largest[:blocks], fold_a, fold_b)
        is_exact = scale_blocks(largest[:blocks], scales, codes, tensor_scale[0], b, s)
        if scale_codes.size > 0:
            for k in range(blocks):
                scale_codes[block + k] = codes[k]
        skip = 0
        if DRAWS:  # noqa: F821
            skip = fill_draws(draws, offset + low, high - low, seed, stream, step, x[low:], out[low:])
        source, target, drawn = x[low:high], out[low:high], draws[skip : skip + high - low]
        if BY_SIXTEENS and size % 16 == 0:  # noqa: F821
            round_sixteens(source, target, drawn, scales[:blocks], size, is_exact, p)  # noqa: F821
        else:
            spread(scales[:blocks], np.uint64(size), factors)
            round_scaled(source, target, drawn, factors[: high - low], is_exact, p)  # noqa: F821
        low, block = high, block + blocks


@scalar
def largest_of_blocks(x, size, largest, fold_a, fold_b):  # type: ignore[no-untyped-def]
    """The largest magnitude pattern (a NaN's is largest) of each block of `size` elements.

    In flat loops over all blocks: a loop over one block would not vectorise. Sixteens, of which the usual sizes are
    multiples, are halved four times.
    """
    if size % 16 == 0:
        for i in range(np.uint64(x.size // 2)):
            one, other = x[i + i], x[i + i + UNSIGNED_ONE]
            one, other = np.uint32(bits_of(one) & MAGNITUDE), np.uint32(bits_of(other) & MAGNITUDE)
            fold_a[i] = one if one > other else other
        halve(fold_a, fold_b, x.size // 4)
        halve(fold_b, fold_a, x.size // 8)
        halve(fold_a, fold_b, x.size // 16)
        parts = size // 16
    else:
        for i in range(x.size):
            fold_b[i] = np.uint32(bits_of(x[i]) & MAGNITUDE)
        parts = size
    if parts == 2:
        halve(fold_b, largest, largest.size)
        return
    for k in range(largest.size):
        largest[k] = fold_b[k * parts]
    for j in range(1, parts):
        for k in range(largest.size):
            bits = fold_b[k * parts + j]
            largest[k] = bits if bits > largest[k] else largest[k]


@scalar
def halve(source, target, count):  # type: ignore[no-untyped-def]
    """The larger of each two. Signed indices, which numba would have to test for being negative, do not vectorise."""
    for i in range(np.uint64(count)):
        one, other = source[i + i], source[i + i + UNSIGNED_ONE]
        target[i] = one if one > other else other


@scalar
def scale_blocks(largest, scales, codes, tensor_scale, b, s):  # type: ignore[no-untyped-def]
    """Scales and their codes from the largest patterns of blocks; returns whether all scales have exact inverses."""
    if b.rule == AMAX:
        for i in range(largest.size):
            scales[i], codes[i] = amax_scale(largest[i], tensor_scale, b, s)
        return False
    inexact = np.uint32(0)
    for i in range(largest.size):
        scales[i], codes[i] = power_of_two_scale(largest[i], b)
        inexact = np.uint32(inexact | (np.uint32(0) if has_exact_inverse(scales[i]) else np.uint32(1)))
    return inexact == np.uint32(0)


@scalar
def spread(scales, size, factors):  # type: ignore[no-untyped-def]
    """Each scale `size` times, an unsigned number."""
    begin = np.uint64(0)
    for k in range(scales.size):
        scale = scales[k]
        for i in range(size):
            factors[begin + i] = scale
        begin += size


def _round_columns(  # type: ignore[no-untyped-def]
    start, stop, x, length, inner, block_size, tensor_scale, out, scale_codes, blocks_a_row,
    offset, seed, stream, step, *fields,
):  # fmt: skip
    """Blocks along an axis that `inner` elements follow: x is (outer, length, inner), an item is (outer, block)."""
    b, s = BlockParameters(*fields[:BLOCK_FIELDS]), Parameters(*fields[BLOCK_FIELDS:ELEMENT_FIELDS])
    p = PARAMETERS(*fields[ELEMENT_FIELDS:])  # noqa: F821
    draws = np.empty(CHUNK + GROUP, np.uint32)
    factors = np.empty(CHUNK, np.float32)
    largest, codes = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    for item in range(start, stop):
        outer, block = item // blocks_a_row, item % blocks_a_row
        top = outer * length + block * block_size
        bottom = min(top + block_size, (outer + 1) * length)
        for left in range(0, inner, CHUNK):
            width = min(CHUNK, inner - left)
            largest[:width] = np.uint32(0)
            for row in range(top, bottom):
                raise_largest(largest[:width], x[row * inner + left : row * inner + left + width])
            is_exact = scale_blocks(largest[:width], factors, codes, tensor_scale[0], b, s)
            if scale_codes.size > 0:
                for i in range(width):
                    scale_codes[item * inner + left + i] = codes[i]
            for row in range(top, bottom):
                low = row * inner + left
                skip = 0
                if DRAWS:  # noqa: F821
                    skip = fill_draws(draws, offset + low, width, seed, stream, step, x[low:], out[low:])
                drawn = draws[skip : skip + width]
                round_scaled(x[low : low + width], out[low : low + width], drawn, factors[:width], is_exact, p)  # noqa: F821


@scalar
def raise_largest(largest, x):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        bits = np.uint32(bits_of(x[i]) & MAGNITUDE)
        largest[i] = bits if bits > largest[i] else largest[i]


@kernel
def largest_patterns(start, stop, x, last, pattern):  # type: ignore[no-untyped-def]
    """The largest bit pattern of |x| up to `last` in a piece, at the number of its first CHUNK."""
    lanes = np.zeros(GROUP, np.uint32)
    for low in range(start, stop, GROUP):
        piece = x[low : min(low + GROUP, stop)]
        prefetch(x[low:], AHEAD)
        for i in range(piece.size):
            bits = np.uint32(bits_of(piece[i]) & MAGNITUDE)
            bits = bits if bits <= last else np.uint32(0)
            lanes[i] = bits if bits > lanes[i] else lanes[i]
    largest = np.uint32(0)
    for i in range(GROUP):
        largest = max(largest, lanes[i])
    pattern[start // CHUNK] = largest


def _round_both(  # type: ignore[no-untyped-def]
    start, stop, x, first, scales, row_length, out, codes, offset, seed, stream, step, *fields
):
    """codes = transform(x / scale), and out the values of the codes times the scale."""
    v, p = Parameters(*fields[:VALUE_FIELDS]), PARAMETERS(*fields[VALUE_FIELDS:])  # noqa: F821
    draws = np.empty(CHUNK + GROUP, np.uint32)
    factors = np.ones(CHUNK, x.dtype)
    is_exact = True
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = 0
        if DRAWS:  # noqa: F821
            skip = fill_draws(draws, offset + first + low, high - low, seed, stream, step, x[low:], out[low:])
        if scales.size > 1 or (scales.size == 1 and low == start):
            is_exact = fill_factors(factors, first + low, high - low, scales, row_length)
        drawn, used = draws[skip : skip + high - low], factors[: high - low]
        round_scaled(x[low:high], codes[low:high], drawn, used, is_exact, p)  # noqa: F821
        decode_scaled(codes[low:high], out[low:high], used, v)


@scalar
def decode_scaled(codes, out, factors, v):  # type: ignore[no-untyped-def]
    for i in range(codes.size):
        out[i] = value_of(codes[i], v) * factors[i]


@kernel
def decode(start, stop, codes, first, scales, row_length, out, *fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    factors = np.ones(CHUNK, np.float32)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        if scales.size > 1 or (scales.size == 1 and low == start):
            fill_factors(factors, first + low, high - low, scales, row_length)
        decode_scaled(codes[low:high], out[low:high], factors[: high - low], p)


# --- pruning --------------------------------------------------------------------------------------------------------


@kernel
def prune(start, stop, x, first, alpha, out, offset, seed, stream, step):  # type: ignore[no-untyped-def]
    draws = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = fill_draws(draws, offset + first + low, high - low, seed, stream, step, x[low:], out[low:])
        source, target, drawn = x[low:high], out[low:high], draws[skip : skip + high - low]
        for i in range(source.size):
            target[i] = prune_stochastic(source[i], drawn[i], alpha)


@scalar
def is_alpha(value, alpha):  # type: ignore[no-untyped-def]
    return np.uint32(bits_of(value) & MAGNITUDE) == bits_of(alpha)


@scalar
def survivor(kept, rounded, alpha):  # type: ignore[no-untyped-def]
    return kept if is_alpha(kept, alpha) else rounded


@scalar
def tally(value, alpha):  # type: ignore[no-untyped-def]
    """1 for a nonzero, and 2^16 more for +-alpha: both counts of a chunk in one number a vector lane."""
    weight = NONZERO_ALPHA if is_alpha(value, alpha) else NONZERO
    return weight if bits_of(value) != np.uint32(0) else np.uint32(0)


def _round_survivors_by_one(kept, drawn, factor, alpha, p):  # type: ignore[no-untyped-def]
    """Rounds in place all but +-alpha; returns the sum of their tallies."""
    counts = np.uint32(0)
    if has_exact_inverse(factor):
        inverse = inverse_power(factor)
        for i in range(kept.size):
            rounded = np.float32(transform(np.float32(kept[i] * inverse), drawn[i], p) * factor)  # noqa: F821
            kept[i] = survivor(kept[i], rounded, alpha)
            counts = np.uint32(counts + tally(kept[i], alpha))
    else:
        for i in range(kept.size):
            rounded = np.float32(transform(np.float32(kept[i] / factor), drawn[i], p) * factor)  # noqa: F821
            kept[i] = survivor(kept[i], rounded, alpha)
            counts = np.uint32(counts + tally(kept[i], alpha))
    return counts


def _draw_survivors_by_one(kept, drawn, factor, alpha, p):  # type: ignore[no-untyped-def]
    """The same, without the steps for subnormal results where alpha, and so every survivor, is normal."""
    inverse = inverse_power(factor)
    if not (has_exact_inverse(factor) and np.float32(alpha * inverse) >= p.min_normal):
        return round_any_by_one(kept, drawn, factor, alpha, p)  # noqa: F821
    counts = np.uint32(0)
    for i in range(kept.size):
        rounded = np.float32(fast_stochastic_normal_value(np.float32(kept[i] * inverse), drawn[i], p) * factor)
        kept[i] = survivor(kept[i], rounded, alpha)
        counts = np.uint32(counts + tally(kept[i], alpha))
    return counts


def _round_survivors_scaled(kept, drawn, factors, is_exact, alpha, p):  # type: ignore[no-untyped-def]
    counts = np.uint32(0)
    if is_exact:
        for i in range(kept.size):
            x = np.float32(kept[i] * inverse_power(factors[i]))
            rounded = np.float32(transform(x, drawn[i], p) * factors[i])  # noqa: F821
            kept[i] = survivor(kept[i], rounded, alpha)
            counts = np.uint32(counts + tally(kept[i], alpha))
    else:
        for i in range(kept.size):
            rounded = np.float32(transform(np.float32(kept[i] / factors[i]), drawn[i], p) * factors[i])  # noqa: F821
            kept[i] = survivor(kept[i], rounded, alpha)
            counts = np.uint32(counts + tally(kept[i], alpha))
    return counts


def _prune_round(  # type: ignore[no-untyped-def]
    start, stop, x, first, alpha, scales, row_length, out, nonzeros, alphas, offset, seed, stream, step, *fields
):
    """Prune, then round the survivors (+-alpha is never rounded); counts of nonzeros and +-alpha a block of CHUNK.

    In two loops over pieces that stay in the nearest cache: one loop of both has more constants than registers.
    """
    p = PARAMETERS(*fields)  # noqa: F821
    draws = np.empty(PIECE + GROUP, np.uint32)
    factors = np.empty(PIECE, np.float32)
    factor = scales[0] if scales.size else np.float32(1)
    low = start
    while low < stop:
        block = (first + low) // CHUNK
        high = min(((first + low) // PIECE + 1) * PIECE - first, stop)
        skip = fill_draws(draws, offset + first + low, high - low, seed, stream, step, x[low:], out[low:])
        source, target, drawn = x[low:high], out[low:high], draws[skip : skip + high - low]
        for i in range(source.size):
            target[i] = prune_stochastic(source[i], drawn[i], alpha)
        if scales.size <= 1:
            counts = round_survivors_by_one(target, drawn, factor, alpha, p)  # noqa: F821
        else:
            is_exact = fill_factors(factors, first + low, high - low, scales, row_length)
            counts = round_survivors_scaled(target, drawn, factors[: high - low], is_exact, alpha, p)  # noqa: F821
        nonzeros[block] += np.int64(counts & LOW_HALF)
        alphas[block] += np.int64(counts >> np.uint32(16))
        low = high


# --- +-alpha in the code points that a format reserves for it --------------------------------------------------------


@kernel
def keep_alpha(start, stop, x, alpha, out):  # type: ignore[no-untyped-def]
    """out = x where |x| = alpha."""
    source, target = x[start:stop], out[start:stop]
    for i in range(source.size):
        target[i] = source[i] if is_alpha(source[i], alpha) else target[i]


@kernel
def encode_alpha(start, stop, x, alpha, codes, positive, negative):  # type: ignore[no-untyped-def]
    """codes = the code of +-alpha where |x| = alpha."""
    source, target = x[start:stop], codes[start:stop]
    for i in range(source.size):
        code = positive if source[i] > np.float32(0) else negative
        target[i] = code if is_alpha(source[i], alpha) else target[i]


@kernel
def decode_alpha(start, stop, codes, positive, negative, alpha, out):  # type: ignore[no-untyped-def]
    """out = +-alpha where the code says so."""
    source, target = codes[start:stop], out[start:stop]
    for i in range(source.size):
        value = alpha if np.uint32(source[i]) == positive else target[i]
        target[i] = -alpha if np.uint32(source[i]) == negative else value


# --- one kernel for each way to round -------------------------------------------------------------------------------

# method: value function, code function, parameters, whether it draws
METHODS = {
    "nearest": (rounding.nearest_value, rounding.nearest_code, Parameters, False),
    "stochastic": (rounding.stochastic_value, rounding.stochastic_code, Parameters, True),
    "fast_nearest": (rounding_fast.fast_nearest_value, rounding_fast.fast_nearest_code, FastParameters, False),
    "fast_narrow": (rounding_fast.fast_narrow_value, rounding_fast.fast_nearest_code, FastParameters, False),
    "fast_stochastic": (rounding_fast.fast_stochastic_value, rounding_fast.fast_stochastic_code, FastParameters, True),
    "fast_integer": (rounding_fast.fast_integer_value, rounding_fast.fast_integer_code, IntegerParameters, False),
}


def _kernels(method: str) -> dict[str, Kernel]:
    value, code, record, draws = METHODS[method]
    kernels = {}
    bound: dict[str, Any] = {"PARAMETERS": record, "DRAWS": draws}
    for name, transform, rescaled in (("quantize", value, scaled_back), ("encode", code, unchanged)):
        names = {"transform": transform, "rescaled": rescaled, "SPAN": CHUNK if draws else GROUP}
        bound["round_plain"] = part(_round_plain, f"{name}_{method}_plain", **names)
        bound["round_by_one"] = part(_round_by_one, f"{name}_{method}_by_one", **names)
        bound["round_scaled"] = part(_round_scaled, f"{name}_{method}_scaled", **names)
        # LLVM unrolls sixteen steps of a short function before it could make one vector of them.
        bound["BY_SIXTEENS"] = transform is not rounding_fast.fast_integer_value
        bound["round_sixteens"] = part(_round_sixteens, f"{name}_{method}_sixteens", **names)
        kernels[name] = kernel(_round, f"{name}_{method}", **bound)
        kernels[f"{name}_blocks"] = kernel(_round_blocks, f"{name}_blocks_{method}", **bound)
        kernels[f"{name}_columns"] = kernel(_round_columns, f"{name}_columns_{method}", **bound)
    kernels["both"] = kernel(_round_both, f"both_{method}", **bound)  # bound to the code function
    by_one = part(_round_survivors_by_one, f"survivors_{method}_by_one", transform=value)
    if method == "fast_stochastic":
        by_one = part(_draw_survivors_by_one, f"survivors_{method}_normal", round_any_by_one=by_one)
    rows = {
        "round_survivors_by_one": by_one,
        "round_survivors_scaled": part(_round_survivors_scaled, f"survivors_{method}_scaled", transform=value),
    }
    kernels["prune"] = kernel(_prune_round, f"prune_quantize_{method}", **rows, **bound)
    return kernels


KERNELS = {method: _kernels(method) for method in METHODS}


# --- launchers: the same names in kernels/cuda.py -------------------------------------------------------------------


def _launch(
    loop: Kernel, x: torch.Tensor, *arguments: Any, fields: Fields = (), size: int | None = None, **cut: int
) -> None:
    views = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    size = x.numel() if size is None else size
    run(loop, size, x.numpy(), *views, *fields, threads=torch.get_num_threads(), **cut)


def round_elements(
    operation: str, method: str, x: torch.Tensor, first: int, scales: Scales, out: torch.Tensor, key: Key, p: Fields
) -> None:
    """operation: "quantize" or "encode"; x, out: flat. scales: None for no division."""
    _launch(KERNELS[method][operation], x, first, *_table(scales, x.dtype), out, *key, fields=p)


def round_both(
    method: str,
    x: torch.Tensor,
    first: int,
    scales: Scales,
    out: torch.Tensor,
    codes: torch.Tensor,
    values: Fields,
    key: Key,
    p: Fields,
) -> None:
    """out: the values, codes: their codes. values: the parameters that `decode` takes."""
    _launch(KERNELS[method]["both"], x, first, *_table(scales, x.dtype), out, codes, *key, fields=(*values, *p))


def round_blocks(
    operation: str,
    method: str,
    x: torch.Tensor,
    layout: Layout,
    tensor_scale: torch.Tensor,
    fmt: BlockFormat,
    out: torch.Tensor,
    scale_codes: torch.Tensor,
    key: Key,
    p: Fields,
) -> None:
    """x, out: flat; scale_codes: one a block, or empty where they are not asked for."""
    fields = *block_scaling.block_parameters(fmt), *block_scaling.scale_parameters(fmt), *p
    size, length, block = fmt.block_size, layout.length, layout.blocks
    arguments = (tensor_scale, out, scale_codes, block, *key)
    if layout.inner == 1:
        is_cut_anywhere = layout.outer == 1 or length % size == 0
        align = size * -(-CHUNK // size) if is_cut_anywhere else length
        _launch(KERNELS[method][f"{operation}_blocks"], x, length, size, *arguments, fields=fields, align=align)
    else:
        elements = min(size, length) * layout.inner
        _launch(
            KERNELS[method][f"{operation}_columns"], x, length, layout.inner, size, *arguments,
            fields=fields, size=layout.outer * block, align=1, elements=elements,
        )  # fmt: skip


def largest_magnitude(x: torch.Tensor, keeps_nan: bool) -> torch.Tensor:
    """max|x| of a flat float32 tensor: float32 of shape (1,). A NaN is the result, or left out."""
    patterns = np.zeros(max(-(-x.numel() // CHUNK), 1), np.uint32)
    _launch(largest_patterns, x, MAGNITUDE if keeps_nan else INFINITY, patterns)
    return torch.from_numpy(patterns.max(keepdims=True).view(np.float32))


def decode_elements(codes: torch.Tensor, first: int, scales: Scales, out: torch.Tensor, p: Fields) -> None:
    _launch(decode, codes, first, *_table(scales, torch.float32), out, fields=p)


def prune_elements(x: torch.Tensor, first: int, alpha: np.float32, out: torch.Tensor, key: Key) -> None:
    _launch(prune, x, first, alpha, out, *key)


def prune_round(
    method: str,
    x: torch.Tensor,
    first: int,
    alpha: np.float32,
    scales: Scales,
    out: torch.Tensor,
    counts: torch.Tensor,
    key: Key,
    p: Fields,
) -> None:
    """counts: int64 (2, blocks of CHUNK), to which nonzeros and +-alphas are added."""
    nonzeros, alphas = counts.numpy()
    arguments = (first, alpha, *_table(scales, x.dtype), out, nonzeros, alphas, *key)
    align = x.numel() if first % CHUNK else CHUNK  # two threads must not add to one block
    _launch(KERNELS[method]["prune"], x, *arguments, fields=p, align=align)


def keep_alphas(x: torch.Tensor, alpha: np.float32, out: torch.Tensor) -> None:
    _launch(keep_alpha, x, alpha, out)


def encode_alphas(x: torch.Tensor, alpha: np.float32, codes: torch.Tensor, positive: int, negative: int) -> None:
    _launch(encode_alpha, x, alpha, codes, np.uint32(positive), np.uint32(negative))


def decode_alphas(codes: torch.Tensor, positive: int, negative: int, alpha: np.float32, out: torch.Tensor) -> None:
    _launch(decode_alpha, codes, np.uint32(positive), np.uint32(negative), alpha, out)


def _table(scales: Scales, dtype: torch.dtype) -> tuple[Any, int]:
    """The scales as the kernels take them: an array, empty for none, and the length of a row."""
    if isinstance(scales, Table):
        return scales.values.to(dtype).numpy(), scales.row_length
    if scales is None:
        return _NO_SCALES[dtype], 1
    return np.array([scales], np.float32 if dtype == torch.float32 else np.float64), 1


_NO_SCALES = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}
