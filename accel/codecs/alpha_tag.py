"""Two bits an element say what it is: zero, +alpha, -alpha or a value, and only values are stored."""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import count_flags, get_fields, get_pairs, put_fields, put_pairs
from accel.codecs.codec import VALUE, Codec, Content, Setting, Stream
from accel.codecs.gather import compact, scatter
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", content.numel, 2, "fixed"),
        Stream("payload", content.survivors, setting.bits),
    )


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    for i in range(nonzeros):
        work.others[i] = work.tags[i]
        work.signs[i] = np.uint8(work.tags[i] == VALUE)
    values = compact(work.codes, work.signs, nonzeros, work.fields)
    scatter(work.others, work.flags, numel, work.more)
    for i in range(numel):
        work.tags[i] = np.uint8(work.more[i])
    middle = put_pairs(work.tags_8, work.tags, numel, out, position)
    return middle, put_fields(work.fields, values, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    middle = get_pairs(data, position, end, numel, work.tags_8)
    if middle < 0:
        return middle, middle, 0
    for i in range(numel):
        work.flags[i] = np.uint8(work.tags[i] == VALUE)
    place = get_fields(data, middle, end, count_flags(work.flags, numel), setting.bits, work.fields)
    scatter(work.fields, work.flags, numel, work.codes)
    return middle, place, numel


ALPHA_TAG = Codec("alpha_tag", streams, write, read, tags_alpha=True)
