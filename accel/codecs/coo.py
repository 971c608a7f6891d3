"""Coordinates: the index of each nonzero in its block, and its value. The first field of a block says how many."""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import get_fields, get_number, put_fields, put_number, width_of
from accel.codecs.codec import OUT_OF_RANGE, VALUE, ZERO, Codec, Content, Setting, Stream, bit_length
from accel.codecs.gather import compact
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", 1, bit_length(content.numel), "fixed"),
        Stream("metadata", content.nonzeros, setting.index_bits),
        Stream("payload", content.nonzeros, setting.bits),
    )


@scalar
def list_indices(work, numel):  # type: ignore[no-untyped-def]
    """The indices of the nonzeros, to `others`."""
    for i in range(numel):
        work.more[i] = np.uint32(i)
    compact(work.more, work.flags, numel, work.others)


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    list_indices(work, numel)
    middle = put_number(nonzeros, width_of(numel), out, position)
    middle = put_fields(work.others, nonzeros, setting.index_bits, out, middle)
    return middle, put_fields(work.codes, nonzeros, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    nonzeros, middle = get_number(data, position, end, width_of(numel))
    if middle < 0 or nonzeros > numel:
        return middle, -OUT_OF_RANGE, 0
    middle = get_fields(data, middle, end, nonzeros, setting.index_bits, work.others)
    place = get_fields(data, middle, end, nonzeros, setting.bits, work.fields)
    if place < 0:
        return place, place, 0
    work.tags[:numel] = ZERO
    work.codes[:numel] = np.uint32(0)
    last = np.int64(-1)
    for k in range(nonzeros):
        at = np.int64(work.others[k])
        if at <= last or at >= numel:
            return middle, -OUT_OF_RANGE, 0
        work.codes[at] = work.fields[k]
        work.tags[at] = VALUE
        last = at
    return middle, place, numel


COO = Codec("coo", streams, write, read)
