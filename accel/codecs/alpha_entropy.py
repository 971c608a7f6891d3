"""The tags of `alpha_tag`, entropy-coded block by block (range coder of the library constriction, on the CPU only).

A block: how many values, +alphas and -alphas it holds, the coded tags in words of 32 bits, the payload of the values.
The three counts are the model: the tags cost their entropy within the block, and nothing where all are alike.
"""

from __future__ import annotations

import math
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from accel.codecs import alpha_tag
from accel.codecs.codec import OUT_OF_RANGE, TOO_SHORT, VALUE, Codec, Content, Number, Setting, Stream, bit_length

SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)
WORD_BITS = 32
CODER_BITS = (0.0, 1.0, 2.0, 3.0)  # that the coder takes beside the entropy, each as often as another
Bytes = npt.NDArray[np.uint8]


def streams(content: Content, setting: Setting) -> tuple[Stream, ...]:
    """The coder fills up its last word. As many +alphas as -alphas are expected."""
    return (
        Stream("metadata", 3, bit_length(content.numel), "fixed"),
        Stream("metadata", _expected_words(content) if content.is_expected else _words(content), WORD_BITS),
        Stream("payload", content.survivors, setting.bits),
    )


def _words(content: Content) -> Number:
    kinds = _entropy(content.survivors, content.alphas / 2, content.alphas / 2)
    # Counts of three kinds, as they happen to be, have a smaller entropy than the shares that they come from.
    kinds = np.maximum(kinds - math.log2(math.e), 0) if content.is_expected else kinds
    entropy = _entropy(content.numel - content.nonzeros, content.nonzeros) + kinds
    words = sum(np.ceil((entropy + bits) / WORD_BITS) for bits in CODER_BITS) / len(CODER_BITS)
    return np.where(entropy > 0, words, 0)


def _entropy(*counts: Number) -> Number:
    """Bits of symbols that occur so often, all together."""
    whole = sum(np.asarray(count, np.float64) for count in counts)
    return sum(count * np.log2(np.where(count > 0, whole, 1) / np.where(count > 0, count, 1)) for count in counts)


def _expected_words(content: Content) -> Number:
    """The mean over how many nonzeros a block may have."""
    from scipy.stats import binom

    numel, share = int(content.numel), min(content.nonzeros / content.numel, 1.0)
    alpha_share = content.alphas / content.nonzeros if content.nonzeros else 0.0
    lowest, highest = (int(end) for end in binom.interval(1 - 1e-12, numel, share))
    nonzeros = np.arange(max(lowest, 0), highest + 1)
    words = _words(Content(numel, nonzeros, alpha_share * nonzeros, 1, is_expected=True))
    return float((words * binom.pmf(nonzeros, numel, share)).sum())


def shrink(block: Bytes, numel: int, setting: Setting) -> tuple[bytes, int]:
    """A block of `alpha_tag` with its tags coded, and how many bytes of it are metadata."""
    tag_bytes = -(-2 * numel // 8)
    tags = (block[:tag_bytes, None] >> SHIFTS & 3).reshape(-1)[:numel].astype(np.int32)
    counts = np.bincount(tags, minlength=4)
    metadata = _write_counts(counts, numel)
    if counts.max() < numel:
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(tags, _model(counts))
        metadata += coder.get_compressed().astype("<u4").tobytes()
    return metadata + block[tag_bytes:].tobytes(), len(metadata)


def restore(block: Bytes, numel: int, setting: Setting) -> tuple[Bytes, int]:
    """The block of `alpha_tag`, and how many bytes of the given one are metadata, or minus what is wrong with it."""
    length, counts = _read_counts(block, numel)
    if counts is None:
        return block, -TOO_SHORT if block.size < length else -OUT_OF_RANGE
    payload = -(-int(counts[VALUE]) * setting.bits // 8)
    word_bytes = block.size - length - payload
    if word_bytes < 0:
        return block, -TOO_SHORT
    tags = _decoded(block[length : length + word_bytes], counts, numel)
    if tags is None:
        return block, -OUT_OF_RANGE
    padded = np.zeros(-(-numel // 4) * 4, np.uint8)
    padded[:numel] = tags
    tag_bytes = np.bitwise_or.reduce(padded.reshape(-1, 4) << SHIFTS, axis=1)
    return np.concatenate([tag_bytes, block[block.size - payload :]]), length + word_bytes


def _decoded(words: Bytes, counts: npt.NDArray[np.int64], numel: int) -> npt.NDArray[np.integer] | None:
    """The tags, None where the words are not those of tags with these counts."""
    if counts.max() == numel:
        return np.full(numel, counts.argmax()) if words.size == 0 else None
    if words.size % 4:
        return None
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words.tobytes(), "<u4").astype(np.uint32))
    try:
        tags = coder.decode(_model(counts), numel)
    except (AssertionError, ValueError):
        return None
    is_whole = coder.maybe_exhausted() and (np.bincount(tags, minlength=4) == counts).all()
    return tags if is_whole else None


def _model(counts: npt.NDArray[np.int64]) -> Any:
    return constriction.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)


def _write_counts(counts: npt.NDArray[np.int64], numel: int) -> bytes:
    width = numel.bit_length()
    fields = sum(int(count) << width * place for place, count in enumerate(counts[1:]))
    return fields.to_bytes(-(-3 * width // 8), "little")


def _read_counts(block: Bytes, numel: int) -> tuple[int, npt.NDArray[np.int64] | None]:
    """How many bytes they take, and the counts of all four tags; None where they are no counts of `numel` elements."""
    width = numel.bit_length()
    length = -(-3 * width // 8)
    fields = int.from_bytes(block[:length].tobytes(), "little")
    found = [fields >> width * place & ((1 << width) - 1) for place in range(3)]
    if block.size < length or sum(found) > numel:
        return length, None
    return length, np.array([numel - sum(found), *found])


ALPHA_ENTROPY = Codec(
    "alpha_entropy", streams, alpha_tag.write, alpha_tag.read, tags_alpha=True, is_counted=False,
    base=alpha_tag.ALPHA_TAG, shrink=shrink, restore=restore,
)  # fmt: skip
