"""Coordinates: the index of each nonzero in its block, and its value. The first field of a block says how many."""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import get_fields, get_number, put_fields, put_number, width_of
from accel.codecs.codec import OUT_OF_RANGE, VALUE, ZERO, Codec, Content, Setting, Stream, bit_length
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", 1, bit_length(content.numel), "fixed"),
        Stream("metadata", content.nonzeros, setting.index_bits),
        Stream("payload", content.nonzeros, setting.bits),
    )


@scalar
def write(work, numel, setting, out, position):  # type: ignore[no-untyped-def]
    found = np.uint64(0)
    for i in range(numel):
        work.others[found] = np.uint32(i)
        work.fields[found] = work.codes[i]
        found += np.uint64(work.tags[i] != ZERO)
    nonzeros = np.int64(found)
    middle = put_number(nonzeros, width_of(numel), out, position)
    middle = put_fields(work.others, nonzeros, setting.index_bits, out, middle)
    return middle, put_fields(work.fields, nonzeros, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    nonzeros, middle = get_number(data, position, end, width_of(numel))
    if middle < 0 or nonzeros > numel:
        return min(middle, -OUT_OF_RANGE), -OUT_OF_RANGE
    middle = get_fields(data, middle, end, nonzeros, setting.index_bits, work.others)
    place = get_fields(data, middle, end, nonzeros, setting.bits, work.fields)
    if place < 0:
        return place, place
    work.tags[:numel] = ZERO
    work.codes[:numel] = np.uint32(0)
    last = np.int64(-1)
    for k in range(nonzeros):
        at = np.int64(work.others[k])
        if at <= last or at >= numel:
            return middle, -OUT_OF_RANGE
        work.codes[at] = work.fields[k]
        work.tags[at] = VALUE
        last = at
    return middle, place


COO = Codec("coo", streams, write, read)
