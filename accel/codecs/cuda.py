"""CUDA loops of the codecs `bitmask`, `alpha_tag` and `alpha`: count, prefix sum, write; and back.

A CUDA block takes a block of elements, a thread GROUP neighbouring elements at a time. The whole encoded block is put
together in shared memory, each stream from the byte on where it belongs, and then goes out at once; reading is the
reverse. Where the fields of a thread's elements lie follows from prefix sums over the threads' counts.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import torch
from numba import cuda

from accel.codecs.blocks import Cut
from accel.codecs.codec import (
    ALPHA_UNKNOWN,
    BLOCK,
    FITS,
    NEGATIVE_ALPHA,
    POSITIVE_ALPHA,
    TOO_LONG,
    TOO_SHORT,
    VALUE,
    ZERO,
    Content,
)
from accel.codecs.coding import alpha_of, as_codes, has_zero, value_fields
from accel.codecs.symbols import code_with_alpha, coded, decoded, is_misfit, tag_of, value_with_alpha
from accel.formats import Format
from accel.kernels.cpu import METHODS
from accel.kernels.cuda import PADDED_CHUNK, padded
from accel.kernels.cuda_jit import THREADS, device, launch
from accel.kernels.jit import renamed
from accel.rounding import Parameters
from accel.words import bits_of

LAYOUTS = {"bitmask": np.int32(0), "alpha_tag": np.int32(1), "alpha": np.int32(2)}
BITMASK, TAGS, FOUR_STREAMS = LAYOUTS.values()
CODES = {"nearest": "nearest", "fast_nearest": "fast", "fast_narrow": "fast", "fast_integer": "integer"}
"""Which loop makes the codes, for each method of rounding to nearest."""

GROUP = 16
GROUPS = BLOCK // GROUP
IMAGE_WORDS = BLOCK + (2 * BLOCK + BLOCK) // 32 + 2  # the longest block: 32 bits a code, tags, and signs of +-alpha

NONE, ONE = np.uint32(0), np.uint32(1)
LOW_HALF, HALF = np.uint32(0xFFFF), np.uint32(16)
BYTE_BITS, WORD_SHIFT, LAST_OF_WORD, WORD = np.uint32(8), np.uint32(5), np.uint32(31), np.uint32(32)
ALTERNATE = np.uint32(0x55555555)


def serves(cut: Cut, fmt: Format) -> bool:
    """Whether these loops pack and unpack such blocks: of three codecs, not too large, of a format with a zero."""
    return cut.codec.name in LAYOUTS and cut.block <= BLOCK and has_zero(fmt)


# --- in shared memory -----------------------------------------------------------------------------------------------


def _put(image, at, word, bits):  # type: ignore[no-untyped-def]
    """The low `bits` bits of a word, the others being 0, into zeros of the image from bit `at` on."""
    first, shift = at >> WORD_SHIFT, np.uint32(at & LAST_OF_WORD)
    if word != NONE:
        cuda.atomic.or_(image, first, np.uint32(word << shift))
        if np.uint32(shift + bits) > WORD:
            cuda.atomic.or_(image, first + ONE, np.uint32(word >> np.uint32(WORD - shift)))


def _get(image, at, bits):  # type: ignore[no-untyped-def]
    """`bits` bits of the image from bit `at` on, 1 to 32."""
    first, shift = at >> WORD_SHIFT, np.uint32(at & LAST_OF_WORD)
    word = np.uint32(image[first] >> shift)
    if np.uint32(shift + bits) > WORD:
        word = np.uint32(word | np.uint32(image[first + ONE] << np.uint32(WORD - shift)))
    return np.uint32(word & np.uint32(np.uint32(0xFFFFFFFF) >> np.uint32(WORD - bits)))


def _add_up(sums):  # type: ignore[no-untyped-def]
    """Each group's count and those of all groups before it, in sums[row]; returns row. sums[0] holds the counts."""
    row, step = 0, 1
    while step < GROUPS:
        cuda.syncthreads()
        for group in range(cuda.threadIdx.x, GROUPS, THREADS):
            before = sums[row, group - step] if group >= step else NONE
            sums[1 - row, group] = np.uint32(sums[row, group] + before)
        row, step = 1 - row, 2 * step
    cuda.syncthreads()
    return row


