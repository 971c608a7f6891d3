"""Block formats: neighbouring elements share one scale, as in OCP MX v1.0, NVFP4 and block floating point.

Along one axis (the last, unless the format names another), every `block_size` elements x_i of a tensor are stored as
one scale s and elements Q(x_i / s). How s follows from the block's largest magnitude (amax) is the `scale_rule`;
exponents are taken from bit fields, never from a logarithm:

    floor   2^(floor(log2 amax) - emax)      OCP MX v1.0, section 6.3; emax = floor(log2(element.max))
    ceil    2^(ceil(log2 amax) - emax)
    even    floor, after amax is rounded to the element's mantissa (half up), as torchao's EVEN
    rceil   2^ceil(log2(amax / element.max)), the quotient rounded to float32, as torchao's RCEIL
    amax    amax / element.max, rounded into the scale's format (NVFP4), never below its smallest normal number

Power-of-two scales are clamped to what the scale's format holds, so a block of zeros has the smallest. A NaN in a block
makes its scale NaN and with it the whole block; an infinity counts as an amax of 2^128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accel.formats import Format, nearest

SCALE_RULES = {
    "floor": "2^(floor(log2 amax) - emax), as OCP MX v1.0",
    "ceil": "2^(ceil(log2 amax) - emax)",
    "even": "floor, after amax is rounded to the element's mantissa",
    "rceil": "2^ceil(log2(amax / max))",
    "amax": "amax / max, rounded into the scale's format",
}
PADDINGS = {
    "short": "a last block that is not full holds fewer elements",
    "zeros": "a last block that is not full is stored with zeros",
    "refuse": "an axis that is no multiple of block_size is an error",
}
MAX_BLOCK_SIZE = 1 << 20


@dataclass(frozen=True)
class BlockFormat:
    """Elements of one scalar format that share a scale of another, `block_size` of them along `axis`.

    axis: None leaves it open: the last axis here, the channels of a layer's tensors in emulated training.
    tensor_scale: a further float32 scale for the whole tensor, amax(x) / (element.max * scale.max), so that the blocks'
    scales fill their format (NVFP4). padding: what becomes of a last block that is not full.
    Raises ValueError, naming the format and the key, for what cannot be.
    """

    name: str
    element: Format
    scale: Format
    block_size: int
    scale_rule: str = "floor"
    axis: int | None = None
    tensor_scale: bool = False
    padding: str = "short"

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise self._wrong(f"block_size must be an integer from 1 to {MAX_BLOCK_SIZE} (got {self.block_size!r})")
        if self.axis is not None and type(self.axis) is not int:
            raise self._wrong(f"axis must be an integer or null (got {self.axis!r})")
        if type(self.tensor_scale) is not bool:
            raise self._wrong(f"tensor_scale must be true or false (got {self.tensor_scale!r})")
        for key, allowed in (("scale_rule", SCALE_RULES), ("padding", PADDINGS)):
            value = getattr(self, key)
            if not isinstance(value, str) or value not in allowed:
                raise self._wrong(f"unknown {key} {value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
        if self.element.alpha_codes or not self.element.signed:
            raise self._wrong(f"element must be a signed format without alpha_codes (got {self.element.name!r})")
        if (self.scale_rule == "amax") == (self.scale.policy == "scale"):
            raise self._wrong(
                f"scale_rule {self.scale_rule!r} does not go with a scale of policy {self.scale.policy!r}: 'amax' "
                "makes any number, the other rules powers of two (policy 'scale', such as e8m0fnu)"
            )
        is_usual = not self.scale.alpha_codes and self.scale.exponent_bits and self.scale.min_exponent >= -126
        if self.scale_rule == "amax" and not is_usual:
            raise self._wrong(
                "scale must be a floating-point format without alpha_codes whose normal numbers begin at 2^-126 or "
                f"above (got {self.scale.name!r})"
            )
        if self.tensor_scale and self.scale_rule != "amax":
            raise self._wrong(f"tensor_scale goes with scale_rule 'amax' alone (got {self.scale_rule!r})")

    def _wrong(self, reason: str) -> ValueError:
        return ValueError(f"format {self.name!r}: {reason}")

    @property
    def bits(self) -> int:
        """Width of an element's code in bits."""
        return self.element.bits

    @property
    def bits_per_element(self) -> float:
        """Width of an element's code with its share of a full block's scale."""
        return self.element.bits + self.scale.bits / self.block_size

    @property
    def dim(self) -> int:
        """The axis, the last where it is open."""
        return -1 if self.axis is None else self.axis

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape as its elements are stored: under padding `zeros` with whole blocks along the axis."""
        if self.padding != "zeros" or not shape:
            return shape
        dim = self.dim % len(shape)
        return (*shape[:dim], -(-shape[dim] // self.block_size) * self.block_size, *shape[dim + 1 :])

    def block_count(self, shape: tuple[int, ...]) -> int:
        """How many blocks a tensor of this shape has."""
        length = shape[self.dim] if shape else 1
        rows = 1
        for size in shape:
            rows *= size
        return (rows // length) * -(-length // self.block_size) if length else 0


BLOCK_KEYS = ("name", "element", "scale", "block_size", "scale_rule", "axis", "tensor_scale", "padding")


def is_block_mapping(spec: Mapping[str, object]) -> bool:
    """Whether a mapping describes a block format rather than a scalar one."""
    return "element" in spec
