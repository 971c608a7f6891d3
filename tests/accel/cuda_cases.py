"""What CUDA and CPU kernels are compared on: the public operations, on small or large tensors of a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import accel

Case = Callable[[torch.Tensor], Any]
SPECIALS = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 2.0**-10, 448.0, 464.0, -465.0, 3e38]
MODES = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
WORDS = {"seed": 5, "stream": 6, "step": 7, "offset": 1237}
# elements and modes that between them take every way to round, and the kinds of blocks
BLOCKS = [(fmt, mode) for fmt in ("e2m1", "int8") for mode in ("nearest_even", "stochastic")]
BLOCKS += [("bf16", "nearest_even"), ("e2m1", "up")]
BLOCK_KINDS: dict[str, dict[str, Any]] = {
    "power": {},
    "amax": {"scale": "e4m3fn", "scale_rule": "amax"},
    "columns": {"axis": 0, "block_size": 3},
}
E4M3_ALPHA = accel.format({"exponent_bits": 4, "mantissa_bits": 3, "policy": "fn", "alpha_codes": True})


STOCHASTIC = {"base": "fp16-acc", "rounding": "stochastic"}
PRODUCTS: list[tuple[str, Any, Case]] = [  # (what it takes, unit, operands), one for each kind of step
    ("narrow", "fp16-acc", lambda x: accel.quantize(x.nan_to_num(0, 0, 0).clamp(-1, 1), "e5m2")),
    ("narrow, infinite", "fp16-acc", lambda x: accel.quantize(x, "e5m2", overflow="ieee")),
    ("narrow, saturated", {"base": "fp16-acc", "overflow": "saturate"}, lambda x: accel.quantize(x, "e5m2")),
    ("wide", "fp22", lambda x: accel.quantize(x.nan_to_num(0, 0, 0), "e4m3fn")),
    ("wide, infinite", "fp22", lambda x: accel.quantize(x, "e4m3fn")),
    ("wide, saturated", {"base": "fp22", "overflow": "saturate"}, lambda x: accel.quantize(x, "e4m3fn")),
    ("wide, limited", {"accumulator": "e4m3fn"}, lambda x: accel.quantize(x, "e4m3fn")),
    ("odd", "fp32", lambda x: x),
    (
        "wide, toward zero",
        {"base": "fp22", "rounding": "toward_zero"},
        lambda x: accel.quantize(x.nan_to_num(0, 0, 0), "e4m3fn"),
    ),
    ("limited, toward zero", {"base": "fp16-acc", "rounding": "toward_zero"}, lambda x: accel.quantize(x, "e4m3fn")),
    ("odd, toward zero", {"base": "fp32", "rounding": "toward_zero"}, lambda x: x),
    (
        "chunks",
        {"base": "fp16-acc", "chunk": 7, "outer": "fp32"},
        lambda x: accel.quantize(x.nan_to_num(0, 0, 0), "e4m3fn"),
    ),
    ("fused", "hopper-fp8", lambda x: accel.quantize(x, "e4m3fn")),
    ("rounded products", {"accumulator": "fp16", "product": "bf16", "chunk": 7}, lambda x: x),
    ("stochastic", STOCHASTIC, lambda x: accel.quantize(x.nan_to_num(0, 0, 0), "e4m3fn")),
]


def numbers(count: int) -> torch.Tensor:
    """float32 of many magnitudes, with special values among them: shape (count,)."""
    random = np.random.default_rng(0)
    x = (random.normal(0, 30, count) * 2.0 ** random.integers(-12, 4, count)).astype(np.float32)
    x[: len(SPECIALS)] = SPECIALS
    return torch.from_numpy(x)


def cases() -> Iterator[tuple[str, Case]]:
    """(name, operation) for every kernel; the tensor that they take has a multiple of 8 elements."""
    for mode in MODES:
        for fmt in ("e4m3fn", "int8", "binary8p1", "e8m0fnu"):
            yield f"quantize {fmt} {mode}", _quantize(fmt, rounding=mode, overflow="ieee", **WORDS)
        yield f"quantize scaled {mode}", _quantize("e5m2", rounding=mode, scale=0.3, **WORDS)
        yield f"encode {mode}", _encode("e4m3fn", rounding=mode, **WORDS)
        yield f"encode scaled {mode}", _encode("e4m3fn", rounding=mode, scale=0.7, **WORDS)
        yield f"both {mode}", _both("e5m2", rounding=mode, scale=0.25, **WORDS)
        yield f"prune_quantize {mode}", _prune_quantize("e5m2", rounding=mode, **WORDS)
        yield f"prune_quantize scaled {mode}", _prune_quantize("e5m2", rounding=mode, scale=0.3, **WORDS)
        yield f"float64 {mode}", _double("e4m3fn", rounding=mode, **WORDS)
    for element, mode in BLOCKS:
        for name, options in BLOCK_KINDS.items():
            blocks = {"element": element, "block_size": 12, **options}
            yield f"blocks {element} {name} {mode}", _quantize(blocks, rounding=mode, **WORDS)
            yield f"encode blocks {element} {name} {mode}", _encode_blocks(blocks, rounding=mode, **WORDS)
    for size in (1, 8, 16, 32, 40, 5000):
        yield f"blocks of {size}", _quantize({"base": "mxfp4", "block_size": size}, **WORDS)
    yield "stochastic blocks of 32", lambda x: accel.quantize(x[: x.numel() // 32 * 32], "nvfp4", rounding="stochastic")
    yield "quantize bf16", _quantize("bf16", overflow="ieee")
    yield "both bf16", _both("bf16", scale=0.3)
    yield "prune_quantize bf16", _prune_quantize("bf16")
    yield "encode int8", _encode("int8")
    yield "encode uint8 up", _encode("uint8", rounding="up")
    yield "both int8", _both("int8")
    yield "prune_quantize int8", _prune_quantize("int8")
    yield "prune_quantize int8 stochastic", _prune_quantize("int8", rounding="stochastic", **WORDS)
    yield "prune_quantize int8 stochastic scaled", _prune_quantize("int8", rounding="stochastic", scale=3.0, **WORDS)
    for fmt, mode in (("int8", "nearest_even"), ("bf16", "nearest_even"), ("int8", "stochastic")):
        yield f"scaled {fmt} {mode}", _quantize(fmt, rounding=mode, scale=0.3, **WORDS)
        yield f"encode scaled {fmt} {mode}", _encode(fmt, rounding=mode, scale=0.3, **WORDS)
        yield f"prune_quantize scaled {fmt} {mode}", _prune_quantize(fmt, rounding=mode, scale=0.3, **WORDS)
    yield "prune_quantize e8m0fnu", _prune_quantize("e8m0fnu", **WORDS)  # which has no zero
    yield "prune", lambda x: accel.prune(x, 9.0, **WORDS)
    yield "channel scales", _with_scales((8, 1))
    yield "element scales", _with_scales((-1,))
    yield "bfloat16", lambda x: accel.quantize(x.bfloat16(), "e4m3fn", rounding="stochastic")
    yield "transposed", lambda x: accel.quantize(x.view(8, -1).t(), "e4m3fn", rounding="stochastic", **WORDS)
    yield "16-bit codes", lambda x: _decoded(accel.encode(x, "bf16"), "bf16")
    yield "32-bit codes", lambda x: _decoded(accel.encode(x, "tf32", rounding="up"), "tf32")
    yield "alpha codes", _alpha_codes
    for codec in ("bitmask", "alpha_tag", "alpha"):
        yield f"pack {codec}", _packed(codec)
    for fmt in ("e2m1", "int8", "bf16"):
        yield f"pack alpha {fmt}", _packed("alpha", fmt)
    yield "pack reserved codes", _packed("bitmask", "e4m3fn codes")
    yield "pack in blocks of 24", _packed("alpha", block=24)
    yield "pack with a tiny scale", _packed("alpha", scale=2.0**-140)
    yield "pack what no value has a code for", _refused
    yield "unpack what is wrong", _damaged
    yield "pack rle", _packed("rle")  # whose loops run on the CPU
    for name, unit, make in PRODUCTS:
        yield f"matmul {name}", _product(unit, make)
    yield "matmul convolution", _convolution
    yield "largest magnitude", lambda x: (accel.largest_magnitude(x), accel.largest_magnitude(x.nan_to_num()))
    yield "empty", lambda x: accel.quantize(x[:0], "e4m3fn")
    yield "0-d", lambda x: accel.quantize(x[7], "e4m3fn", rounding="stochastic", **WORDS)


def _product(unit: Any, make: Case) -> Case:
    """A product of whose operands one is transposed, in tiles that are not whole."""

    def call(x: torch.Tensor) -> torch.Tensor:
        rows, length, columns = (9, 20, 7) if x.numel() < 100_000 else (130, 300, 70)
        a, b = x[: rows * length].view(rows, length), x.flip(0)[: length * columns].view(columns, length).t()
        return accel.matmul(make(a), make(b), unit, seed=3, stream=4, step=5, offset=6)

    return call


def _convolution(x: torch.Tensor) -> list[torch.Tensor]:
    """All three products, with a stride, padding and groups."""
    conv, side = accel.Convolution((2, 1), (1, 0), (1, 1), 2), 5 if x.numel() < 100_000 else 40
    image = accel.quantize(x.nan_to_num(0, 0, 0)[: 4 * side * side].view(1, 4, side, side), "e4m3fn")
    w = accel.quantize(x.flip(0).nan_to_num(0, 0, 0)[: 6 * 2 * 6].view(6, 2, 3, 2), "e4m3fn")
    y = accel.conv_forward(image, w, conv, "fp22")
    dy = accel.quantize(y, "e5m2")
    dx = accel.conv_dgrad(dy, w, conv, (side, side), "fp22")
    return [y, dx, accel.conv_wgrad(image, dy, conv, (3, 2), "fp22")]


def _quantize(fmt: Any, **options: Any) -> Case:
    return lambda x: accel.quantize(x.view(8, -1), fmt, **options)


def _encode(fmt: Any, **options: Any) -> Case:
    return lambda x: _decoded(accel.encode(x.nan_to_num(), fmt, **options), fmt)


def _decoded(codes: torch.Tensor, fmt: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return codes, accel.decode(codes, fmt, scale=0.7)


def _both(fmt: Any, **options: Any) -> Case:
    return lambda x: accel.quantize_encode(x.nan_to_num(), fmt, **options)


def _prune_quantize(fmt: Any, **options: Any) -> Case:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded, counts = accel.prune_quantize(x, 9.0, fmt, **options)
        return rounded, counts.counts

    return call


def _double(fmt: Any, **options: Any) -> Case:
    def call(x: torch.Tensor) -> Any:
        wide = x.double() * (1 + 2.0**-40)
        finite = wide.nan_to_num()
        codes = accel.encode(finite, fmt, **options)
        return accel.quantize(wide, fmt, **options), codes, accel.quantize_encode(finite, fmt, **options)

    return call


def _encode_blocks(fmt: Any, **options: Any) -> Case:
    def call(x: torch.Tensor) -> Any:
        encoded = accel.encode(x.view(8, -1), fmt, **options)
        return encoded.codes, encoded.scales, accel.decode(encoded, fmt)

    return call


def _with_scales(shape: tuple[int, ...]) -> Case:
    def call(x: torch.Tensor) -> Any:
        rows = x.view(8, -1)
        count = 8 if shape == (8, 1) else rows.shape[1]
        scale = torch.linspace(0.1, 3, count, device=x.device).view(shape)
        return accel.quantize(rows, "e4m3fn", scale=scale), accel.quantize(
            rows, "e4m3fn", scale=scale, rounding="stochastic", **WORDS
        )

    return call


def _alpha_codes(x: torch.Tensor) -> Any:
    alpha = 0.7
    pruned = accel.prune(x.nan_to_num(), alpha)
    codes = accel.encode(pruned, E4M3_ALPHA, alpha=alpha)
    return codes, accel.decode(codes, E4M3_ALPHA, alpha=alpha), accel.quantize(pruned, E4M3_ALPHA, alpha=alpha)


def _packed(codec: str, name: str = "e4m3fn", block: int = 4096, scale: float = 1.0) -> Case:
    """The stream of a pruned tensor, and the tensor again."""
    fmt = E4M3_ALPHA if name == "e4m3fn codes" else accel.format(name)
    alpha = 3.0 * scale

    def call(x: torch.Tensor) -> Any:
        rounded, _ = accel.prune_quantize(x.nan_to_num() * scale, alpha, fmt, scale=scale)
        if name == "bf16":
            rounded[1], rounded[5] = -0.0, torch.nan
        alphas = {"alpha": alpha} if "alpha" in codec or name == "e4m3fn codes" else {}
        packed = accel.pack(rounded.view(8, -1), codec, fmt, scale=scale, block=block, **alphas)
        again = accel.unpack(packed, out=torch.full_like(rounded, 7.0).view(8, -1))
        assert same_bits(again.view(-1).cpu(), rounded.cpu())
        return torch.tensor(list(packed.to_bytes()), dtype=torch.uint8), again

    return call


def _refused(x: torch.Tensor) -> torch.Tensor:
    """The message for the first of two values that no code stands for, as bytes."""
    wrong = torch.zeros_like(x)
    wrong[-3], wrong[-50] = 1.03, 1.02
    with pytest.raises(accel.CodecError) as error:
        accel.pack(wrong, "alpha", "e4m3fn", alpha=3.0)
    return torch.tensor(list(str(error.value).encode()), dtype=torch.uint8)


def _damaged(x: torch.Tensor) -> torch.Tensor:
    """Messages for blocks that are too short, too long, or hold an alpha that the header does not know, as bytes."""
    found = b""
    for codec in ("bitmask", "alpha_tag", "alpha"):
        values = accel.prune(x.nan_to_num(), 3.0).sign() * 3
        good = accel.pack(values, codec, "e4m3fn", alpha=3.0)
        body = good.header.body_bytes
        start = len(good.stream) - body
        header = dataclasses.replace(good.header, alpha=np.float32(0))
        short, long = good.stream[:start] + bytes(body), good.stream[:start] + b"\xff" * body
        streams = (header, good.stream), (good.header, short), (good.header, long)
        for packed in (accel.Packed(*parts) for parts in streams):
            try:
                found += str(float(accel.unpack(packed, out=torch.empty_like(x)).nan_to_num().sum())).encode()
            except accel.CodecError as error:
                found += str(error).encode()
    return torch.tensor(list(found), dtype=torch.uint8)


def flattened(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, on the CPU."""
    if isinstance(result, torch.Tensor):
        return [result.cpu()]
    return [tensor for part in result for tensor in flattened(part)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape, dtype and bits, all NaNs being one."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.dtype.is_floating_point:
        if not torch.equal(one.isnan(), other.isnan()):
            return False
        one, other = one.masked_fill(one.isnan(), 0.0), other.masked_fill(other.isnan(), 0.0)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))
