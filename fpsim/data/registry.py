"""From the `data` section of a configuration to a Dataset."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpsim.data import builtin, cifar, idx, imagefolder, table, text
from fpsim.data.dataset import Dataset, TensorSplit, channel_statistics, limited
from fpsim.data.errors import DataError
from fpsim.data.source import IntegerArray, LabelledImages, Source

READERS: dict[str, Callable[[Any, int], Source]] = {
    "mnist5k": lambda spec, seed: builtin.mnist5k(),
    "digits": lambda spec, seed: builtin.digits(),
    "mnist": lambda spec, seed: idx.read(_root(spec)),
    "fashion_mnist": lambda spec, seed: idx.read(_root(spec)),
    "cifar10": lambda spec, seed: cifar.read(_root(spec), classes=10),
    "cifar100": lambda spec, seed: cifar.read(_root(spec), classes=100),
    "synthetic": lambda spec, seed: builtin.synthetic(
        spec.train_samples, spec.test_samples, spec.classes, spec.image_size, spec.channels, seed
    ),
}
NEVER_FLIPPED = ("mnist5k", "digits", "mnist")  # a mirrored digit is another sign


def names() -> list[str]:
    """The data sets that `load` knows."""
    return [*READERS, *table.TABLES, "imagefolder", "text"]


def load(spec: Any, seed: int) -> Dataset:
    """The data set that `spec`, the `data` section of a configuration, describes.

    spec.name is one of `names()`; spec.root the folder of a set of files; spec.train_limit and spec.test_limit keep at
    most that many samples of a fixed shuffle (None: all); spec.augment augments train batches; spec.path and
    spec.context are those of `text.read`. `seed` only draws the synthetic set: which samples any other set holds, and
    their order, never depends on it.
    Images in memory and tables are normalised with the train split's own mean and standard deviation, imagefolder with
    ImageNet's.
    Raises DataError for an unknown name, for files that are missing, unreadable or damaged, and for a synthetic set
    that is too large.
    """
    if spec.name not in names():
        nearest = get_close_matches(spec.name, names(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(f"data.name: unknown data set {spec.name!r} (allowed: {', '.join(names())}){hint}")
    try:
        if spec.name == "imagefolder":
            return imagefolder.read(_root(spec), spec.image_size, spec.train_limit, spec.test_limit, spec.augment)
        if spec.name in table.TABLES:
            return table.read(spec.name, spec.train_limit, spec.test_limit)
        if spec.name == "text":
            path = None if spec.path is None else _absolute(spec.path)
            return text.read(path, spec.context, spec.train_limit, spec.test_limit)
        return _in_memory(spec, READERS[spec.name](spec, seed))
    except OSError as error:
        raise DataError(f"data: cannot read {error.filename}: {error.strerror}") from error


def _root(spec: Any) -> Path:
    return _absolute(spec.root)


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise DataError(f"{path}: no such user's home directory") from error


def _in_memory(spec: Any, source: Source) -> Dataset:
    train, test = _limit(source.train, spec.train_limit), _limit(source.test, spec.test_limit)
    channels, height, width = train.images.shape[1:]
    if test.images.shape[1:] != train.images.shape[1:]:
        raise DataError(f"data: train images have shape {train.images.shape[1:]}, test {test.images.shape[1:]}")
    train_images = _tensor(train.images)
    mean, std = channel_statistics(train_images)
    flip = spec.name not in NEVER_FLIPPED
    return Dataset(
        name=spec.name,
        train=TensorSplit(train_images, _tensor(train.labels).long(), mean, std, spec.augment, flip),
        test=TensorSplit(_tensor(test.images), _tensor(test.labels).long(), mean, std, augment=False, flip=False),
        classes=source.classes,
        input_shape=(channels, height, width),
        description=f"{spec.name}: {source.provenance}; {_count(train, source.train)} train / "
        f"{_count(test, source.test)} test images of {channels}x{height}x{width}, {source.classes} classes",
    )


def _limit(samples: LabelledImages, limit: int | None) -> LabelledImages:
    count = len(samples.labels)
    return samples if limit is None or limit >= count else samples.take(limited(count, limit))


def _count(kept: LabelledImages, published: LabelledImages) -> str:
    kept_count, published_count = len(kept.labels), len(published.labels)
    return f"{kept_count:,}" if kept_count == published_count else f"{kept_count:,} of {published_count:,}"


def _tensor(array: IntegerArray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"]))
