"""Train and test splits as batches: float32 inputs and their labels, or text and its next characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SPLIT_SEED = 20_180_309  # of every split and limit, whatever the run's seed
MAX_CROP_PADDING = 4  # pixels
STATISTICS_CHUNK = 4096  # images


@runtime_checkable
class Split(Protocol):
    """Samples of images or text, read by index."""

    def __len__(self) -> int: ...

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, H, W], normalised, and labels int64 [B], for `indices` int64 [B].

        Of a text: characters int64 [B, T], and as labels the character after each, int64 [B, T].
        `generator` (CPU) augments the images of a split that augments: a function of its state alone. None: as stored.
        `chosen`: only these positions of the batch, int64; each is augmented as it is in the whole batch. None: all.
        """


@dataclass(frozen=True)
class Dataset:
    """Both splits of a data set, `Samples` say.

    classes: number of different labels; input_shape: (C, H, W) of every image, or (T,) of every piece of text;
    labels_per_sample: 1 of an image, T of a piece of text; description: where the samples come from, how many there
    are, and what is missing.
    """

    name: str
    train: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]
    description: str
    labels_per_sample: int = 1


@dataclass(frozen=True)
class TensorSplit:
    """A split in memory: images uint8 [N, C, H, W], labels int64 [N]; mean and std [C, 1, 1] of images scaled to 0..1.

    Augmenting is a random crop after zero padding (He et al. 2016, section 4.2), and a horizontal flip if `flip`.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    augment: bool
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.batch`."""
        kept = slice(None) if chosen is None else chosen
        images = self.images[indices]
        if self.augment and generator is not None:
            images = random_crop(images, generator)
            if self.flip:
                images = flipped(images, draw_flips(len(images), generator))
        return normalise(images[kept], self.mean, self.std), self.labels[indices[kept]]


@dataclass(frozen=True)
class Samples:
    """A split in memory, as it is given to the network: inputs [N, ...] (float32, or int64 of text), labels int64 [N].

    Nothing is normalised or augmented. Raises ValueError for a dtype or a number of labels that does not fit.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.inputs.dtype not in (torch.float32, torch.int64) or self.labels.dtype != torch.int64:
            message = "inputs must be float32 (or int64, of text) and labels int64"
            raise ValueError(f"{message} (got {self.inputs.dtype} and {self.labels.dtype})")
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.batch`."""
        indices = indices if chosen is None else indices[chosen]
        return self.inputs[indices], self.labels[indices]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] -> float32 (images / 255 - mean) / std."""
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 [C, 1, 1], of uint8 images scaled to 0..1. A constant channel has std 1."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    total_of_squares = torch.zeros_like(total)
    for chunk in images.split(STATISTICS_CHUNK):
        values = chunk.to(torch.int32)
        total += values.sum(dim=(0, 2, 3))
        total_of_squares += (values * values).sum(dim=(0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total.double() / count
    std = (total_of_squares.double() / count - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 255
    return (mean / 255).float()[:, None, None], (std / 255).float()[:, None, None]


def random_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, C, H, W] moved by up to an eighth of its side, at most 4 pixels, in y and x; zeros move in."""
    count, _, height, width = images.shape
    padding = min(MAX_CROP_PADDING, -(-min(height, width) // 8))
    padded = torch.nn.functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2 padding + 1, 2 padding + 1, H, W], a view
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, top, left]


def draw_flips(count: int, generator: torch.Generator) -> Tensor:
    """Which of so many images to mirror, each with probability one half: bool [count, 1, 1, 1]."""
    return torch.randint(2, (count, 1, 1, 1), generator=generator, dtype=torch.bool)


def flipped(images: Tensor, which: Tensor) -> Tensor:
    """Images [B, C, H, W], those of `which` mirrored left to right."""
    return torch.where(which, images.flip(3), images)


def fixed_shuffle(count: int) -> npt.NDArray[np.intp]:
    """One permutation of range(count), the same everywhere and always: raw bits of a generator, sorted."""
    return np.argsort(np.random.PCG64(SPLIT_SEED).random_raw(count), kind="stable")


def limited(count: int, limit: int | None) -> npt.NDArray[np.intp]:
    """Indices of the first `limit` of a fixed shuffle of range(count); all in their order where that is no limit."""
    return np.arange(count) if limit is None or limit >= count else fixed_shuffle(count)[:limit]


def stratified_split(
    labels: npt.NDArray[np.integer[Any]], test_count: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices of train and test images, shuffled by the fixed seed; each class within one image of its share."""
    order = fixed_shuffle(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[by_class[(2 * np.arange(test_count) + 1) * len(labels) // (2 * test_count)]] = True
    return order[~is_test[order]], order[is_test[order]]
