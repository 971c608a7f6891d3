"""What users call on tensors: quantize, encode, decode, prune, and the fused forms.

Every operation takes a torch tensor or a NumPy array and returns the same kind. Elements are numbered in row-major
logical order, whatever the strides; `offset` is the number of the first element, for a piece of a larger tensor.
Random words depend on (seed, stream, step, element number) alone: see accel/random.py.

`quantize`, `prune` and `prune_quantize` of torch tensors without `out` are the operators of accel/operators.py:
differentiable (straight-through) and known to torch.compile. Everything else goes straight to the kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from accel import launch
from accel.arguments import (
    Scale,
    alpha_of,
    as_tensor,
    check_block,
    checked_options,
    checked_out,
    checked_scales,
    checked_tensor,
    checked_words,
    code_dtype,
    key_of,
    refuse_nan,
    refuse_narrow,
    scalar_format,
    split_scale,
)
from accel.block_formats import BlockFormat
from accel.codecs.counts import BlockCounts
from accel.formats import Format
from accel.kernels.arguments import Table
from accel.kernels.cpu import CHUNK
from accel.operators import (
    checked_prunable,
    checked_threshold,
    flush_name,
    prune_quantize_into,
    quantize_into,
    tensor_scale,
)
from accel.presets import Spec, format, to_text
from accel.rounding import needs_wide, parameters

Array = TypeVar("Array", torch.Tensor, npt.NDArray[Any])
AnyArray = torch.Tensor | npt.NDArray[Any]

text_of = torch.compiler.assume_constant_result(to_text)  # torch.compile need not see how a text is made


class BlockCodes(NamedTuple):
    """A tensor encoded in a block format.

    codes: of the elements, in the tensor's shape (the axis rounded up to whole blocks under padding `zeros`).
    scales: codes of the blocks' scales, in that shape with the blocks along the axis. tensor_scale: float32, shape
    (1,), or None. length: elements along the axis before padding.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None
    length: int


def quantize(
    x: Array,
    fmt: Spec,
    *,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    scale: Scale = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    random_bits: int = 32,
    flush_subnormals: bool | str = False,
    alpha: float | None = None,
    gradient: str = "straight_through",
    out: Array | None = None,
) -> Array:
    """s Q(x / s): x rounded once into `fmt`, in x's shape, dtype and device; s is `scale` (None = 1).

    x: float32, float64, float16 or bfloat16, any shape and strides. x / s and the product are one IEEE operation each,
    in float32 (float64 for float64); a narrower result is rounded once more where a scale takes it off its grid.
    fmt: what `accel.format` takes. A block format finds the scale of each block itself; NVFP4 takes a number as `scale`
    for the tensor's.
    rounding: `nearest_even`, `nearest_away` (ties away from zero), `toward_zero`, `up`, `down`, or `stochastic` with
    the word of (seed, stream, step, offset + index) cut to `random_bits` (1 to 32): up with probability
    floor(f 2^k) / 2^k, f the discarded fraction. Ties between powers of two go to the larger where M = 0 (to the even
    code for policy p3109).
    overflow: `saturate` (beyond the largest number, infinities included, becomes it) or `ieee` (as IEEE 754:
    `toward_zero`, and `up` / `down` against their direction, stop at the largest number for finite x; else infinity,
    else NaN, else saturates). flush_subnormals: False, `input`, `output` or True (both) turn subnormals into zero.
    NaN stays NaN, signs survive, -0 becomes +0 only where the format has no -0. e8m0: zero and negatives become NaN.
    scale: a positive finite number, or an array of them that broadcasts to x's shape.
    alpha: the value of the alpha codes of a format that has them: +-alpha stays as it is.
    gradient: `straight_through`, or `clipped`: zero where x / s is beyond the format's range.
    out: float32 tensor of x's shape (may be x) that receives the result and is returned; without gradient.
    Raises ValueError or TypeError for arguments that are not as said, and where the result's 16-bit dtype cannot hold
    every value of `fmt` (give a float32 `out`); never for the values of x.
    """
    checked_words(seed, stream, step, offset)
    number, scales = split_scale(scale)
    if isinstance(x, torch.Tensor) and out is None:
        refuse_sparse(x)
        check_draw_width(random_bits)
        return torch.ops.accel.quantize(
            x, text_of(fmt), number, scales, alpha, str(rounding), str(overflow), random_bits,
            flush_name(flush_subnormals), signed(seed), stream, step, offset, str(gradient),
        )  # fmt: skip
    tensor, described = checked_tensor(x), format(fmt)
    options = checked_options(rounding, overflow, random_bits, flush_subnormals)
    target = torch.empty_like(tensor) if out is None else checked_out(out, tensor)
    quantize_into(tensor, target, described, options, number, scales, alpha, key_of(seed, stream, step, offset))
    return _like(target, x) if out is None else out


