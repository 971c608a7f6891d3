"""What every reader of an in-memory set returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fpsim.data.errors import DataError

UInt8Array = npt.NDArray[np.uint8]
IntegerArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class LabelledImages:
    """images uint8 [N, C, H, W], labels of any integer type [N]."""

    images: UInt8Array
    labels: IntegerArray

    def take(self, indices: npt.NDArray[np.intp]) -> LabelledImages:
        """A copy of the images at `indices`, in that order."""
        return LabelledImages(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A whole image set as published; provenance says where it comes from and what is missing."""

    train: LabelledImages
    test: LabelledImages
    classes: int
    provenance: str


def check_labels(labels: IntegerArray, classes: int, where: object) -> None:
    """DataError for a label outside 0..classes-1, naming the file or folder `where`."""
    if labels.max(initial=0) >= classes:
        raise DataError(f"{where}: label {labels.max()} is outside 0..{classes - 1}")
