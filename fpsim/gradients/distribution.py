"""How the tensors of a training are distributed: recorded layer by layer on the steps that the ledger samples.

An input X, a weight W (with its mask) and a neural gradient dY are recorded as they arrive at their layer, before
pruning and rounding, of the first micro-batch of a step; a weight gradient dW after the optimizer's step: the sum over
all micro-batches, with what clipping did to it.
Source: Chmiel et al., ICLR 2021, section 3.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

import accel
from fpsim.distributions import SMALLEST_SAMPLE, compare
from fpsim.ranges import STATISTICS, spanned
from fpsim.ranks import ALONE, Ranks
from fpsim.scales import measured, sample

GRADIENTS = ("dY", "dW")
TAKEN = (torch.float32, torch.float16, torch.bfloat16)  # dtypes whose statistics are taken as they are


class Distributions:
    """What is recorded. rows: one a tensor, plain data; samples: of the latest recorded step, by "role layer"."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: dict[str, Tensor] = {}

    def restart_step(self, step: int) -> None:
        """The step begins anew: what was recorded of it is dropped."""
        while self.rows and self.rows[-1]["step"] == step:
            self.rows.pop()

    def layers_of(self, step: int) -> list[str]:
        """The layers whose dY of the step, the latest one, has been recorded, in the order in which it arrived."""
        rows = takewhile(lambda row: row["step"] == step, reversed(self.rows))
        return [row["layer"] for row in rows if row["role"] == "dY"][::-1]

    @spanned(STATISTICS)
    def record(self, step: int, layer: str, role: str, x: Tensor, ranks: Ranks = ALONE) -> None:
        """Enter a tensor, of which x may be this rank's part: of all of it elements, zeros, mean and deviation of
        log2|x| over the nonzeros; of gradients D of seven distributions (see fpsim.distributions) of the `sample` of
        4096 elements, None where it has no fit."""
        if x.dtype not in TAKEN:
            x = x.float()
        whole = _of_all(accel.log2_statistics(x), ranks)
        taken = sample(measured(x.detach(), None, ranks)[1]).to("cpu", torch.float32, copy=True)
        values = taken.numpy()
        can_fit = role in GRADIENTS and not whole.not_finite and np.count_nonzero(values) >= SMALLEST_SAMPLE
        fitted = compare(values) if can_fit else {}
        self.rows.append(
            {
                "step": step,
                "layer": layer,
                "role": role,
                "elements": whole.numel,
                "zeros": whole.numel - whole.nonzeros - whole.not_finite,
                "mean_log2": _plain(whole.mean),
                "std_log2": _plain(whole.std),
                "statistics": {name: _plain(one.statistic) for name, one in fitted.items()} or None,
            }
        )
        self.samples[f"{role} {layer}"] = taken

    def encoded(
        self, fmt: accel.Format | accel.BlockFormat, scale: float | Tensor | None, **more: float | None
    ) -> None:
        """Add to the latest row how its tensor is stored: format, scale (1 where it has none, None for blocks; of
        several the median, with their number in `scales`), and more."""
        scales = scale.numel() if isinstance(scale, Tensor) else 1
        median = float(scale.median()) if isinstance(scale, Tensor) else 1.0 if scale is None else scale
        stored_with = None if isinstance(fmt, accel.BlockFormat) else median
        self.rows[-1] |= {"format": fmt.name, "scale": stored_with, "scales": scales, **more}


def _of_all(part: accel.Log2Statistics, ranks: Ranks) -> accel.Log2Statistics:
    """The statistics of all ranks' parts."""
    if ranks.count == 1:
        return part
    mean, std = (part.mean, part.std) if part.nonzeros else (0.0, 0.0)
    moments = part.nonzeros * mean, part.nonzeros * (std * std + mean * mean)
    numel, nonzeros, not_finite, total, squares = ranks.totals(part.numel, part.nonzeros, part.not_finite, *moments)
    mean = total / nonzeros if nonzeros else math.nan
    std = math.sqrt(max(squares / nonzeros - mean * mean, 0.0)) if nonzeros else math.nan
    return accel.Log2Statistics(int(numel), int(nonzeros), int(not_finite), mean, std)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
