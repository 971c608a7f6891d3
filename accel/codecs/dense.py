"""Every value, one after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from accel.codecs.codec import Codec, Read, Stream, Symbols

PAYLOAD = Stream("payload", "numel")


def split(symbols: Symbols) -> tuple[npt.NDArray[np.uint32]]:
    return (symbols.codes,)


def join(read: Read, numel: int) -> Symbols:
    codes = read(PAYLOAD, numel)
    return Symbols((codes != 0).astype(np.uint8), codes)


DENSE = Codec("dense", (PAYLOAD,), split, join)
