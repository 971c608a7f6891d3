"""CUDA loops over the same scalar functions as kernels/cpu.py, and the same launchers.

A CUDA block takes a chunk of CHUNK elements, and a thread four of them at a time, 16 apart: those that one call of the
random generator serves. Neighbouring threads touch neighbouring elements, and all four are read before the first is
written. Within a chunk all numbers fit 32 bits. Launches go to torch's current stream and nothing waits for them;
tensors are read and written where they lie.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numba import cuda

from accel import block_scaling
from accel.block_formats import BlockFormat
from accel.block_scaling import BlockParameters, amax_scale, block_scale, power_of_two_scale
from accel.kernels.arguments import Fields, Key, Layout, Scales, Table
from accel.kernels.cpu import (
    CHUNK,
    GROUP,
    INFINITY,
    LOW_HALF,
    MAGNITUDE,
    METHODS,
    is_alpha,
    scaled_back,
    survivor,
    tally,
    unchanged,
)
from accel.kernels.cuda_jit import SIMULATED, THREADS, device, launch
from accel.kernels.jit import renamed
from accel.random import draw_four, draw_one, round_keys
from accel.rounding import Parameters, prune_stochastic, value_of
from accel.words import LOW_WORD, bits_of

MAX_BLOCKS = 1 << 11  # of loops that are not cut into chunks
SEGMENT = 16  # elements of a block of a block format among which one thread looks for the largest
SMALLEST_BLOCK = 8  # of a block format, for `_round_blocks`

ZERO, ONE = np.uint32(0), np.uint32(1)
TWO, LAST_FOUR, NOT_LAST_FOUR = np.uint32(2), np.uint32(15), np.uint32(0xFFFFFFF0)
LAST_OF_CHUNK = np.uint32(CHUNK - 1)
COUNT_BITS = np.uint32(16)
BANK_BITS = np.uint32(5)  # shared memory has 32 banks
SECOND, THIRD, FOURTH = np.uint64(16), np.uint64(33), np.uint64(49)  # of four elements in shared memory, from the first
PADDED_CHUNK = CHUNK + CHUNK // 32
CHUNK_BLOCKS = CHUNK // SMALLEST_BLOCK
RECIPROCAL_BITS = np.uint64(26)
LARGEST_DIVISOR = (1 << 13) - 1

NO_DRAWS = ZERO, ZERO, ZERO, ZERO
NO_FACTORS = np.float32(1), np.float32(1), np.float32(1), np.float32(1)


# --- a chunk, its groups and its rows -------------------------------------------------------------------------------


def reciprocal_of(divisor: int) -> np.uint32:
    """What `quotient` takes in place of a divisor."""
    return np.uint32(-(-(1 << int(RECIPROCAL_BITS)) // min(divisor, LARGEST_DIVISOR)))


@device
def quotient(number, reciprocal):  # type: ignore[no-untyped-def]
    """number // divisor for numbers up to 2^13 - 2.

    Exact: the reciprocal is less than 1 too large in units of 2^-26, which makes less than number 2^-26 < 1 / divisor.
    """
    return np.uint32((np.uint64(number) * np.uint64(reciprocal)) >> RECIPROCAL_BITS)


@device
def chunk_of(number, first, size):  # type: ignore[no-untyped-def]
    """Where the chunk of this number begins and ends in a piece that begins at element `first` of the tensor."""
    low = number * CHUNK - first % CHUNK
    return max(low, 0), min(low + CHUNK, size)


@device
def groups_of(number, count):  # type: ignore[no-untyped-def]
    """(first group of the generator, elements of it that come before, calls of the generator) for `count` elements."""
    first = number // GROUP
    return first, np.uint32(number - first * GROUP), ((number + count + GROUP - 1) // GROUP - first) * 16


# Most chunks are whole: they have CHUNK elements and begin with a group. Their loops test no index.


@device
def whole_lanes(quad, skip):  # type: ignore[no-untyped-def]
    """The four elements that a call serves, counted in the chunk."""
    quad = np.uint32(quad)
    i = np.uint64(np.uint32((quad & NOT_LAST_FOUR) << TWO) | np.uint32(quad & LAST_FOUR))
    return i, i + np.uint64(16), i + np.uint64(32), i + np.uint64(48)


@device
def whole_load(x, i):  # type: ignore[no-untyped-def]
    return x[i]


@device
def whole_store(out, i, value):  # type: ignore[no-untyped-def]
    out[i] = value


@device
def whole_inside(i, size):  # type: ignore[no-untyped-def]
    return True


@device
def ragged_lanes(quad, skip):  # type: ignore[no-untyped-def]
    """The same; beyond the chunk's end also for elements before its begin."""
    i, j, k, m = whole_lanes(quad, skip)
    return np.uint32(i - skip), np.uint32(j - skip), np.uint32(k - skip), np.uint32(m - skip)


