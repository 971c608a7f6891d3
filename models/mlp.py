"""Multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """Flattened image -> Linear + ReLU for each width in `hidden` -> Linear to `classes` logits."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, hidden: Sequence[int] = (256, 128)) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: every layer width must be at least 1, got {list(hidden)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise([math.prod(image_shape), *hidden]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        last = hidden[-1] if hidden else math.prod(image_shape)
        super().__init__(*layers, nn.Linear(last, classes))
