"""What a codec is: the bit streams of a block of elements, and the loops that write and read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 4096  # elements that are encoded together, unless told otherwise
MAX_BLOCK = 1 << 16
MAX_ROW = 1 << 20  # elements of a row, where a block holds whole rows

# What an element is.
ZERO, VALUE, POSITIVE_ALPHA, NEGATIVE_ALPHA = np.uint8(0), np.uint8(1), np.uint8(2), np.uint8(3)

# What can be wrong with a block, as the loops that read it say it.
FITS, TOO_SHORT, TOO_LONG, OUT_OF_RANGE, ALPHA_UNKNOWN = range(5)

Number = Any  # a number, or an array of numbers, one a block


class CodecError(ValueError):
    """A tensor that a codec cannot hold, or a stream that is not one."""


class Content(NamedTuple):
    """What a block holds; or what it is expected to hold (not whole numbers) as a part of a tensor with such shares."""

    numel: Number
    nonzeros: Number
    alphas: Number
    rows: Number  # rows that it holds or touches
    is_expected: bool = False

    @property
    def survivors(self) -> Number:
        return self.nonzeros - self.alphas


class Setting(NamedTuple):
    """What the streams of all blocks of a tensor depend on beside their content."""

    bits: int  # of a code
    index_bits: int  # of an index in a block, or in a row where blocks hold whole rows
    row_length: int
    first: int  # the codec's own parameters
    second: int


class Alpha(NamedTuple):
    """+-alpha as the loops take it.

    value: 0 for none. pattern: of +alpha where a tag or a code can tell it, else one that no magnitude has.
    code, sign: the code that a format reserves for +alpha, and its sign bit; 0 where it has none.
    """

    value: np.float32
    pattern: np.uint32
    is_tagged: bool
    has_codes: bool
    code: np.uint32
    sign: np.uint32


class Stream(NamedTuple):
    """`fields` fields of `bits` bits, one after another, padded to a whole byte.

    length: `fixed` follows from a block's numel alone; `random` depends on its elements, one by one; `padded` is a mean
    that has the padding in it.
    """

    part: Literal["metadata", "payload"]
    fields: Number
    bits: Number
    length: Literal["random", "fixed", "padded"] = "random"


class Work(NamedTuple):
    """Room for one block at a time. Each array of bytes is a view of the uint64 before it, for eight at once."""

    tags_8: npt.NDArray[np.uint64]
    tags: npt.NDArray[np.uint8]
    flags_8: npt.NDArray[np.uint64]
    flags: npt.NDArray[np.uint8]
    signs_8: npt.NDArray[np.uint64]
    signs: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.uint32]
    fields: npt.NDArray[np.uint32]
    others: npt.NDArray[np.uint32]
    more: npt.NDArray[np.uint32]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codec:
    """A sparse encoding.

    name: as users write it, with its parameters.
    streams: the streams of a block, metadata before payload, from its content; what the content does not tell is
        expected as of independent elements.
    write(work, numel, nonzeros, setting, out, position): a block into bytes, from `position` on: work.flags tells which
        elements are nonzero, work.tags and work.codes are those of the nonzeros, one after another. Returns where the
        metadata and where the payload ends.
    read(data, position, end, numel, setting, work): the reverse; returns where the metadata and where the payload ends
        (less than zero: minus what is wrong), and how many elements are in work.tags and work.codes.
    is_masked: whether `read` gives the nonzeros only, and work.flags tells which elements they are.
    tags_alpha: whether +-alpha leaves the value format; if not, +-alpha is a value like any other.
    rows: `ignored`; or a block holds `whole` rows; or whole rows, and rows longer than a block are `cut`.
    is_counted: whether the counts of blocks of equal size tell the stream's length.
    base, shrink, restore: for a codec that stores the blocks of another one, with its loops, in fewer bytes.
    """

    name: str
    streams: Callable[[Content, Setting], tuple[Stream, ...]]
    write: Any
    read: Any
    first: int = 0
    second: int = 0
    is_masked: bool = False
    tags_alpha: bool = False
    rows: Literal["ignored", "whole", "cut"] = "ignored"
    is_counted: bool = True
    base: Codec | None = None
    shrink: Callable[[npt.NDArray[np.uint8], int, Setting], tuple[bytes, int]] | None = None
    restore: Callable[[npt.NDArray[np.uint8], int, Setting], tuple[npt.NDArray[np.uint8], int]] | None = None


def bit_length(number: Number) -> Number:
    """Bits that count up to `number`, a whole one or an array of them."""
    return np.ceil(np.log2(np.asarray(number, np.float64) + 1)).astype(np.int64)
