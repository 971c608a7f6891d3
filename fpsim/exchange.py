"""How the ranks add up their weight gradients: as float32, or as packed streams of an emulated format.

torch's DistributedDataParallel calls for the sums, bucket by bucket, while backward goes on. Without a format a bucket
is all-reduced: a ring sends 2 (R - 1) / R times its bytes from each of R ranks. With a format, every rank rounds its
part of a gradient, packs it (`accel.pack`), and sends the stream to the R - 1 others; all add up what they unpack, in
the order of the ranks. What rounding left out is added to the same gradient of the next step (error feedback; Seide et
al. 2014, Karimireddy et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import accel
from fpsim.config.schema import Communication, number_format
from fpsim.gradients import thresholds
from fpsim.layers import rounding_of
from fpsim.ranks import Ranks
from fpsim.scales import largest_magnitude, sample, scale_of


class Exchange:
    """Sums the weight gradients of a model over the ranks; of a rank alone they stay what they are.

    model: what a training step calls: DistributedDataParallel once several ranks are connected. sent_bytes: by this
    rank, so far; float32_bytes: what float32 would have sent.
    step: of the random words; the caller counts it on.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, spec: Communication | None, seed: int) -> None:
        self.ranks, self.spec, self.seed = ranks, spec, seed
        self.step = 0
        self.sent_bytes, self.float32_bytes = 0.0, 0.0
        self.left_out: dict[str, Tensor] = {}  # by parameter: what error feedback adds
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.model = model

    def connect(self) -> None:
        """Have all ranks begin from rank 0's parameters, and the backward passes from now on sum up."""
        if self.ranks.count == 1:
            return
        # find_unused_parameters also keeps the buckets as they are: rebuilt after the first step, they would have a
        # resumed run add in another order.
        parallel = DistributedDataParallel(self.model, find_unused_parameters=True)
        hook = self._all_reduced if self.spec is None else self._exchanged
        parallel.register_comm_hook(None, lambda state, bucket: hook(bucket))
        self.model = parallel

    @contextmanager
    def pass_over(self, is_last: bool) -> Iterator[None]:
        """A forward and backward pass; the gradients of a step's passes are summed over the ranks after the last."""
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            with self.model.no_sync():
                yield
        else:
            yield

    @property
    def summary(self) -> dict[str, Any] | None:
        """Bytes that a rank sent a step, and those of float32; None for a rank alone."""
        if self.ranks.count == 1:
            return None
        steps = max(self.step, 1)
        return {
            "ranks": self.ranks.count,
            "format": "fp32" if self.spec is None else number_format(self.spec.format).name,
            "codec": None if self.spec is None else self.spec.codec,
            "sent_bytes_per_step": self.sent_bytes / steps,
            "float32_bytes_per_step": self.float32_bytes / steps,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "sent_bytes": self.sent_bytes, "float32_bytes": self.float32_bytes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; `left_out` is to be put back beside."""
        self.step = state["step"]
        self.sent_bytes, self.float32_bytes = state["sent_bytes"], state["float32_bytes"]

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _all_reduced(self, bucket: distributed.GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        self.float32_bytes += self._ring_bytes(buffer)
        self.sent_bytes += self._ring_bytes(buffer)
        work = distributed.all_reduce(buffer, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    def _exchanged(self, bucket: distributed.GradBucket) -> Future[Tensor]:
        self.float32_bytes += self._ring_bytes(bucket.buffer())
        gradients = bucket.gradients()
        names = [self._names[id(parameter)] for parameter in bucket.parameters()]
        own = [self._packed(name, gradient) for name, gradient in zip(names, gradients, strict=True)]
        lengths = torch.zeros(self.ranks.count, len(own), dtype=torch.int64)
        lengths[self.ranks.number] = torch.tensor([len(stream) for stream in own])
        sizes = self.ranks.total(lengths).sum(1).tolist()
        parts = self.ranks.gathered(b"".join(own), sizes)
        self.sent_bytes += self._ring_bytes(lengths) + (self.ranks.count - 1) * max(sizes)
        received = [_cut(part, these) for part, these in zip(parts, lengths.tolist(), strict=True)]
        for gradient, *streams in zip(gradients, *received, strict=True):
            gradient.zero_()
            for stream in streams:
                gradient.add_(accel.unpack(accel.Packed.from_bytes(stream)).view_as(gradient) if stream else math.nan)
        done: Future[Tensor] = Future()
        done.set_result(bucket.buffer())
        return done

    def _packed(self, name: str, gradient: Tensor) -> bytes:
        """The stream of a gradient; empty where it is not finite, which makes the sum NaN on every rank."""
        spec = self.spec
        assert spec is not None
        known = self.left_out.get(name)
        wanted = gradient.clone() if known is None else gradient + known
        amax = largest_magnitude(wanted)
        assert isinstance(amax, float)
        if not math.isfinite(amax):
            return b""
        fmt = number_format(spec.format)
        assert isinstance(fmt, accel.Format)
        drawn = sample(wanted)
        kept = wanted
        if spec.sparsity:
            kept = torch.where(wanted.abs() < thresholds.quantile(drawn.numpy(), spec.sparsity), 0.0, wanted)
        scale = scale_of(drawn, fmt, spec.scale, amax)
        assert not isinstance(scale, Tensor)
        rounded = accel.quantize(
            kept, fmt, scale=scale, seed=self.seed, stream=accel.stream_id(f"{name}/exchange/{self.ranks.number}"),
            step=self.step, **rounding_of(spec),
        )  # fmt: skip
        if spec.error_feedback:
            self.left_out[name] = wanted.sub_(rounded)
        return accel.pack(rounded, spec.codec, fmt, scale=scale).to_bytes()

    def _ring_bytes(self, reduced: Tensor) -> float:
        """What a rank sends of a tensor that is all-reduced."""
        return 2 * (self.ranks.count - 1) / self.ranks.count * reduced.nbytes


def _cut(data: bytes, lengths: list[int]) -> list[bytes]:
    ends = list(accumulate(lengths))
    return [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]
