"""Other libraries on the same work, and where their results differ from ours.

A library that is not installed, or that does not run, is reported with the reason. Results are compared on landmarks of
the format: its values, the midpoints between them and their float32 neighbours, numbers beyond its range, infinities,
NaN and zeros. Each peer is compared with the options of `accel.quantize` that ask for the peer's own overflow: what
differs then differs in rounding, and not in what was asked for.
"""

from __future__ import annotations

import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch

import accel
from accel.block_formats import BlockFormat

Options = tuple[dict[str, Any], ...]  # of accel.quantize
NEAREST: Options = ({},)
OVERFLOWING: Options = ({"overflow": "ieee"},)
NEIGHBOURS: Options = ({"rounding": "down"}, {"rounding": "up"})  # what stochastic rounding may return

QTORCH_E5M2 = {"exponent_bits": 5, "mantissa_bits": 2, "policy": "finite"}  # its top exponent holds numbers
NOT_ON_PYPI = {
    "microxcaling": "not installed: not on PyPI (https://github.com/microsoft/microxcaling)",
    "mptorch": "not installed: not on PyPI (https://github.com/mptorch/mptorch)",
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """Another library's way to do what a row of ours does.

    like: that row. apply: a float32 tensor of shape (rows, columns) to a new one. fill: the same from the benchmark's
    source into its destination, where the library can. fmt: what it rounds into, None for nothing to compare. ours: the
    options of `accel.quantize` to compare with; a result is the same where one of them gives it.
    """

    name: str
    like: str
    apply: Callable[[torch.Tensor], torch.Tensor]
    fmt: Any = None
    ours: Options = NEAREST
    fill: Callable[[], object] | None = None


def find(x: torch.Tensor, out: torch.Tensor) -> tuple[list[Peer], dict[str, str]]:
    """The peers that work here, for the source x and the destination out, and why the others do not."""
    peers, missing = [], dict(NOT_ON_PYPI)
    for library, build in LIBRARIES.items():
        try:
            with _without_warnings():
                peers += build(x, out)
        except ImportError as error:
            missing[library] = f"not installed: {error}"
        except Exception as error:  # whatever a library raises where its compiler or its build of torch is missing
            missing[library] = reason(error)
    return peers, missing


def reason(error: Exception) -> str:
    """In one line."""
    return f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    installed = {}
    for library in LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return installed


@contextmanager
def _without_warnings() -> Iterator[None]:
    """No log records below ERROR: torchao warns of extensions for other devices."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# --- libraries ------------------------------------------------------------------------------------------------------


def torch_peers(x: torch.Tensor, out: torch.Tensor) -> list[Peer]:
    """torch's casts there and back, and its random numbers alone."""

    def cast(dtype: torch.dtype, fmt: str, ours: Options) -> Peer:
        codes = torch.empty(x.shape, dtype=dtype)
        return Peer(
            f"torch {str(dtype).removeprefix('torch.')} there and back",
            f"quantize nearest_even {fmt}",
            lambda tensor: tensor.to(dtype).to(torch.float32),
            fmt,
            ours,
            lambda: out.copy_(codes.copy_(x)),
        )

    return [
        cast(torch.float8_e4m3fn, "e4m3fn", NEAREST),
        cast(torch.float8_e5m2, "e5m2", OVERFLOWING),
        cast(torch.bfloat16, "bf16", OVERFLOWING),
        cast(torch.float8_e8m0fnu, "e8m0fnu", OVERFLOWING),
        Peer(
            "torch.rand alone", "quantize stochastic e4m3fn", torch.rand_like, fill=lambda: torch.rand(x.shape, out=out)
        ),
    ]


def ml_dtypes_peers(x: torch.Tensor, out: torch.Tensor) -> list[Peer]:
    """Casts there and back (NumPy: one thread)."""
    import ml_dtypes

    def cast(dtype: type, fmt: str) -> Peer:
        source, target = x.numpy(), out.numpy()
        codes: np.ndarray = np.empty(source.shape, dtype)

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            with np.errstate(over="ignore", invalid="ignore"):
                return torch.from_numpy(tensor.numpy().astype(dtype).astype(np.float32))

        def fill() -> None:
            np.copyto(codes, source, casting="unsafe")
            np.copyto(target, codes, casting="unsafe")

        name = f"ml_dtypes {dtype.__name__} there and back"
        return Peer(name, f"quantize nearest_even {fmt}", apply, fmt, OVERFLOWING, fill)

    return [cast(ml_dtypes.float8_e4m3fn, "e4m3fn"), cast(ml_dtypes.float8_e5m2, "e5m2")]


def gfloat_peers(x: torch.Tensor, out: torch.Tensor) -> list[Peer]:
    """`round_ndarray` of NumPy arrays."""
    from gfloat import formats, round_ndarray

    def round_to(info: Any, fmt: str) -> Peer:
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            with np.errstate(over="ignore"):
                return torch.from_numpy(round_ndarray(info, tensor.numpy(), sat=True).astype(np.float32))

        return Peer(f"gfloat {fmt}", f"quantize nearest_even {fmt}", apply, fmt)

    return [round_to(formats.format_info_ocp_e4m3, "e4m3fn"), round_to(formats.format_info_ocp_e5m2, "e5m2")]


def qtorch_peers(x: torch.Tensor, out: torch.Tensor) -> list[Peer]:
    """`float_quantize`, whose C++ is compiled when it is imported first."""
    scripts = sysconfig.get_path("scripts")  # of this environment, where pip puts ninja
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    from qtorch.quant import float_quantize

    return [
        Peer(
            f"qtorch e5m2 without infinities, {rounding}",
            f"quantize {like} e5m2",
            partial(float_quantize, exp=5, man=2, rounding=rounding),
            QTORCH_E5M2,
            ours,
        )
        for rounding, like, ours in (
            ("nearest", "nearest_even", NEAREST),
            ("stochastic", "stochastic", NEIGHBOURS),
        )
    ]


def torchao_peers(x: torch.Tensor, out: torch.Tensor) -> list[Peer]:
    """Its MX and NVFP4 reference code, to codes and back."""
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def mx(element: Any, fmt: str) -> Peer:
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            scales, codes = to_mx(tensor, element, 32)
            return to_dtype(codes, scales, element, 32, torch.float32)

        return Peer(f"torchao {fmt}", f"quantize nearest_even {fmt}", apply, fmt)

    def nvfp4(tensor: torch.Tensor) -> torch.Tensor:
        scale = per_tensor_amax_to_scale(tensor.abs().max())
        return NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=scale).dequantize(torch.float32)

    return [
        mx(torch.float8_e4m3fn, "mxfp8_e4m3fn"),
        mx(torch.float8_e5m2, "mxfp8_e5m2"),
        mx("fp6_e3m2", "mxfp6_e3m2"),
        mx("fp6_e2m3", "mxfp6_e2m3"),
        mx(torch.float4_e2m1fn_x2, "mxfp4"),
        Peer("torchao nvfp4", "quantize nearest_even nvfp4", nvfp4, "nvfp4"),
    ]


