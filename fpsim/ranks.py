"""The processes (ranks) that train one model together, each on its part of every batch, and what they tell each other.

A batch is cut along its first dimension into equal contiguous parts, rank after rank. What is decided from a whole
tensor (a scale, a threshold, a mask) is decided from all parts, so every rank decides alike, and as one rank alone
would on the whole batch. Elements are numbered through all parts, so their random words are those of the whole tensor.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from fpsim.errors import ConfigError, FpsimError, Problem, RunError, ToldError, reason_of

BACKEND = "cpu:gloo,cuda:nccl"
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset")  # what errors say when a rank is gone
TIMEOUT = timedelta(minutes=30)  # that a rank waits for another: rank 0 may be writing a large checkpoint


@dataclass(frozen=True)
class Ranks:
    """number: of this process, from 0. count: of all.

    They talk through torch's default process group. All ranks call each method, in one order; a rank alone gets back
    what it gave.
    """

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def maximum(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks, in place. No x may hold NaN."""
        if self.count > 1:
            distributed.all_reduce(x, distributed.ReduceOp.MAX)
        return x

    def total(self, x: Tensor) -> Tensor:
        """The elementwise sum over the ranks, in place: the same bits on all of them."""
        if self.count > 1:
            distributed.all_reduce(x, distributed.ReduceOp.SUM)
        return x

    def totals(self, *values: float) -> list[float]:
        """The sums of numbers, in float64: exact for integers below 2^53."""
        return list(values) if self.count == 1 else self.total(torch.tensor(values, dtype=torch.float64)).tolist()

    def gathered(self, data: bytes, sizes: list[int] | None = None) -> list[bytes]:
        """What each rank gave. sizes: how many bytes each gives, where all know that."""
        if self.count == 1:
            return [data]
        if sizes is None:
            own = (len(data) if number == self.number else 0 for number in range(self.count))
            sizes = [int(size) for size in self.totals(*own)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded.numpy()[: len(data)] = memoryview(data)
        everyone = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(everyone, padded)
        return [one[:size].numpy().tobytes() for one, size in zip(everyone, sizes, strict=True)]

    def share_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def told_by_first(self, error: FpsimError) -> FpsimError:
        """An error that all ranks meet: rank 0 raises it, the others ToldError."""
        return error if self.is_first else ToldError("told by rank 0")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank cannot do, none goes on with: rank 0 raises the first rank's error, the others ToldError. An
        OSError becomes a RunError."""
        error: FpsimError | None = None
        try:
            yield
        except FpsimError as caught:
            error = caught
        except OSError as caught:
            if self.count == 1:
                raise
            error = RunError(reason_of(caught))
        told = [] if error is None else [isinstance(error, ConfigError), str(error)]
        for number, other in enumerate(self.gathered(json.dumps(told).encode())):
            if not (said := json.loads(other)):
                continue
            is_mistake, text = said
            if self.is_first:
                raise error or _told(is_mistake, f"rank {number}: {text}")
            raise ToldError("told by rank 0")


ALONE = Ranks()


@contextmanager
def _first_tells(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except ToldError:
        raise
    except FpsimError:
        if _is_told():
            raise ToldError("told by another rank") from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or any(text in str(error) for text in LOST)):
            raise
        if _is_told():
            raise ToldError("told by another rank") from None
        raise RunError(f"the other ranks are gone: {str(error).splitlines()[0]}") from error


def _is_told() -> bool:
    """Whether another rank has asked this before."""
    try:
        return int(distributed.distributed_c10d._get_default_store().add("fpsim/told", 1)) > 1
    except RuntimeError:  # the store is gone, with the launcher
        return False


def _told(is_mistake: bool, text: str) -> FpsimError:
    return ConfigError([Problem("", text)]) if is_mistake else RunError(text)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started, joined meanwhile; one alone where it has not.

    Where several fail, each in its way, the first raises its error and the others ToldError. A process that has a
    process group already keeps it.
    """
    if distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
        return
    if not distributed.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1":
        yield Ranks()
        return
    has_gpu = torch.cuda.is_available()
    distributed.init_process_group(BACKEND if has_gpu else "gloo", timeout=TIMEOUT)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    try:
        with _first_tells(ranks):
            yield ranks
    finally:
        gc.collect()  # a work object that outlives its group can abort the interpreter at its end
        distributed.destroy_process_group()
