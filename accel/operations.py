"""What users call on tensors: quantize, encode, decode, prune, and prune + quantize in one pass.

Every operation takes a torch tensor or a NumPy array and returns the same kind. Elements are numbered in row-major
logical order, whatever the strides; `offset` is the number of the first element, for a piece of a larger tensor.
Random words depend on (seed, stream, step, element number) alone: see accel/random.py. None of the operations is
differentiable; `fpsim.emulate` gives them their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from accel.codecs.counts import BlockCounts
from accel.formats import Format, format, nearest
from accel.kernels import cpu
from accel.rounding import OVERFLOWS, ROUNDINGS, Parameters, parameters

Array = TypeVar("Array", torch.Tensor, npt.NDArray[Any])
Spec = str | Mapping[str, object] | Format
Scale = float | torch.Tensor | npt.NDArray[Any] | None

CARRIERS = (torch.float32, torch.float16, torch.bfloat16)
FLUSHES = (False, True, "input", "output")


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
    out: Array | None = None,
) -> Array:
    """s Q(x / s): x rounded once into `fmt`, in x's shape, dtype and device; s is `scale` (None = 1).

    x: float32, float16 or bfloat16, any shape and strides. x / s and the product are one IEEE float32 operation each; a
    16-bit result is rounded once more where a scale takes it off its grid.
    rounding: `nearest_even`, or `stochastic` with the word of (seed, stream, step, offset + index) cut to `random_bits`
    (1 to 32). overflow: `saturate` (beyond the largest number, infinities included, becomes it) or `ieee` (becomes
    infinity, else NaN, else saturates). flush_subnormals: False, `input`, `output` or True (both) turn subnormals into
    zero. NaN stays NaN, signs survive, -0 becomes +0 only where the format has no -0.
    scale: a positive finite number, or an array of them that broadcasts to x's shape.
    out: float32 tensor of x's shape (may be x) that receives the result and is returned.
    Raises ValueError or TypeError for arguments that are not as said, and where the result's 16-bit dtype cannot hold
    every value of `fmt` (give a float32 `out`); never for the values of x.
    """
    tensor, target = _tensor(x, "x"), None if out is None else _tensor(out, "out")
    described = format(fmt)
    _check_holds((tensor if target is None else target).dtype, described)
    p = _parameters(described, rounding, overflow, random_bits, flush_subnormals)
    scales, row_length = _rows(scale, tensor)
    result = _result(tensor, target)
    source = _flat(tensor, result)
    words = _word_key(seed, stream, step, offset, tensor.numel())
    if rounding == "nearest_even":
        _run(cpu.quantize_nearest_even, source, scales, row_length, _view(result), *p)
    else:
        _run(cpu.quantize_stochastic, source, scales, row_length, _view(result), *words, *p)
    return _deliver(result, x, tensor, target, out)


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
    out: Array | None = None,
) -> Array:
    """The integer codes of Q(x / s), in x's shape: uint8 for formats up to 8 bits, uint16 up to 16, else uint32.

    Arguments as for `quantize`; out: a tensor of that integer dtype. A code holds the sign in bit `bits - 1`, then the
    exponent and the mantissa. Raises ValueError, naming the first index, for a NaN where `fmt` has no NaN code.
    """
    tensor, target = _tensor(x, "x"), None if out is None else _tensor(out, "out", any_dtype=True)
    described = format(fmt)
    p = _parameters(described, rounding, overflow, random_bits, flush_subnormals)
    dtype = _code_dtype(described)
    if target is not None and (target.dtype != dtype or target.shape != tensor.shape or not target.is_contiguous()):
        raise ValueError(f"out must be a contiguous {dtype} tensor of shape {tuple(tensor.shape)} for {described.name}")
    if not described.has_nan and bool(torch.isnan(tensor).any()):
        first = int(torch.isnan(tensor.reshape(-1)).nonzero()[0])
        raise ValueError(f"x holds a NaN at flat index {first}; format {described.name!r} has no NaN code")
    scales, row_length = _rows(scale, tensor)
    codes = torch.empty(tensor.shape, dtype=dtype) if target is None else target
    source = _flat(tensor, codes)
    words = _word_key(seed, stream, step, offset, tensor.numel())
    if rounding == "nearest_even":
        _run(cpu.encode_nearest_even, source, scales, row_length, _view(codes), *p)
    else:
        _run(cpu.encode_stochastic, source, scales, row_length, _view(codes), *words, *p)
    return out if out is not None else _like(codes, x)


def decode(codes: Array, fmt: Spec) -> Array:
    """The float32 values of integer `codes` (uint8, uint16, uint32 or any integer dtype), in their shape.

    Raises TypeError for codes that are not integers, ValueError for a code outside 0 .. 2^bits - 1.
    """
    described = format(fmt)
    tensor = _tensor(codes, "codes", any_dtype=True)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"codes must be integers (got {tensor.dtype})")
    source = tensor.contiguous().reshape(-1).numpy()
    if source.dtype not in (np.uint8, np.uint16, np.uint32) or described.bits < 8 * source.dtype.itemsize:
        wrong = np.flatnonzero((source < 0) | (source >= 1 << described.bits))
        if wrong.size:
            raise ValueError(
                f"codes holds {source[wrong[0]]} at flat index {wrong[0]}; {described.name!r} has codes 0 to "
                f"{(1 << described.bits) - 1}"
            )
        source = source.astype(np.uint32) if source.dtype not in (np.uint8, np.uint16, np.uint32) else source
    values = torch.empty(tensor.shape, dtype=torch.float32)
    _run(cpu.decode, source, _view(values), *parameters(described))
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
    x: float32, float16 or bfloat16; a 16-bit x must represent alpha exactly unless `out` is float32. Raises ValueError
    for a negative or non-finite alpha.
    """
    tensor, target = _tensor(x, "x"), None if out is None else _tensor(out, "out")
    threshold = _alpha(alpha)
    dtype = (tensor if target is None else target).dtype
    if float(torch.tensor(float(threshold)).to(dtype)) != float(threshold):
        raise ValueError(f"alpha = {float(threshold)!r} is not a value of {dtype}: give a float32 `out`")
    result = _result(tensor, target)
    words = _word_key(seed, stream, step, offset, tensor.numel())
    _run(cpu.prune, _flat(tensor, result), threshold, _view(result), *words)
    return _deliver(result, x, tensor, target, out)


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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, BlockCounts]:
    """T(x), then the survivors rounded into `fmt`, in one pass: (tensor, counts of nonzeros and +-alpha per block).

    +-alpha itself is never rounded: it is exact whether or not it lies on the format's grid (it then needs a codec that
    keeps it apart). With alpha on the grid the result equals `quantize(prune(x))` under the same random words: pruned
    elements are not rounded and survivors do not use the prune draw, so one word serves both.
    Arguments as for `quantize` and `prune`; x is float32.
    """
    tensor, target = _tensor(x, "x"), None if out is None else _tensor(out, "out")
    if tensor.dtype != torch.float32:
        raise TypeError(f"x must be float32 (got {tensor.dtype})")
    p = _parameters(format(fmt), rounding, overflow, random_bits, flush_subnormals)
    scales, row_length = _rows(scale, tensor)
    result = _result(tensor, target)
    blocks = -(-tensor.numel() // cpu.CHUNK)
    nonzeros, alphas = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    words = _word_key(seed, stream, step, offset, tensor.numel())
    stochastic = rounding == "stochastic"
    threshold = _alpha(alpha)
    _run(
        cpu.prune_quantize, _flat(tensor, result), threshold, scales, row_length, _view(result), nonzeros, alphas,
        stochastic, *words, *p,
    )  # fmt: skip
    if threshold == 0:
        alphas[:] = 0
    return _deliver(result, x, tensor, target, out), BlockCounts(nonzeros, alphas, tensor.numel(), cpu.CHUNK)


def _tensor(x: torch.Tensor | npt.NDArray[Any], name: str, any_dtype: bool = False) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        plain = x.flags.writeable and x.dtype.isnative and all(stride >= 0 for stride in x.strides)
        if name == "out" and not plain:
            raise ValueError("out must be a writable array of native byte order without negative strides")
        try:
            x = torch.from_numpy(x if plain else np.array(x, dtype=x.dtype.newbyteorder("=")))
        except TypeError:
            raise TypeError(f"{name} must hold numbers of a dtype that torch has (got {x.dtype})") from None
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor or a NumPy array (got {type(x).__name__})")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor (got {x.layout})")
    if x.device.type != "cpu":
        raise TypeError(f"{name} must be on the CPU (got {x.device}): this version has no kernels for other devices")
    if not any_dtype and x.dtype not in CARRIERS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16 (got {x.dtype})")
    return x.detach() if name == "out" else x.detach().resolve_neg()


