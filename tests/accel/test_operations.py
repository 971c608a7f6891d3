"""Arguments, errors, strides, kinds of arrays, threads and processes: what all operations share."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accel
from accel.kernels import cpu
from accel.kernels.jit import kernel

OPERATIONS: dict[str, Callable[..., Any]] = {
    "quantize": lambda x, **options: accel.quantize(x, "e4m3fn", rounding="stochastic", **options),
    "prune": lambda x, **options: accel.prune(x, 0.5, **options),
    "prune_quantize": lambda x, **options: accel.prune_quantize(x, 0.5, "e4m3fn", **options)[0],
}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].reshape(x.shape),
    "requires grad": lambda x: x.clone().requires_grad_(),
}
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def numbers(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 1, shape).astype(np.float32))


@operations
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(operation: Callable[..., Any], layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = numbers(3, 4, 5, 6)
    expected = operation(x)
    given = layout(x)
    result = operation(given)
    assert torch.equal(result, expected)
    assert result.requires_grad == given.requires_grad
    out = layout(torch.zeros_like(x)).detach()
    assert operation(given, out=out) is out
    assert torch.equal(out, expected)
    in_place = layout(x.clone()).detach()
    assert operation(in_place, out=in_place) is in_place
    assert torch.equal(in_place, expected)


@operations
def test_expanded_and_reversed_inputs(operation: Callable[..., Any]) -> None:
    row = numbers(6)
    expanded = row.expand(4, 6)
    assert torch.equal(operation(expanded), operation(expanded.contiguous()))
    array = row.numpy()[::-1]
    np.testing.assert_array_equal(operation(array), operation(array.copy()))


@operations
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1)])
def test_small_shapes(operation: Callable[..., Any], shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.75)
    assert torch.equal(operation(x), x)
    array = operation(x.numpy())
    assert isinstance(array, np.ndarray)
    assert (array.shape, array.dtype) == (shape, np.float32)
    codes = accel.encode(x, "e4m3fn")
    assert codes.shape == shape
    assert torch.equal(accel.decode(codes, "e4m3fn"), x)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_empty_tensors_take_scales_that_broadcast(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    for scale in (torch.ones(shape), torch.ones([1] * len(shape)), torch.ones(shape[-1:])):
        assert accel.quantize(x, "e4m3fn", scale=scale).shape == shape
        assert accel.encode(x, "e4m3fn", scale=scale).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tensors(dtype: torch.dtype) -> None:
    x = torch.cat([numbers(1000) * 100, torch.tensor([0.0, -0.0, float("inf"), float("nan"), 6e-8])]).to(dtype)
    quantized = accel.quantize(x, "e4m3fn")
    assert quantized.dtype == dtype
    expected = accel.quantize(x.float(), "e4m3fn")
    assert torch.equal(quantized.float().nan_to_num(), expected.nan_to_num())
    assert torch.equal(accel.quantize(x, "e4m3fn", out=torch.empty(x.shape)).nan_to_num(), expected.nan_to_num())
    assert torch.equal(accel.encode(x, "e4m3fn"), accel.encode(x.float(), "e4m3fn"))
    in_place = x.clone()
    assert accel.quantize(in_place, "e4m3fn", out=in_place) is in_place
    assert torch.equal(in_place.nan_to_num(), quantized.nan_to_num())


@pytest.mark.parametrize(
    ("dtype", "fmt"),
    [
        (torch.float16, "bf16"),
        (torch.float16, "e8m1"),
        (torch.float16, "e6m5"),
        (torch.bfloat16, "fp16"),
        (torch.bfloat16, "tf32"),
    ],
)
def test_16_bit_tensors_refuse_formats_that_they_cannot_hold(dtype: torch.dtype, fmt: str) -> None:
    x = torch.ones(3, dtype=dtype)
    for out in (None, torch.empty_like(x)):
        with pytest.raises(ValueError, match=f"{dtype} cannot hold every value of format '{fmt}'"):
            accel.quantize(x, fmt, out=out)
    assert accel.quantize(x, fmt, out=torch.empty(3)).dtype == torch.float32


def test_numpy_in_numpy_out() -> None:
    x = numbers(5, 6).numpy()
    assert isinstance(accel.quantize(x, "e4m3fn"), np.ndarray)
    assert accel.quantize(x.astype(np.float16), "e4m3fn").dtype == np.float16
    out = np.zeros_like(x)
    assert accel.quantize(x, "e4m3fn", out=out) is out
    np.testing.assert_array_equal(out, accel.quantize(torch.from_numpy(x), "e4m3fn").numpy())
    codes = np.zeros(x.shape, np.uint8)
    assert accel.encode(x, "e4m3fn", out=codes) is codes
    np.testing.assert_array_equal(accel.decode(codes, "e4m3fn"), out)


def test_read_only_arrays_are_read_and_never_written() -> None:
    """torch warns once a process about them: made to warn always, so that the warning is an error here."""
    x = numbers(6).numpy()
    x.flags.writeable = False
    scale = np.broadcast_to(np.float32(2), (6,))
    torch.set_warn_always(True)
    try:
        expected = accel.quantize(x.copy(), "e4m3fn", scale=2.0)
        np.testing.assert_array_equal(accel.quantize(x, "e4m3fn", scale=scale), expected)
        np.testing.assert_array_equal(accel.decode(np.frombuffer(b"\x38\xb8", np.uint8), "e4m3fn"), np.float32([1, -1]))
        with pytest.raises(ValueError, match="out"):
            accel.quantize(np.ones(6, np.float32), "e4m3fn", out=x)
    finally:
        torch.set_warn_always(False)


@operations
@pytest.mark.parametrize("shift", [-1, 1])
def test_an_out_that_overlaps_x_elsewhere_gets_the_same_bits(operation: Callable[..., Any], shift: int) -> None:
    buffer = numbers(200_001)
    x, out = (buffer[:-1], buffer[1:]) if shift == 1 else (buffer[1:], buffer[:-1])
    expected = operation(x.clone())
    operation(x, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "nearest"}, "unknown rounding 'nearest' .did you mean 'nearest_even'.*'stochastic'"),
        ({"overflow": "saturated"}, "unknown overflow 'saturated' .did you mean 'saturate'"),
        ({"flush_subnormals": "inputs"}, "unknown flush_subnormals 'inputs' .did you mean 'input'"),
        ({"random_bits": 0}, "random_bits must be an integer from 1 to 32 .got 0."),
        ({"random_bits": 33}, "random_bits must be an integer from 1 to 32 .got 33."),
        ({"random_bits": 2.0}, "random_bits must be an integer"),
        ({"seed": -1}, "seed must be an integer from 0 to 2.64 - 1 .got -1."),
        ({"seed": 1 << 64}, "seed must be"),
        ({"stream": 1 << 32}, "stream must be an integer from 0 to 2.32 - 1"),
        ({"step": 0.5}, "step must be an integer"),
        ({"offset": -1}, "offset must be an integer"),
        ({"scale": 0.0}, "scale must be positive and finite.*got 0.0"),
        ({"scale": float("nan")}, "scale must be positive and finite"),
        ({"scale": 1e-46}, "scale must be positive and finite, also as float32"),
        ({"scale": 1e39}, "scale must be positive and finite, also as float32"),
        ({"scale": torch.tensor([1.0, -2.0, 1.0])}, r"scale must be positive and finite.*got -2\.0"),
        ({"scale": torch.ones(2)}, r"scale of shape \(2,\) does not broadcast to x's shape \(2, 3\)"),
        ({"scale": torch.ones(4, 2, 3)}, r"scale of shape \(4, 2, 3\) does not broadcast"),
        ({"scale": 1j}, "scale must hold real numbers"),
        ({"scale": "amax"}, "scale"),
        ({"fmt": "e4m3f"}, "unknown format 'e4m3f' .did you mean 'e4m3fn'"),
    ],
)
@pytest.mark.parametrize("operation", [accel.quantize, accel.encode])
def test_bad_options_are_named(operation: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        operation(torch.ones(2, 3), **({"fmt": "e4m3fn"} | options))


@operations
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x must be a torch tensor or a NumPy array .got list."),
        (torch.ones(3, dtype=torch.int32), "x must be float32, float64, float16 or bfloat16 .got torch.int32."),
        (torch.ones(3, dtype=torch.bool), "x must be float32.*got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), "x must be float32.*got torch.complex64"),
        (np.ones(3, np.int64), "x must be float32.*got torch.int64"),
        (np.array(["a"]), "x must hold numbers"),
        (torch.eye(3).to_sparse(), "x must be a dense"),
    ],
)
def test_what_is_no_tensor_of_floats_is_refused(operation: Callable[..., Any], x: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        operation(x)


@operations
def test_an_out_of_another_shape_or_dtype_is_refused(operation: Callable[..., Any]) -> None:
    for out in (torch.empty(4), torch.empty(3, 1), torch.empty(3, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"out must be a float32.*tensor of shape \(3,\)"):
            operation(torch.ones(3), out=out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_prune_quantize_takes_float32_alone(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"x must be float32 .got {dtype}"):
        accel.prune_quantize(x, 0.5, "e4m3fn")
    with pytest.raises(TypeError, match=f"x must be float32 .got {dtype}"):
        accel.prune_quantize(x, 0.5, "e4m3fn", out=torch.empty_like(x))


def test_prune_refuses_float64() -> None:
    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16 .got torch\.float64"):
        accel.prune(torch.ones(3, dtype=torch.float64), 0.5)
    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16 .got torch\.float64"):
        accel.prune(np.ones(3), 0.5)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), 1e39, "1", None, True])
def test_bad_alphas_are_named(alpha: Any) -> None:
    for call in (lambda: accel.prune(torch.ones(3), alpha), lambda: accel.prune_quantize(torch.ones(3), alpha, "e5m2")):
        with pytest.raises(ValueError, match="alpha must be one number, finite and not negative"):
            call()


def test_encode_and_decode_refuse_what_they_cannot_represent() -> None:
    x = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    with pytest.raises(ValueError, match="x holds a NaN at flat index 2; format 'e2m1' has no NaN code"):
        accel.encode(x, "e2m1")
    with pytest.raises(ValueError, match=r"out must be a torch\.uint8 tensor of shape \(2, 2\) for e4m3fn"):
        accel.encode(x, "e4m3fn", out=torch.empty(2, 2, dtype=torch.uint16))
    with pytest.raises(ValueError, match="codes holds 16 at flat index 1; 'e2m1' has codes 0 to 15"):
        accel.decode(torch.tensor([15, 16], dtype=torch.uint8), "e2m1")
    with pytest.raises(ValueError, match="codes holds -1 at flat index 0"):
        accel.decode(np.array([-1]), "e4m3fn")
    for codes in (torch.ones(3), torch.ones(3, dtype=torch.bool), torch.ones(3).to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="codes must be integers"):
            accel.decode(codes, "e4m3fn")


@pytest.mark.parametrize(
    ("fmt", "dtype"), [("e2m1", torch.uint8), ("e4m3fn", torch.uint8), ("e4m4", torch.uint16), ("tf32", torch.uint32)]
)
def test_codes_come_in_the_smallest_integers(fmt: str, dtype: torch.dtype) -> None:
    codes = accel.encode(torch.tensor([1.0, -1.5]), fmt)
    assert codes.dtype == dtype
    for integers in (dtype, torch.uint32, torch.int64):
        assert accel.decode(codes.to(integers), fmt).tolist() == [1.0, -1.5]


def test_kernels_with_the_same_arguments_stay_apart() -> None:
    """Also on disk: the cache must tell the parallel forms of two loops from each other."""

    @kernel
    def add_one(start, stop, x, out):  # type: ignore[no-untyped-def]
        for i in range(start, stop):
            out[i] = x[i] + 1

    @kernel
    def add_two(start, stop, x, out):  # type: ignore[no-untyped-def]
        for i in range(start, stop):
            out[i] = x[i] + 2

    x, out = np.zeros(1 << 17, np.float32), np.empty(1 << 17, np.float32)
    for loop, expected in ((add_one, 1), (add_two, 2)):
        cpu.run(loop, x.size, x, out, threads=2)
        assert set(out.tolist()) == {expected}


def test_two_threads_at_once_get_the_same_bits() -> None:
    x = numbers(1 << 18)
    expected = [accel.quantize(x, "e4m3fn", rounding="stochastic", seed=seed) for seed in (0, 1)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            if not torch.equal(accel.quantize(x, "e4m3fn", rounding="stochastic", seed=seed), expected[seed]):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_quantizes(restored_threads: None) -> None:
    torch.set_num_threads(2)
    x = numbers(1 << 18)
    expected = accel.quantize(x, "e4m3fn").numpy().tobytes()
    child = os.fork()
    if child == 0:
        same = accel.quantize(x, "e4m3fn").numpy().tobytes() == expected
        os._exit(0 if same else 1)
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


def test_kernels_work_where_the_cache_cannot_be_written() -> None:
    """And leave nothing beside the sources, where a stale kernel would be found again."""
    environment = os.environ | {"NUMBA_CACHE_DIR": "/proc/no/such/folder"}
    program = "import torch, accel; print(accel.quantize(torch.tensor([17.0]), 'e4m3fn').item())"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "16.0"
    assert list(Path(accel.__file__).parent.rglob("*.nbi")) == []


FORMS = ["e4m3fn", "bf16", "fp32", "e8m0fnu", "int8", "uint8", "binary8p1", "e8m3fnuz", "fixed<8,4>"]
MODES = ["nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic"]


@pytest.mark.parametrize("fmt", FORMS)
@pytest.mark.parametrize("rounding", MODES)
def test_every_layout_gets_the_same_bits(fmt: str, rounding: str) -> None:
    x = numbers(3, 4, 5, 6) * 3
    for scale in (None, 0.3, numbers(4, 1, 1).abs() + 0.1, numbers(6).abs() + 0.1, numbers(3, 1, 5, 1).abs() + 0.1):
        options: dict[str, Any] = {"rounding": rounding, "scale": scale, "seed": 3, "offset": 77}
        expected, codes = accel.quantize(x, fmt, **options), accel.encode(x, fmt, **options)
        assert torch.equal(accel.decode(codes, fmt, scale=scale).nan_to_num(), expected.nan_to_num())
        values, both_codes = accel.quantize_encode(x, fmt, **options)
        assert torch.equal(values.nan_to_num(), expected.nan_to_num())
        assert torch.equal(both_codes, codes)
        for layout in LAYOUTS.values():
            given = layout(x)
            assert torch.equal(accel.quantize(given, fmt, **options).nan_to_num(), expected.nan_to_num())
            assert torch.equal(accel.encode(given, fmt, **options), codes)
            assert torch.equal(accel.quantize_encode(given.detach(), fmt, **options)[1], codes)


def test_channels_last_stays_channels_last() -> None:
    x = numbers(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    for operation in OPERATIONS.values():
        assert operation(x).is_contiguous(memory_format=torch.channels_last)


def test_scales_of_every_shape() -> None:
    """Rows of equal scale, scales that repeat and scales of single elements, against one division and product each."""
    x = numbers(3, 4, 5)
    for shape in ((), (1,), (5,), (4, 1), (4, 5), (3, 1, 1), (3, 1, 5), (1, 4, 1), (3, 4, 5), (3, 4, 1)):
        scale = torch.from_numpy(np.random.default_rng(1).uniform(0.1, 3, shape).astype(np.float32))
        expected = accel.quantize(x / scale, "e4m3fn") * scale
        assert torch.equal(accel.quantize(x, "e4m3fn", scale=scale), expected)


def test_a_power_of_two_scale_is_a_division_like_any_other() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32))
    for exponent in (-149, -130, -127, -126, -3, 0, 5, 126, 127):
        scale = 2.0**exponent
        expected = accel.quantize(x / scale, "e5m2", overflow="ieee") * scale
        given = accel.quantize(x, "e5m2", overflow="ieee", scale=scale)
        assert torch.equal(given.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("rounding", MODES)
def test_float64_is_rounded_once(rounding: str) -> None:
    """Just above a tie of the target, where a detour over float32 would land on the tie."""
    near = [1.0625 + 2.0**-40, 1.0625 - 2.0**-40, 1 + 2.0**-50, -1.0625 - 2.0**-40]
    x = torch.tensor([*near, 1e300, 1e-300], dtype=torch.float64)
    rounded = accel.quantize(x, "e4m3fn", rounding=rounding, overflow="ieee", seed=1)
    assert rounded.dtype == torch.float64
    expected = {
        "nearest_even": [1.125, 1.0, 1.0, -1.125, math.nan, 0.0],
        "nearest_away": [1.125, 1.0, 1.0, -1.125, math.nan, 0.0],
        "toward_zero": [1.0, 1.0, 1.0, -1.0, 448.0, 0.0],
        "up": [1.125, 1.125, 1.125, -1.0, math.nan, 2.0**-9],
        "down": [1.0, 1.0, 1.0, -1.125, 448.0, 0.0],
    }
    if rounding in expected:
        np.testing.assert_array_equal(rounded.numpy(), np.array(expected[rounding]))
    assert torch.equal(accel.encode(x[:4], "e4m3fn", rounding=rounding, seed=1), accel.encode(rounded[:4], "e4m3fn"))


def test_float64_keeps_fp32_values_and_rounds_to_them() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, 10_000))
    assert torch.equal(accel.quantize(x, "fp32"), x.float().double())
    assert torch.equal(accel.quantize(x, "bf16", scale=0.7), accel.quantize(x / 0.7, "bf16") * float(np.float32(0.7)))


def test_flushing_subnormals_leaves_integers_alone() -> None:
    x = torch.tensor([1.0, -3.0, 0.4])
    assert accel.quantize(x, "int8", flush_subnormals=True).tolist() == [1.0, -3.0, 0.0]


def test_alpha_codes_hold_alpha() -> None:
    """+-alpha is kept, coded in the two reserved codes, and read back; other values use the rest of the codes."""
    alpha = 0.7
    x = torch.tensor([0.7, -0.7, 0.0, 1.0, -448.0, 5.0]).repeat(3)
    for policy, e, m, code in (("ieee", 5, 2, 0x7F), ("fn", 4, 3, 0x7F), ("finite", 2, 1, 0x7), ("fnuz", 4, 3, 0x7F)):
        fmt = accel.format({"exponent_bits": e, "mantissa_bits": m, "policy": policy, "alpha_codes": True})
        codes = accel.encode(x, fmt, alpha=alpha)
        assert codes[:2].tolist() == [code, code | 1 << (e + m)]
        values = accel.decode(codes, fmt, alpha=alpha)
        assert torch.equal(values, accel.quantize(x, fmt, alpha=alpha))
        assert values[:2].tolist() == [float(np.float32(0.7)), float(np.float32(-0.7))]
        assert not set(accel.encode(torch.tensor([448.0, -448.0, 1e9]), fmt).tolist()) & {code, code | 1 << (e + m)}
        in_place = x.clone()
        assert torch.equal(accel.quantize(in_place, fmt, alpha=alpha, out=in_place), values)
        strided = x.repeat_interleave(2)[::2]
        assert torch.equal(accel.encode(strided, fmt, alpha=alpha), codes)
        with pytest.raises(ValueError, match="decode needs alpha"):
            accel.decode(codes, fmt)
    with pytest.raises(ValueError, match="alpha is for formats with alpha_codes; 'e4m3fn' has none"):
        accel.quantize(x, "e4m3fn", alpha=alpha)
    with pytest.raises(ValueError, match=r"NaN at flat index 0; format .* has no NaN code"):
        accel.encode(torch.tensor([math.nan]), {"base": "e4m3fn", "alpha_codes": True})


def test_a_new_format_compiles_nothing() -> None:
    """Formats are numbers that kernels are given at run time: no new signature of any kernel."""

    def signatures() -> int:
        kernels = [one for group in cpu.KERNELS.values() for one in group.values()]
        return sum(len(one.serial.signatures) for one in [*kernels, cpu.decode])  # type: ignore[attr-defined]

    def use(fmt: Any) -> None:
        x = numbers(20, 400)
        for rounding in ("nearest_even", "stochastic", "up"):
            accel.quantize(x, fmt, rounding=rounding)
            accel.decode(accel.encode(x, fmt, rounding=rounding), fmt)
            accel.prune_quantize(x, 0.5, fmt, rounding=rounding)

    for fmt in ("e4m3fn", "int8", "mxfp4", "nvfp4"):
        use(fmt)
    before = signatures()
    use({"exponent_bits": 3, "mantissa_bits": 3, "bias": 6, "policy": "fn"})
    use("e5m1")
    use({"exponent_bits": 2, "mantissa_bits": 4, "policy": "p3109"})
    use("fixed<7,3>")
    use({"element": "e3m3", "block_size": 24})
    use({"base": "nvfp4", "block_size": 8})
    assert signatures() == before


@pytest.mark.exhaustive
def test_more_than_2_to_the_31_elements() -> None:
    """In place on bfloat16 (4 GiB): the last elements are numbered beyond 2^31."""
    size, tail = (1 << 31) + 1000, 5000
    x = torch.full((size,), 1.3, dtype=torch.bfloat16)
    assert accel.quantize(x, "e5m2", rounding="stochastic", seed=1, out=x) is x
    last = torch.full((tail,), 1.3, dtype=torch.bfloat16)
    assert torch.equal(x[-tail:], accel.quantize(last, "e5m2", rounding="stochastic", seed=1, offset=size - tail))
