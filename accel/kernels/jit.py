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
from typing import Any, NamedTuple

import numba
import numba.core.config
from llvmlite.binding import get_host_cpu_name
from numba.core.codegen import get_host_cpu_features


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
config: Any = numba.core.config  # has no type stubs
if config.CPU_NAME is None and config.CPU_FEATURES is None and "+avx512f" in get_host_cpu_features():
    # Processors for which LLVM prefers vectors of 256 bits run these loops up to a third slower with them.
    config.CPU_NAME, config.CPU_FEATURES = get_host_cpu_name(), f"{get_host_cpu_features()},-prefer-256-bit"
config.PARFOR_MAX_TUPLE_SIZE = 256  # the parameters of a block format, its scale's and its elements' go in one tuple


class Kernel(NamedTuple):
    """A loop over a piece of the work, `serial(start, stop, *arguments)`, and the same over many pieces at once."""

    serial: Callable[..., None]
    parallel: Callable[..., None]  # parallel(arguments, bounds): the pieces bounds[i] .. bounds[i + 1]


def _parallel(arguments, bounds):  # type: ignore[no-untyped-def]
    for piece in numba.prange(len(bounds) - 1):
        serial(bounds[piece], bounds[piece + 1], *arguments)  # noqa: F821


def scalar(function: Callable[..., Any]) -> Any:
    """Compile one scalar function, callable from CPU loops and from CUDA kernels alike."""
    return numba.njit(function, error_model="numpy", forceinline=True)


def kernel(loop: Callable[..., None], name: str = "", **bound: Any) -> Kernel:
    """Compile `loop(start, stop, *arguments)` without the interpreter lock, serial and parallel, cached on disk.

    bound: what names that the loop uses mean, for loops over several scalar functions; each such kernel has a `name`.
    The parallel form finds its loop as a global, not in a closure: numba does not cache closures over functions. Every
    form bears a name of its own because numba tells cached functions apart by name.
    """
    name = name or loop.__name__
    with cache_in(CACHE_FOLDER):
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": CACHED}
        serial = numba.njit(renamed(loop, name, {**loop.__globals__, **bound}), **options)
        whole = renamed(_parallel, f"{name}_parallel", {"numba": numba, "serial": serial}, loop.__module__)
        return Kernel(serial, numba.njit(whole, parallel=True, **options))


@contextmanager
def cache_in(folder: str) -> Iterator[None]:
    """What is decorated within caches its compiled forms in `folder`."""
    before = config.CACHE_DIR
    config.CACHE_DIR = folder
    try:
        yield
    finally:
        config.CACHE_DIR = before


def renamed(
    function: Callable[..., Any], name: str, names: dict[str, Any], module: str | None = None
) -> Callable[..., Any]:
    """`function` under another name and with other globals."""
    copy = FunctionType(function.__code__, names, name)
    copy.__module__ = module or function.__module__
    copy.__qualname__ = f"{copy.__module__}.{name}"
    return copy
