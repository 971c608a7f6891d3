from __future__ import annotations

import contextlib
import itertools
import math
import struct
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel.codecs.coding as coding
import accel.codecs.packed as packed_module
from accel.codecs import (
    CODECS,
    CodecError,
    Counts,
    Packed,
    count_blocks,
    footprint,
    footprint_of_blocks,
    pack,
    unpack,
    unpack_slice,
)
from accel.codecs.bits import get_fields, get_flags, get_pairs, put_fields, put_flags, put_pairs
from accel.codecs.codec import MAX_ROW, TOO_SHORT
from accel.codecs.coding import crc32c
from accel.formats import POLICIES, Format
from accel.presets import format, formats

SCALARS = [fmt for fmt in formats() if isinstance(fmt, Format)]
CUSTOM: dict[str, object] = {
    "exponent_bits": 5,
    "mantissa_bits": 6,
    "bias": 9,
    "policy": "fnuz",
    "subnormals": False,
    "name": "odd",
}
FORMATS: list[str | dict[str, object]] = ["e4m3fn", "e5m2", "e2m1", "e3m2", "bf16", "fp16", CUSTOM]
NAMES = [spec if isinstance(spec, str) else "custom" for spec in FORMATS]
FLOAT = npt.NDArray[np.float32]
NAMED = [codec.name for codec in CODECS.values() if codec.name != "alpha_entropy"]  # which has a test of its own
NARROW = ["e4m3fn", "e2m1", "e3m2"]  # one loop of a codec serves them; each further loop takes seconds to compile
EVERY_LOOP = ["dense", "bitmask", "alpha"]  # the codecs that are tested with all
COUNTED = [name for name, codec in CODECS.items() if codec.is_counted]


def bits_of(x: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Bit patterns, all NaNs alike."""
    values = np.asarray(x, np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.int32)


def assert_same(result: torch.Tensor, x: FLOAT) -> None:
    assert result.dtype == torch.float32
    assert tuple(result.shape) == np.shape(x)
    np.testing.assert_array_equal(bits_of(result.numpy()), bits_of(x))


def draw_values(fmt: Format, size: int, density: float, seed: int) -> FLOAT:
    """Values of the format, NaN, infinity and -0 among them where it has them, with a share of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.choice(fmt.codes(), size).astype(np.float32)
    values = np.where(rng.random(size) < density, values, np.float32(0)).astype(np.float32)
    return values if fmt.has_negative_zero else values + np.float32(0)


# --- a slow packer of its own: strings of bits, codes looked up in the format's table ---


def reference_codes(x: FLOAT, fmt: Format, scale: np.float32) -> list[int]:
    table: dict[int, int] = {}
    with np.errstate(over="ignore", under="ignore"):
        for code, value in enumerate((fmt.codes() * scale).tolist()):
            table.setdefault(int(bits_of(np.float32(value))), code)
    if fmt.nan_code is not None:
        table[int(bits_of(np.float32(np.nan)))] = fmt.nan_code
    return [table[int(word)] for word in bits_of(x)]


def reference_streams(
    codec: str, codes: list[int], signs: list[int], bits: int, columns: int, index_bits: int
) -> list[str]:
    """Streams of a block as strings of 0 and 1; signs is +-1 for +-alpha, 0 otherwise; columns: of the matrix."""

    def number(value: int, width: int) -> str:
        return f"{value:0{width}b}"[::-1] if width else ""

    def numbers(values: list[int], width: int) -> str:
        return "".join(number(value, width) for value in values)

    def payload(chosen: list[int]) -> str:
        return numbers(chosen, bits)

    def mask(chosen: list[bool]) -> str:
        return "".join("1" if bit else "0" for bit in chosen)

    nonzero = [bool(code or sign) for code, sign in zip(codes, signs, strict=True)]
    places, size = [i for i, bit in enumerate(nonzero) if bit], len(codes)
    values = [codes[i] for i in places]
    if codec == "dense":
        return [payload(codes)]
    if codec == "bitmask":
        return [mask(nonzero), payload(values)]
    if codec == "bitmask2":
        groups = [nonzero[i : i + 32] for i in range(0, size, 32)]
        full = [group for group in groups if any(group)]
        return [mask([any(group) for group in groups]), "".join(map(mask, full)), payload(values)]
    if codec.startswith("rle"):
        run_bits, entries, last = int(codec[4:-1] or 4), [], -1
        for place in places:
            zeros = place - last - 1
            while zeros >= 2**run_bits:
                entries.append((2**run_bits - 1, 0))
                zeros -= 2**run_bits
            entries.append((zeros, codes[place]))
            last = place
        runs, found = [run for run, _ in entries], [value for _, value in entries]
        return [number(len(entries), size.bit_length()), numbers(runs, run_bits), payload(found)]
    if codec == "coo":
        return [number(len(places), size.bit_length()), numbers(places, index_bits), payload(values)]
    if codec == "csr":
        pointers = [sum(place < row for place in places) for row in range(0, size + 1, columns)]
        return [
            number(len(places), size.bit_length()),
            numbers(pointers, len(places).bit_length()),
            numbers([place % columns for place in places], (columns - 1).bit_length()),
            payload(values),
        ]
    if codec.startswith("nm"):
        kept, width = map(int, codec[3:-1].split(":"))
        indices, found = [], []
        row_length = min(columns, size)
        for row in range(0, size, row_length):
            for low in range(row, row + row_length, width):
                group = codes[low : min(low + width, row + row_length)] + [0] * width
                chosen = [i for i in range(width) if group[i]]
                spare = [i for i in range(width) if not group[i]][: kept - len(chosen)]
                indices += sorted(chosen + spare)
                found += [group[i] for i in sorted(chosen + spare)]
        return [numbers(indices, (width - 1).bit_length()), payload(found)]
    kinds = [
        0 if not bit else 1 if not sign else 2 if sign > 0 else 3 for bit, sign in zip(nonzero, signs, strict=True)
    ]
    if codec == "alpha_tag":
        return [numbers(kinds, 2), payload([code for code, kind in zip(codes, kinds, strict=True) if kind == 1])]
    kept_kinds = [kind for kind in kinds if kind]
    return [
        mask(nonzero),
        mask([kind == 1 for kind in kept_kinds]),
        mask([kind == 3 for kind in kept_kinds if kind != 1]),
        payload([code for code, kind in zip(codes, kinds, strict=True) if kind == 1]),
    ]


def reference_bytes(stream: str) -> bytes:
    stream += "0" * (-len(stream) % 8)
    return bytes(int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8))