def _parameters(
    fmt: Format, rounding: str, overflow: str, random_bits: int, flush_subnormals: bool | str
) -> Parameters:
    _check_choice("rounding", rounding, ROUNDINGS)
    _check_choice("overflow", overflow, OVERFLOWS)
    _check_choice("flush_subnormals", flush_subnormals, FLUSHES)
    if type(random_bits) is not int or not 1 <= random_bits <= 32:
        raise ValueError(f"random_bits must be an integer from 1 to 32 (got {random_bits!r})")
    return parameters(fmt, overflow, random_bits, flush_subnormals)


def _check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    names = list(allowed)
    if value not in names:
        raise ValueError(f"unknown {name} {value!r}{nearest(value, names)}; allowed: {', '.join(map(repr, names))}")


def _check_holds(dtype: torch.dtype, fmt: Format) -> None:
    info = torch.finfo(dtype)
    precise = 2.0**-fmt.mantissa_bits >= info.eps and fmt.min_subnormal >= info.smallest_normal * info.eps
    if not precise or fmt.max > info.max:
        raise ValueError(f"{dtype} cannot hold every value of format {fmt.name!r}: give a float32 `out`")


def _alpha(alpha: float) -> np.float32:
    value = _as_float32(alpha)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"alpha must be one number, finite and not negative, also as float32 (got {alpha!r})")
    return value


