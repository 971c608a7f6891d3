"""Blocks of values to bytes and back: on all threads, or on the GPU where the values and loops for the codec are."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from accel import launch
from accel.codecs.blocks import Cut, starts_of
from accel.codecs.codec import ALPHA_UNKNOWN, OUT_OF_RANGE, TOO_LONG, TOO_SHORT, Alpha, CodecError
from accel.codecs.loops import PATTERNS, is_built_in, packer, unpacker
from accel.formats import FLOAT32, Format
from accel.kernels import cpu
from accel.kernels.cpu import run
from accel.rounding import Parameters, needs_wide, parameters

NO_ALPHA = np.float32(0)
SLACK, SLACK_AN_ELEMENT = 64, 16  # bytes beside a block of an own codec, which may write more than it says
NO_PATTERN = np.uint32(0xFFFFFFFF)  # of no magnitude
FAULTS = {
    TOO_SHORT: "is too short for its streams",
    TOO_LONG: "goes on after its streams",
    OUT_OF_RANGE: "holds an index or a count that is out of range",
    ALPHA_UNKNOWN: "holds +-alpha, but the header has no alpha",
}


class Body(NamedTuple):
    """Encoded blocks: their bytes in order, and the length of each block and of its metadata.

    misfit: the first element that has no code, or minus (1 + the first of a group with too many nonzeros); None where
    all fit.
    """

    pieces: list[npt.NDArray[np.uint8]]
    lengths: npt.NDArray[np.int64]
    metadata: npt.NDArray[np.int64]
    misfit: int | None


def crc32c(data: bytes | memoryview | npt.NDArray[np.uint8], before: int = 0) -> int:
    """CRC-32C (Castagnoli) of the bytes, as RFC 3720 (iSCSI), appendix B.4; before: that of the bytes before them."""
    return int(google_crc32c.extend(before, bytes(data) if isinstance(data, memoryview) else data))


def pack_blocks(
    x: npt.NDArray[np.float32] | torch.Tensor, cut: Cut, fmt: Format, scale: np.float32, alpha: np.float32
) -> Body:
    """The blocks of a flat array, or of a flat tensor on a GPU. alpha: NO_ALPHA tags nothing."""
    if isinstance(x, torch.Tensor):
        if (loops := _gpu_loops(x, cut, fmt)) is not None:
            found = loops.pack_blocks(x, cut, fmt, scale, alpha)
            body, offsets, metadata, misfits = (tensor.cpu().numpy() for tensor in found)
            if not misfits[0]:
                return Body([body], np.diff(offsets), metadata, None)
        x = x.cpu().numpy()  # also where some element has no code: the loops below find the first
    most = sum((-(-fields * bits // 8) for fields, bits in cut.streams_of_full_blocks), start=np.zeros(cut.count))
    is_ours = is_built_in(cut.codec.write) and cut.codec.streams.__module__.startswith("accel.")
    room = most if is_ours else most + SLACK + SLACK_AN_ELEMENT * cut.sizes
    places = starts_of(room.astype(np.int64))
    out = np.empty(int(places[-1]), np.uint8)  # pages that nothing is written to cost nothing
    middles, ends = np.zeros(cut.count, np.int64), np.zeros(cut.count, np.int64)
    misfits = np.full(cut.count, -1)
    divisor, method, fields = as_codes(fmt, scale)
    marks = alpha_of(alpha, cut, fmt)
    run(
        packer(cut.codec.write, method), cut.count, _room(cut), x, cut.bounds, divisor, scale,
        marks.pattern, marks.is_tagged, marks.code, marks.sign, has_zero(fmt), *cut.setting,
        out, places, middles, ends, misfits, *value_fields(fmt), *fields,
        threads=torch.get_num_threads(), align=1, elements=_block_elements(cut),
    )  # fmt: skip
    if (ends - places[:-1] > most).any():
        raise CodecError(f"codec {cut.codec.name!r} writes more than its streams say")
    if (misfits != -1).any():
        block = int(np.argmax(misfits != -1))
        first, found = int(cut.bounds[block]), int(misfits[block])
        return Body([], ends, ends, first + found if found >= 0 else -1 - first + found + 2)
    places = places[:-1]
    if cut.codec.shrink is not None:
        return _shrunk(out, places, ends, cut)
    lengths = ends - places
    begins = np.flatnonzero(np.append(True, places[1:] != ends[:-1])[: cut.count])  # of what lies in one piece
    stops = np.append(begins[1:], cut.count)[: begins.size] - 1
    pieces = [out[places[begin] : ends[stop]] for begin, stop in zip(begins, stops, strict=True)]
    return Body(pieces, lengths, middles - places, None)


def _shrunk(out: npt.NDArray[np.uint8], places: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], cut: Cut) -> Body:
    assert cut.codec.shrink is not None
    pieces, metadata = [], []
    for place, end, size in zip(places, ends, cut.sizes, strict=True):
        piece, length = cut.codec.shrink(out[place:end], int(size), cut.setting)
        pieces.append(np.frombuffer(piece, np.uint8))
        metadata.append(length)
    return Body(pieces, np.array([piece.size for piece in pieces], np.int64), np.array(metadata, np.int64), None)


def unpack_blocks(
    data: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    cut: Cut,
    first: int,
    fmt: Format,
    scale: np.float32,
    alpha: np.float32,
    values: torch.Tensor,
) -> int:
    """Fills in the flat values of blocks from number `first` on; returns how many bytes of them are metadata.

    offsets: where each block starts in data, and where the last one ends. CodecError where a block is wrong.
    """
    if (loops := _gpu_loops(values, cut, fmt)) is not None:
        there = [torch.tensor(array, device=values.device) for array in (data, offsets)]
        found = loops.unpack_blocks(*there, cut, fmt, scale, alpha, values)
        middles, faults = (tensor.cpu().numpy() for tensor in found)
        _check(faults, first, offsets)
        return int(middles.sum())
    here = values if values.device.type == "cpu" else torch.empty(values.shape)
    marks = alpha_of(alpha, cut, fmt)
    count = offsets.size - 1
    bounds = cut.bounds[first : first + count + 1]
    middles, faults = np.zeros(count, np.int64), np.zeros(count, np.int64)
    if cut.codec.restore is not None:
        data, offsets, middles, faults = _restored(data, offsets, cut, bounds)
        _check(faults, first, offsets)
    of_base = np.zeros(count, np.int64)
    _, method, _ = as_codes(fmt, scale)
    run(
        unpacker(cut.codec.read, cut.codec.is_masked, method), count, _room(cut), data, offsets, bounds, scale, alpha,
        bool(alpha > 0), marks.has_codes, marks.code, marks.sign,
        *cut.setting, here.numpy(), of_base, faults, *value_fields(fmt),
        threads=torch.get_num_threads(), align=1, elements=_block_elements(cut),
    )  # fmt: skip
    _check(faults, first, offsets)
    if here is not values:
        values.copy_(here)
    return int((middles if cut.codec.restore is not None else of_base).sum())


def _restored(
    data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], cut: Cut, bounds: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(data, offsets) of the blocks as the loop reads them, bytes of metadata of the given ones, and what is wrong."""
    assert cut.codec.restore is not None
    pieces, metadata = [], []
    for low, high, size in zip(offsets[:-1], offsets[1:], np.diff(bounds), strict=True):
        piece, length = cut.codec.restore(data[low:high], int(size), cut.setting)
        pieces.append(piece)
        metadata.append(length)
    lengths = np.array([piece.size for piece in pieces], np.int64)
    found = np.array(metadata, np.int64)
    whole = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
    return whole, starts_of(lengths), found, np.maximum(-found, 0)