LIBRARIES: dict[str, Callable[[torch.Tensor, torch.Tensor], list[Peer]]] = {
    "torch": torch_peers,
    "ml_dtypes": ml_dtypes_peers,
    "torchao": torchao_peers,
    "qtorch": qtorch_peers,
    "gfloat": gfloat_peers,
}


# --- how their results differ ---------------------------------------------------------------------------------------


def differences(peer: Peer) -> tuple[Counter[str], int]:
    """(how many results of `peer` on its format's landmarks differ from ours, by kind; how many landmarks)."""
    described = accel.format(peer.fmt)
    points = block_landmarks(described) if isinstance(described, BlockFormat) else landmarks(described)
    found: Counter[str] = Counter()
    for kind, x in points.items():
        theirs = peer.apply(x.clone())
        ours = [accel.quantize(x, described, **options) for options in peer.ours]
        differs = torch.stack([~_same(theirs, result) for result in ours]).all(0)
        in_sign_only = differs & torch.stack([theirs == result for result in ours]).any(0)
        found[kind] += int((differs & ~in_sign_only).sum())
        found["sign of zero"] += int(in_sign_only.sum())
    return +found, sum(x.numel() for x in points.values())


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())


def landmarks(fmt: accel.Format) -> Tensors:
    """Where rounding into a scalar format can go wrong: float32 rows (1, n) by kind, in pairs of both signs."""
    values = np.unique(fmt.codes())
    values = values[np.isfinite(values) & (values >= 0)].astype(np.float64)
    below = np.concatenate([[0.0], values])  # also between zero and the smallest number where there is no zero
    ties = np.unique((below[:-1] + below[1:]) / 2)
    beyond = values[-1] + (values[-1] - values[-2]) / 2
    largest = float(np.finfo(np.float32).max)
    magnitudes = {
        "values": values[values >= fmt.min_normal],
        "ties": ties[ties >= fmt.min_normal],
        "beside ties": _neighbours(ties[ties >= fmt.min_normal]),
        "subnormal values": values[values < fmt.min_normal],
        "subnormal ties": ties[ties < fmt.min_normal],
        "beside subnormal ties": _neighbours(ties[ties < fmt.min_normal]),
        "underflow": np.array([fmt.min_subnormal / 4, 2.0**-149]),
        "overflow": np.concatenate([[beyond, 2 * values[-1], largest], _neighbours(np.array([beyond]))]),
        "infinity": np.array([np.inf]),
        "NaN": np.array([np.nan]),
    }
    points = {kind: torch.tensor(_float32(found)) for kind, found in magnitudes.items()}
    points = {kind: x[~x.isinf()] if kind != "infinity" else x for kind, x in points.items()}
    if not fmt.signed:
        negative = {"negative": -torch.cat(list(points.values()))}
        return {kind: x[None] for kind, x in (points | negative).items() if x.numel()}
    return {kind: torch.cat([x, -x])[None] for kind, x in points.items() if x.numel()}


