"""CUDA without a GPU: every kernel in the simulator against the CPU's bits, and as PTX for three architectures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import accel
from accel import block_scaling, launch
from accel.block_formats import BlockFormat
from accel.codecs.codec import Alpha
from accel.formats import Format
from accel.rounding import parameters
from accel.rounding_fast import fast_parameters, integer_parameters

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install 'fpsim[cuda]'")
WORD = np.uint32(0)
KEY = (0, (WORD, WORD, (WORD,) * 20))


def test_the_simulator_gives_the_bits_of_the_cpu() -> None:
    program = Path(__file__).with_name("cuda_simulator.py")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "differing: none; not launched: none" in result.stdout


def scalar(name: str) -> Format:
    fmt = accel.format(name)
    assert isinstance(fmt, Format)
    return fmt


def blocks() -> BlockFormat:
    fmt = accel.format("nvfp4")
    assert isinstance(fmt, BlockFormat)
    return fmt


def arguments(name: str, wide: bool = False) -> tuple[Any, ...]:
    """Values of the types that a kernel is launched with."""
    reals = np.zeros(8, np.float64 if wide else np.float32)
    bytes_ = np.zeros(8, np.uint8)
    values = tuple(parameters(scalar("e5m2"), wide=wide))
    method = re.search(r"(fast|integer)(_\w+)?$", name)
    fields: tuple[Any, ...] = values
    if method:
        is_integer = method[0].endswith("integer")
        fields = tuple(integer_parameters(scalar("int8")) if is_integer else fast_parameters(scalar("e5m2")))
    alpha, code = np.float32(1), np.uint32(1)
    table = reals.dtype.type(1), reals, (1, code, code)
    plain: dict[str, tuple[Any, ...]] = {
        "largest_patterns": (reals, code, np.zeros(1, np.uint32)),
        "decode": (bytes_, 0, *table, reals, values),
        "prune": (reals, 0, alpha, reals, *KEY),
        "keep_alpha": (reals, alpha, reals),
        "encode_alpha": (reals, alpha, bytes_, code, code),
        "decode_alpha": (bytes_, code, code, alpha, reals),
    }
    if name in plain:
        return plain[name]
    one, offsets = reals.dtype.type(1), np.zeros(8, np.int64)
    marks = tuple(Alpha(alpha, code, True, False, code, code))
    if name == "unpack":
        return (bytes_, 1, np.int32(0), code, alpha, marks, values, offsets, reals, offsets, offsets)
    singles = reals.astype(np.float32)
    if name == "count_patterns":
        return (singles, 1, np.int32(0), code, marks, offsets, offsets)
    if name.startswith("pack"):
        return (singles, 1, np.int32(0), code, one, alpha, marks, values, fields, offsets, bytes_, offsets)
    out = bytes_ if name.startswith("encode") else reals
    scales = tuple(block_scaling.block_parameters(blocks())), tuple(block_scaling.scale_parameters(blocks()))
    if "blocks_" in name:
        return (reals, (1, 1, 1, 1), code, reals, *scales, out, bytes_, *KEY, fields)
    if "_columns_" in name:
        return (reals, 1, 1, 1, 1, reals, *scales, out, bytes_, *KEY, fields)
    if name.startswith("both"):
        return (reals, 0, *table, reals, bytes_, values, *KEY, fields)
    if name.startswith("prune"):
        return (reals, 0, alpha, *table, reals, np.zeros((2, 2), np.int64), *KEY, fields)
    return (reals, 0, *table, out, *KEY, fields)


def fusible(ptx: str) -> list[str]:
    """Additions and subtractions of a product: what the assembler may turn into one fused operation.

    NVVM writes products without a rounding modifier, which allows it. In `round_stochastic` |x| in steps of the
    smallest number is a product by powers of two, so exact, and its integer part is subtracted: fused or not, the same.
    """
    products, integers, found = set(), set(), []
    for line in ptx.splitlines():
        match = re.match(r"\s*(\w+)\.(?:\w+\.)*f32(?:\.s32)?\s+(%f\d+), (.*);", line)
        if not match:
            continue
        operation, result, operands = match[1], match[2], re.findall(r"%[fr]\d+", match[3])
        if operation == "mul":
            products.add(result)
        elif operation == "cvt":
            integers.add(result)
        elif operation in ("add", "sub") and products & set(operands):
            is_exact = operation == "sub" and operands[0] in products and operands[1] in integers
            found += [] if is_exact else [line.strip()]
    return found


@pytest.mark.parametrize(
    ("architecture", "step"),
    [
        pytest.param((8, 0), 5, id="sm_80, every fifth"),
        pytest.param((9, 0), 5, id="sm_90, every fifth"),
        pytest.param((10, 0), 5, id="sm_100, every fifth"),
        pytest.param((8, 0), 1, id="sm_80", marks=pytest.mark.exhaustive),
        pytest.param((9, 0), 1, id="sm_90", marks=pytest.mark.exhaustive),
        pytest.param((10, 0), 1, id="sm_100", marks=pytest.mark.exhaustive),
    ],
)
def test_every_kernel_compiles(architecture: tuple[int, int], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without float64, fused products, products that may still be fused, inexact divisions, or local memory."""
    import numba.cuda.dispatcher

    from accel.codecs import cuda as codecs_cuda
    from accel.kernels import cuda
    from accel.kernels.cuda_jit import assembled, flat, ptx_of

    class Device:
        compute_capability = architecture

    monkeypatch.setattr(numba.cuda.dispatcher, "get_current_device", Device)
    divisions = 0
    for name, loop in list((cuda.LOOPS | codecs_cuda.LOOPS).items())[::step]:
        ptx = ptx_of(loop, name, arguments(name), architecture)
        passed = tuple(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments(name))
        assert len(re.findall(r"^\s*\.param \.", ptx, re.MULTILINE)) == len(flat(passed)), name
        assert f".target sm_{architecture[0]}{architecture[1]}" in ptx
        assert ".f64" not in ptx, name
        assert not re.search(r"\bfma\b", ptx), name
        assert ".local" not in ptx, name
        assert fusible(ptx) == [], name
        assert set(re.findall(r"\bdiv\.\w+(?:\.\w+)*\.f32", ptx)) <= {"div.rn.f32"}, name
        divisions += ptx.count("div.rn.f32")
        if re.search(r"^((quantize_scaled|encode_scaled|both)_(nearest|stochastic)|pack_nearest)$", name):
            wide = ptx_of(loop, name, arguments(name, wide=True), architecture)
            assert "div.rn.f64" in wide
            assert not re.search(r"\bfma\b", wide), name
        if name in codecs_cuda.LOOPS:  # which take the most of shared memory
            assert assembled(ptx, architecture).startswith(b"\x7fELF")
    assert divisions > 20 // step


