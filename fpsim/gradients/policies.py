"""The policies of pruning by name: the rules by which they find the threshold alpha, and rules of one's own.

A rule is a function of a sample of the gradient (a NumPy array of at most 4096 elements, zeros included) and the
sparsity that is asked of the layer, and returns alpha, 0 for pruning nothing. Magnitudes below alpha then become 0 or
+-alpha, at random and without bias. `following` are those that look at the sample itself: between renewals, 10 steps
apart unless `refresh` says otherwise, their alpha follows the quantile of each tensor; the others are renewed every
step.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from accel.formats import nearest
from fpsim.gradients import thresholds

Rule = Callable[..., float]  # of a sample and a sparsity

RULES: dict[str, Rule] = {
    "empirical": thresholds.empirical,
    "lognormal": thresholds.lognormal,
    "laplace": thresholds.laplace,
    "atp": thresholds.atp,
    "topk": thresholds.quantile,
    "topk_stochastic": thresholds.quantile,
    "none": lambda sample, sparsity: 0.0,
}
FOLLOWING = {"empirical", "topk", "topk_stochastic"}
BUILT_IN = ("homogeneous", "heterogeneous", "topk", "topk_stochastic", "atp", "laplace", "none")
POLICIES = [*BUILT_IN]


def register_policy(name: str, rule: Rule, *, following: bool = True) -> None:
    """Make a rule of one's own a policy for `gradients.pruning.policy`, by its name, in this process (see above).

    Raises ValueError for a rule that cannot be called, and for a name that another one has or that is not made of lower
    case letters, digits and _, the first a letter.
    """
    if not callable(rule):
        raise ValueError(f"the rule of a policy must be a function (got {type(rule).__name__})")
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        message = "must be made of lower case letters, digits and _, the first a letter"
        raise ValueError(f"a policy's name {message} (got {name!r})")
    if name in POLICIES or name in RULES:
        raise ValueError(f"there is another policy {name!r}")
    RULES[name] = rule
    POLICIES.append(name)
    if following:
        FOLLOWING.add(name)


def known_policy(name: str) -> str:
    """The name itself. Raises ValueError where there is no such policy."""
    if name not in POLICIES:
        allowed = f"{', '.join(POLICIES)}, or your own by --import MODULE"
        raise ValueError(f"must be {allowed} (got {name!r}){nearest(name, POLICIES)}")
    return name


def is_own(name: str) -> bool:
    """Whether the policy was registered, and is none of ours."""
    return name not in BUILT_IN
