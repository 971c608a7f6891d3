"""What a sweep's file may say: the pydantic models of every key, with the texts that editors show."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from fpsim.config.schema import PositiveInt, Section
from fpsim.config.tree import shown


def _base(value: Any) -> Any:
    if not isinstance(value, dict) and not (isinstance(value, str) and value):
        raise ValueError(f"must be the name of an experiment, a path or a mapping (got {shown(value)})")
    return value


def _rising(limits: list[Any]) -> list[Any]:
    if limits[0] >= limits[1]:
        raise ValueError(f"must be a lower and a higher number (got {limits[0]} and {limits[1]})")
    return limits


def _positive(limits: list[float]) -> list[float]:
    if limits[0] <= 0:
        raise ValueError(f"must be above 0 (got {limits[0]})")
    return limits


Base = Annotated[Any, BeforeValidator(_base), WithJsonSchema({"type": ["string", "object"], "minLength": 1})]
Values = Annotated[list[Any], Field(min_length=1)]
Changes = dict[str, Any]
ListOfChanges = list[Changes]
Limits = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_rising)]
PositiveLimits = Annotated[Limits, AfterValidator(_positive)]
IntegerLimits = Annotated[list[int], Field(min_length=2, max_length=2), AfterValidator(_rising)]


class Draw(Section):
    """How a value is drawn: exactly one of these."""

    uniform: Limits | None = None
    """From the lower to the higher number, all alike."""
    log_uniform: PositiveLimits | None = None
    """From the lower to the higher positive number, the logarithms all alike."""
    integers: IntegerLimits | None = None
    """An integer from the lower to the higher, both included."""
    choice: Values | None = None
    """One of these values."""

    @model_validator(mode="after")
    def _is_one(self) -> Draw:
        given = [name for name in Draw.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must say one of {', '.join(Draw.model_fields)} (got {', '.join(given) or 'none'})")
        return self


class Random(Section):
    """Values drawn at random, the same ones whenever the seed is the same."""

    samples: PositiveInt
    """How many draws of all keys; every draw is combined with every point of the grid and every entry of the list."""
    seed: int = Field(0, ge=0)
    """Of the draws; what a key draws does not depend on the other keys."""
    keys: dict[str, Draw] = Field(min_length=1)
    """Dotted keys of the configuration, and how each is drawn."""


class Dask(Section):
    """Where the trials are trained."""

    scheduler: str | None = Field(default=None, min_length=1)
    """Address of a Dask scheduler; null: the environment variable DASK_SCHEDULER_ADDRESS, else worker processes of this
    machine, started for the sweep and stopped with it. Workers need fpsim and the data, whose paths are looked up from
    their current directory; they write run directories where the sweep's folder is, which need not be a shared disk."""
    workers: PositiveInt | None = None
    """Worker processes to start on this machine; null: as many as its cores allow."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of each process started, for trials whose configuration says no `threads`. A process trains one
    trial at a time."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """What a trial takes of a worker's resources, such as {GPU: 1}; workers of a scheduler offer theirs by `dask worker
    --resources "GPU=1"`, those started here have enough for one trial."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a sweep's file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Sweep.model_json_schema()}


class Sweep(Section):
    """Trials that are trained and compared: one configuration, with other values at some keys.

    A trial is an entry of `list`, with a point of `grid`, with a draw of `random`: their product, the list varying
    slowest. Values replace those of the base in the order set, list, grid, random; a key stands in one of them only.
    """

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep and of its folder."""
    output: str = Field("runs/sweeps", min_length=1)
    """Folder for the folders of sweeps, relative to the current directory."""
    base: Base
    """The configuration to vary: the name of an experiment, a path from this file, or a mapping."""
    set: Changes = Field({})
    """Dotted keys of the configuration, and their values in every trial."""
    list: ListOfChanges = Field([], min_length=1)
    """Mappings of dotted keys to values, one of which a trial has."""
    grid: dict[str, Values] = Field({})
    """Dotted keys, and the values of each; trials take every combination, the last key varying fastest."""
    random: Random | None = None
    """Values drawn at random."""
    retries: int = Field(1, ge=0)
    """How often a trial that failed is begun again. Mistakes, such as missing data, are not."""
    dask: Dask = Dask()
    """Where the trials are trained."""