def reference_body(
    x: FLOAT, codec: str, fmt: Format, scale: float, alpha: float, cuts: list[int], columns: int
) -> tuple[list[int], bytes]:
    """(offset of each block, all blocks)."""
    offsets, body = [], b""
    codes = reference_codes(x, fmt, np.float32(scale))
    tags_alpha = codec.startswith("alpha") and alpha
    signs = [int(np.sign(v)) if tags_alpha and abs(v) == np.float32(alpha) else 0 for v in x]
    for start, stop in itertools.pairwise(cuts):
        offsets.append(len(body))
        streams = reference_streams(
            codec, codes[start:stop], signs[start:stop], fmt.bits, columns, (min(64, x.size) - 1).bit_length()
        )
        body += b"".join(map(reference_bytes, streams))
    return offsets, body


def with_groups(x: FLOAT, kept: int, group: int) -> FLOAT:
    """x with zeros for what an N:M codec cannot hold, rows being multiples of a group or the groups of one row."""
    grouped = np.append(x, np.zeros(-x.size % group, np.float32)).astype(np.float32).reshape(-1, group)
    nonzero = (grouped != 0) | np.signbit(grouped)
    return np.where(np.cumsum(nonzero, axis=1) > kept, np.float32(0), grouped).reshape(-1)[: x.size]


# codec and shape -> where blocks of about 64 elements begin and end
CUTS: dict[tuple[str, tuple[int, ...]], list[int]] = {
    ("csr", (203,)): [0, 203],
    ("csr", (29, 7)): [0, 63, 126, 189, 203],
    ("nm(2:4)", (29, 7)): [0, 63, 126, 189, 203],
    ("nm(3:8)", (29, 7)): [0, 63, 126, 189, 203],
    ("csr", (2, 100)): [0, 100, 200],
    ("nm(2:4)", (2, 100)): [0, 64, 100, 164, 200],
    ("nm(3:8)", (2, 100)): [0, 64, 100, 164, 200],
}


@pytest.mark.parametrize("codec", [*NAMED, "rle(6)", "nm(3:8)"])
@pytest.mark.parametrize("spec", FORMATS, ids=NAMES)
@pytest.mark.parametrize(("shape", "scale"), [((1,), 1.0), ((203,), 1.0), ((29, 7), 0.375), ((2, 100), 2.0)])
def test_stream_equals_a_slow_packer(
    codec: str, spec: str | dict[str, object], shape: tuple[int, ...], scale: float
) -> None:
    if codec not in EVERY_LOOP and spec not in NARROW:
        return
    fmt, size = format(spec), math.prod(shape)
    values = draw_values(fmt, size, density=0.7, seed=size)
    values[::5] = np.float32(2)
    values[1::9] = np.float32(-2)
    if codec.startswith("nm"):
        kept, group = map(int, codec[3:-1].split(":"))
        rows = values.reshape(-1, shape[-1])
        values = np.concatenate([with_groups(row, kept, group) for row in rows])
    x = values * np.float32(scale)
    p = pack(x.reshape(shape), codec, fmt, scale=scale, alpha=2 * scale, block=64)
    cuts = CUTS.get((codec, shape), [*range(0, size, 64), size])
    offsets, body = reference_body(x, codec, fmt, scale, 2 * scale, cuts, shape[-1])
    stream = p.to_bytes()
    assert stream.endswith(np.array(offsets, "<u4").tobytes() + body)
    bits = p.bits_by_part
    assert bits["offsets"] == 32 * len(offsets)
    assert bits["metadata"] + bits["payload"] == 8 * len(body)
    assert sum(bits.values()) == p.nbits == 8 * len(stream)
    assert_same(unpack(Packed.from_bytes(stream)), x.reshape(shape))


def test_header_bytes_by_hand() -> None:
    p = pack(np.array([[0.0, 1.5, -0.5]], np.float32), "alpha", "e4m3fn", scale=0.5, alpha=0.5)
    stream = p.to_bytes()
    magic, version, checksum = struct.unpack_from("<4sHI", stream)
    assert (magic, version) == (b"FPSM", 1)
    assert checksum == crc32c(stream[10:])
    expected = struct.pack("<BBhBBIffQQ", 4, 3, 7, 1, 2, 4096, 0.5, 0.5, 3, 1)
    expected += b"\x05alpha\x02fn\x06e4m3fn" + struct.pack("<QQ", 1, 3)
    expected += struct.pack("<I", 0)
    # nonzero 110, is-value 01, sign 1, payload 3.0 = 0 1000 100
    assert stream[10:] == expected + bytes([0b110, 0b01, 0b1, 0b01000100])


def test_crc32c_published_vectors() -> None:  # RFC 3720 B.4, and the check value of the CRC catalogue
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@numba.njit
def written(fields, bits, out):  # type: ignore[no-untyped-def]
    return put_fields(fields, fields.size, bits, out, 1)


@numba.njit
def read_back(data, end, count, bits):  # type: ignore[no-untyped-def]
    fields = np.zeros(count + 1, np.uint32)
    return get_fields(data, 1, end, count, bits, fields), fields


