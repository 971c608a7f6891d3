"""The signal-to-noise ratio of a weight's gradient, averaged over steps, and what noise alone makes of it.

Source: "Dynamic pruning of a neural network via gradient signal-to-noise ratio" (2021); Mahsereci et al. 2017.

    snr = g^2 / Sigma      g: the gradient of a mini-batch; Sigma: the variance of that mean over the mini-batch

A mini-batch's gradient is the sum of its parts, g = h_1 + ... + h_K: a part is a sample's gradient over the number of
samples (estimator `per_sample`) or that of a chunk (`microbatch`). Where the true gradient is 0 and the parts are
normal, one step's snr follows F(1, K - 1), whose mean is (K - 1) / (K - 3): an average of ratios tends to that, so
averages are of the moments. `ema` sees whole gradients alone and takes their changes from step to step for noise:

    rule       snr after t steps, A being the average with weights beta^(t - i)
    moments    A(g^2) / A(Sigma)
    ratio      A(g^2 / Sigma), the source's wording; no step counts more than 1 / eps, which is what float32 tells
    ema        A(g)^2 / (A(g^2) - A(g)^2) * (1 - q) / q      q: the variance of A(g) in units of that of g

The last is the ratio of the averaged gradient, (1 + beta) / (1 - beta) times that of a step when t is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Rule = Literal["moments", "ratio", "ema"]

NULL_SAMPLES = 1 << 16
NULL_SEED = 20210615
LARGEST_RATIO = 2.0**23  # Sigma is a difference, known to a rounding error of g^2
FORGOTTEN = 1e-4  # the weight of what came before the steps that are simulated


def moments_of_parts(total: Tensor, squares: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """(g^2, Sigma) from the sum of the parts, of their squares (elementwise), and their number K >= 2.

    Sigma = (K sum h^2 - g^2) / (K - 1), unbiased; never negative. Both overwrite what they are made of.
    Raises ValueError for fewer than two parts.
    """
    if parts < 2:
        raise ValueError(f"the variance of a mean needs two parts or more (got {parts})")
    mean_square = total.square_()
    return mean_square, squares.mul_(parts).sub_(mean_square).div_(parts - 1).clamp_(min=0)


@dataclass
class Average:
    """The snr of the elements of one gradient, averaged over steps by a rule (see above).

    beta: what an average keeps of itself in a step, in [0, 1). first, second: the two averages of the rule, begun at 0
    and not corrected for that, float32 in the gradient's shape; `ratio` has no second. steps: how many were added.
    """

    rule: Rule
    beta: float
    steps: int = 0
    first: Tensor | None = None
    second: Tensor | None = None

    def add(self, one: Tensor, other: Tensor | None = None) -> None:
        """A step: (g^2, Sigma) for `moments` and `ratio`, g alone for `ema`."""
        if self.rule == "ratio":
            assert other is not None
            one, other = ratio(one, other).clamp_(max=LARGEST_RATIO), None
        elif self.rule == "ema":
            other = one.square()
        if self.first is None:
            self.first = torch.zeros_like(one)
            self.second = None if other is None else torch.zeros_like(one)
        self.first.lerp_(one, 1 - self.beta)
        if other is not None and self.second is not None:
            self.second.lerp_(other, 1 - self.beta)
        self.steps += 1

    def snr(self) -> Tensor:
        """Of every element: 0 where there is neither signal nor noise, infinite where there is signal alone.

        Raises ValueError before the first step, and for `ema` before the second.
        """
        if self.steps < (2 if self.rule == "ema" else 1) or self.first is None:
            raise ValueError(f"no snr after {self.steps} steps")
        weight = 1 - self.beta**self.steps
        if self.rule == "ratio":
            return self.first / weight
        assert self.second is not None
        if self.rule == "moments":
            return ratio(self.first, self.second)
        mean_square = (self.first / weight).square()
        noise = (self.second / weight - mean_square).clamp_(min=0)
        return ratio(mean_square, noise) * _calibration(self.beta, self.steps)


def ratio(signal: Tensor, noise: Tensor) -> Tensor:
    """signal / noise, both not negative; 0 / 0 = 0."""
    return torch.where(signal == 0, 0.0, signal / noise)


def _calibration(beta: float, steps: float) -> float:
    """(1 - q) / q of the average over `steps` steps; 2 beta / (1 - beta) for infinitely many."""
    left = beta**steps
    q = (1 + left) * (1 - beta) / ((1 - left) * (1 + beta))
    return (1 - q) / q


def false_prune_rate(
    threshold: float, rule: Rule, beta: float, parts: int | None = None, steps: int | None = None
) -> float:
    """P(snr <= threshold) of a weight whose true gradient is 0: how often noise alone is taken for noise.

    parts: K, not for `ema`. steps: how many the average has seen; None for very many. The parts being normal, one step
    follows F(1, K - 1) exactly; averages are simulated with a fixed seed, standard error at most 0.002.
    Raises ValueError for fewer parts than the rule needs.
    """
    _check_parts(rule, parts)
    if rule != "ema" and steps == 1:
        assert parts is not None
        return float(stats.f.cdf(threshold, 1, parts - 1))
    return float(np.searchsorted(_null(rule, beta, parts, steps), threshold, side="right") / NULL_SAMPLES)


def threshold_of_rate(
    rate: float, rule: Rule, beta: float, parts: int | None = None, steps: int | None = None
) -> float:
    """The threshold of which `false_prune_rate` is `rate`, in (0, 1). Raises ValueError as that does."""
    _check_parts(rule, parts)
    if rule != "ema" and steps == 1:
        assert parts is not None
        return float(stats.f.ppf(rate, 1, parts - 1))
    return float(np.quantile(_null(rule, beta, parts, steps), rate))


def _check_parts(rule: Rule, parts: int | None) -> None:
    if rule == "ema":
        return
    least = 4 if rule == "ratio" else 2
    if parts is None or parts < least:
        reason = "the mean of F(1, K - 1) is not finite below" if rule == "ratio" else "a variance needs two"
        raise ValueError(f"{rule} needs {least} parts or more: {reason} (got {parts})")


@cache
def _null(rule: Rule, beta: float, parts: int | None, steps: int | None) -> np.ndarray[Any, Any]:
    """NULL_SAMPLES values of snr that noise alone makes, sorted."""
    if steps is None:
        steps = max(2, int(np.ceil(np.log(FORGOTTEN) / np.log(beta)))) if beta > 0 else 2
    random = np.random.default_rng(NULL_SEED)
    average = Average(rule, beta)
    for _ in range(steps):
        gradient = random.standard_normal(NULL_SAMPLES)
        if rule == "ema":
            average.add(torch.from_numpy(gradient))
        else:
            assert parts is not None
            variance = random.chisquare(parts - 1, NULL_SAMPLES) / (parts - 1)
            average.add(torch.from_numpy(gradient).square(), torch.from_numpy(variance))
    return np.sort(average.snr().numpy())
