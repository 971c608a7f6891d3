"""How scalar functions and CPU loops are compiled.

Compiled kernels are cached on disk. numba notices only changes to the file that holds a kernel, not to the scalar
functions it calls, so the cache folder carries a digest of all sources of `accel`: stale bits cannot be loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numba
import numba.core.config


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


class Kernel(NamedTuple):
    """A loop over a piece of the work, `serial(start, stop, *arguments)`, and the same over many pieces at once."""

    serial: Callable[..., None]
    parallel: Callable[..., None]  # parallel(arguments, bounds): the pieces bounds[i] .. bounds[i + 1]


def _parallel(arguments, bounds):  # type: ignore[no-untyped-def]
    for piece in numba.prange(len(bounds) - 1):
        serial(bounds[piece], bounds[piece + 1], *arguments)  # noqa: F821


def scalar(function: Callable[..., Any]) -> Any:
    """Compile one scalar function, callable from CPU loops and from CUDA kernels alike."""
    return numba.njit(function)


def kernel(loop: Callable[..., None]) -> Kernel:
    """Compile `loop(start, stop, *arguments)` without the interpreter lock, serial and parallel, cached on disk.

    The parallel form finds its loop as a global, not in a closure: numba does not cache closures over functions. It
    bears the loop's name because numba tells cached functions apart by name, and all parallel forms share their code.
    """
    before = config.CACHE_DIR
    config.CACHE_DIR = CACHE_FOLDER
    try:
        serial = numba.njit(loop, nogil=True, cache=CACHED)
        parallel = FunctionType(_parallel.__code__, {"numba": numba, "serial": serial}, f"{loop.__name__}_parallel")
        parallel.__module__ = loop.__module__
        parallel.__qualname__ = f"{loop.__module__}.{loop.__qualname__}"
        return Kernel(serial, numba.njit(parallel, nogil=True, parallel=True, cache=CACHED))
    finally:
        config.CACHE_DIR = before
