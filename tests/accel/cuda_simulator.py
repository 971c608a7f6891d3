"""Every CUDA kernel in numba's simulator, bit for bit against the CPU: run with NUMBA_ENABLE_CUDASIM=1.

Exits with 1, naming the cases, if bits differ or a kernel was not launched.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numba.cuda.simulator.kernelapi import FakeCUDAShared

sys.path.insert(0, str(Path(__file__).parents[2]))

from accel import launch
from accel.codecs import cuda as codecs_cuda
from accel.datapath import cpu as datapath_cpu
from accel.datapath import cuda as datapath_cuda
from accel.datapath import products
from accel.kernels import cpu, cuda, cuda_jit
from tests.accel.cuda_cases import Case, cases, flattened, numbers, same_bits

COUNT = 8 * 41  # not a multiple of a warp, nor of the groups of the random words

LONG = 8 * 700
SEVERAL_CHUNKS = (
    "quantize e4m3fn nearest_even", "encode stochastic", "both up", "prune_quantize scaled stochastic",
    "channel scales", "element scales", "blocks int8 power stochastic", "blocks of 32", "blocks of 5000",
    "stochastic blocks of 32", "pack bitmask", "pack alpha_tag", "pack alpha",
)  # fmt: skip


def shared_array(self: Any, shape: Any, dtype: Any) -> Any:
    """One array for all threads: the simulator's own look-up now and then gives two of them one each."""
    frame = sys._getframe(1)
    return self._allocations.setdefault((frame.f_code, frame.f_lineno), np.empty(shape, dtype))


def on(backend: ModuleType, case: Case, x: torch.Tensor) -> list[torch.Tensor]:
    launch.backend = lambda _: backend  # type: ignore[assignment]
    products.backend = lambda _: datapath_cpu if backend is cpu else datapath_cuda  # type: ignore[assignment]
    return flattened(case(x))


def main() -> int:
    assert cuda.SIMULATED, "set NUMBA_ENABLE_CUDASIM=1"
    FakeCUDAShared.array = shared_array
    warnings.simplefilter("ignore", RuntimeWarning)  # overflowing casts into the simulator's arrays
    launched: set[str] = set()
    simulated = cuda_jit.simulated

    def noted(loop: Any, name: str) -> Any:
        launched.add(name)
        return simulated(loop, name)

    cuda_jit.simulated = noted
    sys.setswitchinterval(1e-4)  # a thread of the simulator spins while others run
    wrong, count = [], 0
    for name, case in cases():
        x = numbers(LONG if name in SEVERAL_CHUNKS else COUNT)
        expected, found = on(cpu, case, x.clone()), on(cuda, case, x.clone())
        count += 1
        if len(expected) != len(found) or not all(map(same_bits, expected, found)):
            wrong.append(name)
    missing = sorted({*cuda.LOOPS, *codecs_cuda.LOOPS, *datapath_cuda.LOOPS} - launched)
    print(f"{count} cases, {len(launched)} kernels; differing: {wrong or 'none'}; not launched: {missing or 'none'}")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
