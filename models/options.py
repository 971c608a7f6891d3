"""Checks of the options that several image networks share."""

from __future__ import annotations

from collections.abc import Mapping

STEMS = ("cifar", "imagenet")


def check_width(width: int, multiple: int = 1) -> None:
    """ValueError unless `width` is a positive multiple of `multiple`."""
    if width < 1 or width % multiple:
        rule = "at least 1" if multiple == 1 else f"a positive multiple of {multiple}"
        raise ValueError(f"width must be {rule}, got {width}")


def check_stem(network: str, stem: str, image_shape: tuple[int, int, int], least_sides: Mapping[str, int]) -> None:
    """ValueError unless `stem` is known and leaves a pixel of the images; least_sides: smallest side by stem."""
    if stem not in STEMS:
        raise ValueError(f"unknown stem: {stem!r} (allowed: {', '.join(STEMS)})")
    _, height, width = image_shape
    least = least_sides[stem]
    if min(height, width) < least:
        needs = f"{network} (stem: {stem}) needs images of at least {least}x{least} pixels"
        raise ValueError(f"{needs}, got {height}x{width}")
