"""Four streams, for stochastically pruned tensors: +-alpha leaves the value format and costs three bits.

Which elements are nonzero, which of those are values (not +-alpha), the signs of +-alpha (1 is -alpha), the values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from accel.codecs.codec import Codec, Read, Stream, Symbols, Tag

NONZERO = Stream("metadata", "numel", bits=1)
IS_VALUE = Stream("metadata", "nonzeros", bits=1)
SIGN = Stream("metadata", "alphas", bits=1)
PAYLOAD = Stream("payload", "survivors")


def split(symbols: Symbols) -> tuple[npt.NDArray[np.integer], ...]:
    nonzero = symbols.tags != Tag.ZERO
    tags = symbols.tags[nonzero]
    is_value = tags == Tag.VALUE
    sign = tags[~is_value] == Tag.NEGATIVE_ALPHA
    values = symbols.codes[nonzero][is_value]
    return nonzero.astype(np.uint8), is_value.astype(np.uint8), sign.astype(np.uint8), values


def join(read: Read, numel: int) -> Symbols:
    nonzero = np.flatnonzero(read(NONZERO, numel))
    is_value = read(IS_VALUE, nonzero.size) != 0
    alphas, values = nonzero[~is_value], nonzero[is_value]
    tags = np.zeros(numel, np.uint8)
    tags[alphas] = np.where(read(SIGN, alphas.size), Tag.NEGATIVE_ALPHA, Tag.POSITIVE_ALPHA)
    tags[values] = Tag.VALUE
    codes = np.zeros(numel, np.uint32)
    codes[values] = read(PAYLOAD, values.size)
    return Symbols(tags, codes)


ALPHA = Codec("alpha", (NONZERO, IS_VALUE, SIGN, PAYLOAD), split, join, tags_alpha=True)