@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8, 9, 12, 16, 19, 24, 32])
def test_fields_are_one_little_endian_integer(bits: int) -> None:
    fields = np.random.default_rng(bits).integers(0, 1 << bits, 101, dtype=np.uint32)
    whole = sum(int(field) << (bits * i) for i, field in enumerate(fields))
    length, out = -(-101 * bits // 8), np.zeros(500, np.uint8)
    assert written(fields, bits, out) == 1 + length
    assert out[1 : 1 + length].tobytes() == whole.to_bytes(length, "little")
    assert not out[1 + length :].any()
    place, found = read_back(out, 1 + length, 101, bits)
    assert place == 1 + length
    np.testing.assert_array_equal(found[:101], fields)
    assert read_back(out, length, 101, bits)[0] == -TOO_SHORT


@numba.njit
def flags_and_back(flags_8, flags, count, pairs, out, found_8):  # type: ignore[no-untyped-def]
    if pairs:
        return put_pairs(flags_8, flags, count, out, 3), get_pairs(out, 3, out.size, count, found_8)
    return put_flags(flags_8, flags, count, out, 3), get_flags(out, 3, out.size, count, found_8)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 200])
@pytest.mark.parametrize("bits", [1, 2])
def test_flags_and_pairs_are_narrow_fields(count: int, bits: int) -> None:
    flags_8, found_8 = np.full(40, (1 << 64) - 1, np.uint64), np.zeros(40, np.uint64)
    flags = flags_8.view(np.uint8)
    flags[:count] = np.random.default_rng(count).integers(0, 1 << bits, count)
    given, out, expected = flags[:count].copy(), np.zeros(500, np.uint8), np.zeros(500, np.uint8)
    places = flags_and_back(flags_8, flags, count, bits == 2, out, found_8)
    assert places == (3 + -(-count * bits // 8),) * 2
    written(given.astype(np.uint32), bits, expected[2:])
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(found_8.view(np.uint8)[:count], given)


@pytest.mark.parametrize("fmt", [f for f in [*SCALARS, format(CUSTOM)] if f.bits <= 16], ids=lambda f: f.name)
def test_codes_match_the_table_of_the_format(fmt: Format) -> None:
    codes = np.arange(1 << fmt.bits, dtype=np.uint32)
    table = fmt.codes()
    unique = ~np.isnan(table)
    if not fmt.subnormals:  # every code of exponent field 0 is zero
        unique &= (codes & ((1 << (fmt.bits - 1)) - 1) == 0) | (table != 0)
    body = np.frombuffer(pack(table[unique], "dense", fmt, block=1 << 16).to_bytes(), np.uint8)
    body = body[body.size - -(-int(unique.sum()) * fmt.bits // 8) :]
    np.testing.assert_array_equal(
        read_back(np.append(np.uint8(0), body), body.size + 1, int(unique.sum()), fmt.bits)[1][:-1], codes[unique]
    )
    if fmt.nan_code is not None:
        packed = pack(np.array([np.nan], np.float32), "dense", fmt).to_bytes()
        assert int.from_bytes(packed[-math.ceil(fmt.bits / 8) :], "little") == fmt.nan_code


@pytest.mark.parametrize("spec", ["fp32", "tf32", "e8m22"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 0.1, 3.7])
def test_wide_formats_round_trip(spec: str, scale: float) -> None:
    fmt, rng = format(spec), np.random.default_rng(3)
    words = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32) & np.uint32(
        0x100000000 - (1 << (23 - fmt.mantissa_bits))
    )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        x = words.view(np.float32) * np.float32(scale)
    assert_same(unpack(pack(x, "bitmask", fmt, scale=scale)), x)


@pytest.mark.parametrize("codec", EVERY_LOOP)
def test_float32_numbers_are_their_own_codes(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(5).integers(0, 1 << 32, 10_000, dtype=np.uint32).view(np.float32)
    x[::3], x[1::7] = 0.0, 1.5
    x[:6] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45]
    packed = pack(x, codec, "fp32", alpha=1.5)
    assert_same(unpack(packed), x)
    monkeypatch.setattr(coding, "FLOAT32", format("fp16"))  # so that codes are worked out as those of any other format
    assert pack(x, codec, "fp32", alpha=1.5).to_bytes() == packed.to_bytes()


@st.composite
def tensors(draw: st.DrawFn, codec: str, fmt: Format) -> FLOAT:
    """Values of a format, any share of them zeros, alone or in clusters; as a vector or a matrix."""
    size = draw(st.one_of(st.integers(0, 20_000), st.sampled_from([0, 1, 4095, 4096, 4097, 8192])))
    density = draw(st.one_of(st.sampled_from([0.0, 0.01, 0.15, 0.5, 1.0]), st.floats(0, 1)))
    seed, cluster = draw(st.integers(0, 1000)), draw(st.sampled_from([1, 1, 7, 300]))
    rng = np.random.default_rng(seed)
    x = draw_values(fmt, size, 1.0, seed)
    kept = np.repeat(rng.random(-(-size // cluster)) < density, cluster)[:size]
    x = np.where(kept, x, np.float32(0)).astype(np.float32)
    if codec.startswith("nm"):
        x = with_groups(x, *map(int, codec[3:-1].split(":")))
    columns = draw(st.sampled_from([0, 1, 5, 64, 1000, 5000]))
    if codec.startswith("nm") and columns % 8:
        columns = 0
    return x[: size // columns * columns].reshape(-1, columns) if columns else x


ANY_CODEC = [*NAMED, "alpha_entropy", "rle(1)", "rle(16)", "nm(1:4)", "nm(3:8)"]


@settings(max_examples=120, deadline=None)
@given(
    codec=st.sampled_from(ANY_CODEC),
    block=st.sampled_from([4096, 4096, 64, 65536]),
    alpha=st.sampled_from([None, 0.0, 2.0, 4.0]),
    data=st.data(),
)
def test_round_trip_and_footprints(codec: str, block: int, alpha: float | None, data: st.DataObject) -> None:
    has_every_loop = codec in EVERY_LOOP
    fmt = format(data.draw(st.sampled_from(FORMATS if has_every_loop else NARROW)))
    scale = data.draw(st.sampled_from([None, 2.0**-10, 0.3, *([1e-37] if has_every_loop else [])]))
    factor = np.float32(1 if scale is None else scale)
    with np.errstate(under="ignore"):
        x = data.draw(tensors(codec, fmt)) * factor
        alpha = None if alpha is None else float(np.float32(alpha) * factor)
    if codec.startswith("nm"):  # NaN times a scale has a sign that no matter
        x = np.where(np.isnan(x), np.float32(np.nan), x)
    p = pack(x, codec, fmt, scale=scale, alpha=alpha, block=block)
    read = Packed.from_bytes(p.to_bytes())
    assert_same(unpack(read), x)
    start, stop = sorted(data.draw(st.integers(0, x.size)) for _ in range(2))
    assert_same(unpack_slice(read, start, stop), x.reshape(-1)[start:stop])
    counted = footprint(x, codec=codec, fmt=fmt, alpha=alpha, scale=scale, block=block)
    assert counted.bits_by_part == p.bits_by_part
    assert counted.nbits == p.nbits == 8 * len(p.to_bytes())
    if codec in COUNTED:
        assert footprint_of_blocks(count_blocks(x, alpha, block), codec, fmt, x.shape).bits_by_part == p.bits_by_part


@pytest.mark.parametrize("codec", CODECS)
def test_threads_do_not_change_a_stream(codec: str) -> None:
    x = with_groups(draw_values(format("e4m3fn"), 300_000, 0.15, seed=3), 2, 4)
    before = torch.get_num_threads()
    streams = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            streams.append(pack(x, codec, alpha=1.0).to_bytes())
            assert_same(unpack(Packed.from_bytes(streams[-1])), x)
    finally:
        torch.set_num_threads(before)
    assert streams[0] == streams[1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (0, 1 << 40), (2, 3, 5, 8), (1,) * 30])
def test_shapes(codec: str, shape: tuple[int, ...]) -> None:
    x = np.resize(np.array([1.5, 0, -2, 0, 0.25, 0, 0, -0.0], np.float32), math.prod(shape)).reshape(shape)
    p = Packed.from_bytes(pack(x, codec, alpha=0.25).to_bytes())
    assert_same(unpack(p), x)
    assert footprint(x, codec=codec, fmt="e4m3fn", alpha=0.25).nbits == p.nbits


@pytest.mark.parametrize("codec", [*EVERY_LOOP, "rle(4)"])
def test_a_format_without_zero(codec: str) -> None:
    """The code 0 is 2^-127, and counts as a zero: it takes no payload."""
    fmt = format("e8m0fnu")
    x = np.where(np.random.default_rng(6).random(203) < 0.6, 0, np.arange(203)).astype(np.uint8)
    values = fmt.codes()[x].astype(np.float32)
    p = pack(values, codec, fmt, alpha=2.0**-60, block=64)
    cuts = CUTS.get((codec, (203,)), [*range(0, 203, 64), 203])
    _, body = reference_body(values, codec, fmt, 1.0, 2.0**-60, cuts, 203)
    assert p.to_bytes().endswith(body)
    assert_same(unpack(Packed.from_bytes(p.to_bytes())), values)
    values[100] = 0
    with pytest.raises(CodecError, match="element 100"):
        pack(values, codec, fmt)


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 7)])
def test_a_slice_outside_the_tensor_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(CodecError, match=r"0 <= start <= stop <= 6 does not hold"):
        unpack_slice(pack(np.zeros(6, np.float32)), *bounds)


def test_bursts_of_blocks_by_hand() -> None:
    p = pack(np.ones(100, np.float32), "dense", block=40)  # blocks at bytes 0-39, 40-79, 80-99
    assert p.fetched_bytes(1) == 100
    assert p.fetched_bytes(32) == 32 * (2 + 2 + 2)  # bursts 0-1, 1-2, 2-3
    assert p.fetched_bytes(64) == 64 * (1 + 2 + 1)
    assert pack(np.zeros(0, np.float32)).fetched_bytes(64) == 0
    for burst in (0, -1, 2.0):
        with pytest.raises(CodecError, match="burst_bytes must be a positive integer"):
            p.fetched_bytes(burst)  # type: ignore[arg-type]


def test_a_slice_reads_its_blocks_only() -> None:
    x = draw_values(format("e4m3fn"), 1000, 0.5, seed=4)
    p = pack(x, "bitmask", block=100)
    torn = bytearray(p.to_bytes())
    torn[-60:] = bytes(60)  # in the last block: its mask and codes are gone
    assert_same(unpack_slice(Packed.from_bytes(resigned(torn)), 150, 850), x[150:850])


def test_a_group_with_too_many_nonzeros_is_refused() -> None:
    x = np.zeros((3, 8), np.float32)
    x[1, 5:8] = 1
    with pytest.raises(
        CodecError, match=r"group of 4 elements at element 12 \(index \(1, 4\)\) has more than 2 nonzeros"
    ):
        pack(x, "nm")
    assert_same(unpack(pack(x, "nm(3:4)")), x)
    x = np.zeros(5000, np.float32)
    x[4998:] = 1
    with pytest.raises(CodecError, match=r"group of 4 elements at element 4996 .* has more than 1 nonzeros"):
        pack(x, "nm(1:4)")


def test_entropy_coded_tags_by_hand() -> None:
    """The three counts of a block, then words, then the codes of the values."""
    x = np.array([0, 1, -1, 1, 0, 3, 0, 0], np.float32)
    stream = pack(x, "alpha_entropy", "e4m3fn", alpha=1.0).to_bytes()
    counts = 1 | 2 << 4 | 1 << 8  # values, +alpha, -alpha of 8 elements: 4 bits each
    assert stream[-7:-5] == counts.to_bytes(2, "little")
    assert stream[-1:] == bytes([0b01000100])
    assert_same(unpack(Packed.from_bytes(stream)), x)
    uniform = pack(np.zeros(4096, np.float32), "alpha_entropy").bits_by_part
    assert uniform["metadata"] == 40


@pytest.mark.parametrize("sigma", [1, 2, 3])
def test_entropy_coding_comes_near_the_tag_entropy(sigma: float) -> None:
    x, alpha, scale = pruned_lognormal(sigma, sparsity=0.85)
    f = footprint(x, codec="alpha_entropy", fmt="e4m3fn", alpha=float(alpha), scale=scale)
    assert f.tag_entropy_bits < f.nbits < 1.05 * f.tag_entropy_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_strided_and_with_gradients(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0, -2.0], [0.5, -0.0, 6.0]], dtype=dtype, requires_grad=True)
    for view in (x, x.t(), x[:, ::2], x[1, 1]):
        assert_same(unpack(pack(view, "alpha", alpha=0.5)), view.detach().float().numpy())


def test_alpha_off_the_grid_is_kept_exactly_by_the_codec_that_tags_it() -> None:
    alpha = np.float32(0.1)
    x = np.array([0, alpha, -alpha, 1, alpha / 2, 0], np.float32)
    with pytest.raises(CodecError, match=r"element 4 \(index \(4,\)\)"):
        pack(x, "alpha", "e4m3fn", alpha=0.1)
    x[4] = 0.015625  # below alpha and on the grid: an ordinary value
    assert_same(unpack(pack(x, "alpha", "e4m3fn", alpha=0.1)), x)
    with pytest.raises(CodecError, match="element 1"):
        pack(x, "bitmask", "e4m3fn", alpha=0.1)
    assert count_blocks(x, 0.1).total == Counts(numel=6, nonzeros=4, alphas=2)


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ([[0, 1], [1, 1.01]], {}, r"element 3 \(index \(1, 1\)\) is 1.01: codec 'alpha' needs a value of e4m3fn"),
        ([[1, 449]], {}, r"index \(0, 1\)"),
        ([[1, np.inf]], {}, r"index \(0, 1\)"),
        ([[np.nan]], {"fmt": "e2m1"}, "element 0"),
        ([[-0.0]], {"fmt": "e4m3fnuz"}, "element 0"),
        ([[1.0]], {"codec": "alpa"}, "unknown codec 'alpa' .did you mean 'alpha'"),
        ([[1.0]], {"fmt": "e4m3fm"}, "unknown format 'e4m3fm' .did you mean 'e4m3fn'"),
        ([[1.0]], {"scale": 0.0}, "scale must be positive and finite"),
        ([[1.0]], {"scale": math.nan}, "scale must be positive and finite"),
        ([[1.0]], {"scale": 1e-60}, "scale must be positive and finite"),
        ([[1.0]], {"scale": "two"}, "scale must be a number"),
        ([[1.0]], {"scale": torch.ones(1)}, "scale must be one number.*tensor"),
        ([[1.0]], {"alpha": -1.0}, "alpha must be positive and finite"),
        ([[1.0]], {"alpha": torch.ones(1)}, "alpha must be one number.*tensor"),
        ([[1.0]], {"block": 0}, "block must be an integer from 1 to 65536"),
    ],
)
def test_what_pack_refuses(values: list[list[float]], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        pack(np.array(values, np.float32), **arguments)  # type: ignore[arg-type]


def test_types_that_are_not_carried_are_refused() -> None:
    for x in (
        torch.ones(2, dtype=torch.float64),
        np.ones(2),
        np.ones(2, ">f4"),
        torch.ones(2, dtype=torch.int8),
        [1.0],
    ):
        with pytest.raises(CodecError, match="float"):
            pack(x)  # type: ignore[arg-type]


def test_a_body_beyond_the_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "MAX_BODY_BYTES", 99)
    pack(np.zeros(99, np.float32), "dense", block=10)
    with pytest.raises(CodecError, match="99 bytes that block offsets reach"):
        pack(np.zeros(100, np.float32), "dense", block=10)


