"""Networks to train: plain `torch.nn` modules that know nothing of the simulation around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from models.densenet import DenseNet121
from models.gpt import GPT
from models.lenet import LeNet
from models.mlp import MLP
from models.mobilenet import MobileNetV2
from models.resnet import ResNet18
from models.vgg import VGG16

__all__ = ["GPT", "MLP", "VGG16", "DenseNet121", "LeNet", "MobileNetV2", "ResNet18", "build", "names"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "resnet18": ResNet18,
    "vgg16": VGG16,
    "densenet121": DenseNet121,
    "mobilenet_v2": MobileNetV2,
    "gpt": GPT,
}
LANGUAGE_MODELS = ("gpt",)


def names() -> list[str]:
    """The names that `build` accepts."""
    return list(MODELS)


def build(name: str, *, input_shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    """A freshly initialised network (from torch's global generator) for inputs of `input_shape`.

    Of images, (C, H, W): it maps float32 [B, C, H, W] to logits float32 [B, classes]. Of text, (T,): it maps tokens
    int64 [B, T], each less than `classes`, to logits float32 [B, T, classes] of the next ones. `options` are the
    network's own, such as `width`.
    Raises ValueError for an unknown name or option, an option out of range, or inputs the network cannot take.
    """
    _check_known("model", name, names())
    network = MODELS[name]
    allowed = list(inspect.signature(network).parameters)[2:]
    for option in options:
        _check_known(f"option of model {name!r}", option, allowed)
    if (len(input_shape) == 1) != (name in LANGUAGE_MODELS):
        takes, given = ("text", "images") if name in LANGUAGE_MODELS else ("images", "text")
        raise ValueError(f"{name} takes {takes}, but the data are {given}")
    return network(input_shape, classes, **options)


def _check_known(what: str, given: str, allowed: list[str]) -> None:
    if given not in allowed:
        nearest = get_close_matches(given, allowed, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown {what}: {given!r} (allowed: {', '.join(allowed) or 'none'}){hint}")
