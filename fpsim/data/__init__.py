"""Data sets: what ships inside installed packages, and readers of local images and text."""

from __future__ import annotations

from fpsim.data.dataset import Dataset, Samples, Split, TensorSplit
from fpsim.data.errors import DataError
from fpsim.data.registry import load, names

__all__ = ["DataError", "Dataset", "Samples", "Split", "TensorSplit", "load", "names"]
