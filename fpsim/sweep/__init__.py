"""Sweeps: many configurations trained on workers of Dask, compared in one table and one report."""

from fpsim.sweep.driver import run_sweep
from fpsim.sweep.outcome import read_outcomes
from fpsim.sweep.trials import load_sweep

__all__ = ["load_sweep", "read_outcomes", "run_sweep"]
