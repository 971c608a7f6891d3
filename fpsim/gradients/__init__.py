"""Neural gradients (dY of a layer): the thresholds at which they are pruned."""

from __future__ import annotations

from fpsim.gradients.thresholds import empirical, expected_sparsity, lognormal

__all__ = ["empirical", "expected_sparsity", "lognormal"]
