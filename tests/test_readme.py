"""What the README shows works: its Python runs, its commands are accepted, its YAML is the experiment's."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fpsim.cli import app
from fpsim.config import load_config, parse_config, parse_emulation

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [content for tag, content in fenced if tag == language]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("fpsim ")]
    return [shlex.split(line)[1:] for line in lines]


TRAINED = [command for command in commands() if {"runs/sparse", "runs/chip"} & set(command)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's own runs were trained, exported and estimated, by its own commands."""
    place, before, threads = tmp_path_factory.mktemp("readme"), Path.cwd(), torch.get_num_threads()
    os.chdir(place)
    try:
        for command in TRAINED:
            assert CliRunner().invoke(app, command).exit_code == 0
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    return place


@pytest.mark.parametrize("source", blocks("python"))
def test_python_blocks_run(
    source: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_has_commands_and_code() -> None:
    assert len(commands()) >= 5
    assert len(blocks("python")) == 6
    assert [verb for verb, *_ in TRAINED] == ["run", "export", "run", "estimate"]


@pytest.mark.parametrize("command", [one for one in commands() if one not in TRAINED], ids=" ".join)
def test_commands_are_accepted(command: list[str]) -> None:
    verb, *arguments = command
    if verb == "run":
        config, *rest = (argument for argument in arguments if not argument.startswith("--") and argument != "2")
        assert load_config(config, rest).training.epochs > 0
    elif verb in ("report", "resume"):
        assert all(name.startswith("runs/quickstart") for name in arguments)
    else:
        assert CliRunner().invoke(app, command).exit_code == 0


def test_the_yaml_is_the_quickstart() -> None:
    shown, overrides, weights, communication, datapath, _ = blocks("yaml")
    quickstart, pruned = load_config("quickstart").model_dump(), yaml.safe_load(weights)
    training = {**quickstart["training"], **pruned["training"]}
    assert parse_config({**quickstart, **pruned, "training": training})
    assert parse_config({**yaml.safe_load(shown.replace("5e-4", "0.0005")), **yaml.safe_load(overrides)})
    assert parse_config(yaml.safe_load(shown.replace("5e-4", "0.0005"))) == load_config("quickstart")
    assert parse_config({**quickstart, **yaml.safe_load(datapath)})
    quickstart["training"] |= yaml.safe_load(communication)["training"]
    assert parse_config(quickstart)


def test_the_yaml_of_a_machine_is_one() -> None:
    emulation = parse_emulation(yaml.safe_load(blocks("yaml")[-1]))
    assert emulation.machine.name == "edge-npu-vectors"
    assert emulation.machine.skips.granularity == 8
