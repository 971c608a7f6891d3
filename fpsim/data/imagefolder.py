"""Images in folders, one per class, decoded with Pillow when a batch asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fpsim.data.dataset import Dataset, draw_flips, flipped, limited, normalise
from fpsim.data.errors import DataError, missing

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of RGB scaled to 0..1
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
CROP_AREA = (0.08, 1.0)  # of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width over height


@dataclass(frozen=True)
class FolderSplit:
    """A split on disk: paths[i] has the label labels[i] (int64 [N]); images come as RGB of image_size x image_size.

    As stored: shorter side resized to image_size, centre crop. Augmented: random resized crop (Szegedy et al. 2015,
    "Going deeper with convolutions", section 6; a side longer than the image's is clamped) and horizontal flip.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    image_size: int
    augment: bool

    def __len__(self) -> int:
        return len(self.paths)

    def batch(
        self, indices: Tensor, generator: torch.Generator | None = None, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.batch`. Raises DataError for a file that is not an image."""
        kept = slice(None) if chosen is None else chosen
        count, indices = len(indices), indices[kept]
        paths = [self.paths[i] for i in indices.tolist()]
        if self.augment and generator is not None:
            draws = torch.rand(count, 4, generator=generator, dtype=torch.float64)[kept].tolist()
            images = torch.stack([self._decode(path, draw) for path, draw in zip(paths, draws, strict=True)])
            images = flipped(images, draw_flips(count, generator)[kept])
        else:
            images = torch.stack([self._decode(path, None) for path in paths])
        return normalise(images, IMAGENET_MEAN, IMAGENET_STD), self.labels[indices]

    def _decode(self, path: Path, draw: list[float] | None) -> Tensor:
        """uint8 [3, image_size, image_size]; `draw`: four uniform numbers that choose the crop's area, ratio, place."""
        size, bilinear = (self.image_size, self.image_size), Image.Resampling.BILINEAR
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged files
            raise DataError(f"{path}: not a readable image: {error}") from error
        if draw is None:
            image = ImageOps.fit(image, size, bilinear)
        else:
            image = image.resize(size, bilinear, box=crop_box(image.width, image.height, draw))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_box(width: int, height: int, draw: list[float]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the crop that four uniform numbers in [0, 1) choose in a width x height image."""
    area = width * height * (CROP_AREA[0] + draw[0] * (CROP_AREA[1] - CROP_AREA[0]))
    ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** draw[1]
    crop_width, crop_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draw[2] * (width - crop_width), draw[3] * (height - crop_height)
    return left, top, left + crop_width, top + crop_height


def read(root: Path, image_size: int, train_limit: int | None, test_limit: int | None, augment: bool) -> Dataset:
    """The folders root/train/CLASS/ and root/val/CLASS/ (or root/test/CLASS/) of images; classes in sorted order."""
    train_folder = root / "train"
    if not train_folder.is_dir():
        raise missing(train_folder, "data.root to hold train/CLASS/*.png (or another image type) and val/ or test/")
    test_folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test_folder is None:
        raise missing(root / "val", "a folder val/ or test/ beside train/")
    classes = _subfolders(train_folder)
    train_split = _split(train_folder, classes, image_size, train_limit, augment)
    test_split = _split(test_folder, classes, image_size, test_limit, augment=False)
    description = (
        f"imagefolder: {root.name}/, {len(train_split):,} train / {len(test_split):,} {test_folder.name} images, "
        f"{len(classes)} classes, resized to {image_size}x{image_size} RGB"
    )
    return Dataset("imagefolder", train_split, test_split, len(classes), (3, image_size, image_size), description)


def _split(folder: Path, classes: list[str], image_size: int, limit: int | None, augment: bool) -> FolderSplit:
    unknown = [name for name in _subfolders(folder) if name not in classes]
    if unknown:
        raise DataError(f"{folder}: classes without train images: {', '.join(unknown)}")
    samples = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
            samples += [(path, label) for path in files]
    if not samples:
        raise DataError(f"{folder}: no images; expected CLASS/*{{{','.join(SUFFIXES)}}}")
    kept = [samples[i] for i in limited(len(samples), limit)]
    labels = torch.tensor([label for _, label in kept])
    return FolderSplit(tuple(path for path, _ in kept), labels, image_size, augment)


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