def _check(faults: npt.NDArray[np.int64], first: int, offsets: npt.NDArray[np.int64]) -> None:
    if faults.any():
        block = int(np.argmax(faults != 0))
        size = int(offsets[block + 1] - offsets[block])
        raise CodecError(f"block {first + block} ({size} bytes) {FAULTS[int(faults[block])]}")


def alpha_of(alpha: np.float32, cut: Cut, fmt: Format) -> Alpha:
    """+-alpha as the loops take it; NO_ALPHA for none."""
    has_codes = bool(alpha > 0 and fmt.alpha_code is not None)
    has_pattern = has_codes or (alpha > 0 and cut.codec.tags_alpha)
    pattern = alpha.view(np.uint32) if has_pattern else NO_PATTERN
    code, sign = np.uint32(fmt.alpha_code or 0), np.uint32(fmt.sign_code)
    return Alpha(alpha, pattern, cut.codec.tags_alpha, has_codes, code, sign)


def _gpu_loops(x: torch.Tensor, cut: Cut, fmt: Format) -> ModuleType | None:
    """The loops for blocks of a tensor on a GPU, None where only the CPU has some."""
    if launch.backend(x) is cpu:
        return None
    from accel.codecs import cuda

    return cuda if cuda.serves(cut, fmt) else None


def as_codes(fmt: Format, scale: np.float32) -> tuple[np.floating, str, tuple[object, ...]]:
    """(scale, method, fields): the code of each value of scale * grid(fmt) is the method's code of x / scale.

    PATTERNS where the code is the value's own pattern. In float32 where products are normal numbers and fewer bits than
    float32's tell them apart; else in float64.
    """
    if scale == 1 and replace(fmt, name=FLOAT32.name) == FLOAT32:
        return scale, PATTERNS, parameters(fmt)
    is_plain = fmt.mantissa_bits <= 20 and fmt.min_subnormal * float(scale) >= 2.0**-126
    is_plain = is_plain and max(fmt.max, -fmt.min) * float(scale) < 2.0**127 and not needs_wide(fmt)
    dtype = torch.float32 if is_plain else torch.float64
    method, fields = launch.method_of(fmt, "nearest_even", "ieee", 32, False, dtype)
    return scale if is_plain else np.float64(scale), method, fields


def has_zero(fmt: Format) -> bool:
    """Whether the code 0 is the number 0."""
    return fmt.policy != "scale"


def value_fields(fmt: Format) -> Parameters:
    """The parameters by which the loops decode."""
    return parameters(fmt, wide=needs_wide(fmt))


def _room(cut: Cut) -> int:
    """The most fields of a stream, and the most elements of a block."""
    fields = [float(fields.max(initial=0)) for fields, _ in cut.streams_of_full_blocks]
    return int(max(cut.sizes.max(initial=0), *fields))


def _block_elements(cut: Cut) -> int:
    return cut.numel // max(cut.count, 1)
