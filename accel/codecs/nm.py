"""N:M structured sparsity: of every M consecutive elements of a row at most N are nonzero; N are stored, with indices.

Groups begin anew in each row (the matrix is shape[0] x rest). A group with fewer nonzeros stores zeros too, those with
the lowest indices; indices rise, also beyond the end of a row that is no multiple of M.
"""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import get_fields, put_fields
from accel.codecs.codec import OUT_OF_RANGE, VALUE, ZERO, Codec, Content, Setting, Stream
from accel.codecs.gather import scatter
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    rows = np.maximum(content.rows, 1)
    stored = rows * np.ceil(np.ceil(np.asarray(content.numel) / rows) / setting.second) * setting.first
    return (
        Stream("metadata", stored, setting.index_bits, "fixed"),
        Stream("payload", stored, setting.bits, "fixed"),
    )


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    """Where a group has too many nonzeros: minus (1 + its first element), in place of the positions."""
    kept, group = setting.first, setting.second
    scatter(work.codes, work.flags, numel, work.more)
    length, stored = min(setting.row_length, numel), 0
    for row in range(numel // length):
        for begin in range(0, length, group):
            found = 0
            for column in range(begin, min(begin + group, length)):
                found += work.flags[row * length + column]
            zeros = kept - found  # stored beside them
            if zeros < 0:
                return -1 - (row * length + begin), 0
            for j in range(group):
                at = row * length + begin + j
                is_nonzero = begin + j < length and work.flags[at] != 0
                if is_nonzero or zeros > 0:
                    zeros -= 0 if is_nonzero else 1
                    work.others[stored] = np.uint32(j)
                    work.fields[stored] = work.more[at] if is_nonzero else np.uint32(0)
                    stored += 1
    middle = put_fields(work.others, stored, setting.index_bits, out, position)
    return middle, put_fields(work.fields, stored, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    kept, group = setting.first, setting.second
    length = min(setting.row_length, numel)
    stored = numel // length * -(-length // group) * kept
    middle = get_fields(data, position, end, stored, setting.index_bits, work.others)
    place = get_fields(data, middle, end, stored, setting.bits, work.fields)
    if place < 0:
        return place, place, 0
    work.tags[:numel] = ZERO
    work.codes[:numel] = np.uint32(0)
    stored = 0
    for row in range(numel // length):
        for begin in range(0, length, group):
            last = np.int64(-1)
            for k in range(stored, stored + kept):
                j, code = np.int64(work.others[k]), work.fields[k]
                is_inside = j < group and begin + j < length
                if j <= last or j >= group or (code != 0 and not is_inside):
                    return middle, -OUT_OF_RANGE, 0
                last = j
                if code != 0:
                    work.codes[row * length + begin + j] = code
                    work.tags[row * length + begin + j] = VALUE
            stored += kept
    return middle, place, numel


def nm(kept: int = 2, group: int = 4) -> Codec:
    """At most `kept` nonzeros in each `group`, 1 <= kept <= group <= 256."""
    return Codec(f"nm({kept}:{group})", streams, write, read, kept, group, rows="cut", is_counted=False)
