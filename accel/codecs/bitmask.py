"""Zero-value compression: one bit an element says which are nonzero, and only those are stored."""

from __future__ import annotations

from accel.codecs.bits import count_flags, get_fields, get_flags, put_fields, put_flags
from accel.codecs.codec import VALUE, Codec, Content, Setting, Stream
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", content.numel, 1, "fixed"),
        Stream("payload", content.nonzeros, setting.bits),
    )


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    middle = put_flags(work.flags_8, work.flags, numel, out, position)
    return middle, put_fields(work.codes, nonzeros, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    middle = get_flags(data, position, end, numel, work.flags_8)
    if middle < 0:
        return middle, middle, 0
    return middle, *read_nonzeros(data, middle, end, numel, setting, work)


@scalar
def read_nonzeros(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    """The payload of the flagged elements: (position after it, how many they are)."""
    nonzeros = count_flags(work.flags, numel)
    place = get_fields(data, position, end, nonzeros, setting.bits, work.codes)
    for i in range(nonzeros):
        work.tags[i] = VALUE
    return place, nonzeros


BITMASK = Codec("bitmask", streams, write, read, is_masked=True)