def test_counts_per_block_against_numpy() -> None:
    rng = np.random.default_rng(5)
    x = rng.choice(np.array([0, 0, -0.0, 0.5, -0.5, 3, np.nan, np.inf], np.float32), 150_001)
    counts = count_blocks(x, 0.5)
    pieces = [x[i : i + 4096] for i in range(0, x.size, 4096)]
    assert counts.nonzeros.tolist() == [int(((p != 0) | np.signbit(p)).sum()) for p in pieces]
    assert counts.alphas.tolist() == [int((np.abs(p) == 0.5).sum()) for p in pieces]
    assert counts.sizes.tolist() == [p.size for p in pieces]
    assert count_blocks(x, None).total == count_blocks(x, 0).total == Counts(x.size, counts.total.nonzeros, 0)


@pytest.mark.parametrize("codec", [*NAMED, "alpha_entropy", "rle(6)"])
@pytest.mark.parametrize(("spec", "shape"), [("e4m3fn", (1_000_000,)), ("e2m4", (2000, 500)), ("e2m1", (100_000, 10))])
@pytest.mark.parametrize(
    ("density", "alpha_share"),
    [
        (0.0, 0.0),
        (0.0001, 0.5),
        (0.001, 0.5),
        (0.02, 0.0),
        (0.05, 0.9),
        (0.15, 0.66),
        (0.5, 0.4),
        (0.9, 0.9),
        (1.0, 0.5),
    ],
)
def test_closed_form_is_within_a_percent(
    codec: str, spec: str, shape: tuple[int, ...], density: float, alpha_share: float
) -> None:
    """Of the stream, for independent elements, at every density; run lengths from .05 on."""
    if codec.startswith("rle") and 0 < density < 0.05:
        return
    rng, size = np.random.default_rng(7), 1_000_000
    x = np.where(rng.random(size) < alpha_share, np.float32(1), np.float32(2)) * (rng.random(size) < density)
    x = (x * rng.choice(np.array([-1, 1], np.float32), size)).astype(np.float32) + np.float32(0)
    if codec.startswith("nm"):
        x = with_groups(x, 2, 4)
    if codec.startswith("nm") and shape[-1] % 4:
        shape = (1_000_000,)
    counts = count_blocks(x, 1.0)
    counted = pack(x.reshape(shape), codec, spec, alpha=1.0)
    expected = footprint(counts.total, codec=codec, fmt=spec, shape=shape)
    by_chance = codec == "csr" and density == 0.0001  # 100 nonzeros tell how wide the pointers of 245 blocks are
    assert expected.nbits == pytest.approx(counted.nbits, rel=0.03 if by_chance else 0.01)
    assert expected.bits_by_part.keys() == counted.bits_by_part.keys()


