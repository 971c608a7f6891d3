"""The benchmarks can still be run: they import, and what they put a stopwatch on is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem not in ("gpu", "peers")]
)
def test_a_benchmark_is_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other than those that need a GPU, or other libraries."""
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module(name)
    for places in getattr(module, "PARTS", {}).values():
        for owner, attribute in places:
            assert callable(getattr(owner, attribute))
