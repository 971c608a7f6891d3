"""Codecs and pruning policies of the user's own: registered in Python, brought in by --import, checked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accel
import fpsim
import fpsim.cli
from accel.codecs.codec import Stream
from accel.codecs.registry import CODECS
from fpsim.errors import ConfigError, RunError
from fpsim.gradients import thresholds
from fpsim.run_directory import ledger_of

HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def source_of(page: str, name: str) -> str:
    """A file that a page of the documentation shows."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (HOWTO / f"{page}.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}\n")]
    return found


@pytest.fixture(autouse=True)
def _as_before(own_forgotten: None) -> None:
    """What a test registers is gone after it."""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The codec of the documentation, its module loaded once, registered by each test that wants it."""
    file = tmp_path_factory.mktemp("own") / "groups.py"
    file.write_text(source_of("own_codec", "groups.py"))
    spec = importlib.util.spec_from_file_location("groups_of_the_page", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del CODECS["groups"]
    return module.GROUPS


SETTINGS: dict[str, Any] = {
    "name": "own",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [16]},
    "training": {"epochs": 1, "batch_size": 64, "optimizer": {"name": "sgd", "learning_rate": 0.2}},
    "threads": 1,
}


def settings(**emulation: Any) -> dict[str, Any]:
    return {**SETTINGS, "emulation": emulation}


# --- codecs ---------------------------------------------------------------------------------------------------------


def test_an_own_codec_keeps_its_word(groups: Any) -> None:
    assert accel.register_codec(groups) is groups
    assert accel.register_codec(groups) is groups
    assert accel.find_codec("groups") is groups
    assert accel.check_codec(groups) == accel.check_codec("groups") == 3 * 5 * 5 * 3


def test_its_stream_by_hand(groups: Any) -> None:
    accel.register_codec(groups)
    x = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2.0])
    packed = accel.pack(x, "groups", "e4m3fn")
    metadata, payload = packed.bits_by_part["metadata"], packed.bits_by_part["payload"]
    assert (metadata, payload) == (8, 8 * (4 + 3))  # three flags in a byte; four codes, and the last group's three
    one, two = (int(accel.encode(torch.tensor(value), "e4m3fn")) for value in (1.0, 2.0))
    assert packed.to_bytes()[-8:] == bytes([0b101, one, 0, 0, 0, 0, 0, two])


def test_a_run_counts_its_stream(groups: Any, tmp_path: Path) -> None:
    accel.register_codec(groups)
    spec = {"weights": {"format": "e4m3fn", "scale": "amax", "codec": "groups"}}
    result = fpsim.run(settings(**spec), tmp_path / "run", quiet=True)
    stored = [record.stored for record in ledger_of(tmp_path / "run").records if record.role == "weight"]
    assert {one.codec for one in stored} == {"groups"}
    assert result.ledger.records == ledger_of(tmp_path / "run").records
    tensors = [one for one in result.results["ledger"]["tensors"] if one["role"] == "weight"]
    assert all(one["codec"] == "groups" and one["bits_per_element"] > 8 for one in tensors)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("groups", r"must be a Codec \(got str\)"),
        ({"name": "Groups"}, r"lower case letters, digits and _, the first a letter \(got 'Groups'\)"),
        ({"name": "groups(4)"}, r"lower case letters"),
        ({"name": "bitmask"}, "there is another codec 'bitmask'"),
    ],
)
def test_codecs_that_are_not_registered(groups: Any, codec: Any, message: str) -> None:
    with pytest.raises(accel.CodecError, match=message):
        accel.register_codec(codec if isinstance(codec, str) else replace(groups, **codec))


def test_a_codec_that_loses_something(groups: Any) -> None:
    accel.register_codec(replace(groups, name="lossy", read=accel.find_codec("dense").read))
    with pytest.raises(accel.CodecError):
        accel.check_codec("lossy")


def test_a_codec_that_writes_more_than_it_says(groups: Any) -> None:
    def less(content: Any, setting: Any) -> tuple[Stream, ...]:
        return (Stream("metadata", content.numel, 1, "fixed"), Stream("payload", content.numel // 2, setting.bits))

    accel.register_codec(replace(groups, name="more", streams=less))
    with pytest.raises(accel.CodecError, match="codec 'more' writes more than its streams say"):
        accel.pack(torch.ones(64), "more", "e4m3fn")


def test_a_codec_whose_count_is_wrong(groups: Any) -> None:
    accel.register_codec(replace(accel.find_codec("bitmask"), name="short", streams=groups.streams))
    with pytest.raises(accel.CodecError, match="codec 'short'"):
        accel.check_codec("short")


def test_a_stream_of_a_codec_that_is_not_registered(groups: Any) -> None:
    accel.register_codec(groups)
    packed = accel.pack(torch.ones(8), "groups", "e4m3fn").to_bytes()
    del CODECS["groups"]
    with pytest.raises(accel.CodecError, match="unknown codec 'groups'"):
        accel.unpack(accel.Packed.from_bytes(packed))


# --- policies -------------------------------------------------------------------------------------------------------


def half(sample: Any, sparsity: float) -> float:
    return 0.5 * thresholds.empirical(sample, sparsity)


def pruned(**more: Any) -> dict[str, Any]:
    pruning = {"policy": "half", "sparsity": 0.8, **more}
    return settings(gradients={"format": "e5m2", "scale": "amax", "codec": "alpha", "pruning": pruning})


def test_an_own_policy_decides(tmp_path: Path) -> None:
    fpsim.register_policy("half", half)
    own = fpsim.run(pruned(), tmp_path / "own", quiet=True).results
    ours = fpsim.run(pruned(policy="homogeneous"), tmp_path / "ours", quiet=True).results
    for one, other in zip(own["gradients"], ours["gradients"], strict=True):
        assert one["asked_sparsity"] == 0.8
        assert 0.55 < one["achieved_sparsity"] < other["achieved_sparsity"] - 0.05
    assert own["config"]["emulation"]["gradients"]["pruning"]["policy"] == "half"


def test_one_like_ours_prunes_alike(tmp_path: Path) -> None:
    """Also between renewals, and when it is resumed."""
    fpsim.register_policy("solved", thresholds.empirical)
    own = fpsim.run(pruned(policy="solved"), tmp_path / "own", quiet=True)
    ours = fpsim.run(pruned(policy="homogeneous"), tmp_path / "ours", quiet=True)
    assert own.metrics_path.read_bytes() == ours.metrics_path.read_bytes()
    (tmp_path / "own" / "results.json").unlink()
    assert fpsim.resume(tmp_path / "own", quiet=True).results["gradients"] == ours.results["gradients"]


@pytest.mark.parametrize(("following", "calls"), [(True, 3), (False, 22)])
def test_how_often_a_rule_is_asked(following: bool, calls: int, tmp_path: Path) -> None:
    seen = []

    def rule(sample: Any, sparsity: float) -> float:
        seen.append(sample.size)
        return 0.0

    fpsim.register_policy("counted", rule, following=following)
    settings_ = pruned(policy="counted")
    settings_["emulation"]["exclude"] = ["last"]
    fpsim.run(settings_, tmp_path / "run", quiet=True)
    assert seen == [64 * 16] * calls


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda sample, sparsity: -1.0, r"policy 'half' gave an alpha that is not finite and >= 0 \(got -1.0\)"),
        (lambda sample, sparsity: np.nan, r"\(got nan\)"),
        (lambda sample, sparsity: np.inf, r"\(got inf\)"),
        (lambda sample, sparsity: 1 / 0, r"policy 'half' raised ZeroDivisionError: division by zero \(.*\.py:\d+\)"),
        (lambda sample, sparsity: None, r"policy 'half' raised TypeError"),
        (lambda sample: 1.0, r"policy 'half' raised TypeError"),
    ],
)
def test_rules_that_give_no_alpha(rule: Any, message: str, tmp_path: Path) -> None:
    fpsim.register_policy("half", rule)
    with pytest.raises(RunError, match=message):
        fpsim.run(pruned(), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("half", 0.5, r"must be a function \(got float\)"),
        ("Half", half, r"lower case letters, digits and _, the first a letter \(got 'Half'\)"),
        (7, half, r"\(got 7\)"),
        ("topk", half, "there is another policy 'topk'"),
        ("empirical", half, "there is another policy 'empirical'"),
    ],
)
def test_policies_that_are_not_registered(name: Any, rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fpsim.register_policy(name, rule)


def test_keys_that_are_not_for_it() -> None:
    fpsim.register_policy("half", half)
    with pytest.raises(ConfigError, match="threshold: is for the policies homogeneous and heterogeneous"):
        fpsim.run(pruned(threshold="lognormal"))
    with pytest.raises(ConfigError, match=r"must be .* or your own by --import MODULE \(got 'hal'\) \(did you"):
        fpsim.run(pruned(policy="hal"))


# --- the command line -----------------------------------------------------------------------------------------------


def fpsim_in(folder: Path, *arguments: str) -> tuple[str, str, int]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fpsim", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stdout, done.stderr, done.returncode


def test_modules_by_import(tmp_path: Path) -> None:
    """Of a run and of its resumption, and noted in env.json; without them one line says what is missing."""
    (tmp_path / "rules.py").write_text(source_of("own_policy", "median.py"))
    (tmp_path / "own.yaml").write_text(json.dumps(pruned(policy="median")))
    out, err, code = fpsim_in(tmp_path, "--import", "rules", "run", "own.yaml", "--run-dir", "run", "--quiet")
    assert (err, code) == ("", 0)
    noted = json.loads((tmp_path / "run" / "env.json").read_text())["modules"]["rules"]
    assert noted["file"] == str(tmp_path / "rules.py")
    assert len(noted["sha256"]) == 64
    assert fpsim_in(tmp_path, "--import", "rules", "resume", "run", "--quiet") == (out, "", 0)
    out, err, code = fpsim_in(tmp_path, "resume", "run")
    assert (out, code) == ("", 2)
    assert "or your own by --import MODULE (got 'median')" in err


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "broken.py").write_text("1 +\n")
    (tmp_path / "raising.py").write_text("raise KeyError('x')\n")
    (tmp_path / "missing.py").write_text("import nothing_like_that\n")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("nowhere", f"nowhere: no module named 'nowhere' in {tmp_path} or where Python looks"),
        ("broken", "broken: cannot be imported: SyntaxError: "),
        ("raising", f"raising: cannot be imported: KeyError: 'x' ({tmp_path}/raising.py:1)"),
        ("missing", f"missing: cannot be imported: No module named 'nothing_like_that' ({tmp_path}/missing.py:1)"),
    ):
        monkeypatch.setattr("sys.argv", ["fpsim", "--import", name, "presets"])
        with pytest.raises(SystemExit) as stop:
            fpsim.cli.main()
        out, err = capsys.readouterr()
        assert (out, stop.value.code) == ("", 2)
        assert err.startswith(f"--import: {message}")
        assert len(err.splitlines()) == 1
    assert os.environ["FPSIM_IMPORT"] == ""