def _as_float32(number: object) -> np.float32:
    """A real number as float32 (infinite where it is too large); NaN for anything that is not one."""
    if isinstance(number, bool | str | bytes):
        return np.float32(np.nan)
    try:
        with np.errstate(over="ignore"):
            return np.float32(float(number))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return np.float32(np.nan)


def _word_key(
    seed: int, stream: int, step: int, offset: int, numel: int
) -> tuple[int, np.uint64, np.uint64, np.uint64]:
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("step", step, 32), ("offset", offset, 62)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be an integer from 0 to 2^{bits} - 1 (got {value!r})")
    return int(offset), np.uint64(seed), np.uint64(stream), np.uint64(step)


def _rows(scale: Scale, x: torch.Tensor) -> tuple[npt.NDArray[np.float32], int]:
    """The scale as one float32 a row of equal scale, and the row's length: the last dimensions, where it is one."""
    length = max(x.numel(), 1)
    if scale is None:
        return np.ones(1, np.float32), length
    if not isinstance(scale, torch.Tensor | np.ndarray):
        if not isinstance(scale, int | float | np.number) or isinstance(scale, bool):
            raise TypeError(f"scale must hold real numbers (got {scale!r})")
        number = _as_float32(scale)
        if not (np.isfinite(number) and number > 0):
            raise ValueError(f"scale must be positive and finite, also as float32 (got {scale!r})")
        return np.full(1, number), length
    given = _tensor(scale, "scale", any_dtype=True)
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"scale must hold real numbers (got {given.dtype})")
    values = given.to(torch.float32).numpy()  # NumPy from here on: its small operations cost a fraction of torch's
    if values.size and not (values.min() > 0 and values.max() < np.inf):
        wrong = torch.from_numpy(~(np.isfinite(values) & (values > 0)))
        raise ValueError(f"scale must be positive and finite, also as float32 (got {float(given[wrong][0])!r})")
    try:
        spread = np.broadcast_to(values, x.shape)
    except ValueError:
        raise ValueError(
            f"scale of shape {tuple(values.shape)} does not broadcast to x's shape {tuple(x.shape)}"
        ) from None
    if x.numel() == 0 or values.size == 1:
        return values.reshape(-1)[:1].copy() if values.size else np.ones(1, np.float32), length
    varying = max((d for d in range(x.ndim) if spread.strides[d] != 0 and x.shape[d] > 1), default=-1) + 1
    for _ in x.shape[varying:]:
        spread = spread[..., 0]
    return spread.flatten(), max(math.prod(x.shape[varying:]), 1)


def _flat(x: torch.Tensor, result: torch.Tensor) -> npt.NDArray[np.float32]:
    """x in row-major order as float32; a copy where `result` overlaps it other than element on element."""
    flat = _view(x.to(torch.float32).contiguous())
    target = _view(result)
    in_place = flat.ctypes.data == target.ctypes.data and flat.dtype == target.dtype
    return flat.copy() if not in_place and np.may_share_memory(flat, target) else flat


def _view(x: torch.Tensor) -> npt.NDArray[Any]:
    return x.reshape(-1).numpy()


def _result(x: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """Where the kernel writes: `target` itself where that is possible, else a fresh contiguous float32 tensor."""
    if target is None:
        return torch.empty(x.shape, dtype=torch.float32)
    if target.shape != x.shape or target.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"out must be a float32 or {x.dtype} tensor of shape {tuple(x.shape)} "
            f"(got {target.dtype}, {tuple(target.shape)})"
        )
    direct = target.dtype == torch.float32 and target.is_contiguous()
    return target if direct else torch.empty(x.shape, dtype=torch.float32)


def _deliver(result: torch.Tensor, x: Any, tensor: torch.Tensor, target: torch.Tensor | None, out: Any) -> Any:
    if target is None:
        return _like(result.to(tensor.dtype), x)
    if target is not result:
        target.copy_(result)
    return out


def _like(result: torch.Tensor, x: Any) -> Any:
    return result.numpy() if isinstance(x, np.ndarray) else result


def _run(loop: Any, source: npt.NDArray[Any], *arguments: Any) -> None:
    cpu.run(loop, source.size, source, *arguments, threads=torch.get_num_threads())


def _code_dtype(fmt: Format) -> torch.dtype:
    return torch.uint8 if fmt.bits <= 8 else torch.uint16 if fmt.bits <= 16 else torch.uint32