@pytest.mark.parametrize(("shape", "message"), [((2, 3), "does not hold the 7 elements"), ((7, 2), "does not hold")])
def test_a_closed_form_for_another_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        footprint(Counts(7, 3), codec="csr", fmt="e4m3fn", shape=shape)


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if not codec.is_counted])
def test_a_length_that_counts_do_not_tell(codec: str) -> None:
    with pytest.raises(CodecError, match="does not follow from counts: pack the tensor"):
        footprint_of_blocks(count_blocks(np.ones(6, np.float32)), codec, "e4m3fn", (6,))


def test_closed_form_by_hand() -> None:
    f = footprint(Counts(numel=8192, nonzeros=2000, alphas=800), codec="alpha", fmt="e3m2")
    # lengths that vary are multiples of 1 bit (6 in the payload: of 2) in each of 2 blocks: 3.5 (3) bits fill them up
    assert f.bits_by_part == {
        "header": 8 * (10 + 34 + 6 + 7 + 5 + 8),
        "offsets": 64,
        "metadata": pytest.approx(8192 + 2000 + 7 + 800 + 7, abs=1e-6),
        "payload": pytest.approx(7200 + 6, abs=1e-6),
    }
    share = np.array([6192, 400, 400, 1200]) / 8192
    assert f.tag_entropy_bits == pytest.approx(-8192 * (share * np.log2(share)).sum() + 7200)
    assert f.order0_entropy_bits is None
    f = footprint({"numel": 64, "nonzeros": 16}, codec="csr", fmt="e4m3fn", shape=(8, 8))
    count, pointers, columns = 8, 9 * 5 + 3, 16 * 3  # 16 nonzeros take 5 bits to count, 8 to 15 of them take 4
    assert f.bits_by_part["metadata"] == pytest.approx(count + pointers + columns, abs=6)
    assert f.bits_by_part["payload"] == pytest.approx(16 * 8)
    f = footprint({"numel": 6400, "nonzeros": 640}, codec="rle", fmt="e4m3fn", block=6400)
    entries = 640 / (1 - 0.9**16)
    assert f.bits_by_part["payload"] == pytest.approx(8 * entries)
    assert f.bits_by_part["metadata"] == pytest.approx(16 + 4 * entries + 2, abs=1e-3)


