"""Named ranges of a training step, for whatever torch profiler is running; without one a range costs 0.3 us.

    step       all of a step
    PHASES     within it; the end of step is what emulation does after the optimizer
    KINDS      what emulation does, within a phase and within one another

In a trace their names begin with PREFIX.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch.autograd import _profiler_enabled
from torch.autograd.profiler import record_function

PREFIX = "fpsim: "
STEP = "step"
DATA, FORWARD, BACKWARD, OPTIMIZER, END = PHASES = ("data", "forward", "backward", "optimizer", "end of step")
ROUNDING = {"activation": "rounding of activations", "weight": "rounding of weights"}
GRADIENTS = "pruning and rounding of gradients"
SCALES = "scales"
STATISTICS = "thresholds and statistics"
PRODUCTS = "products on emulated datapaths"
SAVED = "packing of saved activations"
WEIGHT_PRUNING = "pruning of weights"
LEDGER = "ledger"
HOOKS = "emulation's other hooks"
KINDS = (*ROUNDING.values(), GRADIENTS, SCALES, STATISTICS, PRODUCTS, SAVED, WEIGHT_PRUNING, LEDGER, HOOKS)

P = ParamSpec("P")
R = TypeVar("R")
NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """A range of that name."""
    return record_function(PREFIX + name) if _profiler_enabled() else NOTHING


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: every call of the function is a range of that name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            with span(name):
                return function(*arguments, **named)

        return call

    return decorate