def encode(
    x: Array,
    fmt: Spec,
    *,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    scale: Scale = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    random_bits: int = 32,
    flush_subnormals: bool | str = False,
    alpha: float | None = None,
    out: Array | None = None,
) -> Any:
    """The integer codes of Q(x / s), in x's shape: uint8 for formats up to 8 bits, uint16 up to 16, else uint32.

    Arguments as for `quantize`; out: a tensor of that integer dtype. A code holds the sign in its first bit, then the
    exponent and the mantissa; integers are in two's complement. For a block format: BlockCodes, without `out`.
    Raises ValueError, naming the first index, for a NaN where `fmt` has no NaN code.
    """
    checked_words(seed, stream, step, offset)
    number, scales = split_scale(scale)
    tensor, described, key = checked_tensor(x), format(fmt), key_of(seed, stream, step, offset)
    options = checked_options(rounding, overflow, random_bits, flush_subnormals)
    if isinstance(described, BlockFormat):
        if out is not None:
            raise ValueError(f"out is for scalar formats (got the block format {described.name!r})")
        return _encode_blocks(tensor, described, options, number if scales is None else scales, key)
    dtype, register = code_dtype(described), alpha_of(alpha, described)
    target = torch.empty_like(tensor, dtype=dtype) if out is None else as_tensor(out, "out")
    if target.dtype != dtype or target.shape != tensor.shape or target.device != tensor.device:
        raise ValueError(f"out must be a {dtype} tensor of shape {tuple(tensor.shape)} for {described.name}")
    if not described.has_nan:
        refuse_nan(tensor, described)
    method = launch.method_of(described, *options, launch.work_dtype(tensor))
    launch.round_into("encode", tensor, target, method, checked_scales(number, scales, tensor), key)
    if register is not None:
        codes = described.alpha_code, described.alpha_code | described.sign_code  # type: ignore[operator]
        launch.on_flat(lambda s, t: launch.backend(tensor).encode_alphas(s, register, t, *codes), tensor, target)
    return _like(target, x) if out is None else out


def quantize_encode(
    x: Array,
    fmt: Spec,
    *,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    scale: Scale = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    random_bits: int = 32,
    flush_subnormals: bool | str = False,
) -> tuple[Array, Array]:
    """(`quantize(x)`, `encode(x)`) in one pass over x, for a scalar format without alpha codes.

    Arguments as for `encode`. Raises ValueError, naming the first index, for a NaN where `fmt` has no NaN code.
    """
    checked_words(seed, stream, step, offset)
    number, scales = split_scale(scale)
    tensor, described = checked_tensor(x), scalar_format(fmt, "quantize_encode")
    if described.alpha_codes:
        raise ValueError(f"quantize_encode takes a format without alpha_codes (got {described.name!r})")
    options = checked_options(rounding, overflow, random_bits, flush_subnormals)
    refuse_narrow(tensor.dtype, described)
    if not described.has_nan:
        refuse_nan(tensor, described)
    values = torch.empty_like(tensor)
    codes = torch.empty(tensor.shape, dtype=code_dtype(described), device=tensor.device)
    method = launch.method_of(described, *options, launch.work_dtype(tensor))
    decoding = parameters(described, wide=tensor.dtype == torch.float64 or needs_wide(described))
    table, key = checked_scales(number, scales, tensor), key_of(seed, stream, step, offset)
    launch.round_both_into(tensor, values, codes, method, decoding, table, key)
    return _like(values, x), _like(codes, x)