def test_entropies_of_a_tensor() -> None:
    x = np.array([0, 0, 0, 0, 1, 1, -2, np.nan], np.float32)
    f = footprint(x, codec="bitmask", fmt="e4m3fn", alpha=1.0)  # all alphas are positive
    assert f.tag_entropy_bits == pytest.approx(4 * 1 + 2 * 2 + 2 * 2 + 2 * 8)
    assert f.order0_entropy_bits == pytest.approx(4 * 1 + 2 * 2 + 2 * 3)
    assert f.bits_per_element == f.nbits / 8
    assert math.isnan(footprint(x[:0], codec="dense", fmt="e4m3fn").bits_per_element)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"numel": 4, "nonzeros": 5}, "does not hold"),
        ({"numel": 4, "nonzero": 1}, "unknown key 'nonzero' .did you mean 'nonzeros'"),
        ({"numel": 4}, "nonzeros is missing"),
        ({"numel": 4, "nonzeros": 3, "alphas": 2, "negative_alphas": 3}, "negative_alphas"),
        ({"numel": 4, "nonzeros": 3, "code_histogram": (1, 2)}, "code_histogram must sum to"),
    ],
)
def test_contradicting_counts_are_refused(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        footprint(mapping, codec="dense", fmt="e4m3fn")


def test_a_shape_other_than_the_counted_is_refused() -> None:
    with pytest.raises(CodecError, match="does not hold the 6 elements"):
        footprint_of_blocks(count_blocks(np.ones(6, np.float32)), "dense", "e4m3fn", (2, 4))


# --- the checked numbers: lognormal samples, stochastic pruning at 85 % zeros, FP8 by ml_dtypes ---


def pruned_lognormal(sigma: float, sparsity: float) -> tuple[FLOAT, np.float32, float]:
    """(T(x) with survivors rounded to scale * e4m3fn, alpha off that grid, scale) for 1e6 samples."""
    rng, size = np.random.default_rng(11), 1_000_000
    magnitude = np.exp(sigma * rng.standard_normal(size)).astype(np.float32)
    low, high = magnitude.min(), magnitude.max()
    for _ in range(60):
        alpha = np.float32(np.sqrt(low * high))
        low, high = (alpha, high) if np.maximum(0, 1 - magnitude / alpha).mean() < sparsity else (low, alpha)
    scale = 2.0 ** np.ceil(np.log2(magnitude.max() / 448))
    survivors = (magnitude / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    pruned = np.where(magnitude >= alpha * rng.random(size, np.float32), alpha, np.float32(0))
    x = np.where(magnitude > alpha, survivors, pruned) * rng.choice(np.array([-1, 1], np.float32), size)
    return np.where(x == 0, np.float32(0), x).astype(np.float32), alpha, scale


def entropy(shares: npt.ArrayLike) -> float:
    """Bits a symbol."""
    return -sum(share * math.log2(share) for share in np.asarray(shares).tolist() if share)


@pytest.mark.parametrize("sigma", [1, 2, 3])
def test_entropies_against_the_lognormal_law_and_ml_dtypes_codes(sigma: float) -> None:
    x, alpha, scale = pruned_lognormal(sigma, sparsity=0.85)
    f = footprint(x, codec="alpha", fmt="e4m3fn", alpha=float(alpha), scale=scale)
    values = math.erfc(math.log(alpha) / sigma / math.sqrt(2)) / 2  # P(|x| > alpha)
    tags = [0.85, (0.15 - values) / 2, (0.15 - values) / 2, values]
    assert f.tag_entropy_bits / x.size == pytest.approx(entropy(tags) + 8 * values, abs=0.006)
    codes = (x / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.int64)
    codes[np.abs(x) == alpha] = 256 + (x[np.abs(x) == alpha] > 0)
    assert f.order0_entropy_bits == pytest.approx(x.size * entropy(np.bincount(codes) / x.size), rel=1e-9)
    if sigma == 2:
        assert f.order0_entropy_bits is not None
        assert f.tag_entropy_bits / x.size == pytest.approx(1.254, abs=0.005)
        assert f.order0_entropy_bits / x.size == pytest.approx(1.138, abs=0.01)


def test_checked_bits_per_element() -> None:
    x, alpha, scale = pruned_lognormal(2, sparsity=0.85)
    counts = count_blocks(x, float(alpha))
    assert counts.total.alphas / counts.total.nonzeros == pytest.approx(0.66, abs=0.005)
    for codec, bits in (("dense", 8.0), ("bitmask", 2.20), ("alpha", 1.65)):
        parts = footprint_of_blocks(counts, codec, "e4m3fn", x.shape).bits_by_part
        assert (parts["metadata"] + parts["payload"]) / x.size == pytest.approx(bits, abs=0.01)
    assert footprint(x, codec="alpha", fmt="e4m3fn", alpha=float(alpha), scale=scale).bits_per_element < 1.68


@pytest.mark.parametrize(
    ("density", "bits"),
    [
        (0.15, {"bitmask": 2.20, "csr": 2.72, "rle(4)": 1.95, "coo": 3.00}),
        (0.05, {"bitmask": 1.40, "csr": 0.91, "rle(6)": 0.72, "coo": 1.00}),
        (0.5, {"bitmask": 4.99, "csr": 9.00, "rle(2)": 5.32, "coo": 10.0}),
    ],
)
def test_checked_bits_of_independent_masks(density: float, bits: dict[str, float]) -> None:
    rng = np.random.default_rng(3)
    x = np.where(rng.random((512, 1024)) < density, np.float32(1), np.float32(0))
    for codec, expected in bits.items():
        parts = pack(x, codec).bits_by_part
        assert (parts["metadata"] + parts["payload"]) / x.size == pytest.approx(expected, abs=0.02)


# --- bad input ---


def resigned(stream: bytes | bytearray) -> bytes:
    return bytes(stream[:6]) + struct.pack("<I", crc32c(bytes(stream[10:]))) + bytes(stream[10:])


@pytest.fixture(scope="module")
def sample() -> FLOAT:
    x = draw_values(format("e4m3fn"), 600, density=0.4, seed=1)
    x[::7], x[3::11] = 1.0, -1.0
    return np.concatenate([with_groups(row, 2, 4) for row in x.reshape(20, 30)]).reshape(20, 30)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sign_again", [False, True], ids=["damaged", "forged"])
def test_mutated_streams_are_refused(codec: str, sign_again: bool, sample: FLOAT) -> None:
    check_mutants(codec, sign_again, sample, trials=1000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sign_again", [False, True], ids=["damaged", "forged"])
def test_many_mutated_streams_are_refused(codec: str, sign_again: bool, sample: FLOAT) -> None:
    check_mutants(codec, sign_again, sample, trials=100_000)


def check_mutants(codec: str, sign_again: bool, sample: FLOAT, trials: int) -> None:
    """Damage gives CodecError; with the checksum made to fit, CodecError or some tensor, and nothing else."""
    stream = pack(sample, codec, alpha=1.0, block=128).to_bytes()
    rng = np.random.default_rng(2)
    header = stream.index(b"e4m3fn") + 6 + 16 + 4 * 5
    most = MAX_ROW if codec == "csr" else 1 << 16  # elements of a block, which takes four bytes of offset
    refused = 0
    for trial in range(trials):
        mutant = bytearray(stream)
        kind = trial % 5
        place = int(rng.integers(len(stream) if kind else header))
        if kind <= 1:
            mutant[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            mutant[place : place + 8] = rng.bytes(8)
        elif kind == 3:
            del mutant[place : place + int(rng.integers(1, 9))]
        else:
            mutant[place:place] = rng.bytes(int(rng.integers(1, 9)))
        try:
            result = unpack(Packed.from_bytes(resigned(mutant) if sign_again else bytes(mutant)))
        except CodecError:
            refused += 1
            continue
        assert sign_again or bytes(mutant) == stream
        assert result.numel() <= most * len(mutant) / 4
    assert refused >= (trials // 2 if sign_again else 0.99 * trials)


@pytest.mark.parametrize("codec", CODECS)
def test_truncated_streams_are_refused(codec: str, sample: FLOAT) -> None:
    stream = pack(sample[:2, :20], codec, alpha=1.0, block=16).to_bytes()
    for length in range(len(stream)):
        for mutant in (stream[:length], resigned(stream[:length])):
            with pytest.raises(CodecError):
                Packed.from_bytes(mutant)


def test_wrong_streams_say_what_is_wrong(sample: FLOAT) -> None:
    stream = pack(sample, "alpha", alpha=1.0, block=128).to_bytes()
    shape = stream.index(b"e4m3fn") + 6

    def changed(place: int, data: bytes) -> bytes:
        return resigned(stream[:place] + data + stream[place + len(data) :])

    cases = [
        (b"", "truncated"),
        (b"PK\x03\x04" + stream[4:], "not a packed tensor"),
        (stream[:4] + b"\x02\x00" + stream[6:], "has version 2; this program reads version 1"),
        (stream[:-1], "damaged or truncated"),
        (resigned(stream + b"\0"), "its header says"),
        (stream[:60].replace(b"alpha", b"alpho") + stream[60:], "damaged"),
        (resigned(stream.replace(b"alpha", b"alpho")), "unknown codec 'alpho'"),
        (changed(10, b"\x09"), "exponent_bits must be an integer from 0 to 8"),
        (changed(16, struct.pack("<I", 1 << 31)), "block must be an integer"),
        (changed(20, struct.pack("<f", -1)), "scale must be positive"),
        (changed(24, struct.pack("<f", math.inf)), "alpha must be positive"),
        (changed(shape, struct.pack("<QQ", 1 << 62, 1 << 62)), "larger than any tensor"),
        (changed(shape, struct.pack("<QQ", 1 << 50, 1)), "its header says"),
        (changed(shape + 16, b"\x01"), "block offsets do not rise"),
        (changed(shape + 20, struct.pack("<I", 1 << 31)), "block offsets do not rise"),
        (changed(24, struct.pack("<f", 0)), "the header has no alpha"),
    ]
    for mutant, message in cases:
        with pytest.raises(CodecError, match=message):
            unpack(Packed.from_bytes(mutant))
    with pytest.raises(CodecError, match="must be bytes"):
        Packed.from_bytes(10**12)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("codec", CODECS)
def test_memory_of_a_forged_stream(codec: str) -> None:
    """At most twice the tensor and the stream that it declares, and 4 MiB."""
    x = np.tile(with_groups(draw_values(format("e4m3fn"), 1024, density=0.5, seed=4), 2, 4), (2048, 1))
    stream = pack(x, codec, alpha=1.0).to_bytes()
    unpack(Packed.from_bytes(stream))
    rng, first = np.random.default_rng(5), len(stream) - 4 * 512 - 4096
    for trial in range(6):
        mutant = bytearray(stream)
        if trial:
            place = int(rng.integers(first, len(stream) - 8))
            mutant[place : place + 8] = rng.bytes(8)
        forged = resigned(mutant)
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = status_bytes("VmRSS")
        with contextlib.suppress(CodecError):
            unpack(Packed.from_bytes(forged))
        assert status_bytes("VmHWM") - before <= 2 * (4 * x.size + len(stream)) + (4 << 20), trial


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def test_a_small_stream_cannot_ask_for_much_memory() -> None:
    stream = pack(np.zeros(65536, np.float32), "bitmask", block=1 << 16).to_bytes()
    shape = stream.index(b"e4m3fn") + 6
    forged = bytearray(stream[: shape + 8 + 4])
    forged[28:44] = struct.pack("<QQ", 0, 0)
    with pytest.raises(CodecError, match="0 bytes of blocks are too few"):
        Packed.from_bytes(resigned(forged))


def test_every_policy_survives_the_header() -> None:
    fields: dict[str, dict[str, object]] = {"scale": {"exponent_bits": 8, "mantissa_bits": 0}}
    fields["integer"] = {"exponent_bits": 0, "mantissa_bits": 7}
    usual = {"exponent_bits": 4, "mantissa_bits": 3}
    described = [{**fields.get(policy, usual), "policy": policy} for policy in POLICIES]
    more = [
        {"policy": "ieee", "subnormals": False},
        {"policy": "fn", "signed": False},
        {"policy": "fn", "alpha_codes": True},
    ]
    for spec in [*described, *({**usual, **one} for one in more)]:
        fmt = format(spec)
        assert Packed.from_bytes(pack(np.ones(3, np.float32), "dense", fmt).to_bytes()).header.fmt == fmt


def test_alpha_codes_keep_alpha_in_a_dense_stream() -> None:
    """+-alpha off the grid, in the code points that the format reserves: eight bits an element, nothing lost."""
    fmt = format({"exponent_bits": 4, "mantissa_bits": 3, "policy": "fn", "alpha_codes": True})
    x = torch.tensor([0.0, 0.7, -0.7, 1.0, 448.0, -0.0, 0.6875])
    for codec in ("dense", "bitmask", "alpha"):
        packed = pack(x, codec, fmt, alpha=0.7)
        assert torch.equal(unpack(Packed.from_bytes(packed.to_bytes())), x)
    assert pack(x, "dense", fmt, alpha=0.7).bits_by_part["payload"] == 8 * x.numel()
    with pytest.raises(CodecError, match="element 1"):
        pack(x, "dense", fmt)


def test_block_formats_are_refused_by_name() -> None:
    with pytest.raises(CodecError, match=r"a stream holds codes of a scalar format .got the block format 'mxfp4'"):
        pack(torch.ones(3), "dense", "mxfp4")
