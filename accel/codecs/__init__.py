"""Sparse encodings: tensors to bit streams and back, and the bits that they cost (see README.md in this folder)."""

from __future__ import annotations

from accel.codecs.check import check_codec
from accel.codecs.codec import Codec, CodecError
from accel.codecs.counts import BlockCounts, Counts, count_blocks, count_codes
from accel.codecs.footprint import Footprint, footprint, footprint_of_blocks
from accel.codecs.packed import Packed, pack, unpack, unpack_slice
from accel.codecs.registry import CODECS, find_codec, register_codec

__all__ = [
    "CODECS",
    "BlockCounts",
    "Codec",
    "CodecError",
    "Counts",
    "Footprint",
    "Packed",
    "check_codec",
    "count_blocks",
    "count_codes",
    "find_codec",
    "footprint",
    "footprint_of_blocks",
    "pack",
    "register_codec",
    "unpack",
    "unpack_slice",
]
