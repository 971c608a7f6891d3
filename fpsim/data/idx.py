"""MNIST and Fashion-MNIST in the IDX layout (LeCun, "The MNIST database"), gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fpsim.data.errors import DataError, missing
from fpsim.data.source import LabelledImages, Source, UInt8Array, check_labels

CLASSES = 10


def read(root: Path) -> Source:
    """The four IDX files in folder `root`."""
    provenance = f"IDX files in {root.name}/"
    return Source(_read_split(root, "train"), _read_split(root, "t10k"), CLASSES, provenance)


def read_idx(path: Path, dimensions: int) -> UInt8Array:
    """The unsigned bytes of one IDX file, in the shape that its header gives.

    Raises DataError if the file is not gzip where its name ends in .gz, if its magic is not that of unsigned bytes in
    `dimensions` dimensions, or if its length is not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(f"{path}: wrong magic: got 0x{content[:4].hex()}, expected 0x{magic.hex()}")
    header_bytes = 4 + 4 * dimensions
    if len(content) < header_bytes:
        raise DataError(f"{path}: truncated: {len(content)} bytes, the header alone has {header_bytes}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4)]
    if len(content) != header_bytes + math.prod(shape):
        raise DataError(
            f"{path}: wrong length: {len(content)} bytes, the header's shape {shape} needs "
            f"{header_bytes + math.prod(shape)}"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _read_split(root: Path, prefix: str) -> LabelledImages:
    images_path, labels_path = _find(root, f"{prefix}-images", "idx3"), _find(root, f"{prefix}-labels", "idx1")
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{images_path}: {len(images)} images, but {labels_path.name} has {len(labels)} labels")
    if not images.size:
        raise DataError(f"{images_path}: no images: shape {list(images.shape)}")
    check_labels(labels, CLASSES, labels_path)
    return LabelledImages(images[:, None], labels)


def _find(root: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{separator}{kind}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise missing(root / names[0], f"one of {', '.join(names)} in data.root")
