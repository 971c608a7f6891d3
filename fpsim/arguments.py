"""Checks of array arguments whose complaint names the argument and its first bad value."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def floats(value: ArrayLike) -> Floats:
    """`value` as a float64 array."""
    return np.asarray(value, dtype=np.float64)


def integers(value: ArrayLike, name: str, least: int, most: int) -> Integers:
    """`value` as an int64 array. ValueError for what is no integer from `least` to `most`."""
    numbers = floats(value)
    valid = (numbers >= least) & (numbers <= most) & (numbers == np.floor(numbers))
    require(valid, name, numbers, f"an integer from {least} to {most}")
    return numbers.astype(np.int64)


def positive(value: ArrayLike, name: str) -> Floats:
    """`value` as a float64 array. ValueError for what is not finite and > 0."""
    numbers = floats(value)
    require((numbers > 0) & np.isfinite(numbers), name, numbers, "finite and > 0")
    return numbers


def require(valid: NDArray[np.bool_], name: str, value: Floats, allowed: str) -> None:
    """ValueError "NAME must be ALLOWED, got VALUE", unless all of `valid` (of value's shape) is true."""
    if not np.all(valid):
        raise ValueError(f"{name} must be {allowed}, got {float(value[~valid].flat[0])!r}")