@pytest.mark.parametrize("architecture", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_every_matrix_product_compiles(architecture: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And assembles, without local memory. Fused operations are there by intent: of exact products."""
    import numba.cuda.dispatcher

    from accel.datapath import cuda
    from accel.datapath.products import grid_of
    from accel.kernels.cuda_jit import assembled, ptx_of

    class Device:
        compute_capability = architecture

    monkeypatch.setattr(numba.cuda.dispatcher, "get_current_device", Device)
    matrix, values = np.zeros((2, 2), np.float32), tuple(parameters(scalar("fp16"), wide=True))
    for name, loop in cuda.LOOPS.items():
        if "by_code" in name:
            options: tuple[Any, ...] = (
                3,
                1,
                0.5,
                True,
                0,
                *(np.uint64(word) for word in (1, 2, 3)),
                values,
                values,
                values,
            )
        else:
            real = np.float32 if "narrow" in name else np.float64
            grids = (tuple(grid_of(scalar("fp16"), "nearest_even", "ieee", kind)) for kind in (real, np.float64))
            options = (3, *grids)
        ptx = ptx_of(loop, name, (matrix, matrix, matrix, *options), architecture)
        assert f".target sm_{architecture[0]}{architecture[1]}" in ptx
        assert ".local" not in ptx, name
        assert ("by_code" in name) or re.search(r"\bfma\.rn\.f(32|64)", ptx), name
        assert assembled(ptx, architecture).startswith(b"\x7fELF")


def test_fused_products_would_be_seen() -> None:
    assert fusible("mul.f32 %f3, %f1, %f2;\nadd.f32 %f4, %f3, %f1;") == ["add.f32 %f4, %f3, %f1;"]
    assert fusible("mul.f32 %f3, %f1, %f2;\nsub.f32 %f4, %f1, %f3;") == ["sub.f32 %f4, %f1, %f3;"]
    exact = "mul.f32 %f3, %f1, %f2;\ncvt.rn.f32.s32 %f4, %r1;\nsub.f32 %f5, %f3, %f4;"
    assert fusible(exact) == []


def test_without_numba_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accel.kernels.cuda", None)
    monkeypatch.delattr(accel.kernels, "cuda", raising=False)  # there once something has imported it
    on_a_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"pip install 'fpsim\[cuda\]'"):
        launch.backend(on_a_gpu)
