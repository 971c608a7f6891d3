"""Tables of numbers that come with scikit-learn: a row is an image of one pixel, with a channel for each column."""

from __future__ import annotations

import numpy as np
import torch

from fpsim.data.dataset import Dataset, Samples, limited, stratified_split

TEST_SHARE = 5  # a fifth of the rows is the test split
TABLES = {"wine": "UCI wine recognition data", "breast_cancer": "UCI breast cancer data of Wisconsin"}


def read(name: str, train_limit: int | None, test_limit: int | None) -> Dataset:
    """One of TABLES, its columns normalised with the mean and standard deviation of the train split."""
    from sklearn import datasets

    values, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    parts = stratified_split(labels, len(labels) // TEST_SHARE)
    train, test = (
        part[limited(len(part), limit)] for part, limit in zip(parts, (train_limit, test_limit), strict=True)
    )
    mean, std = values[train].mean(axis=0), values[train].std(axis=0)
    std[std == 0] = 1.0
    normal = torch.from_numpy(((values - mean) / std).astype(np.float32))[:, :, None, None]
    places = torch.from_numpy(labels.astype(np.int64))
    classes = len(np.unique(labels))
    return Dataset(
        name=name,
        train=Samples(normal[train], places[train]),
        test=Samples(normal[test], places[test]),
        classes=classes,
        input_shape=tuple(normal.shape[1:]),
        description=f"{name}: {TABLES[name]} shipped with scikit-learn; {len(train):,} train / {len(test):,} test rows "
        f"of {normal.shape[1]} columns, {classes} classes",
    )