@device
def ragged_load(x, i):  # type: ignore[no-untyped-def]
    return x[i] if i < x.size else x.dtype.type(0)


@device
def ragged_store(out, i, value):  # type: ignore[no-untyped-def]
    if i < out.size:
        out[i] = value


@device
def ragged_inside(i, size):  # type: ignore[no-untyped-def]
    return i < size


def _load_four(x, lanes):  # type: ignore[no-untyped-def]
    i, j, k, m = lanes
    return load(x, i), load(x, j), load(x, k), load(x, m)  # noqa: F821


def _store_four(out, lanes, values):  # type: ignore[no-untyped-def]
    i, j, k, m = lanes
    a, b, c, d = values
    store(out, i, a)  # noqa: F821
    store(out, j, b)  # noqa: F821
    store(out, k, c)  # noqa: F821
    store(out, m, d)  # noqa: F821


# --- scales ---------------------------------------------------------------------------------------------------------

# `one` is the scale where `scales` is empty. Rows of rows[0] elements take `scales` in turn; rows[1] and rows[2] are
# the reciprocals of the length of a row and of their number.


@device
def start_of(number, one, scales, rows):  # type: ignore[no-untyped-def]
    """(scale, row, how many elements come before the next row) of a chunk that begins at an element."""
    if scales.size < 2:
        return scales[0] if scales.size else one, 0, ZERO
    row = number // rows[0]
    return one, row % scales.size, np.uint32(min((row + 1) * rows[0] - number, CHUNK))


@device
def factor_at(i, size, scales, rows, start):  # type: ignore[no-untyped-def]
    """The scale of element i of a chunk of `size` elements."""
    factor, row, boundary = start
    if scales.size > 1 and np.int64(i) < size:
        passed = ZERO if i < boundary else np.uint32(ONE + quotient(np.uint32(i - boundary), rows[1]))
        turns = quotient(passed, rows[2])
        ahead = row + np.int64(np.uint32(passed - np.uint32(turns * np.uint32(scales.size))))
        factor = scales[ahead - scales.size if ahead >= scales.size else ahead]
    return factor


@device
def factors_at(lanes, size, scales, rows, start):  # type: ignore[no-untyped-def]
    i, j, k, m = lanes
    return (
        factor_at(i, size, scales, rows, start),
        factor_at(j, size, scales, rows, start),
        factor_at(k, size, scales, rows, start),
        factor_at(m, size, scales, rows, start),
    )


@device
def no_factors(lanes, size, scales, rows, start):  # type: ignore[no-untyped-def]
    return start[0], start[0], start[0], start[0]


# --- rounding -------------------------------------------------------------------------------------------------------


def _round_four(values, draws, factors, p):  # type: ignore[no-untyped-def]
    x0, x1, x2, x3 = values
    d0, d1, d2, d3 = draws
    f0, f1, f2, f3 = factors
    if SCALED:  # noqa: F821
        return (
            rescaled(transform(x0 / f0, d0, p), f0),  # noqa: F821
            rescaled(transform(x1 / f1, d1, p), f1),  # noqa: F821
            rescaled(transform(x2 / f2, d2, p), f2),  # noqa: F821
            rescaled(transform(x3 / f3, d3, p), f3),  # noqa: F821
        )
    return transform(x0, d0, p), transform(x1, d1, p), transform(x2, d2, p), transform(x3, d3, p)  # noqa: F821


def _round_quad(source, target, quad, skip, call, key, scales, rows, start, p):  # type: ignore[no-untyped-def]
    lanes = lanes_of(quad, skip)  # noqa: F821
    values = load_four(source, lanes)  # noqa: F821
    draws = draw_four(call + quad, key[0], key[1], key[2]) if DRAWS else NO_DRAWS  # noqa: F821
    factors = factors_of(lanes, source.size, scales, rows, start)  # noqa: F821
    store_four(target, lanes, round_four(values, draws, factors, p))  # noqa: F821


