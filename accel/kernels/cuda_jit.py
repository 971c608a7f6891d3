"""How CUDA kernels are compiled and launched.

numba turns a loop into PTX, the text that tests/accel/test_cuda.py examines. Its assembler makes machine code of that
with products and sums kept apart (bits would differ from the CPU's otherwise), which is cached on disk beside the CPU's
kernels. A launch passes plain numbers: numba's own launcher takes a hundred times as long for so many arguments.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import cuda

from accel.kernels.jit import CACHE_FOLDER, CACHED, config

SIMULATED: bool = config.ENABLE_CUDASIM
THREADS = 32 if SIMULATED else 256  # of a block

device: Any = (lambda function: function) if SIMULATED else cuda.jit(device=True)

_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.int64: np.int64,
}


def ptx_of(loop: Any, name: str, arguments: tuple[Any, ...], capability: tuple[int, int]) -> str:
    """The PTX of a loop, whose entry is `name`, for arguments of these kinds. Arrays: NumPy's, or dense tensors."""
    kinds = tuple(numba.typeof(_example(a)) for a in arguments)
    ptx, _ = cuda.compile_ptx(loop, kinds, cc=capability)
    (entry,) = re.findall(r"\.entry (\w+)", ptx)
    return str(ptx).replace(entry, name)


def assembled(ptx: str, capability: tuple[int, int]) -> bytes:
    """Machine code of PTX, without fused products."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch="sm_{}{}".format(*capability), fma=False)
    return bytes(Program(ptx, "ptx", options).compile("cubin").code)


def launch(loop: Any, name: str, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Start `loop` on torch's current stream of the device that the tensors among the arguments are on.

    Tensors are flat, or of two contiguous dimensions; other arguments are NumPy scalars, int and tuples of them.
    """
    if blocks == 0:
        return
    if SIMULATED:
        arrays = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
        simulated(loop, name)[blocks, THREADS](*arrays)
        return
    from cuda.core import LaunchConfig
    from cuda.core import launch as start

    place = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    if place.index != torch.cuda.current_device():
        with torch.cuda.device(place):
            launch(loop, name, blocks, arguments)
        return
    kernel = _kernel(name, tuple(map(_kind, arguments)), _capability(place.index), loop, arguments)
    stream = _stream(place.index, torch.cuda.current_stream().cuda_stream)
    start(stream, LaunchConfig(grid=blocks, block=THREADS), kernel, *flat(arguments))


def simulated(loop: Any, name: str) -> Any:
    """The kernel of that name in numba's simulator."""
    return cuda.jit(loop)


_capability = cache(torch.cuda.get_device_capability)
_kernels: dict[Any, Any] = {}


def _kernel(name: str, kinds: tuple[Any, ...], capability: tuple[int, int], loop: Any, arguments: Any) -> Any:
    key = name, kinds, capability
    if key not in _kernels:
        from cuda.core import ObjectCode

        _kernels[key] = ObjectCode.from_cubin(_machine_code(key, loop, arguments)).get_kernel(name)
    return _kernels[key]


def _machine_code(key: tuple[Any, ...], loop: Any, arguments: Any) -> bytes:
    """From the cache, or compiled."""
    name, _, capability = key
    versions = numba.__version__, version("numba-cuda")
    digest = hashlib.blake2s(repr((key, versions)).encode(), digest_size=8).hexdigest()
    place = Path(CACHE_FOLDER) / f"{name}-{digest}.cubin"
    if CACHED and place.is_file():
        return place.read_bytes()
    code = assembled(ptx_of(loop, name, arguments, capability), capability)
    if CACHED:
        _keep(code, place)
    return code


def _keep(code: bytes, place: Path) -> None:
    """Into the cache, unless the disk is full: the next process then compiles again."""
    descriptor, temporary = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
        os.replace(temporary, place)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


@cache
def _stream(index: int, handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _kind(argument: Any) -> Any:
    """What tells arguments of different types apart; numbers of a tuple are of one kind in each of its uses."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return type(argument[0]) if isinstance(argument, tuple) else type(argument)


def _example(argument: Any) -> Any:
    """A value of the type that numba sees."""
    if isinstance(argument, torch.Tensor):
        return np.empty((0,) * argument.ndim, _NUMPY[argument.dtype])
    return argument


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as the compiled entry takes them: a tuple as its parts, a tensor as the record of numba's arrays."""
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            size = argument.element_size()
            strides = [stride * size for stride in argument.stride()]
            found += (0, 0, argument.numel(), size, argument.data_ptr(), *argument.shape, *strides)
        elif isinstance(argument, tuple):
            found += flat(argument) if isinstance(argument[-1], tuple) else argument
        else:
            found.append(argument)
    return found
