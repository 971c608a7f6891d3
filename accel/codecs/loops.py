"""The CPU loops over blocks: values to codes to bytes, and back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from accel.codecs.bits import count_flags
from accel.codecs.codec import ALPHA_UNKNOWN, FITS, TOO_LONG, VALUE, Setting, Work
from accel.codecs.gather import LANES, compact, scatter
from accel.codecs.symbols import (
    NO_CODE,
    code_with_alpha,
    coded,
    decoded,
    is_misfit,
    pattern_code,
    pattern_decoded,
    tag_of,
    value_with_alpha,
)
from accel.kernels.cpu import AHEAD, GROUP, METHODS, STRETCH, VALUE_FIELDS, prefetch
from accel.kernels.jit import Kernel, kernel, part
from accel.rounding import Parameters
from accel.words import bits_of

PATTERNS = "patterns"  # the method by which float32 numbers are their own codes


@numba.njit
def work_for(room):  # type: ignore[no-untyped-def]
    """Arrays for blocks whose streams have up to `room` fields."""
    words, size = room // 8 + 2, room + LANES
    tags_8, flags_8, signs_8 = np.empty(words, np.uint64), np.empty(words, np.uint64), np.empty(words, np.uint64)
    codes, fields, others = np.empty(size, np.uint32), np.empty(size, np.uint32), np.empty(size, np.uint32)
    return Work(
        tags_8, tags_8.view(np.uint8), flags_8, flags_8.view(np.uint8), signs_8, signs_8.view(np.uint8),
        codes, fields, others, np.empty(size, np.uint32), np.empty(size, np.float32),
    )  # fmt: skip


@numba.njit
def first_misfit(wrong, nonzeros, flags):  # type: ignore[no-untyped-def]
    """The element that the first wrong one of the nonzeros is, -1 where none is wrong."""
    left = -1
    for k in range(nonzeros):
        if wrong[k]:
            left = k
            break
    for i in range(flags.size):
        left -= np.int64(flags[i])
        if left < 0 and flags[i]:
            return i
    return -1


def _symbols(x, scale, factor, alpha_bits, tags_alpha, alpha_code, sign_code, has_zero, work, v, p):  # type: ignore[no-untyped-def]
    """Which elements of a block are nonzero, to work.flags, and the tags and codes of those, one after another.

    Returns how many they are, and the first element that has no code, or -1.
    scale divides: in float32, or in float64; factor is the same in float32. alpha_bits: the pattern of alpha, of a NaN
    for no alpha. has_zero: whether the code 0 is the number 0, so that zeros need no encoding. In several loops, which
    vectorise where one does not.
    """
    count = 0
    for base in range(0, x.size, STRETCH):
        piece, flags = x[base : base + STRETCH], work.flags[base : base + STRETCH]
        for place in range(0, STRETCH, GROUP):
            prefetch(piece, place + AHEAD)
        for i in range(piece.size):
            flags[i] = np.uint8((bits_of(piece[i]) != NO_CODE) | (not has_zero))
        count += compact(piece, flags, piece.size, work.values[count:])
    codes, found, wrong = work.codes, work.more, work.signs
    values = work.values[:count]
    for i in range(values.size):
        codes[i] = code_of(values[i], scale, p)  # noqa: F821
    for i in range(values.size):
        found[i] = bits_of(decoded(codes[i], factor, v))
    for i in range(values.size):
        wrong[i] = np.uint8(is_misfit(bits_of(values[i]), found[i], alpha_bits))
    for i in range(values.size):
        given = bits_of(values[i])
        codes[i] = code_with_alpha(codes[i], given, alpha_bits, tags_alpha, alpha_code, sign_code)
        work.tags[i] = tag_of(given, alpha_bits, tags_alpha)
    misfit = first_misfit(wrong, count, work.flags[: x.size]) if count_flags(wrong, count) > 0 else -1
    if not has_zero:  # all elements are there
        for i in range(count):
            work.flags[i] = np.uint8((codes[i] != NO_CODE) | (work.tags[i] != VALUE))
            work.fields[i] = codes[i]
            work.others[i] = work.tags[i]
        count = compact(work.fields, work.flags, x.size, codes)
        compact(work.others, work.flags, x.size, work.more)
        for i in range(count):
            work.tags[i] = np.uint8(work.more[i])
    return count, misfit


def _with_work(start, stop, room, *arguments):  # type: ignore[no-untyped-def]
    """The blocks from start to stop, by a loop that counts no references to its arrays."""
    each_block(start, stop, work_for(room), *arguments)  # noqa: F821


def _pack(  # type: ignore[no-untyped-def]
    start, stop, work, x, bounds, scale, factor, alpha_bits, tags_alpha, alpha_code, sign_code, has_zero,
    bits, index_bits, row_length, first, second, out, places, middles, ends, misfits, *fields
):  # fmt: skip
    """Blocks one after another into out, from places[start] on; places, middles, ends: of each, in out.

    misfits: the first element of a block that has no code, or -2 - the first of a group with too many nonzeros; -1
    where all is well.
    """
    v, p = Parameters(*fields[:VALUE_FIELDS]), PARAMETERS(*fields[VALUE_FIELDS:])  # noqa: F821
    setting = Setting(bits, index_bits, row_length, first, second)
    position = places[start]
    for block in range(start, stop):
        piece = x[bounds[block] : bounds[block + 1]]
        nonzeros, misfits[block] = symbols(  # noqa: F821
            piece, scale, factor, alpha_bits, tags_alpha, alpha_code, sign_code, has_zero, work, v, p
        )
        places[block] = position
        if misfits[block] < 0:
            middle, end = write(work, piece.size, nonzeros, setting, out, position)  # noqa: F821
            if middle < 0:
                misfits[block] = middle - 1
            else:
                middles[block], ends[block], position = middle, end, end


def _unpack(  # type: ignore[no-untyped-def]
    start, stop, work, data, offsets, bounds, factor, alpha, has_alpha, has_alpha_codes, alpha_code, sign_code,
    bits, index_bits, row_length, first, second, out, middles, faults, *fields
):  # fmt: skip
    """The blocks' values into out. offsets: where each block starts in data, and where the last one ends.

    middles: bytes of metadata of each block; faults: what is wrong with each.
    """
    v = Parameters(*fields)
    setting = Setting(bits, index_bits, row_length, first, second)
    rest = decoded(NO_CODE, factor, v)  # what the code 0 is: not 0 in every format
    for block in range(start, stop):
        low, end = offsets[block], offsets[block + 1]
        target = out[bounds[block] - bounds[0] : bounds[block + 1] - bounds[0]]
        middle, place, count = read(data, low, end, target.size, setting, work)  # noqa: F821
        if place < 0:
            faults[block] = -place
            continue
        faults[block] = FITS if place == end else TOO_LONG
        middles[block] = middle - low
        values = work.values if MASKED else target  # noqa: F821
        for i in range(count):
            values[i] = decoded(work.codes[i], factor, v)
        top_tag = VALUE
        for i in range(count):
            tag = work.tags[i]
            top_tag = tag if tag > top_tag else top_tag
        if top_tag > VALUE and not has_alpha:
            faults[block] = ALPHA_UNKNOWN
        if top_tag > VALUE or has_alpha_codes:
            for i in range(count):
                values[i] = value_with_alpha(
                    values[i], work.tags[i], work.codes[i], alpha, has_alpha_codes, alpha_code, sign_code
                )
        if MASKED:  # noqa: F821
            scatter(values, work.flags, target.size, target)
            if bits_of(rest) != NO_CODE:
                for i in range(target.size):
                    target[i] = target[i] if work.flags[i] else rest


@cache
def packer(write: Any, method: str) -> Kernel:
    """The loop that packs by a codec's `write`, for values that a method of rounding, or PATTERNS, turns into codes."""
    code, record = (pattern_code, Parameters) if method == PATTERNS else METHODS[method][1:3]
    names = {"code_of": part(coded, f"coded_{method}", transform=code), **_decoding(method)}
    symbols = part(_symbols, f"symbols_{method}", **names)
    name = f"pack_{_codec_of(write)}_{method}"
    loop = part(_pack, f"{name}_loop", write=write, symbols=symbols, PARAMETERS=record)
    return kernel(_with_work, name, is_built_in(write), each_block=loop)


@cache
def unpacker(read: Any, is_masked: bool, method: str) -> Kernel:
    """The loop that unpacks by a codec's `read` what a method has packed."""
    decoding = _decoding(method)
    name = f"unpack_{_codec_of(read)}" + (f"_{PATTERNS}" if decoding else "")
    loop = part(_unpack, f"{name}_loop", read=read, MASKED=is_masked, **decoding)
    return kernel(_with_work, name, is_built_in(read), each_block=loop)


def _decoding(method: str) -> dict[str, Any]:
    return {"decoded": pattern_decoded} if method == PATTERNS else {}


def is_built_in(function: Any) -> bool:
    """Whether a codec's loop is one of ours."""
    return bool(function.py_func.__module__.startswith("accel."))


def _codec_of(function: Any) -> str:
    return str(function.py_func.__module__.rpartition(".")[2])
