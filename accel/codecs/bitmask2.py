"""A bitmask in two levels: which groups of 32 elements hold any nonzero, and the bitmasks of those groups."""

from __future__ import annotations

import numpy as np

from accel.codecs.bitmask import read_nonzeros
from accel.codecs.bits import count_flags, get_flags, put_fields, put_flags
from accel.codecs.codec import Codec, Content, Setting, Stream
from accel.kernels.jit import scalar

GROUP = 32


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    """Expected for independent elements: a group of 32 is empty with probability q^32."""
    groups = np.ceil(np.asarray(content.numel) / GROUP)
    zeros = 1 - np.asarray(content.nonzeros) / np.maximum(content.numel, 1)
    full, rest = np.floor(np.asarray(content.numel) / GROUP), np.asarray(content.numel) % GROUP
    masked = full * GROUP * (1 - zeros**GROUP) + rest * (1 - zeros**rest)
    return (
        Stream("metadata", groups, 1, "fixed"),
        Stream("metadata", masked / GROUP, GROUP),
        Stream("payload", content.nonzeros, setting.bits),
    )


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    groups, kept = -(-numel // GROUP), 0
    for group in range(groups):  # the flags become the masks of the groups that are not empty
        low, high = group * GROUP, min((group + 1) * GROUP, numel)
        found = np.uint8(0)
        for i in range(low, high):
            found |= work.flags[i]
        work.signs[group] = found
        if found:
            for i in range(low, high):
                work.flags[kept + i - low] = work.flags[i]
            kept += high - low
    middle = put_flags(work.signs_8, work.signs, groups, out, position)
    middle = put_flags(work.flags_8, work.flags, kept, out, middle)
    return middle, put_fields(work.codes, nonzeros, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    groups = -(-numel // GROUP)
    middle = get_flags(data, position, end, groups, work.tags_8)
    if middle < 0:
        return middle, middle, 0
    masked = count_flags(work.tags, groups) * GROUP
    if numel % GROUP and work.tags[groups - 1]:
        masked += numel % GROUP - GROUP
    middle = get_flags(data, middle, end, masked, work.flags_8)
    if middle < 0:
        return middle, middle, 0
    for group in range(groups - 1, -1, -1):  # from the end: a mask never moves to a lower place
        low, high = group * GROUP, min((group + 1) * GROUP, numel)
        if work.tags[group]:
            masked -= high - low
            for i in range(high - low - 1, -1, -1):
                work.flags[low + i] = work.flags[masked + i]
        else:
            for i in range(low, high):
                work.flags[i] = 0
    return middle, *read_nonzeros(data, middle, end, numel, setting, work)


BITMASK2 = Codec("bitmask2", streams, write, read, is_masked=True, is_counted=False)
