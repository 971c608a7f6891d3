"""What an encoded tensor costs: counted on its stream, or expected from its counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from accel.codecs.arguments import as_float32, checked_block, checked_format
from accel.codecs.blocks import Cut
from accel.codecs.codec import BLOCK, Codec, CodecError, Content, Stream
from accel.codecs.counts import BlockCounts, Counts
from accel.codecs.packed import OFFSET_BYTES, header_bytes, pack
from accel.codecs.registry import find_codec
from accel.formats import Format, nearest


@dataclass(frozen=True)
class Footprint:
    """Bits of an encoded tensor, padding included, and the entropies to hold them against.

    bits_by_part: `header`, `offsets`, `metadata`, `payload`; whole numbers where they were counted.
    tag_entropy_bits: symbol entropy of {0, +alpha, -alpha, value} over all elements plus the raw bits of the values:
        the limit of codecs that store survivors raw.
    order0_entropy_bits: entropy of the codes over all elements; None where their histogram is not known.
    """

    codec: str
    format: str
    numel: int
    bits_by_part: dict[str, float]
    tag_entropy_bits: float
    order0_entropy_bits: float | None

    @property
    def nbits(self) -> float:
        return sum(self.bits_by_part.values())

    @property
    def bits_per_element(self) -> float:
        """nbits / numel, NaN for an empty tensor."""
        return self.nbits / self.numel if self.numel else math.nan


def footprint(
    x: torch.Tensor | npt.NDArray[np.floating] | Counts | Mapping[str, Any],
    *,
    codec: str,
    fmt: str | Mapping[str, object] | Format,
    alpha: float | None = None,
    scale: float | None = None,
    block: int = BLOCK,
    shape: tuple[int, ...] | None = None,
) -> Footprint:
    """What x costs when it is packed as `pack` packs it.

    x: a tensor or array, whose stream is made and measured; or Counts (or a mapping with its fields) for the closed
    form: the expected length for a tensor of `shape` (None: 1-D) with such counts, whose elements are independent.
    Counts already hold what alpha and scale would tell.
    Raises CodecError as `pack` does, and for counts that contradict each other or a shape that is not theirs.
    """
    if isinstance(x, Counts | Mapping):
        counts = x if isinstance(x, Counts) else _counts_of(x)
        return _closed_form(counts, find_codec(codec), checked_format(fmt), checked_block(block), shape)
    packed = pack(x, codec, fmt, scale, alpha, block)
    header = packed.header
    return _footprint(header.codec, header.fmt, packed.bits_by_part, _count(as_float32(x), header.alpha))


def footprint_of_blocks(
    counts: BlockCounts, codec: str, fmt: str | Mapping[str, object] | Format, shape: tuple[int, ...]
) -> Footprint:
    """The same bits as `footprint` of the tensor that `count_blocks` counted, without making its stream.

    shape: the tensor's. Raises CodecError where it does not hold counts.numel elements, and for a codec whose length
    does not follow from such counts (`Codec.is_counted`).
    """
    encoding, value = find_codec(codec), checked_format(fmt)
    _check_shape(shape, counts.numel)
    if not encoding.is_counted:
        raise CodecError(f"the length of a stream of {encoding.name!r} does not follow from counts: pack the tensor")
    cut = Cut(encoding, tuple(shape), counts.block, value.bits)
    bits = _fixed_bits(encoding, value, len(shape), cut.count)
    for stream in encoding.streams(cut.content(counts.nonzeros, counts.alphas), cut.setting):
        stream_bits = np.asarray(stream.fields * stream.bits) * np.ones(cut.count, np.int64)
        bits[stream.part] += int((-(-stream_bits // 8) * 8).sum())
    return _footprint(encoding, value, bits, counts.total)


def _closed_form(counts: Counts, codec: Codec, fmt: Format, block: int, shape: tuple[int, ...] | None) -> Footprint:
    shape = (counts.numel,) if shape is None else tuple(shape)
    _check_shape(shape, counts.numel)
    cut = Cut(codec, shape, block, fmt.bits)
    bits = _fixed_bits(codec, fmt, len(shape), cut.count)
    for size, blocks in zip(*np.unique(cut.sizes, return_counts=True), strict=True):
        share = size / counts.numel
        rows = max(int(size) // cut.row_length, 1)
        content = Content(int(size), counts.nonzeros * share, counts.alphas * share, rows, is_expected=True)
        for stream in codec.streams(content, cut.setting):
            bits[stream.part] += int(blocks) * (float(stream.fields * stream.bits) + _padding(stream, int(size)))
    return _footprint(codec, fmt, bits, counts)


def _padding(stream: Stream, numel: int) -> float:
    """Bits that fill up the last byte of a stream of a block, on average."""
    bits = float(stream.fields * stream.bits)
    if stream.length != "random":
        return -bits % 8 if stream.length == "fixed" else 0.0
    lengths = np.arange(8)  # the number of fields, binomial, modulo 8: the inverse transform of its characteristic one
    turns = np.exp(2j * np.pi * lengths / 8)
    share = min(float(stream.fields) / numel, 1.0)
    probabilities = np.fft.fft((1 - share + share * turns) ** numel).real / 8
    return float((probabilities * (-lengths * int(stream.bits) % 8)).sum())


def _check_shape(shape: tuple[int, ...], numel: int) -> None:
    if math.prod(shape) != numel:
        raise CodecError(f"shape {tuple(shape)} does not hold the {numel} elements that were counted")


def _fixed_bits(codec: Codec, fmt: Format, dimensions: int, blocks: int) -> dict[str, float]:
    header = 8 * header_bytes(codec, fmt, dimensions)
    return {"header": header, "offsets": 8 * OFFSET_BYTES * blocks, "metadata": 0, "payload": 0}


def _footprint(codec: Codec, fmt: Format, bits_by_part: dict[str, float], counts: Counts) -> Footprint:
    negative = counts.alphas / 2 if counts.negative_alphas is None else counts.negative_alphas
    tags = (counts.numel - counts.nonzeros, counts.alphas - negative, negative, counts.survivors)
    tag_entropy_bits = _entropy_bits(tags) + fmt.bits * counts.survivors
    order0_entropy_bits = None if counts.code_histogram is None else _entropy_bits(counts.code_histogram)
    return Footprint(codec.name, fmt.name, counts.numel, bits_by_part, tag_entropy_bits, order0_entropy_bits)


def _entropy_bits(counts: Iterable[float]) -> float:
    """Entropy of symbols that occur so often, in bits over all of them."""
    present = np.array([count for count in counts if count], np.float64)
    return float((present * np.log2(present.sum() / present)).sum())


def _count(x: npt.NDArray[np.float32], alpha: np.float32) -> Counts:
    bit_patterns = np.where(np.isnan(x), np.float32(np.nan), x).view(np.int32)  # one for each code that occurs
    words, occurrences = np.unique(bit_patterns, return_counts=True)
    values = words.view(np.float32)
    tagged = (np.abs(values) == alpha) & (alpha > 0)
    return Counts(
        numel=x.size,
        nonzeros=x.size - int(occurrences[words == 0].sum()),
        alphas=int(occurrences[tagged].sum()),
        negative_alphas=int(occurrences[tagged & (values < 0)].sum()),
        code_histogram=tuple(occurrences.tolist()),
    )


def _counts_of(mapping: Mapping[str, Any]) -> Counts:
    allowed = {field.name for field in fields(Counts)}
    for key in mapping:
        if key not in allowed:
            hint = nearest(key, allowed)
            raise CodecError(f"counts: unknown key {key!r}{hint}; allowed: {', '.join(sorted(allowed))}")
    for key in ("numel", "nonzeros"):
        if key not in mapping:
            raise CodecError(f"counts: {key} is missing")
    return Counts(**mapping)
