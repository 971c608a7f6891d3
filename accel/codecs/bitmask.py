"""Zero-value compression: one bit an element says which are nonzero, and only those are stored."""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import compact, count_flags, get_fields, get_flags, put_fields, put_flags
from accel.codecs.codec import VALUE, ZERO, Codec, Content, Setting, Stream
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", content.numel, 1, "fixed"),
        Stream("payload", content.nonzeros, setting.bits),
    )


@scalar
def flag_nonzeros(work, numel):  # type: ignore[no-untyped-def]
    for i in range(numel):
        work.flags[i] = np.uint8(work.tags[i] != ZERO)


@scalar
def write(work, numel, setting, out, position):  # type: ignore[no-untyped-def]
    flag_nonzeros(work, numel)
    middle = put_flags(work.flags_8, work.flags, numel, out, position)
    nonzeros = compact(work.codes, work.flags, numel, work.fields)
    return middle, put_fields(work.fields, nonzeros, setting.bits, out, middle)


@scalar
def scatter(work, numel):  # type: ignore[no-untyped-def]
    """Codes and tags of a block from those of its flagged elements, which `fields` holds one after another."""
    found = np.uint64(0)
    for i in range(numel):
        flag = work.flags[i]
        work.codes[i] = work.fields[found] if flag else np.uint32(0)
        work.tags[i] = VALUE if flag else ZERO
        found += np.uint64(flag)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    middle = get_flags(data, position, end, numel, work.flags_8)
    if middle < 0:
        return middle, middle
    place = get_fields(data, middle, end, count_flags(work.flags, numel), setting.bits, work.fields)
    scatter(work, numel)
    return middle, place


BITMASK = Codec("bitmask", streams, write, read)