def block_landmarks(fmt: BlockFormat) -> Tensors:
    """The same for a block format, a row a block: its element's after a first number that sets the scale."""
    element = fmt.element
    inner = torch.cat([x[0][x[0].abs() <= element.max] for x in landmarks(element).values()])
    inner = torch.nn.functional.pad(inner, (0, -inner.numel() % (fmt.block_size - 1))).view(-1, fmt.block_size - 1)

    def rows(amax: float, factor: float) -> torch.Tensor:
        return torch.cat([torch.full((inner.shape[0], 1), amax), inner], dim=1) * factor

    power = 2.0**element.max_exponent
    last = float(np.nextafter(np.float32(2 * power), np.float32(0)))
    special = rows(element.max, 1.0)[:2].repeat(2, 1)
    special[0, 5], special[2, 5] = torch.nan, torch.inf
    return {
        "elements": torch.cat([rows(element.max, factor) for factor in (1.0, 2.0**-30, 2.0**30)]),
        "scales off the grid": torch.cat([rows(element.max, factor) for factor in (1.3, 0.0071)]),
        "largest a power of two": torch.cat([rows(power, 2.0**k) for k in range(-3, 4)]),
        "largest below a power of two": torch.cat([rows(last, 2.0**k) for k in range(-3, 4)]),
        "smallest scales": torch.cat([rows(element.max, 2.0**k) for k in (-120, -126, -135, -145)]),
        "largest scales": rows(last, 2.0 ** (126 - element.max_exponent)),
        "zeros": torch.zeros(2, fmt.block_size),
        "NaN": special[:2],
        "infinity": special[2:],
    }


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _neighbours(values: np.ndarray) -> np.ndarray:
    """The float32 numbers beside each of `values`."""
    exact = _float32(values)
    return np.concatenate([np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