def decode(
    codes: AnyArray | BlockCodes,
    fmt: Spec,
    *,
    scale: Scale = None,
    alpha: float | None = None,
) -> Any:
    """The float32 values of `codes` (uint8, uint16, uint32 or any integer dtype), in their shape, times `scale`.

    codes: BlockCodes for a block format. alpha: the value of the alpha codes of a format that has them.
    Raises TypeError for codes that are not integers, ValueError for a code outside 0 .. 2^bits - 1.
    """
    described = format(fmt)
    if isinstance(described, BlockFormat) or isinstance(codes, BlockCodes):
        if not isinstance(described, BlockFormat) or not isinstance(codes, BlockCodes):
            raise TypeError(
                f"BlockCodes and block formats go together (got {type(codes).__name__}, {described.name!r})"
            )
        return _decode_blocks(codes, described)
    tensor = as_tensor(codes, "codes")
    number, scales = split_scale(scale)
    register = alpha_of(alpha, described)
    if described.alpha_codes and register is None:
        raise ValueError(f"format {described.name!r} has alpha_codes: decode needs alpha")
    source = _checked_codes(tensor, described)
    values = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    launch.decode_into(source, values, checked_scales(number, scales, tensor), _decoding(described))
    if register is not None:
        code = described.alpha_code
        assert code is not None
        backend = launch.backend(tensor)
        backend.decode_alphas(source.view(-1), code, code | described.sign_code, register, values.view(-1))
    return _like(values, codes)


def prune(
    x: Array,
    alpha: float,
    *,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    out: Array | None = None,
) -> Array:
    """Stochastic pruning, the operator T of Chmiel et al. (ICLR 2021): unbiased, E[T(x)] = x.

    T(x) = x where |x| >= alpha; sign(x) alpha where alpha eps <= |x| < alpha; else +0, with eps = (word >> 8) 2^-24
    from the word of (seed, stream, step, offset + index). Zeros become +0, NaN stays NaN; alpha = 0 prunes nothing.
    x: float32, float16 or bfloat16; a 16-bit x must represent alpha exactly unless `out` is float32. The gradient of a
    torch tensor passes straight through. Raises ValueError for a negative or non-finite alpha.
    """
    checked_words(seed, stream, step, offset)
    threshold = as_number(alpha)
    if isinstance(x, torch.Tensor) and out is None:
        refuse_sparse(x)
        return torch.ops.accel.prune(refuse_double(x), threshold, signed(seed), stream, step, offset)
    tensor = refuse_double(checked_tensor(x))
    target = torch.empty_like(tensor) if out is None else checked_out(out, tensor)
    key = key_of(seed, stream, step, offset)
    launch.prune_into(tensor, target, checked_threshold(threshold, target.dtype), key)
    return _like(target, x) if out is None else out


def prune_quantize(
    x: torch.Tensor,
    alpha: float,
    fmt: Spec,
    *,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    scale: Scale = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    offset: int = 0,
    random_bits: int = 32,
    flush_subnormals: bool | str = False,
    gradient: str = "straight_through",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, BlockCounts]:
    """T(x), then the survivors rounded into `fmt`, in one pass: (tensor, counts of nonzeros and +-alpha per block).

    +-alpha itself is never rounded: it is exact whether or not it lies on the format's grid (it then needs a codec that
    keeps it apart). With alpha on the grid the result equals `quantize(prune(x))` under the same random words: pruned
    elements are not rounded and survivors do not use the prune draw, so one word serves both. A block format takes the
    scales of its blocks after pruning, in passes of their own.
    Arguments as for `quantize` and `prune`; x is float32.
    """
    checked_words(seed, stream, step, offset)
    number, scales = split_scale(scale)
    threshold = as_number(alpha)
    if isinstance(x, torch.Tensor) and out is None:
        refuse_sparse(x)
        check_draw_width(random_bits)
        result, counts = torch.ops.accel.prune_quantize(
            x, threshold, text_of(fmt), number, scales, str(rounding), str(overflow), random_bits,
            flush_name(flush_subnormals), signed(seed), stream, step, offset, str(gradient),
        )  # fmt: skip
    else:
        tensor, described = checked_prunable(x), format(fmt)
        options = checked_options(rounding, overflow, random_bits, flush_subnormals)
        target = torch.empty_like(tensor) if out is None else checked_out(out, tensor)
        key = key_of(seed, stream, step, offset)
        counts = prune_quantize_into(tensor, target, threshold, described, options, number, scales, key)
        result = _like(target, x) if out is None else out
    return result, BlockCounts(counts, x.size if isinstance(x, np.ndarray) else x.numel(), CHUNK)


def largest_magnitude(x: AnyArray) -> torch.Tensor:
    """max|x| in one pass, exactly: float32 of shape (), on x's device. NaN where x holds one, 0 for an empty x."""
    return launch.largest_magnitude(refuse_double(checked_tensor(x)), keeps_nan=True)[0]


