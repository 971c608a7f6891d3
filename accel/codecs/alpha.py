"""Four streams, for stochastically pruned tensors: +-alpha leaves the value format and costs three bits.

Which elements are nonzero, which of those are values (not +-alpha), the signs of +-alpha (1 is -alpha), the values.
"""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import count_flags, get_fields, get_flags, put_fields, put_flags
from accel.codecs.codec import NEGATIVE_ALPHA, VALUE, Codec, Content, Setting, Stream
from accel.codecs.gather import compact, scatter
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", content.numel, 1, "fixed"),
        Stream("metadata", content.nonzeros, 1),
        Stream("metadata", content.alphas, 1),
        Stream("payload", content.survivors, setting.bits),
    )


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    middle = put_flags(work.flags_8, work.flags, numel, out, position)
    for i in range(nonzeros):
        work.signs[i] = np.uint8(work.tags[i] == VALUE)
    values = compact(work.codes, work.signs, nonzeros, work.fields)
    middle = put_flags(work.signs_8, work.signs, nonzeros, out, middle)
    for i in range(nonzeros):
        work.signs[i] = np.uint8(work.tags[i] != VALUE)
        work.others[i] = np.uint32(work.tags[i] == NEGATIVE_ALPHA)
    alphas = compact(work.others, work.signs, nonzeros, work.more)
    for i in range(alphas):
        work.signs[i] = np.uint8(work.more[i])
    middle = put_flags(work.signs_8, work.signs, alphas, out, middle)
    return middle, put_fields(work.fields, values, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    middle = get_flags(data, position, end, numel, work.flags_8)
    if middle < 0:
        return middle, middle, 0
    nonzeros = count_flags(work.flags, numel)
    middle = get_flags(data, middle, end, nonzeros, work.tags_8)
    if middle < 0:
        return middle, middle, 0
    values = count_flags(work.tags, nonzeros)
    middle = get_flags(data, middle, end, nonzeros - values, work.signs_8)
    place = get_fields(data, middle, end, values, setting.bits, work.fields)
    if place < 0:
        return place, place, 0
    scatter(work.fields, work.tags, nonzeros, work.codes)
    alphas = np.uint64(0)
    for i in range(nonzeros):
        is_alpha = np.uint8(1 - work.tags[i])
        work.tags[i] = VALUE + is_alpha * np.uint8(work.signs[alphas] + 1)  # no branch, which nothing could foretell
        alphas += np.uint64(is_alpha)
    return middle, place, nonzeros


ALPHA = Codec("alpha", streams, write, read, is_masked=True, tags_alpha=True)
