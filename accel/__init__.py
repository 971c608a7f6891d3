"""The hardware: number formats, rounding, pruning and encodings, as a chip computes them, bit for bit."""

import accel.kernels.openmp  # before torch  # noqa: F401

# isort: split
from accel.block_formats import BlockFormat
from accel.codecs import (
    CODECS,
    BlockCounts,
    CodecError,
    Counts,
    Footprint,
    Packed,
    check_codec,
    count_blocks,
    count_codes,
    find_codec,
    footprint,
    footprint_of_blocks,
    pack,
    register_codec,
    unpack,
    unpack_slice,
)
from accel.datapath import Convolution, Mac, conv_dgrad, conv_forward, conv_wgrad, mac, macs, matmul
from accel.formats import Format
from accel.ledger import Ledger
from accel.machine import Machine, machine
from accel.operations import (
    BlockCodes,
    decode,
    encode,
    largest_magnitude,
    prune,
    prune_quantize,
    quantize,
    quantize_encode,
)
from accel.presets import format, formats
from accel.random import stream_id
from accel.recommendation import Point, Recommendation, recommend
from accel.statistics import Log2Statistics, log2_statistics

__all__ = [
    "CODECS",
    "BlockCodes",
    "BlockCounts",
    "BlockFormat",
    "CodecError",
    "Convolution",
    "Counts",
    "Footprint",
    "Format",
    "Ledger",
    "Log2Statistics",
    "Mac",
    "Machine",
    "Packed",
    "Point",
    "Recommendation",
    "check_codec",
    "conv_dgrad",
    "conv_forward",
    "conv_wgrad",
    "count_blocks",
    "count_codes",
    "decode",
    "encode",
    "find_codec",
    "footprint",
    "footprint_of_blocks",
    "format",
    "formats",
    "largest_magnitude",
    "log2_statistics",
    "mac",
    "machine",
    "macs",
    "matmul",
    "pack",
    "prune",
    "prune_quantize",
    "quantize",
    "quantize_encode",
    "recommend",
    "register_codec",
    "stream_id",
    "unpack",
    "unpack_slice",
]