def _round(x, first, one, scales, rows, out, offset, key, fields):  # type: ignore[no-untyped-def]
    p = PARAMETERS(*fields)  # noqa: F821
    low, high = chunk_of(cuda.blockIdx.x, first, x.size)
    source, target = x[low:high], out[low:high]
    group, skip, quads = groups_of(offset + first + low, high - low)
    call = group * 16
    start = start_of(first + low, one, scales, rows)
    if high - low == CHUNK and skip == ZERO:
        for base in range(0, CHUNK // 4, THREADS):
            quad = base + cuda.threadIdx.x
            whole_quad(source, target, quad, skip, call, key, scales, rows, start, p)  # noqa: F821
    else:
        for base in range(0, quads, THREADS):
            quad = base + cuda.threadIdx.x
            ragged_quad(source, target, quad, skip, call, key, scales, rows, start, p)  # noqa: F821


@device
def values_of(codes, factors, v):  # type: ignore[no-untyped-def]
    a, b, c, d = codes
    f0, f1, f2, f3 = factors
    return value_of(a, v) * f0, value_of(b, v) * f1, value_of(c, v) * f2, value_of(d, v) * f3


def _both_quad(source, target, coded, quad, skip, call, key, scales, rows, start, p, v):  # type: ignore[no-untyped-def]
    lanes = lanes_of(quad, skip)  # noqa: F821
    values = load_four(source, lanes)  # noqa: F821
    draws = draw_four(call + quad, key[0], key[1], key[2]) if DRAWS else NO_DRAWS  # noqa: F821
    factors = factors_of(lanes, source.size, scales, rows, start)  # noqa: F821
    codes = round_four(values, draws, factors, p)  # noqa: F821
    store_four(coded, lanes, codes)  # noqa: F821
    store_four(target, lanes, values_of(codes, factors, v))  # noqa: F821


def _round_both(x, first, one, scales, rows, out, codes, value_fields, offset, key, fields):  # type: ignore[no-untyped-def]
    p, v = PARAMETERS(*fields), Parameters(*value_fields)  # noqa: F821
    low, high = chunk_of(cuda.blockIdx.x, first, x.size)
    source, target, coded = x[low:high], out[low:high], codes[low:high]
    group, skip, quads = groups_of(offset + first + low, high - low)
    call = group * 16
    start = start_of(first + low, one, scales, rows)
    for base in range(0, quads, THREADS):
        quad = base + cuda.threadIdx.x
        ragged_quad(source, target, coded, quad, skip, call, key, scales, rows, start, p, v)  # noqa: F821


def _decode_quad(source, target, quad, skip, scales, rows, start, p):  # type: ignore[no-untyped-def]
    lanes = lanes_of(quad, skip)  # noqa: F821
    factors = factors_of(lanes, source.size, scales, rows, start)  # noqa: F821
    store_four(target, lanes, values_of(load_four(source, lanes), factors, p))  # noqa: F821


def _decode(codes, first, one, scales, rows, out, fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    low, high = chunk_of(cuda.blockIdx.x, first, codes.size)
    source, target = codes[low:high], out[low:high]
    start = start_of(first + low, one, scales, rows)
    if high - low == CHUNK:
        for base in range(0, CHUNK // 4, THREADS):
            whole_quad(source, target, base + cuda.threadIdx.x, ZERO, scales, rows, start, p)  # noqa: F821
    else:
        for base in range(0, CHUNK // 4, THREADS):
            ragged_quad(source, target, base + cuda.threadIdx.x, ZERO, scales, rows, start, p)  # noqa: F821


# --- block formats --------------------------------------------------------------------------------------------------


@device
def power_scale(amax, tensor_scale, b, s):  # type: ignore[no-untyped-def]
    return power_of_two_scale(amax, b)


@device
def divided(number, divisor):  # type: ignore[no-untyped-def]
    """(quotient, remainder) of two numbers below 2^32: a division of 64 bits takes five times as long."""
    whole = np.uint32(np.uint32(number) // np.uint32(divisor))
    return np.int64(whole), np.int64(number) - np.int64(whole) * divisor


@device
def padded(i):  # type: ignore[no-untyped-def]
    """Where an element lies in shared memory, so that threads which read SEGMENTs side by side use all its banks."""
    i = np.uint32(i)
    return np.uint32(i + np.uint32(i >> BANK_BITS))


@device
def whole_held(held, lanes):  # type: ignore[no-untyped-def]
    """Four elements in shared memory."""
    place = np.uint64(padded(lanes[0]))
    return held[place], held[place + SECOND], held[place + THIRD], held[place + FOURTH]


@device
def ragged_held(held, lanes):  # type: ignore[no-untyped-def]
    """The same; some others for elements outside the chunk."""
    i, j, k, m = lanes
    a, b = held[padded(i & LAST_OF_CHUNK)], held[padded(j & LAST_OF_CHUNK)]
    return a, b, held[padded(k & LAST_OF_CHUNK)], held[padded(m & LAST_OF_CHUNK)]


@device
def whole_block(i, count, reciprocal):  # type: ignore[no-untyped-def]
    return quotient(i, reciprocal)


@device
def ragged_block(i, count, reciprocal):  # type: ignore[no-untyped-def]
    """The number of an element's block; 0 for elements outside the chunk."""
    return quotient(i, reciprocal) if i < count else ZERO


def _held_quad(held, factors, inverses, target, quad, skip, call, key, reciprocal, p):  # type: ignore[no-untyped-def]
    lanes = lanes_of(quad, skip)  # noqa: F821
    draws = draw_four(call + quad, key[0], key[1], key[2]) if DRAWS else NO_DRAWS  # noqa: F821
    i, j, k, m = lanes
    a, b = block_of(i, target.size, reciprocal), block_of(j, target.size, reciprocal)  # noqa: F821
    c, d = block_of(k, target.size, reciprocal), block_of(m, target.size, reciprocal)  # noqa: F821
    x0, x1, x2, x3 = held_at(held, lanes)  # noqa: F821
    scales = factors[a], factors[b], factors[c], factors[d]
    if POWERS:  # noqa: F821  powers of two have exact inverses: the products are the quotients
        values = x0 * inverses[a], x1 * inverses[b], x2 * inverses[c], x3 * inverses[d]
    else:
        f0, f1, f2, f3 = scales
        values = x0 / f0, x1 / f1, x2 / f2, x3 / f3
    store_four(target, lanes, rescaled_four(round_four(values, draws, NO_FACTORS, p), scales))  # noqa: F821


def _rescaled_four(values, factors):  # type: ignore[no-untyped-def]
    a, b, c, d = values
    f0, f1, f2, f3 = factors
    return rescaled(a, f0), rescaled(b, f1), rescaled(c, f2), rescaled(d, f3)  # noqa: F821


@device
def hold(held, source, quad):  # type: ignore[no-untyped-def]
    """Four elements of a whole chunk into shared memory."""
    i, j, k, m = whole_lanes(quad, ZERO)
    a, b, c, d = source[i], source[j], source[k], source[m]
    place = np.uint64(padded(i))
    held[place] = a
    held[place + SECOND] = b
    held[place + THIRD] = c
    held[place + FOURTH] = d


@device
def largest_of_segment(held, place):  # type: ignore[no-untyped-def]
    """The largest pattern of a SEGMENT that has its elements side by side in shared memory."""
    found = ZERO
    for i in range(SEGMENT):
        bits = np.uint32(bits_of(held[np.uint64(place) + np.uint64(i)]) & MAGNITUDE)
        found = bits if bits > found else found
    return found


@device
def largest_between(held, begin, end):  # type: ignore[no-untyped-def]
    found = ZERO
    for i in range(begin, end):
        bits = np.uint32(bits_of(held[padded(i)]) & MAGNITUDE)
        found = bits if bits > found else found
    return found


def _round_blocks(  # type: ignore[no-untyped-def]
    x, rows, reciprocal, tensor_scale, block_fields, scale_fields, out, scale_codes,
    offset, key, fields,
):  # fmt: skip
    """A CUDA block takes as many blocks of a row as fit CHUNK, and reads their elements once, into shared memory.

    rows: elements of a row, blocks of a row, elements of a block, chunks of a row; reciprocal: of a block's elements.
    """
    p, b, s = PARAMETERS(*fields), BlockParameters(*block_fields), Parameters(*scale_fields)  # noqa: F821
    held = cuda.shared.array(PADDED_CHUNK, np.float32)
    largest = cuda.shared.array(CHUNK_BLOCKS, np.uint32)
    factors = cuda.shared.array(CHUNK_BLOCKS, np.float32)
    inverses = cuda.shared.array(CHUNK_BLOCKS, np.float32)
    length, blocks_a_row, size, chunks_a_row = rows
    row, column = divided(cuda.blockIdx.x, chunks_a_row)
    first_block = row * blocks_a_row + column * divided(CHUNK, size)[0]
    low = row * length + column * divided(CHUNK, size)[0] * size
    high = min(low + divided(CHUNK, size)[0] * size, (row + 1) * length)
    source, target, count = x[low:high], out[low:high], high - low
    blocks = divided(count + size - 1, size)[0]

    for base in range(0, blocks, THREADS):
        k = base + cuda.threadIdx.x
        if k < blocks:
            largest[np.uint32(k)] = ZERO
    if count == CHUNK:
        for base in range(0, CHUNK // 4, THREADS):
            hold(held, source, base + cuda.threadIdx.x)
    else:
        for base in range(0, count, THREADS):
            i = base + cuda.threadIdx.x
            held[padded(i)] = ragged_load(source, np.uint32(i))
    cuda.syncthreads()

    segments = (size + SEGMENT - 1) // SEGMENT
    for base in range(0, blocks * segments, THREADS):
        block, segment = divided(base + cuda.threadIdx.x, segments)
        if block < blocks:
            begin = block * size + segment * SEGMENT
            end = min(min(begin + SEGMENT, (block + 1) * size), count)
            if size % SEGMENT == 0 and end == begin + SEGMENT:
                found = largest_of_segment(held, padded(begin))
            else:
                found = largest_between(held, begin, end)
            cuda.atomic.max(largest, np.uint32(block), found)
    cuda.syncthreads()

    for base in range(0, blocks, THREADS):
        k = base + cuda.threadIdx.x
        if k < blocks:
            factor, code = scale_of(largest[np.uint32(k)], tensor_scale[0], b, s)  # noqa: F821
            factors[np.uint32(k)] = factor
            inverses[np.uint32(k)] = np.float32(1) / factor
            if scale_codes.size > 0:
                scale_codes[first_block + k] = code
    cuda.syncthreads()

    group, skip, quads = groups_of(offset + low, high - low)
    call = group * 16
    if count == CHUNK and skip == ZERO:
        for base in range(0, CHUNK // 4, THREADS):
            quad = base + cuda.threadIdx.x
            whole_quad(held, factors, inverses, target, quad, skip, call, key, reciprocal, p)  # noqa: F821
    else:
        for base in range(0, quads, THREADS):
            quad = base + cuda.threadIdx.x
            ragged_quad(held, factors, inverses, target, quad, skip, call, key, reciprocal, p)  # noqa: F821


def _round_columns(  # type: ignore[no-untyped-def]
    x, outer, length, inner, block_size, tensor_scale, block_fields, scale_fields, out, scale_codes,
    offset, key, fields,
):  # fmt: skip
    """A thread takes a block: `block_size` elements, `inner` apart, of x as (outer, length, inner)."""
    p, b, s = PARAMETERS(*fields), BlockParameters(*block_fields), Parameters(*scale_fields)  # noqa: F821
    blocks_a_row = (length + block_size - 1) // block_size
    for item in range(cuda.grid(1), outer * blocks_a_row * inner, cuda.gridsize(1)):
        row, column = item // inner, item % inner
        top = (row // blocks_a_row) * length + (row % blocks_a_row) * block_size
        count = min(block_size, (row // blocks_a_row + 1) * length - top)
        begin = np.uint64(top * inner + column)
        stride, largest = np.uint64(inner), ZERO
        for k in range(count):
            bits = np.uint32(bits_of(x[begin + np.uint64(k) * stride]) & MAGNITUDE)
            largest = bits if bits > largest else largest
        factor, code = block_scale(largest, tensor_scale[0], b, s)
        if scale_codes.size > 0:
            scale_codes[item] = code
        for k in range(count):
            i = begin + np.uint64(k) * stride
            draw = draw_one(np.uint64(offset) + i, key[0], key[1], key[2]) if DRAWS else ZERO  # noqa: F821
            out[i] = rescaled(transform(x[i] / factor, draw, p), factor)  # noqa: F821


def largest_patterns(x, last, pattern):  # type: ignore[no-untyped-def]
    """The largest bit pattern of |x| up to `last`."""
    shared = cuda.shared.array(1, np.uint32)
    if cuda.threadIdx.x == 0:
        shared[0] = ZERO
    cuda.syncthreads()
    largest = ZERO
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        bits = np.uint32(bits_of(x[i]) & MAGNITUDE)
        bits = bits if bits <= last else ZERO
        largest = bits if bits > largest else largest
    cuda.atomic.max(shared, 0, largest)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.atomic.max(pattern, 0, shared[0])


# --- pruning --------------------------------------------------------------------------------------------------------


@device
def prune_four(values, draws, alpha):  # type: ignore[no-untyped-def]
    x0, x1, x2, x3 = values
    d0, d1, d2, d3 = draws
    return (
        np.float32(prune_stochastic(x0, d0, alpha)),
        np.float32(prune_stochastic(x1, d1, alpha)),
        np.float32(prune_stochastic(x2, d2, alpha)),
        np.float32(prune_stochastic(x3, d3, alpha)),
    )


def _prune_quad(source, target, quad, skip, call, key, alpha):  # type: ignore[no-untyped-def]
    lanes = lanes_of(quad, skip)  # noqa: F821
    values = load_four(source, lanes)  # noqa: F821
    draws = draw_four(call + quad, key[0], key[1], key[2])
    store_four(target, lanes, prune_four(values, draws, alpha))  # noqa: F821


def _prune(x, first, alpha, out, offset, key):  # type: ignore[no-untyped-def]
    low, high = chunk_of(cuda.blockIdx.x, first, x.size)
    source, target = x[low:high], out[low:high]
    group, skip, quads = groups_of(offset + first + low, high - low)
    call = group * 16
    if high - low == CHUNK and skip == ZERO:
        for base in range(0, CHUNK // 4, THREADS):
            whole_quad(source, target, base + cuda.threadIdx.x, skip, call, key, alpha)  # noqa: F821
    else:
        for base in range(0, quads, THREADS):
            ragged_quad(source, target, base + cuda.threadIdx.x, skip, call, key, alpha)  # noqa: F821


def _prune_round_quad(  # type: ignore[no-untyped-def]
    source, target, quad, skip, call, key, alpha, scales, rows, start, p
):
    """Returns the tally of the four."""
    lanes = lanes_of(quad, skip)  # noqa: F821
    values = load_four(source, lanes)  # noqa: F821
    draws = draw_four(call + quad, key[0], key[1], key[2])
    factors = factors_of(lanes, source.size, scales, rows, start)  # noqa: F821
    kept = prune_four(values, draws, alpha)
    found = survivors(kept, round_four(kept, draws, factors, p), alpha)  # noqa: F821
    store_four(target, lanes, found)  # noqa: F821
    return tally_four(lanes, target.size, found, alpha)  # noqa: F821


def _tally_four(lanes, size, values, alpha):  # type: ignore[no-untyped-def]
    i, j, k, m = lanes
    a, b, c, d = values
    one = tally(a, alpha) if inside(i, size) else ZERO  # noqa: F821
    two = tally(b, alpha) if inside(j, size) else ZERO  # noqa: F821
    three = tally(c, alpha) if inside(k, size) else ZERO  # noqa: F821
    four = tally(d, alpha) if inside(m, size) else ZERO  # noqa: F821
    return np.uint32(one + two + three + four)


def _prune_round(x, first, alpha, one, scales, rows, out, counts, offset, key, fields):  # type: ignore[no-untyped-def]
    p = PARAMETERS(*fields)  # noqa: F821
    shared = cuda.shared.array(1, np.uint32)
    if cuda.threadIdx.x == 0:
        shared[0] = ZERO
    cuda.syncthreads()
    low, high = chunk_of(cuda.blockIdx.x, first, x.size)
    source, target = x[low:high], out[low:high]
    group, skip, quads = groups_of(offset + first + low, high - low)
    call = group * 16
    start = start_of(first + low, one, scales, rows)
    counted = ZERO
    if high - low == CHUNK and skip == ZERO:
        for base in range(0, CHUNK // 4, THREADS):
            quad = base + cuda.threadIdx.x
            found = whole_quad(source, target, quad, skip, call, key, alpha, scales, rows, start, p)  # noqa: F821
            counted = np.uint32(counted + found)
    else:
        for base in range(0, quads, THREADS):
            quad = base + cuda.threadIdx.x
            found = ragged_quad(source, target, quad, skip, call, key, alpha, scales, rows, start, p)  # noqa: F821
            counted = np.uint32(counted + found)
    cuda.atomic.add(shared, 0, counted)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        block = (first + low) // CHUNK
        counts[0, block] += np.int64(shared[0] & LOW_HALF)
        counts[1, block] += np.int64(shared[0] >> COUNT_BITS)


@device
def survivors(kept, rounded, alpha):  # type: ignore[no-untyped-def]
    a, b, c, d = kept
    e, f, g, h = rounded
    return (
        np.float32(survivor(a, e, alpha)),
        np.float32(survivor(b, f, alpha)),
        np.float32(survivor(c, g, alpha)),
        np.float32(survivor(d, h, alpha)),
    )


# --- +-alpha in the code points that a format reserves for it --------------------------------------------------------


def keep_alpha(x, alpha, out):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        if is_alpha(x[i], alpha):
            out[i] = x[i]


def encode_alpha(x, alpha, codes, positive, negative):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        if is_alpha(x[i], alpha):
            codes[i] = positive if x[i] > np.float32(0) else negative


def decode_alpha(codes, positive, negative, alpha, out):  # type: ignore[no-untyped-def]
    for i in range(cuda.grid(1), codes.size, cuda.gridsize(1)):
        if codes[i] == positive:
            out[i] = alpha
        elif codes[i] == negative:
            out[i] = -alpha


# --- one kernel for each way to round -------------------------------------------------------------------------------


def _bound(name: str, loop: Any, quad: Any, **names: Any) -> Any:
    """`loop` with what its free names mean, and its work on four elements in two forms (see `whole_lanes`)."""
    names = {**globals(), **names}
    for form in ("whole", "ragged"):
        bound = names | {part: globals()[f"{form}_{part}"] for part in ("load", "store", "inside")}
        bound |= {f"{part}_of": globals()[f"{form}_{part}"] for part in ("lanes", "block")}
        bound["held_at"] = globals()[f"{form}_held"]
        for part in (_load_four, _store_four, _tally_four):
            bound[part.__name__[1:]] = device(renamed(part, f"{name}_{form}{part.__name__}", bound))
        names[f"{form}_quad"] = device(renamed(quad, f"{name}_{form}_quad", bound))
    return renamed(loop, name, names)


def _loops() -> dict[str, Any]:
    """Every kernel as a Python function, by name."""
    loops: dict[str, Any] = {loop.__name__: loop for loop in (largest_patterns, keep_alpha, encode_alpha, decode_alpha)}
    loops["decode"] = _bound("decode", _decode, _decode_quad, factors_of=factors_at)
    loops["prune"] = _bound("prune", _prune, _prune_quad)
    for method, (value, code, record, draws) in METHODS.items():
        for operation, transform, rescaled in (("quantize", value, scaled_back), ("encode", code, unchanged)):
            names: dict[str, Any] = {"PARAMETERS": record, "DRAWS": draws, "transform": transform, "rescaled": rescaled}
            bound = {**globals(), **names}
            fours = {
                scaled: device(renamed(_round_four, f"{operation}_{method}_{scaled}", bound | {"SCALED": scaled}))
                for scaled in (False, True)
            }
            names["rescaled_four"] = device(renamed(_rescaled_four, f"{operation}_{method}_rescaled", bound))
            for suffix, scaled in (("", False), ("_scaled", True)):
                names["factors_of"] = factors_at if scaled else no_factors
                name = f"{operation}{suffix}_{method}"
                loops[name] = _bound(name, _round, _round_quad, round_four=fours[scaled], **names)
                if operation == "quantize":
                    name = f"prune{suffix}_{method}"
                    loops[name] = _bound(name, _prune_round, _prune_round_quad, round_four=fours[scaled], **names)
            for suffix, powers, scale_of in (("_blocks", False, amax_scale), ("_power_blocks", True, power_scale)):
                name = f"{operation}{suffix}_{method}"
                names |= {"POWERS": powers, "scale_of": scale_of}
                loops[name] = _bound(name, _round_blocks, _held_quad, round_four=fours[False], **names)
            loops[f"{operation}_columns_{method}"] = renamed(
                _round_columns, f"{operation}_columns_{method}", {**globals(), **names}
            )
            if operation == "encode":
                loops[f"both_{method}"] = _bound(
                    f"both_{method}", _round_both, _both_quad, round_four=fours[True], **names
                )
    return loops


LOOPS = _loops()


# --- launchers: the same names as in kernels/cpu.py ------------------------------------------------------------------


def _launch(name: str, blocks: int, *arguments: Any) -> None:
    launch(LOOPS[name], name, blocks, arguments)


@lru_cache(maxsize=256)
def _drawing(seed: int, stream: int, step: int) -> tuple[np.uint32, np.uint32, tuple[np.uint32, ...]]:
    """A key as the kernels take it: stream, step and the generator's keys of its rounds."""
    low, high = np.uint64(seed) & LOW_WORD, np.uint64(seed) >> np.uint64(32)
    keys = tuple(np.uint32(word) for word in round_keys.py_func(low, high))
    return np.uint32(np.uint64(stream) & LOW_WORD), np.uint32(np.uint64(step) & LOW_WORD), keys


def _chunks(first: int, count: int) -> int:
    """Of the whole tensor, in which a piece of `count` elements from `first` on has a part."""
    return -(-(first % CHUNK + count) // CHUNK) if count else 0


def _strides(items: int) -> int:
    """Blocks of a loop that strides over `items`."""
    return min(-(-items // THREADS), 2 if SIMULATED else MAX_BLOCKS)


def round_elements(
    operation: str, method: str, x: torch.Tensor, first: int, scales: Scales, out: torch.Tensor, key: Key, p: Fields
) -> None:
    arguments = x, first, *_table(scales, x), out, key.offset, _drawing(*key[1:]), tuple(p)
    _launch(f"{operation}{_suffix(scales)}_{method}", _chunks(first, x.numel()), *arguments)


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
    arguments = x, first, *_table(scales, x), out, codes, tuple(values), key.offset, _drawing(*key[1:]), tuple(p)
    _launch(f"both_{method}", _chunks(first, x.numel()), *arguments)


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
    outer, length, inner, blocks = layout
    size = fmt.block_size
    fields = tuple(block_scaling.block_parameters(fmt)), tuple(block_scaling.scale_parameters(fmt))
    last = tensor_scale, *fields, out, scale_codes, key.offset, _drawing(*key[1:]), tuple(p)
    if inner == 1 and SMALLEST_BLOCK <= size <= CHUNK:
        if length % size == 0:
            outer, length, blocks = 1, outer * length, outer * blocks
        chunks = -(-blocks // (CHUNK // size))
        rows = length, blocks, size, chunks
        kind = "blocks" if fmt.scale_rule == "amax" or fmt.scale.bias > 127 else "power_blocks"
        _launch(f"{operation}_{kind}_{method}", outer * chunks, x, rows, reciprocal_of(size), *last)
    else:
        items = _strides(outer * blocks * inner)
        _launch(f"{operation}_columns_{method}", items, x, outer, length, inner, size, *last)


def largest_magnitude(x: torch.Tensor, keeps_nan: bool) -> torch.Tensor:
    pattern = torch.zeros(1, dtype=torch.int32, device=x.device).view(torch.uint32)
    _launch("largest_patterns", _strides(x.numel()), x, MAGNITUDE if keeps_nan else INFINITY, pattern)
    return pattern.view(torch.float32)


def decode_elements(codes: torch.Tensor, first: int, scales: Scales, out: torch.Tensor, p: Fields) -> None:
    _launch("decode", _chunks(first, codes.numel()), codes, first, *_table(scales, out), out, tuple(p))


def prune_elements(x: torch.Tensor, first: int, alpha: np.float32, out: torch.Tensor, key: Key) -> None:
    _launch("prune", _chunks(first, x.numel()), x, first, alpha, out, key.offset, _drawing(*key[1:]))


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
    arguments = x, first, alpha, *_table(scales, x), out, counts, key.offset, _drawing(*key[1:]), tuple(p)
    _launch(f"prune{_suffix(scales)}_{method}", _chunks(first, x.numel()), *arguments)


def keep_alphas(x: torch.Tensor, alpha: np.float32, out: torch.Tensor) -> None:
    _launch("keep_alpha", _strides(x.numel()), x, alpha, out)


def encode_alphas(x: torch.Tensor, alpha: np.float32, codes: torch.Tensor, positive: int, negative: int) -> None:
    _launch("encode_alpha", _strides(x.numel()), x, alpha, codes, np.uint32(positive), np.uint32(negative))


def decode_alphas(codes: torch.Tensor, positive: int, negative: int, alpha: np.float32, out: torch.Tensor) -> None:
    _launch("decode_alpha", _strides(codes.numel()), codes, np.uint32(positive), np.uint32(negative), alpha, out)


def _suffix(scales: Scales) -> str:
    return "" if scales is None or (not isinstance(scales, Table) and scales == 1) else "_scaled"


def _table(scales: Scales, x: torch.Tensor) -> tuple[Any, torch.Tensor, tuple[int, np.uint32, np.uint32]]:
    """The scales as the kernels take them: the only one, or a table and its rows."""
    real = np.float64 if x.dtype == torch.float64 else np.float32
    if isinstance(scales, Table):
        values = scales.values.to(x.device, x.dtype)
        return real(1), values, (scales.row_length, reciprocal_of(scales.row_length), reciprocal_of(values.numel()))
    return real(1 if scales is None else scales), _none(x.dtype, x.device), (1, ZERO, ZERO)


@cache
def _none(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)
