"""What a machine file says: an accelerator's array, memories and engines, with the units in the keys.

The texts under the fields are those that editors show. `accel.machine` reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from accel.ledger import GRANULARITIES, Ledger

if TYPE_CHECKING:
    from accel.machine.estimate import Estimate

KIB = 1024
RESERVED_LEVELS = ("compute", "codec", "mac")  # stand beside the levels in an estimate
Dataflow = Literal["weight_stationary", "output_stationary", "input_stationary"]
PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def _one_of(allowed: tuple[int, ...]) -> Callable[[int], int]:
    def check(value: int) -> int:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(str, allowed))} (got {value})")
        return value

    return check


Granularity = Annotated[
    int,
    AfterValidator(_one_of(GRANULARITIES)),
    WithJsonSchema({"type": "integer", "enum": list(GRANULARITIES)}),
]


def _error_at(key: str, message: str) -> PydanticCustomError:
    """An error of a whole section, to be placed at one of its keys (dotted when deeper)."""
    return PydanticCustomError("section", "{message}", {"at": key, "message": message})


def _first_repeated(values: Iterable[object]) -> int | None:
    """Index of the first value that has occurred before."""
    seen: set[object] = set()
    for index, value in enumerate(values):
        if value in seen:
            return index
        seen.add(value)
    return None


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Precision(_Section):
    bits: PositiveInt
    """Width of the widest operand that it takes, in bits."""
    macs_per_cycle: Positive = 1.0
    """Multiply-accumulates that one element of the array does in a cycle; below 1 for one that takes several cycles."""
    pj_per_mac: NotNegative
    """Energy of one multiply-accumulate, in pJ."""


class Array(_Section):
    rows: PositiveInt
    """Elements along the rows, R."""
    columns: PositiveInt
    """Elements along the columns, C."""
    count: PositiveInt = 1
    """How many such arrays work side by side, on one fold each."""
    dataflow: Dataflow | None
    """Which matrix stays in a systolic array: the second operand of a product (weight_stationary), the first one
    (input_stationary) or the sums (output_stationary). Null: the array is fed at its peak rate, and holds a tile of
    rows x columns sums."""
    precisions: list[Precision] = Field(min_length=1)
    """Operand widths that the array multiplies; a product takes the narrowest that holds its wider operand."""

    @model_validator(mode="after")
    def _check(self) -> Array:
        repeated = _first_repeated(precision.bits for precision in self.precisions)
        if repeated is not None:
            bits = self.precisions[repeated].bits
            raise _error_at(f"precisions.{repeated}.bits", f"must differ from those before (got {bits} again)")
        return self


class Skips(_Section):
    gradient: Literal["none", "gating", "skipping"] = "none"
    """What a zero dY saves: nothing, the energy of its multiplications (gating), or their cycles too (skipping)."""
    weight: Literal["none", "gating", "skipping"] = "none"
    """What a zero weight saves."""
    activation: Literal["none", "gating", "skipping"] = "none"
    """What a zero activation saves."""
    granularity: Granularity = 1
    """So many neighbours along the channels must be zero together."""
    load_balance: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the ideal speed that skipping reaches, as the array waits for its busiest element."""

    def roles(self, *methods: str) -> tuple[str, ...]:
        """The roles whose zeros are treated by one of the methods."""
        return tuple(role for role in ("gradient", "weight", "activation") if getattr(self, role) in methods)


class Level(_Section):
    name: str = Field(min_length=1)
    """What reports call it."""
    size_kib: Positive | None
    """Size in KiB; null for main memory, the last level."""
    bytes_per_cycle: Positive
    """Bytes that it reads and writes in a cycle of the machine's clock, together."""
    burst_bytes: PositiveInt = 1
    """Streams are moved in whole bursts of so many bytes."""
    pj_per_byte: NotNegative
    """Energy of reading or writing a byte, in pJ."""

    @property
    def size_bytes(self) -> float:
        """Size in bytes, infinite for main memory."""
        return math.inf if self.size_kib is None else self.size_kib * KIB


class Codec(_Section):
    decode_bytes_per_cycle: Positive
    """Decoded bytes that leave the decoders in a cycle."""
    encode_bytes_per_cycle: Positive
    """Decoded bytes that enter the encoders in a cycle."""


class Machine(_Section):
    """An accelerator. Levels are ordered from the array outward and grow; the last one is main memory."""

    name: str = Field(min_length=1)
    """What reports call it."""
    source: str = ""
    """Where the numbers are from."""
    clock_mhz: Positive
    """Clock of the array, in MHz; every rate per cycle is at this clock."""
    array: Array
    """The multiply-accumulate units."""
    accumulator_bits: PositiveInt = 32
    """Width of a sum where it leaves the array, in bits."""
    skips: Skips = Skips()
    """What the array saves on zeros."""
    levels: list[Level] = Field(min_length=2)
    """Memories from the array outward: at least one buffer, then main memory."""
    codec: Codec | None = None
    """Decoders and encoders between the first level and the next; null takes them to keep up with every stream."""

    @model_validator(mode="after")
    def _check(self) -> Machine:
        names = [level.name for level in self.levels]
        repeated = _first_repeated((*RESERVED_LEVELS, *names))
        if repeated is not None:
            index = repeated - len(RESERVED_LEVELS)
            taken = ", ".join(dict.fromkeys((*RESERVED_LEVELS, *names[:index])))
            raise _error_at(f"levels.{index}.name", f"must differ from {taken} (got {names[index]!r})")
        inner, last = self.levels[:-1], len(self.levels) - 1
        if self.levels[last].size_kib is not None:
            message = f"must be null: the last level is main memory (got {self.levels[last].size_kib:g})"
            raise _error_at(f"levels.{last}.size_kib", message)
        before = 0.0
        for index, level in enumerate(inner):
            if level.size_kib is None:
                raise _error_at(f"levels.{index}.size_kib", "must be a number: only the last level is main memory")
            if level.size_kib <= before:
                message = f"must be > {before:g}, the size of the level before (got {level.size_kib:g})"
                raise _error_at(f"levels.{index}.size_kib", message)
            before = level.size_kib
        needed = 2 * self._tile_bytes()
        if inner[0].size_bytes < needed:
            message = (
                f"must be >= {needed / KIB:g}: twice, for double buffering, a tile of {self.array.rows} x "
                f"{self.array.columns} of each operand at the widest precision and of the sums (got "
                f"{inner[0].size_kib:g})"
            )
            raise _error_at("levels.0.size_kib", message)
        return self

    def _tile_bytes(self) -> float:
        widest = max(precision.bits for precision in self.array.precisions)
        return self.array.rows * self.array.columns * (2 * widest + self.accumulator_bits) / 8

    def precision(self, bits: int) -> Precision | None:
        """The narrowest precision that takes operands of so many bits, None where there is none."""
        wide_enough = [one for one in self.array.precisions if one.bits >= bits]
        return min(wide_enough, key=lambda one: one.bits, default=None)

    def peak_macs_per_cycle(self, precision: Precision) -> float:
        """Multiply-accumulates of all arrays in a cycle."""
        return self.array.rows * self.array.columns * self.array.count * precision.macs_per_cycle

    def estimate(self, ledger: Ledger) -> Estimate:
        """Time, traffic and energy of the ledger's training step on this machine (see `accel.machine.estimate`).

        Raises ValueError for a ledger without products, and where no precision takes a tensor's format.
        """
        from accel.machine.estimate import estimate

        return estimate(self, ledger)
