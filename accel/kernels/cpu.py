"""CPU loops over the scalar functions, and how they are spread over threads.

Every loop takes a piece [start, stop) of flat, contiguous arrays. `run` cuts the work into one piece a thread; since
random words depend only on the element's index, the bits do not depend on the cut. Inner loops run over slices that
start at index 0: only then does the compiler know that no index is negative, and vectorises.

Scales come as one float32 a row of `row_length` elements (a single row for a scale per tensor). A format comes last,
as the fields of `accel.rounding.Parameters`.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numba
import numpy as np

from accel.kernels.jit import Kernel, config, kernel, scalar
from accel.random import LOW_WORD, WORD_BITS, philox4x32
from accel.rounding import (
    FLOAT_ZERO,
    MAGNITUDE,
    Parameters,
    bits_of,
    code_of,
    finish,
    prune_stochastic,
    round_nearest_even,
    round_stochastic,
    value_of,
)

CHUNK = 4096  # elements whose random words are held at once, and the block of the counts
GROUP = 64  # elements that 16 calls of the generator serve
SERIAL_BELOW = 1 << 15  # elements for which waking a second thread costs more than it saves

MAX_THREADS: int = config.NUMBA_NUM_THREADS

_launching = threading.Lock()  # numba's fallback threading layer is not safe to enter from two threads
_forked = False


def _mark_forked() -> None:
    global _forked, _launching
    _forked, _launching = True, threading.Lock()


os.register_at_fork(after_in_child=_mark_forked)  # OpenMP aborts in a forked child: stay serial there


def run(loop: Kernel, size: int, *arguments: Any, threads: int, align: int = CHUNK) -> None:
    """Call `loop` on pieces that cover [0, size), cut at multiples of `align`, on at most `threads` threads."""
    pieces = min(threads, MAX_THREADS, size // SERIAL_BELOW)
    if pieces < 2 or _forked:
        if size:
            loop.serial(0, size, *arguments)
        return
    length = -(-size // (pieces * align)) * align
    bounds = np.minimum(np.arange(pieces + 1) * length, size)
    with _launching:
        before = numba.get_num_threads()
        numba.set_num_threads(pieces)
        try:
            loop.parallel(arguments, bounds)
        finally:
            numba.set_num_threads(before)


@scalar
def fill_words(words, index, count, seed, stream, step):  # type: ignore[no-untyped-def]
    """Random words of the elements index .. index + count (rounded out to groups of 64); returns where `index` lies."""
    first = index // GROUP
    groups = (index + count + GROUP - 1) // GROUP - first
    k0, k1 = seed & LOW_WORD, seed >> WORD_BITS
    stream, step = stream & LOW_WORD, step & LOW_WORD
    for g in range(groups):
        counter = np.uint64((first + g) * 16)
        low, high = counter & LOW_WORD, counter >> WORD_BITS
        base = g * GROUP
        for j in range(16):
            w0, w1, w2, w3 = philox4x32(low | np.uint64(j), high, stream, step, k0, k1)
            words[base + j] = np.uint32(w0)
            words[base + 16 + j] = np.uint32(w1)
            words[base + 32 + j] = np.uint32(w2)
            words[base + 48 + j] = np.uint32(w3)
    return index - first * GROUP


@kernel
def random_words(start, stop, out, offset, seed, stream, step):  # type: ignore[no-untyped-def]
    words = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        count = min(CHUNK, stop - low)
        skip = fill_words(words, offset + low, count, seed, stream, step)
        out[low : low + count] = words[skip : skip + count]


@kernel
def quantize_nearest_even(start, stop, x, scales, row_length, out, *fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    low = start
    while low < stop:
        row = low // row_length
        high = min(stop, (row + 1) * row_length)
        scale, source, target = scales[row], x[low:high], out[low:high]
        for i in range(source.size):
            v = np.float32(source[i] / scale)
            pattern, steps = round_nearest_even(v, p)
            target[i] = finish(pattern, steps, v, p) * scale
        low = high


@kernel
def encode_nearest_even(start, stop, x, scales, row_length, out, *fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    low = start
    while low < stop:
        row = low // row_length
        high = min(stop, (row + 1) * row_length)
        scale, source, target = scales[row], x[low:high], out[low:high]
        for i in range(source.size):
            v = np.float32(source[i] / scale)
            pattern, steps = round_nearest_even(v, p)
            target[i] = code_of(pattern, steps, v, p)
        low = high


@scalar
def quantize_rows(start, stop, x, scales, row_length, out, buffer, p):  # type: ignore[no-untyped-def]
    low = start
    while low < stop:
        row = low // row_length
        high = min(stop, (row + 1) * row_length)
        scale, source, target, words = scales[row], x[low:high], out[low:high], buffer[low - start : high - start]
        for i in range(source.size):
            v = np.float32(source[i] / scale)
            pattern, steps = round_stochastic(v, words[i], p)
            target[i] = finish(pattern, steps, v, p) * scale
        low = high


@kernel
def quantize_stochastic(start, stop, x, scales, row_length, out, offset, seed, stream, step, *fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    words = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = fill_words(words, offset + low, high - low, seed, stream, step)
        quantize_rows(low, high, x, scales, row_length, out, words[skip:], p)


@scalar
def encode_rows(start, stop, x, scales, row_length, out, buffer, p):  # type: ignore[no-untyped-def]
    low = start
    while low < stop:
        row = low // row_length
        high = min(stop, (row + 1) * row_length)
        scale, source, target, words = scales[row], x[low:high], out[low:high], buffer[low - start : high - start]
        for i in range(source.size):
            v = np.float32(source[i] / scale)
            pattern, steps = round_stochastic(v, words[i], p)
            target[i] = code_of(pattern, steps, v, p)
        low = high


@kernel
def encode_stochastic(start, stop, x, scales, row_length, out, offset, seed, stream, step, *fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    words = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = fill_words(words, offset + low, high - low, seed, stream, step)
        encode_rows(low, high, x, scales, row_length, out, words[skip:], p)


@kernel
def decode(start, stop, codes, out, *fields):  # type: ignore[no-untyped-def]
    p = Parameters(*fields)
    source, target = codes[start:stop], out[start:stop]
    for i in range(source.size):
        target[i] = value_of(source[i], p)


@kernel
def prune(start, stop, x, alpha, out, offset, seed, stream, step):  # type: ignore[no-untyped-def]
    buffer = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = fill_words(buffer, offset + low, high - low, seed, stream, step)
        source, target, words = x[low:high], out[low:high], buffer[skip : skip + high - low]
        for i in range(source.size):
            target[i] = prune_stochastic(source[i], words[i], alpha)


@scalar
def is_alpha(value, alpha):  # type: ignore[no-untyped-def]
    return np.uint32(bits_of(value) & MAGNITUDE) == bits_of(alpha)


@scalar
def prune_quantize_rows(start, stop, x, alpha, scales, row_length, out, buffer, stochastic, p):  # type: ignore[no-untyped-def]
    nonzeros, alphas = 0, 0
    low = start
    while low < stop:
        row = low // row_length
        high = min(stop, (row + 1) * row_length)
        scale, source, target, words = scales[row], x[low:high], out[low:high], buffer[low - start : high - start]
        row_nonzeros, row_alphas = np.int32(0), np.int32(0)
        for i in range(source.size):
            kept = prune_stochastic(source[i], words[i], alpha)
            v = np.float32(kept / scale)
            pattern, steps = round_stochastic(v, words[i], p) if stochastic else round_nearest_even(v, p)
            value = np.float32(finish(pattern, steps, v, p) * scale)
            value = kept if is_alpha(kept, alpha) and alpha > FLOAT_ZERO else value
            target[i] = value
            row_nonzeros = np.int32(row_nonzeros + np.int32(bits_of(value) != 0))
            row_alphas = np.int32(row_alphas + np.int32(is_alpha(value, alpha)))
        nonzeros, alphas = nonzeros + row_nonzeros, alphas + row_alphas
        low = high
    return nonzeros, alphas


@kernel
def prune_quantize(  # type: ignore[no-untyped-def]
    start, stop, x, alpha, scales, row_length, out, nonzeros, alphas, stochastic, offset, seed, stream, step, *fields
):
    """Prune, then round the survivors (+-alpha is never rounded); counts of nonzeros and +-alpha a block of CHUNK."""
    p = Parameters(*fields)
    words = np.empty(CHUNK + GROUP, np.uint32)
    for low in range(start, stop, CHUNK):
        high = min(low + CHUNK, stop)
        skip = fill_words(words, offset + low, high - low, seed, stream, step)
        nonzeros[low // CHUNK], alphas[low // CHUNK] = prune_quantize_rows(
            low, high, x, alpha, scales, row_length, out, words[skip:], stochastic, p
        )
