"""CUDA loops of the codecs `bitmask`, `alpha_tag` and `alpha`: count, prefix sum, write; and back.

A CUDA block takes a block of elements, a thread GROUP neighbouring elements at a time. The whole encoded block is put
together in shared memory, each stream from the byte on where it belongs, and then goes out at once; reading is the
reverse. Where the fields of a thread's elements lie follows from prefix sums over the threads' counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import cuda

from accel.codecs.blocks import Cut
from accel.codecs.codec import (
    ALPHA_UNKNOWN,
    BLOCK,
    FITS,
    POSITIVE_ALPHA,
    TOO_LONG,
    TOO_SHORT,
    VALUE,
    Alpha,
)
from accel.codecs.coding import alpha_of, as_codes, has_zero, value_fields
from accel.codecs.symbols import MAGNITUDE, code_with_alpha, coded, decoded, is_misfit, value_with_alpha
from accel.formats import Format
from accel.kernels.cpu import METHODS
from accel.kernels.cuda import PADDED_CHUNK, hold, padded, ragged_load, whole_held, whole_lanes
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
MAX_BITS = 16  # of a code: a block with all its streams has to fit shared memory, of which there are 48 KiB
IMAGE_WORDS = (MAX_BITS + 3) * BLOCK // 32 + 2

NONE, ONE, THREE = np.uint32(0), np.uint32(1), np.uint32(3)
STEP = np.uint32(THREADS)
LOW_HALF, HALF = np.uint32(0xFFFF), np.uint32(16)
BYTE_BITS, WORD_SHIFT, LAST_OF_WORD, WORD = np.uint32(8), np.uint32(5), np.uint32(31), np.uint32(32)
ALTERNATE = np.uint32(0x55555555)


def serves(cut: Cut, fmt: Format) -> bool:
    """Whether these loops pack and unpack such blocks: of three codecs, not too large, of a format with a zero."""
    return cut.codec.name in LAYOUTS and cut.block <= BLOCK and fmt.bits <= MAX_BITS and has_zero(fmt)


# --- in shared memory -----------------------------------------------------------------------------------------------


def _put(image, at, word, bits):  # type: ignore[no-untyped-def]
    """The low `bits` bits of a word, the others being 0, into zeros of the image from bit `at` on."""
    first, shift = at >> WORD_SHIFT, np.uint32(at & LAST_OF_WORD)
    if word != NONE:
        cuda.atomic.or_(image, first, np.uint32(word << shift))
        if np.uint32(shift + bits) > WORD:
            cuda.atomic.or_(image, first + ONE, np.uint32(word >> np.uint32(WORD - shift)))


def _get(image, at, bits):  # type: ignore[no-untyped-def]
    """`bits` bits of the image from bit `at` on, up to 32."""
    if bits == NONE:
        return NONE
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


@device
def tally(given, alpha):  # type: ignore[no-untyped-def]
    """Of an element's pattern: 1 for a nonzero, and 1 in the upper half for +-alpha."""
    is_alpha = np.uint32((np.uint32(given & MAGNITUDE) == alpha.pattern) & alpha.is_tagged)
    return np.uint32(np.uint32(given != NONE) | np.uint32(is_alpha << HALF))


@device
def streams_of(layout, count, nonzeros, alphas):  # type: ignore[no-untyped-def]
    """Where the second and third stream of metadata (of `alpha`) and the payload begin, in bits."""
    if layout == FOUR_STREAMS:
        second = whole_bytes(count)
        third = np.uint32(second + whole_bytes(nonzeros))
        return second, third, np.uint32(third + whole_bytes(alphas))
    payload = whole_bytes(np.uint32(count + count) if layout == TAGS else count)
    return payload, payload, payload


