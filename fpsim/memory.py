"""How the process treats freed memory."""

from __future__ import annotations

import ctypes

import accel  # noqa: F401  before torch, see accel/kernels/openmp.py

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation instead of handing it back to the system.

    A training step frees its activations and the next one takes as much again: handing them back costs more in page
    faults than rounding them does. Returns whether it could be set; other C libraries keep their ways.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
