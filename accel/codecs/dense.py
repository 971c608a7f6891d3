"""Every value, one after another."""

from __future__ import annotations

from accel.codecs.bits import get_fields, put_fields
from accel.codecs.codec import VALUE, ZERO, Codec, Content, Setting, Stream
from accel.codecs.gather import scatter
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (Stream("payload", content.numel, setting.bits, "fixed"),)


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    scatter(work.codes, work.flags, numel, work.fields)
    return position, put_fields(work.fields, numel, setting.bits, out, position)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    place = get_fields(data, position, end, numel, setting.bits, work.codes)
    for i in range(numel):
        work.tags[i] = VALUE if work.codes[i] != 0 else ZERO
    return position, place, numel


DENSE = Codec("dense", streams, write, read)
