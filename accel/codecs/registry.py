"""The codecs, by name: the one entry that a new codec adds; and codecs of one's own."""

from __future__ import annotations

import re

from accel.codecs.alpha import ALPHA
from accel.codecs.alpha_entropy import ALPHA_ENTROPY
from accel.codecs.alpha_tag import ALPHA_TAG
from accel.codecs.bitmask import BITMASK
from accel.codecs.bitmask2 import BITMASK2
from accel.codecs.codec import Codec, CodecError
from accel.codecs.coo import COO
from accel.codecs.csr import CSR
from accel.codecs.dense import DENSE
from accel.codecs.nm import nm
from accel.codecs.rle import rle
from accel.formats import nearest

CODECS = {
    codec.name.partition("(")[0]: codec
    for codec in (DENSE, BITMASK, BITMASK2, rle(), COO, CSR, nm(), ALPHA_TAG, ALPHA, ALPHA_ENTROPY)
}
"""With their usual parameters; the others are written `rle(6)`, `nm(1:4)`."""


def register_codec(codec: Codec) -> Codec:
    """Make a codec of one's own known by its name, to everything in this process: packing and unpacking, the ledger,
    configurations. Returns it. `check_codec` tells whether it keeps its word.

    Raises CodecError for what is not a codec, and for a name that another one has or that is not made of lower case
    letters, digits and _, the first a letter.
    """
    if not isinstance(codec, Codec):
        raise CodecError(f"what is registered must be a Codec (got {type(codec).__name__})")
    if not re.fullmatch("[a-z][a-z0-9_]*", codec.name):
        message = "must be made of lower case letters, digits and _, the first a letter"
        raise CodecError(f"a codec's name {message} (got {codec.name!r})")
    if CODECS.setdefault(codec.name, codec) is not codec:
        raise CodecError(f"there is another codec {codec.name!r}")
    return codec


def find_codec(name: str) -> Codec:
    """The codec of that name: `bitmask`, `rle` or `rle(6)`, `nm` or `nm(1:4)`.

    Raises CodecError with the nearest name where there is none, and for parameters out of range.
    """
    if not isinstance(name, str):
        raise CodecError(f"a codec is given by its name (got {type(name).__name__})")
    if name in CODECS:
        return CODECS[name]
    if found := re.fullmatch(r"rle\(([0-9]{1,4})\)", name):
        run_bits = int(found[1])
        if not 1 <= run_bits <= 16:
            raise CodecError(f"codec {name!r}: a run takes 1 to 16 bits")
        return rle(run_bits)
    if found := re.fullmatch(r"nm\(([0-9]{1,4}):([0-9]{1,4})\)", name):
        kept, group = int(found[1]), int(found[2])
        if not 1 <= kept <= group <= 256:
            raise CodecError(f"codec {name!r}: 1 <= n <= m <= 256 does not hold")
        return nm(kept, group)
    raise CodecError(
        f"unknown codec {name!r}{nearest(name, CODECS)}; allowed: {', '.join(CODECS)}, also rle(BITS) and nm(N:M)"
    )
