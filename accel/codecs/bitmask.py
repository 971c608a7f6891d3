"""Zero-value compression: one bit an element says which are nonzero, and only those are stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from accel.codecs.codec import Codec, Read, Stream, Symbols, Tag

MASK = Stream("metadata", "numel", bits=1)
PAYLOAD = Stream("payload", "nonzeros")


def split(symbols: Symbols) -> tuple[npt.NDArray[np.integer], ...]:
    nonzero = symbols.tags != Tag.ZERO
    return nonzero.astype(np.uint8), symbols.codes[nonzero]


def join(read: Read, numel: int) -> Symbols:
    tags = read(MASK, numel).astype(np.uint8)
    codes = np.zeros(numel, np.uint32)
    nonzero = tags != Tag.ZERO
    codes[nonzero] = read(PAYLOAD, int(np.count_nonzero(nonzero)))
    return Symbols(tags, codes)


BITMASK = Codec("bitmask", (MASK, PAYLOAD), split, join)