# --- block formats --------------------------------------------------------------------------------------------------


def _encode_blocks(x: torch.Tensor, fmt: BlockFormat, options: Any, scale: object, key: Any) -> BlockCodes:
    check_block(fmt, x, scale)
    if not fmt.scale.has_nan:
        refuse_nan(x, fmt.scale)
    length = x.shape[fmt.dim] if x.ndim else 1
    codes = torch.empty(x.shape, dtype=code_dtype(fmt.element), device=x.device)
    shape = list(x.shape) or [1]
    shape[fmt.dim] = -(-shape[fmt.dim] // fmt.block_size)
    scales = torch.empty(shape, dtype=code_dtype(fmt.scale), device=x.device)
    whole = tensor_scale(x, fmt, scale if isinstance(scale, int | float) else None)
    method = launch.method_of(fmt.element, *options)
    launch.round_blocks_into("encode", x, codes, scales.view(-1), whole, fmt, method, key)
    return BlockCodes(with_padding(codes, fmt), scales, whole if fmt.tensor_scale else None, length)


def with_padding(x: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """x with the zeros that fill its last blocks where these are stored, as BlockFormat.stored_shape says; else x."""
    if (shape := fmt.stored_shape(tuple(x.shape))) == tuple(x.shape):
        return x
    missing = shape[fmt.dim] - x.shape[fmt.dim]
    return pad(x, [0, 0] * (x.ndim - 1 - fmt.dim % x.ndim) + [0, missing])


def _decode_blocks(blocks: BlockCodes, fmt: BlockFormat) -> torch.Tensor:
    shape = blocks.codes.shape
    factors = torch.empty(blocks.scales.shape, dtype=torch.float32, device=blocks.scales.device)
    launch.decode_into(_checked_codes(blocks.scales, fmt.scale), factors, None, _decoding(fmt.scale))
    if blocks.tensor_scale is not None:
        factors = factors * blocks.tensor_scale
    if shape:
        factors = factors.repeat_interleave(fmt.block_size, fmt.dim).narrow(fmt.dim, 0, shape[fmt.dim])
    values = torch.empty(shape, dtype=torch.float32, device=blocks.codes.device)
    table = Table(factors.reshape(-1), 1) if factors.numel() else None
    launch.decode_into(_checked_codes(blocks.codes, fmt.element), values, table, _decoding(fmt.element))
    return values.narrow(fmt.dim, 0, blocks.length) if shape else values


# --- small parts ----------------------------------------------------------------------------------------------------


def _decoding(fmt: Format) -> Any:
    return parameters(fmt, wide=needs_wide(fmt))


def _checked_codes(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Codes as a contiguous tensor of uint8, uint16 or uint32, each of them one of the format's."""
    unsigned = (torch.uint8, torch.uint16, torch.uint32)
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise TypeError(f"codes must be integers (got {codes.dtype})")
    codes = codes.contiguous()
    if codes.dtype not in unsigned or fmt.bits < 8 * codes.element_size():
        wide = codes.reshape(-1).to(torch.int64)
        wrong = (wide < 0) | (wide >= 1 << fmt.bits)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"codes holds {int(wide[first])} at flat index {first}; {fmt.name!r} has codes 0 to "
                f"{(1 << fmt.bits) - 1}"
            )
    return codes if codes.dtype in unsigned else codes.to(torch.uint32)


def as_number(alpha: Any) -> float:
    """alpha as a float. ValueError for what is not one number."""
    try:
        if not isinstance(alpha, bool | str | bytes):
            return float(alpha)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"alpha must be one number, finite and not negative, also as float32 (got {alpha!r})")


def signed(seed: int) -> int:
    """A 64-bit seed as the signed integer of the same bits, which operators take."""
    return seed - (1 << 64) if seed >= 1 << 63 else int(seed)


def check_draw_width(random_bits: object) -> None:
    if type(random_bits) is not int:
        raise ValueError(f"random_bits must be an integer from 1 to 32 (got {random_bits!r})")


def refuse_sparse(x: torch.Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense (strided) tensor (got {x.layout})")


def refuse_double(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float64:
        raise TypeError(f"x must be float32, float16 or bfloat16 (got {x.dtype})")
    return x


def _like(result: torch.Tensor, x: Any) -> Any:
    return result.numpy() if isinstance(x, np.ndarray) else result
