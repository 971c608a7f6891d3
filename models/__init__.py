"""Networks to train: plain `torch.nn` modules that know nothing of the simulation around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from models.lenet import LeNet
from models.mlp import MLP
from models.resnet import ResNet18

__all__ = ["MLP", "LeNet", "ResNet18", "build", "names"]

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "lenet": LeNet, "resnet18": ResNet18}


def names() -> list[str]:
    """The names that `build` accepts."""
    return list(MODELS)


def build(name: str, *, image_shape: tuple[int, int, int], classes: int, **options: Any) -> nn.Module:
    """A freshly initialised network (from torch's global generator) for images of `image_shape` = (C, H, W).

    It maps float32 [B, C, H, W] to logits float32 [B, classes]. `options` are the network's own, such as `width`.
    Raises ValueError for an unknown name or option, an option out of range, or images the network cannot take.
    """
    _check_known("model", name, names())
    network = MODELS[name]
    allowed = [p for p in inspect.signature(network).parameters if p not in ("image_shape", "classes")]
    for option in options:
        _check_known(f"option of model {name!r}", option, allowed)
    return network(image_shape, classes, **options)


def _check_known(what: str, given: str, allowed: list[str]) -> None:
    if given not in allowed:
        nearest = get_close_matches(given, allowed, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown {what}: {given!r} (allowed: {', '.join(allowed) or 'none'}){hint}")
