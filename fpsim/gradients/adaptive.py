"""The format of a layer's neural gradients where it is chosen anew during a run (Chmiel et al., ICLR 2021, section 4).

A lognormal is fitted to the gradient's sample; of the formats with as many bits and the same policy as the one that is
configured, the layer takes the one with the least mean relative error at its best scale (`fpsim.scales.best_format`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import accel
from fpsim.config.schema import GradientSpec
from fpsim.layers import format_of
from fpsim.ranges import STATISTICS, spanned
from fpsim.scales import SIGMA_STEPS, best_format, log2_moments, sigma_steps


@dataclass
class LayerFormat:
    """The state of one layer. steps: the fitted deviation of log2|x|, see `fpsim.scales.sigma_steps`; 0 before any.

    renewals, changes: how often a fit was made, and how often it led to other exponent bits than those before.
    """

    spec: GradientSpec
    steps: int = 0
    renewals: int = 0
    changes: int = 0
    next_renewal: int = 0  # the step at which the format is chosen anew
    epoch_is_new: bool = True

    @property
    def format(self) -> accel.Format:
        """The one in force."""
        given = format_of(self.spec)
        assert isinstance(given, accel.Format)
        return best_format(given.bits, given.policy, self.steps) if self.steps else given

    @spanned(STATISTICS)
    def renew(self, sample: Tensor, step: int) -> accel.Format:
        """The format for a tensor of a step, given a sample of it: chosen anew when that is due."""
        interval, before = self.spec.adapt, self.format
        assert interval is not None
        if self.epoch_is_new or (interval != "epoch" and step >= self.next_renewal):
            mean, deviation = log2_moments(sample)
            if math.isfinite(mean):
                self.steps = sigma_steps(deviation)
                self.renewals += 1
                self.changes += self.format.exponent_bits != before.exponent_bits
            self.epoch_is_new = False
            if interval != "epoch":
                self.next_renewal = step + interval
        return self.format

    def summary(self, layer: str) -> dict[str, Any]:
        """The format at the end, and how it came about: plain data for reports."""
        sigma = self.steps / SIGMA_STEPS if self.steps else None
        return {
            "layer": layer,
            "format": self.format.name,
            "sigma_log2": sigma,
            "renewals": self.renewals,
            "changes": self.changes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but what the specification says, as plain data."""
        return {key: value for key, value in vars(self).items() if key != "spec"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
