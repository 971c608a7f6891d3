"""Pruning of one layer's neural gradients over a run: the threshold, when it is renewed, and what it achieved.

The scale of dY changes from batch to batch, its shape slowly. So rules that look at the sample itself keep, between
renewals, the ratio of alpha to the S-quantile of |dY| (S the sparsity asked for), and alpha follows the quantile of
each tensor's sample. Rules that fit a distribution keep alpha, as their papers do.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from accel import Counts
from fpsim.config.schema import Pruning
from fpsim.gradients import thresholds
from fpsim.ranges import STATISTICS, spanned
from fpsim.ranks import ALONE, Ranks

RULES = {
    "empirical": thresholds.empirical,
    "lognormal": thresholds.lognormal,
    "laplace": thresholds.laplace,
    "atp": thresholds.atp,
    "topk": thresholds.quantile,
    "topk_stochastic": thresholds.quantile,
    "none": lambda sample, sparsity: 0.0,
}
FOLLOWING = ("empirical", "topk", "topk_stochastic")  # the quantile, between renewals


def rule_of(spec: Pruning) -> str:
    """The rule by which a policy finds thresholds."""
    return spec.threshold if spec.policy in ("homogeneous", "heterogeneous") else spec.policy


@dataclass
class Tally:
    """Running sums over the steps of a run, from which mean and standard deviation follow."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0)) if self.count else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean, for values that are independent."""
        return self.std / math.sqrt(self.count - 1) if self.count > 1 else math.nan


@dataclass
class LayerPruning:
    """The state of one layer: the threshold in force and the statistics so far.

    Beside the rule that prunes, the lognormal rule is followed once an epoch, as Chmiel et al. do, and what it would
    achieve is measured on the same samples.

    alpha_kept: how +-alpha stays exact (`snap`, `reserved`, `streams`; see `accel.recommend`), `none` where there is
    none. asked: the sparsity asked of this layer. renewed_at: the step of the threshold in force. bias, cosine: of the
    pruned and rounded gradient against the exact one, over the recorded steps.
    """

    spec: Pruning
    alpha_kept: str = "snap"
    asked: float = math.nan
    alpha: float = 0.0
    quantile_ratio: float = 0.0  # alpha over the S-quantile when alpha was renewed
    lognormal_alpha: float | None = None
    next_renewal: int = 0  # the step at which alpha is renewed
    renewed_at: int = -1
    epoch_is_new: bool = True
    achieved: Tally = field(default_factory=Tally)
    alpha_share: Tally = field(default_factory=Tally)
    lognormal_rule: Tally = field(default_factory=Tally)
    bias: Tally = field(default_factory=Tally)
    cosine: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.asked = self.spec.sparsity

    @spanned(STATISTICS)
    def threshold(self, sample: np.ndarray, step: int) -> float:
        """alpha for a tensor of a step, given a sample of it (finite): renewed when that is due."""
        is_due = self.spec.refresh_interval != "epoch" and step >= self.next_renewal
        if self.epoch_is_new or is_due:
            self._renew(sample, step)
        elif rule_of(self.spec) in FOLLOWING:
            self.alpha = self.quantile_ratio * self._quantile(sample)
        return self.alpha

    def ask(self, sparsity: float, sample: np.ndarray) -> None:
        """From now on the layer is asked for another sparsity: alpha becomes what that calls for, given a sample."""
        self.asked = sparsity
        self.alpha = RULES[rule_of(self.spec)](sample, sparsity)
        quantile = self._quantile(sample)
        self.quantile_ratio = self.alpha / quantile if quantile else 0.0

    def _quantile(self, sample: np.ndarray) -> float:
        return thresholds.quantile(sample, self.asked)

    def _renew(self, sample: np.ndarray, step: int) -> None:
        if self.epoch_is_new:
            self.lognormal_alpha = thresholds.lognormal(sample, self.asked)
        assert self.lognormal_alpha is not None
        self.lognormal_rule.add(thresholds.expected_sparsity(sample, self.lognormal_alpha))
        self.ask(self.asked, sample)
        self.epoch_is_new, self.renewed_at = False, step
        if self.spec.refresh_interval != "epoch":
            self.next_renewal = step + self.spec.refresh_interval

    def record(self, counts: Counts) -> None:
        """Enter what one step achieved."""
        self.achieved.add(1 - counts.nonzeros / counts.numel)
        if counts.nonzeros:
            self.alpha_share.add(counts.alphas / counts.nonzeros)

    @spanned(STATISTICS)
    def measure(self, dy: Tensor, rounded: Tensor, ranks: Ranks = ALONE) -> float | None:
        """Enter the bias sum|rounded| / sum|dy| - 1 of a step and the cosine between the two, of all ranks' parts: the
        cosine; nothing and None if dy is 0."""
        exact, kept = dy.double(), rounded.double()
        sums = exact.abs().sum(), kept.abs().sum(), exact.square().sum(), kept.square().sum(), (exact * kept).sum()
        total, kept_total, squares, kept_squares, products = ranks.totals(*(float(one) for one in sums))
        if not total:
            return None
        norms = math.sqrt(squares * kept_squares)
        cosine = products / norms if norms else 0.0
        self.bias.add(kept_total / total - 1)
        self.cosine.add(cosine)
        return cosine

    def summary(self, layer: str) -> dict[str, Any]:
        """Asked and achieved sparsity, mean over every step, beside the lognormal rule's; bias and cosine, over the
        recorded ones: plain data for reports."""
        return {
            "layer": layer,
            "asked_sparsity": self.asked,
            "achieved_sparsity": self.achieved.mean,
            "achieved_std": self.achieved.std,
            "lognormal_rule_sparsity": self.lognormal_rule.mean if self.lognormal_rule.count else None,
            "alpha_share_of_nonzeros": self.alpha_share.mean if self.alpha_share.count else None,
            "alpha": self.alpha,
            "alpha_kept": self.alpha_kept,
            "bias": self.bias.mean if self.bias.count else None,
            "bias_standard_error": self.bias.standard_error if self.bias.count > 1 else None,
            "cosine": self.cosine.mean if self.cosine.count else None,
            "steps": self.achieved.count,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but what the specification says, as plain data."""
        return {key: value for key, value in asdict(self).items() if key not in ("spec", "alpha_kept")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, Tally(**value) if isinstance(value, dict) else value)
