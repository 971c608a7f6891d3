from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

OFFICIAL = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Exhaustive tests run only where a `-m` expression asks for them."""
    if config.option.markexpr:
        return
    exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
    if exhaustive:
        config.hook.pytest_deselected(items=exhaustive)
        items[:] = [item for item in items if item not in exhaustive]


@pytest.fixture(params=OFFICIAL)
def official(request: pytest.FixtureRequest) -> tuple[str, npt.DTypeLike]:
    """A preset's name and the NumPy type of the same format, made by others."""
    return request.param, OFFICIAL[request.param]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Codecs and policies that the test registers are gone after it."""
    from accel.codecs.registry import CODECS
    from fpsim.gradients import policies

    monkeypatch.setenv("FPSIM_IMPORT", "")
    codecs, rules = dict(CODECS), dict(policies.RULES)
    following, names = set(policies.FOLLOWING), list(policies.POLICIES)
    yield
    for now, before in ((CODECS, codecs), (policies.RULES, rules)):
        now.clear()
        now.update(before)
    policies.FOLLOWING.intersection_update(following)
    policies.POLICIES[:] = names
