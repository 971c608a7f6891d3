"""The codecs, by name."""

from __future__ import annotations

import difflib

from accel.codecs.alpha import ALPHA
from accel.codecs.bitmask import BITMASK
from accel.codecs.codec import Codec, CodecError
from accel.codecs.dense import DENSE

CODECS = {codec.name: codec for codec in (DENSE, BITMASK, ALPHA)}


def find_codec(name: str) -> Codec:
    """The codec of that name; CodecError with the nearest name where there is none."""
    if name in CODECS:
        return CODECS[name]
    close = difflib.get_close_matches(str(name), CODECS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise CodecError(f"unknown codec {name!r}{hint}; allowed: {', '.join(CODECS)}")
