"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in both published layouts, binary and Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fpsim.data.errors import DataError, missing
from fpsim.data.pickle_reader import read_pickle
from fpsim.data.source import LabelledImages, Source, UInt8Array, check_labels

IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """A published folder: its name, its train files (some may be absent), its test file, how to read one of them."""

    folder: str
    train: tuple[str, ...]
    test: str
    read: Callable[[Path], LabelledImages]


def read(root: Path, classes: int) -> Source:
    """CIFAR-10 or, with `classes` = 100, CIFAR-100 with its fine labels.

    `root` is the folder of the files or its parent; the binary layout is taken where both are there. At least one train
    file must be there; the provenance says which are missing.
    """
    for layout in LAYOUTS[classes]:
        for folder in (root, root / layout.folder):
            present = [name for name in layout.train if (folder / name).is_file()]
            if present:
                return _read_folder(folder, layout, present, classes)
    expected = " or ".join(f"{layout.folder} (with {layout.train[0]})" for layout in LAYOUTS[classes])
    raise missing(root / LAYOUTS[classes][0].folder, f"data.root to be {expected}, or a folder that holds it")


def _read_folder(folder: Path, layout: Layout, present: list[str], classes: int) -> Source:
    if not (folder / layout.test).is_file():
        raise missing(folder / layout.test, f"the test images of {layout.folder}")
    parts = [layout.read(folder / name) for name in present]
    train = LabelledImages(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
    absent = [name for name in layout.train if name not in present]
    provenance = f"{layout.folder} layout in {folder.name}/"
    if absent:
        provenance += f", {len(present)} of {len(layout.train)} train batches (missing: {', '.join(absent)})"
    return Source(train, layout.read(folder / layout.test), classes, provenance)


def _read_binary(path: Path, label_bytes: int, classes: int) -> LabelledImages:
    """Records of `label_bytes` labels, the last of which counts, and the planes R, G, B."""
    content = np.fromfile(path, np.uint8)
    record_bytes = label_bytes + IMAGE_BYTES
    if not content.size or content.size % record_bytes:
        raise DataError(f"{path}: truncated or of another layout: {content.size} bytes, not records of {record_bytes}")
    records = content.reshape(-1, record_bytes)
    return _labelled(records[:, label_bytes:], records[:, label_bytes - 1], classes, path)


def _read_python(path: Path, label_key: str, classes: int) -> LabelledImages:
    """A pickled dict with `data` uint8 [N, 3072] and a list of labels, its keys bytes or str."""
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a pickled dict, got {type(content).__name__}")
    fields: dict[Any, Any] = {k.decode("latin-1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    for key in ("data", label_key):
        if key not in fields:
            raise DataError(f"{path}: no {key!r} in the pickled dict, which has {sorted(map(str, fields))}")
    data, labels = fields["data"], fields[label_key]
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != IMAGE_BYTES:
        raise DataError(f"{path}: 'data' is not an array of N x {IMAGE_BYTES} bytes")
    if not isinstance(labels, list) or any(type(label) is not int or not 0 <= label < classes for label in labels):
        raise DataError(f"{path}: {label_key!r} is not a list of labels 0..{classes - 1}")
    if len(data) != len(labels) or not labels:
        raise DataError(f"{path}: {len(data)} images and {len(labels)} labels")
    return _labelled(data, np.array(labels, np.uint8), classes, path)


def _labelled(pixels: UInt8Array, labels: UInt8Array, classes: int, path: Path) -> LabelledImages:
    check_labels(labels, classes, path)
    return LabelledImages(pixels.reshape(-1, *IMAGE_SHAPE), labels)


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = {
    10: (
        Layout(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in BATCHES),
            "test_batch.bin",
            partial(_read_binary, label_bytes=1, classes=10),
        ),
        Layout("cifar-10-batches-py", BATCHES, "test_batch", partial(_read_python, label_key="labels", classes=10)),
    ),
    100: (
        Layout("cifar-100-binary", ("train.bin",), "test.bin", partial(_read_binary, label_bytes=2, classes=100)),
        Layout("cifar-100-python", ("train",), "test", partial(_read_python, label_key="fine_labels", classes=100)),
    ),
}
