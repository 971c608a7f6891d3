"""How a tensor is cut into blocks, and what the streams of all of them depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from accel.codecs.codec import MAX_ROW, Codec, CodecError, Content, Setting


@dataclass(frozen=True)
class Cut:
    """A tensor of `shape`, seen as shape[0] x rest (one row for one dimension), in blocks of about `block` elements.

    Raises CodecError where the codec has no such blocks.
    """

    codec: Codec
    shape: tuple[int, ...]
    block: int
    bits: int  # of a code

    def __post_init__(self) -> None:
        if self.codec.rows == "whole" and self.numel and self.row_length > MAX_ROW:
            raise CodecError(f"{self.codec.name}: a row may have {MAX_ROW} elements (got {self.row_length})")
        if self.codec.rows == "cut" and self.row_length > self.block and self.block % self.codec.second:
            raise CodecError(f"{self.codec.name}: block must be a multiple of {self.codec.second} (got {self.block})")

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def row_length(self) -> int:
        """At least 1."""
        return max(math.prod(self.shape[1:]) if len(self.shape) > 1 else self.numel, 1)

    @property
    def _rows_a_block(self) -> int:
        """0 where a row takes several blocks."""
        is_cut = self.codec.rows == "cut" and self.row_length > self.block
        return 0 if is_cut else max(self.block // self.row_length, 1)

    @cached_property
    def count(self) -> int:
        """Blocks."""
        if self.codec.rows == "ignored":
            return -(-self.numel // self.block)
        rows = self.numel // self.row_length
        if self._rows_a_block:
            return -(-rows // self._rows_a_block)
        return rows * -(-self.row_length // self.block)

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """Where each block starts in the flat tensor, and the end of the last one."""
        step = self.block if self.codec.rows == "ignored" else self.row_length * self._rows_a_block
        if step:
            starts = np.arange(0, self.numel, step)
        else:
            rows = np.arange(0, self.numel, self.row_length)
            starts = (rows[:, None] + np.arange(0, self.row_length, self.block)).reshape(-1)
        return np.append(starts, self.numel)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.diff(self.bounds)

    @cached_property
    def setting(self) -> Setting:
        codec = self.codec
        if codec.rows == "ignored":
            indices = min(self.numel, self.block)
        else:
            indices = self.row_length if codec.rows == "whole" else codec.second
        return Setting(self.bits, max(indices - 1, 0).bit_length(), self.row_length, codec.first, codec.second)

    @property
    def least_bytes(self) -> int:
        """Bytes that the blocks take at least, without looking at each."""
        whole = Content(self.numel, 0, 0, max(self.numel // self.row_length, 1))
        streams = self.codec.streams(whole, self.setting)
        return sum(int(stream.fields * stream.bits) // 8 for stream in streams if stream.length == "fixed")

    def content(self, nonzeros: npt.NDArray[np.int64], alphas: npt.NDArray[np.int64]) -> Content:
        """What the blocks hold, given their counts."""
        return Content(self.sizes, nonzeros, alphas, np.maximum(self.sizes // self.row_length, 1))

    @cached_property
    def streams_of_full_blocks(self) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """(fields, bits) that no block passes as the loops write it, for each stream: without or with only +-alpha."""
        codec = self.codec.base or self.codec
        cases = [codec.streams(self.content(self.sizes, self.sizes * share), self.setting) for share in (0, 1)]
        sizes = np.ones(self.count)
        return [
            (np.maximum(a.fields, b.fields) * sizes, np.maximum(a.bits, b.bits) * sizes)
            for a, b in zip(*cases, strict=True)
        ]


def starts_of(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where pieces of such lengths start, one after another, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
