"""Four streams, for stochastically pruned tensors: +-alpha leaves the value format and costs three bits.

Which elements are nonzero, which of those are values (not +-alpha), the signs of +-alpha (1 is -alpha), the values.
"""

from __future__ import annotations

import numpy as np

from accel.codecs.bitmask import flag_nonzeros
from accel.codecs.bits import compact, count_flags, get_fields, get_flags, put_fields, put_flags
from accel.codecs.codec import NEGATIVE_ALPHA, POSITIVE_ALPHA, VALUE, ZERO, Codec, Content, Setting, Stream
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    return (
        Stream("metadata", content.numel, 1, "fixed"),
        Stream("metadata", content.nonzeros, 1),
        Stream("metadata", content.alphas, 1),
        Stream("payload", content.survivors, setting.bits),
    )


@scalar
def write(work, numel, setting, out, position):  # type: ignore[no-untyped-def]
    flag_nonzeros(work, numel)
    middle = put_flags(work.flags_8, work.flags, numel, out, position)
    nonzeros = compact(work.codes, work.flags, numel, work.fields)
    compact(work.tags, work.flags, numel, work.tags)
    for i in range(nonzeros):
        work.flags[i] = np.uint8(work.tags[i] == VALUE)
    middle = put_flags(work.flags_8, work.flags, nonzeros, out, middle)
    values = compact(work.fields, work.flags, nonzeros, work.codes)
    alphas = np.uint64(0)
    for i in range(nonzeros):
        work.flags[alphas] = np.uint8(work.tags[i] == NEGATIVE_ALPHA)
        alphas += np.uint64(work.tags[i] != VALUE)
    middle = put_flags(work.flags_8, work.flags, np.int64(alphas), out, middle)
    return middle, put_fields(work.codes, values, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    middle = get_flags(data, position, end, numel, work.flags_8)
    if middle < 0:
        return middle, middle
    nonzeros = count_flags(work.flags, numel)
    middle = get_flags(data, middle, end, nonzeros, work.tags_8)
    if middle < 0:
        return middle, middle
    values = count_flags(work.tags, nonzeros)
    for i in range(nonzeros):
        work.others[i] = work.tags[i]
    middle = get_flags(data, middle, end, nonzeros - values, work.tags_8)
    place = get_fields(data, middle, end, values, setting.bits, work.codes)
    if place < 0:
        return place, place
    found, alphas = np.uint64(0), np.uint64(0)
    for i in range(nonzeros):  # `fields` takes the codes of the nonzeros, `others` their tags
        is_value = work.others[i]
        sign = NEGATIVE_ALPHA if work.tags[alphas] else POSITIVE_ALPHA
        work.fields[i] = work.codes[found] if is_value else np.uint32(0)
        work.others[i] = np.uint32(VALUE if is_value else sign)
        found += np.uint64(is_value)
        alphas += np.uint64(1 - is_value)
    found = np.uint64(0)
    for i in range(numel):
        flag = work.flags[i]
        work.codes[i] = work.fields[found] if flag else np.uint32(0)
        work.tags[i] = np.uint8(work.others[found]) if flag else ZERO
        found += np.uint64(flag)
    return middle, place


ALPHA = Codec("alpha", streams, write, read, tags_alpha=True)
