"""How many zeros, +-alphas and other values a tensor holds: all that the length of a stream depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from accel.codecs.arguments import as_float32, checked_alpha, checked_block
from accel.codecs.codec import BLOCK, MAX_BLOCK, CodecError
from accel.kernels import cpu
from accel.kernels.jit import kernel


@dataclass(frozen=True)
class Counts:
    """What a tensor holds. A nonzero is any element but +0.0.

    negative_alphas: how many of the `alphas` are -alpha; None means half of them.
    code_histogram: how often each distinct value occurs, in any order; None where it was not counted.
    Raises CodecError for counts that contradict each other.
    """

    numel: int
    nonzeros: int
    alphas: int = 0
    negative_alphas: int | None = None
    code_histogram: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alphas <= self.nonzeros <= self.numel:
            raise CodecError(
                f"counts: 0 <= alphas <= nonzeros <= numel does not hold (got alphas={self.alphas}, "
                f"nonzeros={self.nonzeros}, numel={self.numel})"
            )
        if self.negative_alphas is not None and not 0 <= self.negative_alphas <= self.alphas:
            raise CodecError(f"counts: negative_alphas must be 0 to alphas={self.alphas} (got {self.negative_alphas})")
        if self.code_histogram is not None and sum(self.code_histogram) != self.numel:
            raise CodecError(f"counts: code_histogram must sum to numel={self.numel} (got {sum(self.code_histogram)})")

    @property
    def survivors(self) -> int:
        return self.nonzeros - self.alphas


@dataclass(frozen=True, eq=False)
class BlockCounts:
    """The counts of each block of `block` elements (the last may be shorter).

    counts: int64 of shape (2, blocks), nonzeros and +-alphas, on the device of the tensor that was counted: reading
    them is what waits for a GPU.
    """

    counts: torch.Tensor = field(repr=False)
    numel: int
    block: int = BLOCK

    @property
    def nonzeros(self) -> npt.NDArray[np.int64]:
        return self.counts[0].cpu().numpy()

    @property
    def alphas(self) -> npt.NDArray[np.int64]:
        return self.counts[1].cpu().numpy()

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Elements of each block."""
        return np.minimum(self.numel - np.arange(0, self.numel, self.block), self.block)

    @property
    def total(self) -> Counts:
        return Counts(self.numel, int(self.nonzeros.sum()), int(self.alphas.sum()))


def count_blocks(
    x: torch.Tensor | npt.NDArray[np.floating], alpha: float | None = None, block: int = BLOCK
) -> BlockCounts:
    """Count the nonzeros and +-alphas of every block of a tensor or array, in one pass.

    alpha is compared in float32; None or 0 tags nothing. Raises CodecError for an x, alpha or block out of range.
    """
    words = as_float32(x).reshape(-1).view(np.int32)
    block, tagged = checked_block(block), checked_alpha(alpha)
    alpha_word = np.int32(0) if tagged is None else tagged.view(np.int32)
    counts = np.zeros((2, block_count(words.size, block)), np.int64)
    arguments = (words, alpha_word, block, counts[0], counts[1])
    cpu.run(_count_blocks, words.size, *arguments, threads=torch.get_num_threads(), align=block)
    return BlockCounts(torch.from_numpy(counts), words.size, block)


def block_count(numel: int, block: int) -> int:
    """How many blocks numel elements take."""
    return -(-numel // block)


@kernel
def _count_blocks(start, stop, words, alpha_word, block, nonzeros, alphas):  # type: ignore[no-untyped-def]
    for first in range(start, stop, block):
        piece = words[first : min(first + block, stop)]
        zeros, matches = np.int32(0), np.int32(0)
        for i in range(piece.size):
            zeros = np.int32(zeros + np.int32(piece[i] == 0))
            matches = np.int32(matches + np.int32(np.int32(piece[i] & np.int32(0x7FFFFFFF)) == alpha_word))
        nonzeros[first // block] = piece.size - zeros
        alphas[first // block] = matches if alpha_word != 0 else 0


def count_codes(codes: torch.Tensor) -> npt.NDArray[np.int64]:
    """How often each code occurs in a uint8 tensor: int64 of shape (256,)."""
    flat = codes.reshape(-1).numpy()
    histograms = np.zeros((block_count(flat.size, MAX_BLOCK), 256), np.int64)
    cpu.run(_count_codes, flat.size, flat, histograms, threads=torch.get_num_threads(), align=MAX_BLOCK)
    return histograms.sum(axis=0)


@kernel
def _count_codes(start, stop, codes, histograms):  # type: ignore[no-untyped-def]
    for low in range(start, stop, MAX_BLOCK):
        block, histogram = codes[low : min(low + MAX_BLOCK, stop)], histograms[low // MAX_BLOCK]
        for i in range(block.size):
            histogram[block[i]] += 1
