"""What a codec is: a list of bit streams, and how the symbols of one block of elements are split into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

BLOCK = 4096  # elements that are encoded together, unless told otherwise
MAX_BLOCK = 1 << 16


class CodecError(ValueError):
    """A tensor that a codec cannot hold, or a stream that is not one."""


class Tag(IntEnum):
    """What an element is."""

    ZERO = 0
    VALUE = 1
    POSITIVE_ALPHA = 2
    NEGATIVE_ALPHA = 3


@dataclass(frozen=True)
class Symbols:
    """The elements of one block: `tags` uint8[n] (see Tag) and `codes` uint32[n], 0 wherever the tag is not VALUE."""

    tags: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Stream:
    """Fields of equal width, one for each element that `count` (an attribute of Counts) counts.

    bits: width of a field; None is the width of the value format's codes.
    """

    part: Literal["metadata", "payload"]
    count: Literal["numel", "nonzeros", "alphas", "survivors"]
    bits: int | None = None


class Read(Protocol):
    """Reads the next stream of a block: `count` fields as uint32[count]. CodecError where the block is too short."""

    def __call__(self, stream: Stream, count: int) -> npt.NDArray[np.uint32]: ...


@dataclass(frozen=True)
class Codec:
    """A sparse encoding.

    streams: in the order in which they lie in a block.
    split: the fields of every stream, for the symbols of a block.
    join: the symbols of a block of so many elements, read stream by stream in the same order.
    tags_alpha: whether +-alpha leaves the value format; if not, +-alpha is a value like any other.
    """

    name: str
    streams: tuple[Stream, ...]
    split: Callable[[Symbols], tuple[npt.NDArray[np.integer], ...]]
    join: Callable[[Read, int], Symbols]
    tags_alpha: bool = False
