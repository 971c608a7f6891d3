"""The codecs, by name."""

from __future__ import annotations

from accel.codecs.alpha import ALPHA
from accel.codecs.bitmask import BITMASK
from accel.codecs.codec import Codec, CodecError
from accel.codecs.dense import DENSE
from accel.formats import nearest

CODECS = {codec.name: codec for codec in (DENSE, BITMASK, ALPHA)}


def find_codec(name: str) -> Codec:
    """The codec of that name; CodecError with the nearest name where there is none."""
    if name in CODECS:
        return CODECS[name]
    raise CodecError(f"unknown codec {name!r}{nearest(name, CODECS)}; allowed: {', '.join(CODECS)}")
