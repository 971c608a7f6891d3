"""A tensor as one stream of bytes: header, offset table, blocks (the layout is drawn in README.md)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from accel.codecs.arguments import (
    MAX_DIMENSIONS,
    checked_alpha,
    checked_block,
    checked_format,
    checked_positive,
    on_its_device,
)
from accel.codecs.blocks import Cut, starts_of
from accel.codecs.codec import BLOCK, Codec, CodecError
from accel.codecs.coding import NO_ALPHA, crc32c, pack_blocks, unpack_blocks
from accel.codecs.registry import find_codec
from accel.formats import Format

MAGIC = b"FPSM"
VERSION = 1
PREFIX = struct.Struct("<4sHI")  # magic, version, CRC-32C of everything after it
# exponent bits, mantissa bits, bias, flags, dimensions, block, scale, alpha, metadata bytes, payload bytes
FIELDS = struct.Struct("<BBhBBIffQQ")
OFFSET_BYTES = 4

MAX_BODY_BYTES = (1 << 32) - 1
MAX_NUMEL = (1 << 61) - 1  # float32 elements that 63-bit byte counts reach


@dataclass(frozen=True)
class Header:
    """What a stream says about itself. alpha 0 is none."""

    codec: Codec
    fmt: Format
    shape: tuple[int, ...]
    block: int
    scale: np.float32
    alpha: np.float32
    metadata_bytes: int
    payload_bytes: int

    @cached_property
    def cut(self) -> Cut:
        return Cut(self.codec, self.shape, self.block, self.fmt.bits)

    @property
    def numel(self) -> int:
        return self.cut.numel

    @property
    def body_bytes(self) -> int:
        return self.metadata_bytes + self.payload_bytes

    @property
    def blocks(self) -> int:
        return self.cut.count


@dataclass(frozen=True)
class Packed:
    """An encoded tensor: its stream, and the header read from it. Made by `pack` and `from_bytes`."""

    header: Header
    stream: bytes = field(repr=False)

    @property
    def nbits(self) -> int:
        return 8 * len(self.stream)

    @property
    def bits_by_part(self) -> dict[str, float]:
        """Bits of `header`, `offsets`, `metadata` and `payload`, padding included: whole numbers that sum to nbits."""
        header = self.header
        return {
            "header": 8 * header_bytes(header.codec, header.fmt, len(header.shape)),
            "offsets": 8 * OFFSET_BYTES * header.blocks,
            "metadata": 8 * header.metadata_bytes,
            "payload": 8 * header.payload_bytes,
        }

    def fetched_bytes(self, burst_bytes: int) -> int:
        """Bytes that memory moves when each block is fetched alone, in bursts of so many bytes.

        A block takes every burst that it touches, the first block being aligned to one. Raises CodecError for a burst
        below one byte.
        """
        if type(burst_bytes) is not int or burst_bytes < 1:
            raise CodecError(f"burst_bytes must be a positive integer (got {burst_bytes!r})")
        bounds = _block_bounds(self)
        begins, ends = bounds[:-1], bounds[1:]
        bursts = -(-ends // burst_bytes) - begins // burst_bytes
        return int(bursts[ends > begins].sum()) * burst_bytes

    def to_bytes(self) -> bytes:
        return self.stream

    @staticmethod
    def from_bytes(stream: bytes) -> Packed:
        """The tensor that `to_bytes` gave. Raises CodecError, naming what is wrong, for anything else."""
        if not isinstance(stream, bytes | bytearray | memoryview):
            raise CodecError(f"a stream must be bytes (got {type(stream).__name__})")
        stream = bytes(stream)
        if len(stream) < PREFIX.size:
            raise CodecError(f"the stream is truncated: {len(stream)} bytes, a header has at least {PREFIX.size}")
        magic, version, checksum = PREFIX.unpack_from(stream)
        if magic != MAGIC:
            raise CodecError(f"not a packed tensor: it starts with {magic!r} (expected {MAGIC!r})")
        if version != VERSION:
            raise CodecError(f"the stream has version {version}; this program reads version {VERSION}")
        if crc32c(memoryview(stream)[PREFIX.size :]) != checksum:
            raise CodecError("the stream is damaged or truncated: its CRC-32C does not match")
        packed = Packed(_read_header(stream), stream)
        _check_length(packed)
        return packed


def pack(
    x: torch.Tensor | npt.NDArray[np.floating],
    codec: str = "alpha",
    fmt: str | Mapping[str, object] | Format = "e4m3fn",
    scale: float | None = None,
    alpha: float | None = None,
    block: int = BLOCK,
) -> Packed:
    """Encode a tensor (float32, bfloat16 or float16, any shape) without losing a bit: `unpack` gives it back.

    Every value lies on scale * grid(fmt), the product rounded to float32, or equals +-alpha for a codec that tags
    alpha; NaN becomes the format's canonical NaN. scale (None is 1) and alpha (None or 0 tags nothing) are taken in
    float32. The stream is cut into blocks of `block` elements; codecs of matrices see shape[0] x rest, and `csr` has
    whole rows in a block.
    Raises CodecError for a value that does not fit, with its index, and for an argument out of range.
    """
    encoding, value = find_codec(codec), checked_format(fmt)
    values, block = on_its_device(x), checked_block(block)
    factor, tagged = checked_positive("scale", 1.0 if scale is None else scale), checked_alpha(alpha) or NO_ALPHA
    cut = Cut(encoding, tuple(values.shape), block, value.bits)
    body = pack_blocks(values.reshape(-1), cut, value, factor, tagged)
    if body.misfit is not None:
        raise CodecError(_misfit(values, body.misfit, cut, value, factor))
    bounds = starts_of(body.lengths)
    if bounds[-1] > MAX_BODY_BYTES:
        raise CodecError(
            f"the encoded tensor passes the {MAX_BODY_BYTES} bytes that block offsets reach: pack it in parts"
        )
    metadata = int(body.metadata.sum())
    header = Header(encoding, value, cut.shape, block, factor, tagged, metadata, int(bounds[-1]) - metadata)
    parts: list[Any] = [_write_header(header), bounds[:-1].astype("<u4").tobytes(), *body.pieces]
    checksum = 0
    for part in parts:
        checksum = crc32c(part, checksum)
    return Packed(header, b"".join([PREFIX.pack(MAGIC, VERSION, checksum), *parts]))


def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that was packed: CPU, float32, in its shape; or `out`, contiguous and on any device, filled in.

    Raises CodecError for a stream whose parts contradict, and for another out.
    """
    header = _header_of(packed)
    result = _result(header, out)
    metadata = _unpack(packed, 0, header.cut.count, result.view(-1))
    if metadata != header.metadata_bytes:
        raise CodecError(
            f"the blocks hold {metadata} bytes of metadata and {header.body_bytes - metadata} of payload; the header "
            f"says {header.metadata_bytes} and {header.payload_bytes}"
        )
    return result


