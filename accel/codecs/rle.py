"""Run lengths: each value with the number of zeros before it, in `run_bits` bits.

A longer run has padding entries before it: 2^run_bits - 1 zeros and a value that is 0 itself. Zeros after the last
nonzero of a block are implied. The first field of a block says how many entries follow.
"""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import get_fields, get_number, put_fields, put_number, width_of
from accel.codecs.codec import OUT_OF_RANGE, VALUE, ZERO, Codec, Content, Setting, Stream, bit_length
from accel.codecs.coo import list_indices
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    """Expected for independent elements: entries = N d / (1 - q^(2^run_bits))."""
    numel = np.asarray(content.numel, np.float64)
    density = np.asarray(content.nonzeros) / np.maximum(numel, 1)
    entries = np.where(
        density > 0, content.nonzeros / np.where(density > 0, 1 - (1 - density) ** (1 << setting.first), 1), 0
    )
    return (
        Stream("metadata", 1, bit_length(numel), "fixed"),
        Stream("metadata", entries, setting.first),
        Stream("payload", entries, setting.bits),
    )


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    longest = (1 << setting.first) - 1
    list_indices(work, numel)
    entries, last = 0, np.int64(-1)
    for k in range(nonzeros):
        at = np.int64(work.others[k])
        zeros = at - last - 1
        while zeros > longest:
            work.more[entries] = np.uint32(longest)
            work.fields[entries] = np.uint32(0)
            entries += 1
            zeros -= longest + 1
        work.more[entries] = np.uint32(zeros)
        work.fields[entries] = work.codes[k]
        entries += 1
        last = at
    middle = put_number(entries, width_of(numel), out, position)
    middle = put_fields(work.more, entries, setting.first, out, middle)
    return middle, put_fields(work.fields, entries, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    entries, middle = get_number(data, position, end, width_of(numel))
    if middle < 0 or entries > numel:
        return middle, -OUT_OF_RANGE, 0
    middle = get_fields(data, middle, end, entries, setting.first, work.others)
    place = get_fields(data, middle, end, entries, setting.bits, work.fields)
    if place < 0:
        return place, place, 0
    work.tags[:numel] = ZERO
    work.codes[:numel] = np.uint32(0)
    at = np.int64(-1)
    for entry in range(entries):
        at += np.int64(work.others[entry]) + 1
        if at >= numel:
            return middle, -OUT_OF_RANGE, 0
        work.codes[at] = work.fields[entry]
        work.tags[at] = VALUE if work.fields[entry] != 0 else ZERO
    return middle, place, numel


def rle(run_bits: int = 4) -> Codec:
    """Run lengths in 1 to 16 bits."""
    return Codec(f"rle({run_bits})", streams, write, read, first=run_bits, is_counted=False)
