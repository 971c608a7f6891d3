"""Emulated training on hardware with other number formats, and what it saves.

Names are loaded when they are first used, so that the command line starts without torch and numba.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Ranks": "fpsim.ranks",
    "emulate": "fpsim.emulation",
    "load_config": "fpsim.config",
    "load_model": "fpsim.packed_model",
    "register_policy": "fpsim.gradients.policies",
    "resume": "fpsim.runner",
    "run": "fpsim.runner",
}

__all__ = ["Ranks", "emulate", "load_config", "load_model", "lognormal", "register_policy", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name == "lognormal":
        return importlib.import_module("fpsim.lognormal")
    if name not in _HOMES:
        raise AttributeError(f"module 'fpsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