def unpack_slice(packed: Packed, start: int, stop: int) -> torch.Tensor:
    """Elements start .. stop of the flattened tensor that was packed; only the blocks that hold them are decoded.

    CPU, float32, of shape (stop - start,). Raises CodecError for a range outside the tensor, and as `unpack` does.
    """
    header = _header_of(packed)
    if not 0 <= start <= stop <= header.numel:
        raise CodecError(f"0 <= start <= stop <= {header.numel} does not hold (got start={start}, stop={stop})")
    if start == stop:
        return torch.empty(0)
    bounds = header.cut.bounds
    first, last = (int(np.searchsorted(bounds, index, "right")) - 1 for index in (start, stop - 1))
    values = torch.empty(int(bounds[last + 1] - bounds[first]))
    _unpack(packed, first, last + 1, values)
    return values[start - int(bounds[first]) : stop - int(bounds[first])].clone()


def _header_of(packed: Packed) -> Header:
    if not isinstance(packed, Packed):
        raise CodecError(f"unpack takes a Packed: make one of bytes by Packed.from_bytes (got {type(packed).__name__})")
    return packed.header


def _result(header: Header, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        try:
            return torch.empty(header.shape)
        except RuntimeError:
            raise CodecError(f"no memory for a tensor of the shape {header.shape}") from None
    fits = isinstance(out, torch.Tensor) and out.dtype == torch.float32
    if not fits or tuple(out.shape) != header.shape or not out.is_contiguous():
        raise CodecError(f"out must be a contiguous float32 tensor of the shape {header.shape}")
    return out


def _unpack(packed: Packed, first: int, last: int, values: torch.Tensor) -> int:
    """Fills in the values of blocks first .. last, flat; returns how many bytes of those blocks are metadata."""
    header = packed.header
    body = np.frombuffer(packed.stream, np.uint8)[len(packed.stream) - header.body_bytes :]
    offsets = _block_bounds(packed)[first : last + 1]
    return unpack_blocks(body, offsets, header.cut, first, header.fmt, header.scale, header.alpha, values)


def header_bytes(codec: Codec, fmt: Format, dimensions: int) -> int:
    """Length of a header, its prefix included."""
    return PREFIX.size + FIELDS.size + sum(len(_text(text)) for text in _names(codec, fmt)) + 8 * dimensions


def _misfit(values: npt.NDArray[np.float32] | torch.Tensor, flat: int, cut: Cut, fmt: Format, scale: np.float32) -> str:
    codec, is_group = cut.codec, flat < 0
    flat = -1 - flat if is_group else flat
    position = tuple(int(i) for i in np.unravel_index(flat, cut.shape))
    if is_group:
        return (
            f"the group of {codec.second} elements at element {flat} (index {position}) has more than {codec.first} "
            f"nonzeros: codec {codec.name!r} cannot hold it"
        )
    grid = f"a value of {fmt.name}" if scale == 1 else f"{scale!s} times a value of {fmt.name}"
    alphas = " or +-alpha" if codec.tags_alpha else ""
    found = np.float32(float(values.reshape(-1)[flat]))
    return (
        f"element {flat} (index {position}) is {found!s}: codec {codec.name!r} needs {grid}{alphas}"
        "; quantize the tensor first"
    )


def _block_bounds(packed: Packed) -> npt.NDArray[np.int64]:
    """Where each block starts in the body, and where the last one ends."""
    header = packed.header
    first = len(packed.stream) - header.body_bytes - OFFSET_BYTES * header.blocks
    offsets = np.frombuffer(packed.stream, "<u4", header.blocks, first)
    bounds = np.append(offsets.astype(np.int64), header.body_bytes)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise CodecError("the stream's block offsets do not rise from 0 to the end of its body")
    return bounds


def _names(codec: Codec, fmt: Format) -> tuple[str, str, str]:
    return codec.name, fmt.policy, fmt.name


def _text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > 255:
        raise CodecError(f"a format's name may have 255 bytes (got {len(encoded)}: {text[:40]!r}...)")
    return bytes([len(encoded)]) + encoded


def _flags(fmt: Format) -> int:
    return fmt.subnormals | (not fmt.signed) << 1 | fmt.alpha_codes << 2


def _write_header(header: Header) -> bytes:
    fmt = header.fmt
    fields = FIELDS.pack(
        fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, _flags(fmt), len(header.shape), header.block,
        header.scale, header.alpha, header.metadata_bytes, header.payload_bytes,
    )  # fmt: skip
    names = b"".join(_text(text) for text in _names(header.codec, fmt))
    return fields + names + struct.pack(f"<{len(header.shape)}Q", *header.shape)


def _read_header(stream: bytes) -> Header:
    try:
        fields = FIELDS.unpack_from(stream, PREFIX.size)
        exponent_bits, mantissa_bits, bias, flags, dimensions, block, scale, alpha, *part_bytes = fields
        position = PREFIX.size + FIELDS.size
        names = []
        for _ in range(3):
            (length,) = struct.unpack_from("<B", stream, position)
            (name,) = struct.unpack_from(f"<{length}s", stream, position + 1)
            names.append(name.decode())
            position += 1 + length
        codec, policy, name = names
        if dimensions > MAX_DIMENSIONS:
            raise CodecError(f"{dimensions} dimensions; at most {MAX_DIMENSIONS}")
        shape = struct.unpack_from(f"<{dimensions}Q", stream, position)
        if math.prod(max(size, 1) for size in shape) > MAX_NUMEL:
            raise CodecError(f"shape {shape} is larger than any tensor")
        if flags > 7:
            raise CodecError(f"the format's flags must be 0 to 7 (got {flags})")
        subnormals, unsigned, alpha_codes = (bool(flags >> bit & 1) for bit in range(3))
        return Header(
            find_codec(codec),
            Format(name, exponent_bits, mantissa_bits, bias, policy, subnormals, not unsigned, alpha_codes),
            shape,
            checked_block(block),
            checked_positive("scale", scale),
            checked_alpha(alpha) or NO_ALPHA,
            *part_bytes,
        )
    except (struct.error, ValueError) as error:
        raise CodecError(f"the stream's header is wrong: {error}") from None


def _check_length(packed: Packed) -> None:
    """CodecError unless the stream is as long as its header says and long enough for the tensor that it describes."""
    header = packed.header
    front = header_bytes(header.codec, header.fmt, len(header.shape)) + OFFSET_BYTES * header.blocks
    length = front + header.body_bytes
    if length != len(packed.stream):
        raise CodecError(f"the stream is {len(packed.stream)} bytes long, its header says {length}")
    if header.cut.least_bytes > header.body_bytes:
        raise CodecError(f"{header.body_bytes} bytes of blocks are too few for the shape {header.shape}")