@device
def whole_bytes(bits):  # type: ignore[no-untyped-def]
    """Bits of as many whole bytes as hold so many bits."""
    return np.uint32(np.uint32(bits + np.uint32(7)) & np.uint32(0xFFFFFFF8))


# --- kernels --------------------------------------------------------------------------------------------------------


def _count(x, block, divisor, factor, alpha, value_fields, fields, counts, misfit):  # type: ignore[no-untyped-def]
    """Nonzeros and +-alphas of each block; the first element that has no code, where it is less than misfit[0]."""
    v, p = Parameters(*value_fields), PARAMETERS(*fields)  # noqa: F821
    shared = cuda.shared.array(1, np.uint32)
    if cuda.threadIdx.x == 0:
        shared[0] = NONE
    cuda.syncthreads()
    low = cuda.blockIdx.x * block
    high = min(low + block, x.size)
    counted = NONE
    for base in range(low, high, 4 * THREADS):
        first = base + cuda.threadIdx.x
        second, third, fourth = first + THREADS, first + 2 * THREADS, first + 3 * THREADS
        a = x[first] if first < high else np.float32(0)
        b = x[second] if second < high else np.float32(0)
        c = x[third] if third < high else np.float32(0)
        d = x[fourth] if fourth < high else np.float32(0)
        counted = np.uint32(counted + counted_one(a, first, divisor, factor, alpha, v, p, misfit))  # noqa: F821
        counted = np.uint32(counted + counted_one(b, second, divisor, factor, alpha, v, p, misfit))  # noqa: F821
        counted = np.uint32(counted + counted_one(c, third, divisor, factor, alpha, v, p, misfit))  # noqa: F821
        counted = np.uint32(counted + counted_one(d, fourth, divisor, factor, alpha, v, p, misfit))  # noqa: F821
    cuda.atomic.add(shared, 0, counted)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        counts[0, cuda.blockIdx.x] = np.int64(shared[0] & LOW_HALF)
        counts[1, cuda.blockIdx.x] = np.int64(shared[0] >> HALF)


def _counted_one(value, index, divisor, factor, alpha, v, p, misfit):  # type: ignore[no-untyped-def]
    """1 for a nonzero, and 1 in the upper half for +-alpha."""
    given = bits_of(value)
    if given == NONE:
        return NONE
    again = np.float32(decoded(code_of(value, divisor, p), factor, v))  # noqa: F821
    if is_misfit(given, bits_of(again), alpha[1]):
        cuda.atomic.min(misfit, 0, index)
    return np.uint32(ONE | np.uint32(np.uint32(tag_of(given, alpha[1], alpha[2]) != VALUE) << HALF))


