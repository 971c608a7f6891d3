"""Compressed rows of a matrix (shape[0] x rest): where each row's nonzeros begin, their columns and values.

A block holds whole rows. Its first field says how many nonzeros it has, n; a row pointer takes as many bits as count
up to n, and the last one is n itself. (Compressed columns are the compressed rows of the transpose.)
"""

from __future__ import annotations

import numpy as np

from accel.codecs.bits import count_flags, get_fields, get_number, put_fields, put_number, width_of
from accel.codecs.codec import OUT_OF_RANGE, VALUE, ZERO, Codec, Content, Setting, Stream, bit_length
from accel.codecs.coo import list_indices
from accel.kernels.jit import scalar


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    pointers = Stream("metadata", content.rows + 1, bit_length(content.nonzeros))
    return (
        Stream("metadata", 1, bit_length(content.numel), "fixed"),
        _expected_pointers(content) if content.is_expected else pointers,
        Stream("metadata", content.nonzeros, setting.index_bits),
        Stream("payload", content.nonzeros, setting.bits),
    )


def _expected_pointers(content: Content) -> Stream:
    """The mean over how many bits the pointers of a block of independent elements may take."""
    from scipy.stats import binom

    widths = np.arange(int(bit_length(content.numel)) + 1)
    share = min(content.nonzeros / content.numel, 1.0)
    at_most = binom.cdf((1 << widths) - 1, content.numel, share)
    shares = np.diff(at_most, prepend=0.0)
    return Stream("metadata", 1, float((shares * 8 * np.ceil((content.rows + 1) * widths / 8)).sum()), "padded")


@scalar
def write(work, numel, nonzeros, setting, out, position):  # type: ignore[no-untyped-def]
    list_indices(work, numel)
    rows, found = numel // setting.row_length, 0
    for row in range(rows):
        work.more[row] = np.uint32(found)
        found += count_flags(work.flags[row * setting.row_length :], setting.row_length)
    work.more[rows] = np.uint32(nonzeros)
    middle = put_number(nonzeros, width_of(numel), out, position)
    middle = put_fields(work.more, rows + 1, width_of(nonzeros), out, middle)
    for k in range(nonzeros):
        work.others[k] = np.uint32(work.others[k] % np.uint32(setting.row_length))
    middle = put_fields(work.others, nonzeros, setting.index_bits, out, middle)
    return middle, put_fields(work.codes, nonzeros, setting.bits, out, middle)


@scalar
def read(data, position, end, numel, setting, work):  # type: ignore[no-untyped-def]
    nonzeros, middle = get_number(data, position, end, width_of(numel))
    if middle < 0 or nonzeros > numel:
        return middle, -OUT_OF_RANGE, 0
    rows, pointers = numel // setting.row_length, work.more
    middle = get_fields(data, middle, end, rows + 1, width_of(nonzeros), pointers)
    middle = get_fields(data, middle, end, nonzeros, setting.index_bits, work.others)
    place = get_fields(data, middle, end, nonzeros, setting.bits, work.fields)
    if place < 0:
        return place, place, 0
    if pointers[0] != 0 or pointers[rows] != nonzeros:
        return middle, -OUT_OF_RANGE, 0
    work.tags[:numel] = ZERO
    for row in range(rows):
        low, high = np.int64(pointers[row]), np.int64(pointers[row + 1])
        if low > high or high > nonzeros:
            return middle, -OUT_OF_RANGE, 0
        last = np.int64(-1)
        for k in range(low, high):
            column = np.int64(work.others[k])
            if column <= last or column >= setting.row_length:
                return middle, -OUT_OF_RANGE, 0
            last = column
            work.others[k] = np.uint32(row * setting.row_length + column)
            work.tags[row * setting.row_length + column] = VALUE
    work.codes[:numel] = np.uint32(0)
    for k in range(nonzeros):
        work.codes[work.others[k]] = work.fields[k]
    return middle, place, numel


CSR = Codec("csr", streams, write, read, rows="whole", is_counted=False)