def count_patterns(x, block, layout, bits, alpha_fields, lengths, metadata):  # type: ignore[no-untyped-def]
    """How many bytes each block takes, to lengths[1 ..], and how many of them are metadata."""
    alpha = Alpha(*alpha_fields)
    shared = cuda.shared.array(1, np.uint32)
    if cuda.threadIdx.x == 0:
        shared[0] = NONE
    cuda.syncthreads()
    low = cuda.blockIdx.x * block
    source = x[low : min(low + block, x.size)]
    count = np.uint32(source.size)
    counted, first = NONE, np.uint32(cuda.threadIdx.x)
    if count == BLOCK:
        for base in range(0, BLOCK, 4 * THREADS):
            i = np.uint32(first + np.uint32(base))
            a, b = source[i], source[np.uint32(i + STEP)]
            c, d = source[np.uint32(i + STEP + STEP)], source[np.uint32(i + STEP + STEP + STEP)]
            one = np.uint32(tally(bits_of(a), alpha) + tally(bits_of(b), alpha))
            other = np.uint32(tally(bits_of(c), alpha) + tally(bits_of(d), alpha))
            counted = np.uint32(counted + one + other)
    else:
        for i in range(first, count, THREADS):
            counted = np.uint32(counted + tally(bits_of(source[np.uint32(i)]), alpha))
    cuda.atomic.add(shared, 0, counted)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        nonzeros, alphas = np.uint32(shared[0] & LOW_HALF), np.uint32(shared[0] >> HALF)
        payload = streams_of(layout, count, nonzeros, alphas)[2]
        end = np.uint32(payload + whole_bytes(np.uint32(np.uint32(nonzeros - alphas) * bits)))
        lengths[cuda.blockIdx.x + 1] = np.int64(end // BYTE_BITS)
        metadata[cuda.blockIdx.x] = np.int64(payload // BYTE_BITS)


def _write(  # type: ignore[no-untyped-def]
    x, block, layout, bits, divisor, factor, alpha_fields, decode_fields, fields, offsets, out, misfits
):
    """Blocks into out, where offsets tell. misfits[0] becomes 1 where an element has no code."""
    v, p, alpha = Parameters(*decode_fields), PARAMETERS(*fields), Alpha(*alpha_fields)  # noqa: F821
    held = cuda.shared.array(PADDED_CHUNK, np.float32)
    kept = cuda.shared.array(BLOCK, np.float32)
    image = cuda.shared.array(IMAGE_WORDS, np.uint32)
    masks = cuda.shared.array(GROUPS, np.uint32)
    sums = cuda.shared.array((2, GROUPS), np.uint32)
    low = cuda.blockIdx.x * block
    source = x[low : min(low + block, x.size)]
    count, begin = np.uint32(source.size), offsets[cuda.blockIdx.x]
    length = np.uint32(offsets[cuda.blockIdx.x + 1] - begin)
    for i in range(cuda.threadIdx.x, (length + 3) // 4, THREADS):
        image[np.uint32(i)] = NONE
    if count == BLOCK:
        for base in range(0, BLOCK // 4, THREADS):
            hold(held, source, base + cuda.threadIdx.x)
    else:
        for i in range(cuda.threadIdx.x, BLOCK, THREADS):
            held[padded(i)] = ragged_load(source, np.uint32(i))
    cuda.syncthreads()

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        first, marks = padded(group * GROUP), NONE
        for lane in range(GROUP):
            one = tally(bits_of(held[np.uint32(first + np.uint32(lane))]), alpha)
            marks = np.uint32(marks | np.uint32(one << np.uint32(lane)))
        masks[group] = marks
        alphas = np.uint32(cuda.popc(np.uint32(marks >> HALF)))
        sums[0, group] = np.uint32(np.uint32(cuda.popc(np.uint32(marks & LOW_HALF))) | np.uint32(alphas << HALF))
    row = add_up(sums)  # noqa: F821
    total = sums[row, GROUPS - 1]
    nonzeros, alphas = np.uint32(total & LOW_HALF), np.uint32(total >> HALF)
    second, third, payload = streams_of(layout, count, nonzeros, alphas)

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        before = sums[row, group - 1] if group > 0 else NONE
        nonzeros_before, alphas_before = np.uint32(before & LOW_HALF), np.uint32(before >> HALF)
        first, place = padded(group * GROUP), np.uint32(nonzeros_before - alphas_before)
        flags, are_alphas = np.uint32(masks[group] & LOW_HALF), np.uint32(masks[group] >> HALF)
        tags, are_values, signs, found, found_alphas, left = NONE, NONE, NONE, NONE, NONE, flags
        while left != NONE:
            lane = np.uint32(np.uint32(cuda.ffs(left)) - ONE)
            left = np.uint32(left & np.uint32(left - ONE))
            value = held[np.uint32(first + lane)]
            is_alpha, sign = np.uint32(np.uint32(are_alphas >> lane) & ONE), np.uint32(bits_of(value) >> LAST_OF_WORD)
            if is_alpha:
                tag = np.uint32(POSITIVE_ALPHA + sign)
                signs = np.uint32(signs | np.uint32(sign << found_alphas))
            else:
                tag = np.uint32(VALUE)
                are_values = np.uint32(are_values | np.uint32(ONE << found))
                kept[place] = value
            tags = np.uint32(tags | np.uint32(tag << np.uint32(lane + lane)))
            place = np.uint32(place + np.uint32(ONE - is_alpha))
            found, found_alphas = np.uint32(found + ONE), np.uint32(found_alphas + is_alpha)
        if layout == TAGS:
            put(image, np.uint32(2 * group * GROUP), tags, np.uint32(2 * GROUP))  # noqa: F821
        else:
            put(image, np.uint32(group * GROUP), flags, np.uint32(GROUP))  # noqa: F821
        if layout == FOUR_STREAMS:
            put(image, np.uint32(second + nonzeros_before), are_values, found)  # noqa: F821
            put(image, np.uint32(third + alphas_before), signs, found_alphas)  # noqa: F821
    cuda.syncthreads()

    for k in range(cuda.threadIdx.x, nonzeros - alphas, THREADS):
        value = kept[np.uint32(k)]
        given = bits_of(value)
        code = np.uint32(code_of(value, divisor, p))  # noqa: F821
        if is_misfit(given, bits_of(np.float32(decoded(code, factor, v))), alpha.pattern):
            misfits[0] = 1
        code = np.uint32(code_with_alpha(code, given, alpha.pattern, alpha.is_tagged, alpha.code, alpha.sign))
        put(image, np.uint32(payload + np.uint32(np.uint32(k) * bits)), code, bits)  # noqa: F821
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, length, THREADS):
        i = np.uint32(i)
        out[begin + np.int64(i)] = np.uint8(image[i >> np.uint32(2)] >> np.uint32(BYTE_BITS * np.uint32(i & THREE)))


def _read(  # type: ignore[no-untyped-def]
    data, block, layout, bits, factor, alpha_fields, decode_fields, offsets, out, metadata, faults
):
    """The blocks' values into out; metadata: bytes of metadata of each block; faults: what is wrong with each.

    Whatever the bytes are, all places in shared memory that they lead to exist.
    """
    v, alpha = Parameters(*decode_fields), Alpha(*alpha_fields)
    held = cuda.shared.array(PADDED_CHUNK, np.float32)
    kept = cuda.shared.array(BLOCK, np.float32)
    image = cuda.shared.array(IMAGE_WORDS, np.uint32)
    sums = cuda.shared.array((2, GROUPS), np.uint32)
    values = cuda.shared.array((2, GROUPS), np.uint32)
    low = cuda.blockIdx.x * block
    target = out[low : min(low + block, out.size)]
    count, begin, end = np.uint32(target.size), offsets[cuda.blockIdx.x], offsets[cuda.blockIdx.x + 1]
    source = data[begin:end]
    for i in range(cuda.threadIdx.x, min((source.size + 3) // 4, IMAGE_WORDS), THREADS):
        word = NONE
        for k in range(4):
            place = np.uint32(4 * i + k)
            if place < source.size:
                word = np.uint32(word | np.uint32(np.uint32(source[place]) << np.uint32(8 * k)))
        image[np.uint32(i)] = word
    cuda.syncthreads()

    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        sums[0, group] = found_in_group(image, layout, count, group)  # noqa: F821
    row, values_row = add_up(sums), 0  # noqa: F821
    total = sums[row, GROUPS - 1]
    found, alphas = np.uint32(total & LOW_HALF), np.uint32(total >> HALF)  # found: nonzeros, of tags values
    second = whole_bytes(count)
    if layout == FOUR_STREAMS:
        for group in range(cuda.threadIdx.x, GROUPS, THREADS):
            before = sums[row, group - 1] if group > 0 else NONE
            values[0, group] = cuda.popc(get(image, np.uint32(second + before), sums[row, group] - before))  # noqa: F821
        values_row = add_up(values)  # noqa: F821
        alphas = np.uint32(found - values[values_row, GROUPS - 1])
        second, third, payload = streams_of(layout, count, found, alphas)
        found = np.uint32(found - alphas)
    else:
        second, third, payload = streams_of(layout, count, found, alphas)
    needed = np.int64(np.uint32(payload + whole_bytes(np.uint32(found * bits))) // BYTE_BITS)
    if cuda.threadIdx.x == 0:
        fault = FITS if needed == end - begin else TOO_LONG
        fault = ALPHA_UNKNOWN if alphas > NONE and not alpha.value > np.float32(0) else fault
        faults[cuda.blockIdx.x] = TOO_SHORT if needed > end - begin else fault
        metadata[cuda.blockIdx.x] = np.int64(payload // BYTE_BITS)

    for k in range(cuda.threadIdx.x, found, THREADS):
        code = get(image, np.uint32(payload + np.uint32(np.uint32(k) * bits)), bits)  # noqa: F821
        value = np.float32(decoded(code, factor, v))
        value = value_with_alpha(value, VALUE, code, alpha.value, alpha.has_codes, alpha.code, alpha.sign)
        kept[np.uint32(k)] = value
    cuda.syncthreads()

    rest = np.float32(decoded(NONE, factor, v))
    for group in range(cuda.threadIdx.x, GROUPS, THREADS):
        before = np.uint32(sums[row, group - 1] & LOW_HALF) if group > 0 else NONE
        place, flags, are_values, signs = before, NONE, np.uint32(0xFFFFFFFF), NONE
        if group * GROUP < count:
            bits_a_group = np.uint32(2 * GROUP if layout == TAGS else GROUP)
            flags = get(image, np.uint32(np.uint32(group) * bits_a_group), bits_a_group)  # noqa: F821
        if layout == FOUR_STREAMS:
            place = values[values_row, group - 1] if group > 0 else NONE
            nonzeros = np.uint32(np.uint32(sums[row, group]) - before)
            are_values = get(image, np.uint32(second + before), nonzeros)  # noqa: F821
            alphas_before = np.uint32(before - place)
            signs = get(image, np.uint32(third + alphas_before), np.uint32(GROUP))  # noqa: F821
        first = padded(group * GROUP)
        for lane in range(GROUP):
            held[np.uint32(first + np.uint32(lane))] = rest
        left = flags
        if layout == TAGS:
            left = np.uint32(np.uint32(flags | np.uint32(flags >> ONE)) & ALTERNATE)  # a bit for each tag but zero
        while left != NONE:
            bit = np.uint32(np.uint32(cuda.ffs(left)) - ONE)
            left = np.uint32(left & np.uint32(left - ONE))
            if layout == TAGS:
                tag = np.uint32(np.uint32(flags >> bit) & THREE)
                lane, is_value, sign = np.uint32(bit >> ONE), np.uint32(tag == VALUE), np.uint32(tag & ONE)
            else:
                lane, is_value, sign = bit, np.uint32(are_values & ONE), np.uint32(signs & ONE)
                are_values = np.uint32(are_values >> ONE)
                signs = np.uint32(signs >> np.uint32(ONE - is_value))
            value = -alpha.value if sign else alpha.value
            held[np.uint32(first + lane)] = kept[place] if is_value else value
            place = np.uint32(place + is_value)
    cuda.syncthreads()
    if count == BLOCK:
        for base in range(0, BLOCK // 4, THREADS):
            lanes = whole_lanes(base + cuda.threadIdx.x, NONE)
            a, b, c, d = whole_held(held, lanes)
            i, j, k, m = lanes
            target[i] = a
            target[j] = b
            target[k] = c
            target[m] = d
    else:
        for i in range(cuda.threadIdx.x, count, THREADS):
            target[np.uint32(i)] = held[padded(i)]


def _found_in_group(image, layout, count, group):  # type: ignore[no-untyped-def]
    """How many nonzeros a mask says that a group has; of tags: how many values, and +-alphas in the upper half."""
    first = group * GROUP
    if first >= count:
        return NONE
    left = np.uint32(min(count - first, GROUP))
    if layout == TAGS:
        tags = get(image, np.uint32(2 * first), np.uint32(left + left))  # noqa: F821
        upper = np.uint32(np.uint32(tags >> ONE) & ALTERNATE)
        alphas = np.uint32(cuda.popc(upper))
        return np.uint32(np.uint32(cuda.popc(np.uint32(tags & ALTERNATE & ~upper))) | np.uint32(alphas << HALF))
    return np.uint32(cuda.popc(get(image, np.uint32(first), left)))  # noqa: F821


def _bound(loop: Any, name: str, **names: Any) -> Any:
    """`loop` with what its free names mean; those that use `cuda` see the loop's own (the simulator replaces it)."""
    names = {**globals(), **names}
    for part in (_put, _get, _add_up, _found_in_group):
        names[part.__name__[1:]] = device(renamed(part, f"{name}{part.__name__}", names))
    return renamed(loop, name, names)


def _loops() -> dict[str, Any]:
    loops = {"count_patterns": count_patterns, "unpack": _bound(_read, "unpack")}
    for method, suffix in CODES.items():
        _, code, record, _ = METHODS[method]
        code_of = device(renamed(coded, f"code_{suffix}", {**coded.__globals__, "transform": code}))
        loops[f"pack_{suffix}"] = _bound(_write, f"pack_{suffix}", PARAMETERS=record, code_of=code_of)
    return loops


LOOPS = _loops()


# --- launchers ------------------------------------------------------------------------------------------------------


def pack_blocks(
    x: torch.Tensor, cut: Cut, fmt: Format, scale: np.float32, alpha: np.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(body, where its blocks start and end, metadata bytes of each, whether an element has no code) of a flat tensor.

    All on x's device.
    """
    divisor, method, fields = as_codes(fmt, scale)
    layout, alpha_fields = (LAYOUTS[cut.codec.name], np.uint32(cut.bits)), tuple(alpha_of(alpha, cut, fmt))
    lengths = torch.zeros(cut.count + 1, dtype=torch.int64, device=x.device)
    metadata = torch.empty(cut.count, dtype=torch.int64, device=x.device)
    _launch("count_patterns", cut.count, x, cut.block, *layout, alpha_fields, lengths, metadata)
    offsets = lengths.cumsum(0)
    body = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=x.device)
    misfits = torch.zeros(1, dtype=torch.int64, device=x.device)
    rounding = divisor, scale, alpha_fields, tuple(value_fields(fmt)), tuple(fields)
    _launch(f"pack_{CODES[method]}", cut.count, x, cut.block, *layout, *rounding, offsets, body, misfits)
    return body, offsets, metadata, misfits


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
    metadata, faults = torch.zeros(2, offsets.numel() - 1, dtype=torch.int64, device=out.device)
    layout, alpha_fields = (LAYOUTS[cut.codec.name], np.uint32(cut.bits)), tuple(alpha_of(alpha, cut, fmt))
    arguments = data, cut.block, *layout, scale, alpha_fields, tuple(value_fields(fmt)), offsets, out, metadata, faults
    _launch("unpack", metadata.numel(), *arguments)
    return metadata, faults


def _launch(name: str, blocks: int, *arguments: Any) -> None:
    launch(LOOPS[name], name, blocks, arguments)
