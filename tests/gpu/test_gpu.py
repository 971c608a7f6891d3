"""The same comparisons on a real GPU: `python -m pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import accel
from tests.accel.cuda_cases import Case, cases, flattened, numbers, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels ran in the simulator only"),
]
COUNT = 8 * 125_003


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "case"), list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_gpu_gives_the_bits_of_the_cpu(name: str, case: Case) -> None:
    x = numbers(COUNT)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = flattened(case(x.cuda()))
    expected = flattened(case(x))
    assert len(found) == len(expected)
    assert all(map(same_bits, expected, found)), name


@pytest.mark.parametrize("fmt", ["e4m3fn", "int8", "mxfp4"])
def test_the_training_path_does_not_wait(fmt: str, no_waiting: None) -> None:
    x = torch.randn(256, 1024, device="cuda", requires_grad=True)
    accel.quantize(x, fmt, rounding="stochastic").sum().backward()
    accel.prune(x, 0.5)
    accel.prune_quantize(x.detach(), 0.5, fmt)


def test_layouts_and_compiled_code() -> None:
    x = torch.randn(4, 8, 33, 17, device="cuda")
    expected = accel.quantize(x, "e4m3fn", rounding="stochastic")
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(accel.quantize(last, "e4m3fn", rounding="stochastic"), expected)
    compiled = torch.compile(lambda y: accel.quantize(y, "e4m3fn", rounding="stochastic"), fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_more_than_2_to_the_31_elements() -> None:
    count, last = (1 << 31) + 4096 + 77, 10_000
    if torch.cuda.mem_get_info()[0] < 5 * 4 * count:
        pytest.skip("needs 43 GB of free memory of the GPU")
    x = torch.randn(count, device="cuda")
    y = accel.quantize(x, "e4m3fn", rounding="stochastic", seed=3)
    tail = accel.quantize(x[-last:], "e4m3fn", rounding="stochastic", seed=3, offset=count - last)
    assert torch.equal(y[-last:], tail)
    pruned, counts = accel.prune_quantize(x, 0.5, "e5m2", out=y)
    assert counts.total.nonzeros == int((pruned != 0).sum())