def _write(x, block, layout, bits, divisor, alpha, fields, offsets, out):  # type: ignore[no-untyped-def]
    """Blocks of elements that all have codes into out, where offsets tell."""
    p = PARAMETERS(*fields)  # noqa: F821
    held = cuda.shared.array(PADDED_CHUNK, np.float32)
    image = cuda.shared.array(IMAGE_WORDS, np.uint32)
    sums = cuda.shared.array((2, GROUPS), np.uint32)
    low = cuda.blockIdx.x * block
    count = np.uint32(min(low + block, x.size) - low)
    begin = offsets[cuda.blockIdx.x]
    length = np.uint32(offsets[cuda.blockIdx.x + 1] - begin)
    for i in range(cuda.threadIdx.x, (length + 3) // 4, THREADS):
        image[i] = NONE
    for i in range(cuda.threadIdx.x, count, THREADS):
        held[padded(i)] = x[low + i]
    cuda.syncthreads()

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        counted = NONE
        for i in range(group * GROUP, min((group + 1) * GROUP, count)):
            given = bits_of(held[padded(i)])
            if given != NONE:
                is_alpha = np.uint32(tag_of(given, alpha[1], alpha[2]) != VALUE)
                counted = np.uint32(counted + ONE + np.uint32(is_alpha << HALF))
        sums[0, group] = counted
    row = add_up(sums)  # noqa: F821
    total = sums[row, GROUPS - 1]
    second, third, payload = streams_of(layout, count, total & LOW_HALF, total >> HALF)

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        before = sums[row, group - 1] if group > 0 else NONE
        nonzeros, alphas = np.uint32(before & LOW_HALF), np.uint32(before >> HALF)
        flags, tags, kept, signs = NONE, NONE, NONE, NONE
        found, found_alphas = NONE, NONE
        place = np.uint32(payload + np.uint32(np.uint32(nonzeros - alphas) * bits))
        for i in range(group * GROUP, min((group + 1) * GROUP, count)):
            lane = np.uint32(i - group * GROUP)
            value = held[padded(i)]
            given = bits_of(value)
            if given != NONE:
                tag = np.uint32(tag_of(given, alpha[1], alpha[2]))
                flags = np.uint32(flags | np.uint32(ONE << lane))
                tags = np.uint32(tags | np.uint32(tag << np.uint32(lane + lane)))
                if tag == VALUE:
                    kept = np.uint32(kept | np.uint32(ONE << found))
                    code = code_of(value, divisor, p)  # noqa: F821
                    code = code_with_alpha(code, given, alpha[1], alpha[2], alpha[4], alpha[5])
                    put(image, place, np.uint32(code), bits)  # noqa: F821
                    place = np.uint32(place + bits)
                else:
                    signs = np.uint32(signs | np.uint32(np.uint32(tag == NEGATIVE_ALPHA) << found_alphas))
                    found_alphas = np.uint32(found_alphas + ONE)
                found = np.uint32(found + ONE)
        if layout == TAGS:
            put(image, np.uint32(2 * group * GROUP), tags, np.uint32(2 * GROUP))  # noqa: F821
        else:
            put(image, np.uint32(group * GROUP), flags, np.uint32(GROUP))  # noqa: F821
        if layout == FOUR_STREAMS:
            put(image, np.uint32(second + nonzeros), kept, found)  # noqa: F821
            put(image, np.uint32(third + alphas), signs, found_alphas)  # noqa: F821
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, length, THREADS):
        out[begin + i] = np.uint8(image[i // 4] >> np.uint32(BYTE_BITS * np.uint32(i % 4)))


@device
def streams_of(layout, count, nonzeros, alphas):  # type: ignore[no-untyped-def]
    """Where the second and third stream of metadata (of `alpha`) and the payload begin, in bits."""
    if layout == FOUR_STREAMS:
        second = whole_bytes(count)
        third = np.uint32(second + whole_bytes(nonzeros))
        return second, third, np.uint32(third + whole_bytes(alphas))
    payload = whole_bytes(np.uint32(count + count) if layout == TAGS else count)
    return payload, payload, payload


def _read(  # type: ignore[no-untyped-def]
    data, block, layout, bits, factor, alpha, value_fields, offsets, out, middles, faults
):
    """The blocks' values into out; middles: bytes of metadata of each block; faults: what is wrong with each.

    Whatever the bytes are, all places in shared memory that they lead to exist.
    """
    v = Parameters(*value_fields)
    held = cuda.shared.array(PADDED_CHUNK, np.float32)
    image = cuda.shared.array(IMAGE_WORDS, np.uint32)
    sums = cuda.shared.array((2, GROUPS), np.uint32)
    values = cuda.shared.array((2, GROUPS), np.uint32)
    low = cuda.blockIdx.x * block
    count = np.uint32(min(low + block, out.size) - low)
    begin, end = offsets[cuda.blockIdx.x], offsets[cuda.blockIdx.x + 1]
    for i in range(cuda.threadIdx.x, min((end - begin + 3) // 4, IMAGE_WORDS), THREADS):
        word = NONE
        for k in range(4):
            place = begin + 4 * i + k
            if place < end:
                word = np.uint32(word | np.uint32(np.uint32(data[place]) << np.uint32(8 * k)))
        image[i] = word
    cuda.syncthreads()

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        sums[0, group] = found_in_group(image, layout, count, group)  # noqa: F821
    row = add_up(sums)  # noqa: F821
    total = sums[row, GROUPS - 1]
    nonzeros, alphas = np.uint32(total & LOW_HALF), np.uint32(total >> HALF)
    values_row = 0
    second = whole_bytes(count)
    if layout == FOUR_STREAMS:
        for group in range(cuda.threadIdx.x, GROUPS, THREADS):
            before = sums[row, group - 1] if group > 0 else NONE
            found = np.uint32(sums[row, group] - before)
            kept = get(image, np.uint32(second + before), found) if found > NONE else NONE  # noqa: F821
            values[0, group] = np.uint32(cuda.popc(kept))
        values_row = add_up(values)  # noqa: F821
        alphas = np.uint32(nonzeros - values[values_row, GROUPS - 1])
    second, third, payload = streams_of(layout, count, nonzeros, alphas)
    kept_values = np.uint32(nonzeros - alphas) if layout == FOUR_STREAMS else nonzeros
    needed = np.int64(np.uint32(payload + whole_bytes(np.uint32(kept_values * bits))) // BYTE_BITS)
    if cuda.threadIdx.x == 0:
        fault = FITS if needed == end - begin else TOO_LONG
        fault = ALPHA_UNKNOWN if alphas > NONE and not alpha[0] > np.float32(0) else fault
        faults[cuda.blockIdx.x] = TOO_SHORT if needed > end - begin else fault
        middles[cuda.blockIdx.x] = np.int64(payload // BYTE_BITS)
    rest = np.float32(decoded(NONE, factor, v))

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        before = sums[row, group - 1] if group > 0 else NONE
        before_values = np.uint32(before & LOW_HALF)
        flags, kept = NONE, NONE
        sign_at = third
        if layout == TAGS:
            flags = image[group] if group * GROUP < count else NONE
        else:
            flags = image[group // 2] >> np.uint32(HALF * np.uint32(group % 2)) if group * GROUP < count else NONE
        if layout == FOUR_STREAMS:
            found = np.uint32(sums[row, group] - before)
            kept = get(image, np.uint32(second + before), found) if found > NONE else NONE  # noqa: F821
            before_values = values[values_row, group - 1] if group > 0 else NONE
            sign_at = np.uint32(third + np.uint32(before - before_values))
        place = np.uint32(payload + np.uint32(before_values * bits))
        for i in range(group * GROUP, min((group + 1) * GROUP, count)):
            lane = np.uint32(i - group * GROUP)
            tag = np.uint32(ZERO)
            if layout == TAGS:
                tag = np.uint32(np.uint32(flags >> np.uint32(lane + lane)) & np.uint32(3))
            elif np.uint32(flags >> lane) & ONE:
                tag = np.uint32(VALUE)
                if layout == FOUR_STREAMS:
                    if not kept & ONE:
                        tag = np.uint32(POSITIVE_ALPHA + get(image, sign_at, ONE))  # noqa: F821
                        sign_at = np.uint32(sign_at + ONE)
                    kept = np.uint32(kept >> ONE)
            value = rest
            if tag == VALUE:
                code = get(image, place, bits)  # noqa: F821
                place = np.uint32(place + bits)
                value = np.float32(decoded(code, factor, v))
                value = value_with_alpha(value, tag, code, alpha[0], alpha[3], alpha[4], alpha[5])
            elif tag != ZERO:
                value = value_with_alpha(rest, tag, NONE, alpha[0], False, NONE, NONE)
            held[padded(i)] = value
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, count, THREADS):
        out[low + i] = held[padded(i)]


def _found_in_group(image, layout, count, group):  # type: ignore[no-untyped-def]
    """How many nonzeros a mask says that a group has; of tags: how many values, and +-alphas in the upper half."""
    first = group * GROUP
    if first >= count:
        return NONE
    left = np.uint32(min(count - first, GROUP))
    if layout == TAGS:
        tags = np.uint32(image[group] & np.uint32(np.uint32(0xFFFFFFFF) >> np.uint32(WORD - np.uint32(left + left))))
        upper = np.uint32(np.uint32(tags >> ONE) & ALTERNATE)
        alphas = np.uint32(cuda.popc(upper))
        return np.uint32(np.uint32(cuda.popc(np.uint32(tags & ALTERNATE & ~upper))) | np.uint32(alphas << HALF))
    return np.uint32(cuda.popc(get(image, np.uint32(first), left)))  # noqa: F821


def _bound(loop: Any, name: str, **names: Any) -> Any:
    """`loop` with what its free names mean; those that use `cuda` see the loop's own (the simulator replaces it)."""
    names = {**globals(), **names}
    for part in (_put, _get, _add_up, _counted_one, _found_in_group):
        names[part.__name__[1:]] = device(renamed(part, f"{name}{part.__name__}", names))
    return renamed(loop, name, names)


def _loops() -> dict[str, Any]:
    loops = {"unpack": _bound(_read, "unpack")}
    for method, suffix in CODES.items():
        _, code, record, _ = METHODS[method]
        names = {"code_of": device(renamed(coded, f"code_{suffix}", {**coded.__globals__, "transform": code}))}
        loops[f"count_{suffix}"] = _bound(_count, f"count_{suffix}", PARAMETERS=record, **names)
        loops[f"pack_{suffix}"] = _bound(_write, f"pack_{suffix}", PARAMETERS=record, **names)
    return loops


LOOPS = _loops()


# --- launchers ------------------------------------------------------------------------------------------------------


def pack_blocks(
    x: torch.Tensor, cut: Cut, fmt: Format, scale: np.float32, alpha: np.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(body, length and metadata bytes of each block, the first element that has no code) of a flat tensor.

    All on x's device; of a tensor with such an element the body is empty, and that number less than x.numel().
    """
    counts = torch.zeros(2, cut.count, dtype=torch.int64, device=x.device)
    misfit = torch.full((1,), x.numel(), dtype=torch.int64, device=x.device)
    divisor, method, fields = as_codes(fmt, scale)
    suffix, marks = CODES[method], tuple(alpha_of(alpha, cut, fmt))
    arguments = x, cut.block, divisor, scale, marks, tuple(value_fields(fmt)), tuple(fields), counts, misfit
    _launch(f"count_{suffix}", cut.count, *arguments)
    streams = cut.codec.streams(Content(_sizes(cut, x.device), counts[0], counts[1], rows=1), cut.setting)
    lengths = [(stream.fields * stream.bits + 7) // 8 for stream in streams]
    length = reduce(torch.add, lengths)
    offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
    is_fit, total = torch.stack([misfit[0] == x.numel(), offsets[-1]]).tolist()
    body = torch.empty(total if is_fit else 0, dtype=torch.uint8, device=x.device)
    if is_fit:
        layout = LAYOUTS[cut.codec.name], np.uint32(cut.bits)
        _launch(f"pack_{suffix}", cut.count, x, cut.block, *layout, divisor, marks, tuple(fields), offsets, body)
    return body, length, length - lengths[-1], misfit


def _sizes(cut: Cut, place: torch.device) -> torch.Tensor:
    sizes = torch.full((cut.count,), cut.block, dtype=torch.int64, device=place)
    if cut.count:
        sizes[-1] = cut.numel - (cut.count - 1) * cut.block
    return sizes


def unpack_blocks(
    data: torch.Tensor,
    offsets: torch.Tensor,
    cut: Cut,
    fmt: Format,
    scale: np.float32,
    alpha: np.float32,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills in the flat values of blocks; returns (bytes of metadata, what is wrong) of each, on out's device.

    offsets: where each block starts in data, and where the last one ends; they rise and stay within data.
    """
    middles, faults = torch.zeros(2, offsets.numel() - 1, dtype=torch.int64, device=out.device)
    layout, marks = (LAYOUTS[cut.codec.name], np.uint32(cut.bits)), tuple(alpha_of(alpha, cut, fmt))
    arguments = data, cut.block, *layout, scale, marks, tuple(value_fields(fmt)), offsets, out, middles, faults
    _launch("unpack", middles.numel(), *arguments)
    return middles, faults


def _launch(name: str, blocks: int, *arguments: Any) -> None:
    launch(LOOPS[name], name, blocks, arguments)
