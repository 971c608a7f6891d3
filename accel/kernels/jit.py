"""How scalar functions and CPU loops are compiled.

Compiled kernels are cached on disk. numba notices only changes to the file that holds a kernel, not to the scalar
functions it calls, so the cache folder carries a digest of all sources of `accel`: stale bits cannot be loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numba.core.config
from llvmlite.binding import get_host_cpu_name
from numba._dispatcher import compute_fingerprint
from numba.core import types
from numba.core.cgutils import unpack_tuple
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic


def _cache_folder() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.blake2s(digest_size=8)
    for source in sorted(package.rglob("*.py")):
        digest.update(source.read_bytes())
    root = (
        os.environ.get("NUMBA_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fpsim"
    )
    return str(Path(root) / f"kernels-{digest.hexdigest()}")


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


CACHE_FOLDER = _cache_folder()
CACHED = _is_writable(CACHE_FOLDER)  # elsewhere numba would cache beside the sources, where no digest tells stale bits
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": CACHED, "no_cfunc_wrapper": True}
config: Any = numba.core.config  # has no type stubs
if config.CPU_NAME is None and config.CPU_FEATURES is None and "+avx512f" in get_host_cpu_features():
    # Processors for which LLVM prefers vectors of 256 bits run these loops up to a third slower with them.
    config.CPU_NAME, config.CPU_FEATURES = get_host_cpu_name(), f"{get_host_cpu_features()},-prefer-256-bit"
config.PARFOR_MAX_TUPLE_SIZE = 256  # the parameters of a block format, its scale's and its elements' go in one tuple


class Kernel:
    """A loop over a piece of the work, `serial(start, stop, *arguments)`, and the same over many pieces at once.

    The parallel loop calls the serial one by its address. Called by its name, it would be compiled into each kernel's
    parallel form once more, which took longer than the kernel itself.
    """

    def __init__(self, serial: Any):
        self.serial = serial
        self._addresses: dict[bytes, int] = {}  # of the compiled loop, by the kinds of the arguments

    def parallel(self, arguments: tuple[Any, ...], bounds: Any) -> None:
        """The pieces bounds[i] .. bounds[i + 1], on as many threads as numba is set to."""
        kinds = compute_fingerprint(arguments)
        if kinds not in self._addresses:
            self._addresses[kinds] = self._address(arguments)
        _on_threads(self._addresses[kinds], arguments, bounds)

    def _address(self, arguments: tuple[Any, ...]) -> int:
        self.serial(0, 0, *arguments)  # compiles it, or finds it in the cache
        wanted = tuple(numba.typeof(argument) for argument in (0, 0, *arguments))
        (compiled,) = (one for kinds, one in self.serial.overloads.items() if _spread(kinds) == wanted)
        return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


def _spread(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """Types of arguments, those that a *parameter takes in line with the others."""
    ends_in_tuple = isinstance(kinds[-1], types.BaseTuple)
    return kinds[:-1] + tuple(kinds[-1]) if ends_in_tuple else kinds


def scalar(function: Callable[..., Any]) -> Any:
    """Compile one scalar function, for CPU loops and CUDA kernels alike.

    Without the wrappers that calls from Python take, which are half of the time that compilation takes; only the
    simulator of CUDA makes such calls.
    """
    options: dict[str, Any] = {"error_model": "numpy", "forceinline": True, "no_cfunc_wrapper": True, "_nrt": False}
    return numba.njit(function, no_cpython_wrapper=not config.ENABLE_CUDASIM, **options)  # type: ignore[call-overload]


def part(function: Callable[..., Any], name: str, **bound: Any) -> Any:
    """`scalar` of a function under another name; bound: what names that it uses mean."""
    return scalar(renamed(function, name, {**function.__globals__, **bound}))


def kernel(loop: Callable[..., None], name: str = "", cached: bool = True, **bound: Any) -> Kernel:
    """Compile `loop(start, stop, *arguments)` without the interpreter lock, serial and parallel, cached on disk unless
    it calls functions from outside `accel`, of which the cache would not notice a change.

    bound: what names that the loop uses mean, for loops over several scalar functions; each such kernel has a `name`,
    because numba tells cached functions apart by name.
    """
    name = name or loop.__name__
    with cache_in(CACHE_FOLDER):
        options = {**OPTIONS, "cache": CACHED and cached}
        return Kernel(numba.njit(renamed(loop, name, {**loop.__globals__, **bound}), **options))


@contextmanager
def cache_in(folder: str) -> Iterator[None]:
    """What is decorated within caches its compiled forms in `folder`."""
    before = config.CACHE_DIR
    config.CACHE_DIR = folder
    try:
        yield
    finally:
        config.CACHE_DIR = before


def renamed(function: Callable[..., Any], name: str, names: dict[str, Any]) -> Callable[..., Any]:
    """`function` under another name and with other globals."""
    copy = FunctionType(function.__code__, names, name)
    copy.__module__ = function.__module__
    copy.__qualname__ = f"{copy.__module__}.{name}"
    return copy


@intrinsic
def _call(typing_context, address, start, stop, arguments):  # type: ignore[no-untyped-def]
    """Call the compiled loop at `address` with (start, stop, *arguments), which must be of the types it has."""
    kinds = (start, stop, *arguments)

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        address, start, stop, arguments = values
        convention = context.call_conv
        kind = convention.get_function_type(types.none, kinds)
        function = builder.inttoptr(address, kind.as_pointer())
        flat = [start, stop, *unpack_tuple(builder, arguments)]
        status, _ = convention.call_function(builder, function, types.none, kinds, flat)
        with builder.if_then(status.is_error, likely=False):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(address, start, stop, arguments), emit


def _pieces(address, arguments, bounds):  # type: ignore[no-untyped-def]
    for piece in numba.prange(len(bounds) - 1):
        _call(address, bounds[piece], bounds[piece + 1], arguments)


with cache_in(CACHE_FOLDER):
    _on_threads = numba.njit(_pieces, parallel=True, **OPTIONS)
