"""`fpsim recommend`: what it reads, prints and writes, and one clear error for each mistake."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

import accel
from fpsim.recommend import recommend, save_plot, source_of, to_data
from tests.fpsim.command_line import command

FEW = ["--sparsity", "0", "--sparsity", "0.8", "--format", "e2m1", "--format", "e4m3fn"]
FEW += ["--codec", "bitmask", "--codec", "alpha"]
OPTIONS = {"sparsities": [0.0, 0.8], "formats": ["e2m1", "e4m3fn"], "codecs": ["bitmask", "alpha"]}


def gradient() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.empty(100, 120).log_normal_(0, 2, generator=generator)
    return magnitude * torch.randn(100, 120, generator=generator).sign()


run = partial(command, "recommend")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "dY.npy", gradient().numpy())
    return tmp_path / "dY.npy"


def test_the_table_the_advice_and_the_files(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plot, data = tmp_path / "out.png", tmp_path / "out.json"
    out, err, code = run(capsys, monkeypatch, file, *FEW, "--budget-bits", 2, "--plot", plot, "--json", data)
    assert (err, code) == ("", 0)
    expected = accel.recommend(gradient(), budget_bits=2, **OPTIONS)  # type: ignore[arg-type]
    assert expected.best is not None
    lines = out.splitlines()
    assert lines[-1] == expected.explanation
    assert lines[-1].startswith("The smallest rms error within 2 bits an element: ")
    assert lines[2].split() == " ".join(accel.Point.COLUMNS).split()
    rows = [" ".join(line.split()) for line in lines[3 : 3 + len(expected.pareto)]]
    assert rows == [" ".join(point.row()) for point in expected.pareto]
    written = json.loads(data.read_text())
    assert len(written["points"]) == len(expected.points)
    assert written["points"][written["best"]]["bits_per_element"] == expected.best.bits_per_element
    assert [written["points"][i]["rms_error"] for i in written["pareto"]] == [p.rms_error for p in expected.pareto]
    assert imread(plot).shape[2] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dY.npy", "out.json", "out.png"]


def test_a_lognormal_and_no_limit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, code = run(capsys, monkeypatch, "--lognormal", "-3,2", *FEW)
    assert (err, code) == ("", 0)
    assert out.startswith("a sample of 262144 elements, lognormal with mu -3 and sigma 2: ")
    assert "set budget_bits or max_error" in out.splitlines()[-1]


def test_what_does_not_fit_is_said(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, code = run(capsys, monkeypatch, file, *FEW, "--budget-bits", 0.5)
    assert code == 0
    assert out.splitlines()[-1].startswith("Nothing that was tried keeps within 0.5 bits an element: ")


def test_a_tensor_among_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": gradient(), "b": gradient().double()[:50].contiguous(), "steps": torch.arange(3)}, path)
    assert source_of(path, "b", None).shape == (50, 120)
    _, err, code = run(capsys, monkeypatch, path)
    assert (code, err) == (2, "--tensor: m.safetensors holds several, name one: a, b\n")
    _, err, code = run(capsys, monkeypatch, path, "--tensor", "steps")
    assert (code, err) == (2, "--tensor: m.safetensors has no tensor 'steps' of floats; it has a, b\n")


def test_the_plot_shows_what_it_is_about(tmp_path: Path) -> None:
    found = recommend(gradient(), max_error=0.2, alphas=["streams", "rounded"], **OPTIONS)
    save_plot(found, tmp_path / "out.svg")
    drawn = (tmp_path / "out.svg").read_text()
    best = found.best
    assert best is not None
    assert f"advised: {100 * best.achieved:.0f} % zeros, {best.format}, {best.codec}" in drawn
    assert "largest error: 0.2" in drawn
    assert "budget" not in drawn
    assert "alpha rounded: biased" in drawn
    assert "two codes" not in drawn


def test_the_data_are_plain(tmp_path: Path) -> None:
    found = recommend(gradient(), **OPTIONS)
    data = json.loads(json.dumps(to_data(found), allow_nan=False))
    assert data["best"] is None
    assert math.isclose(sum(data["points"][0]["bits_by_part"].values()) / 12000, data["points"][0]["bits_per_element"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a FILE or --lognormal"),
        (["FILE", "--lognormal", "0,2"], "give either a FILE or --lognormal"),
        (["--lognormal", "0"], "--lognormal: must be two numbers, MU,SIGMA (got '0')"),
        (["--lognormal", "0,-2"], "sigma that is finite and >= 0"),
        (["--lognormal", "0,2", "--tensor", "a"], "--tensor: names a tensor of a FILE"),
        (["FILE", "--tensor", "a"], "--tensor: dY.npy has no tensor 'a' of floats; it has dY.npy"),
        (["FILE", "--budget-bits", "-1"], "budget_bits must be a positive finite number"),
        (["FILE", "--max-error", "nan"], "max_error must be a positive finite number"),
        (["FILE", "--error", "mse"], "unknown error 'mse'"),
        (["FILE", "--sparsity", "1"], "sparsities must lie in [0, 1) (got 1.0)"),
        (["FILE", "--format", "e4m3fm"], "formats: unknown format 'e4m3fm'"),
        (["FILE", "--codec", "bitmsk"], "codecs: unknown codec 'bitmsk'"),
        (["FILE", "--alphas", "snapped"], "unknown alphas 'snapped'"),
        (["FILE", "--plot", "out.txt"], "--plot: must end in .png"),
        (["FILE", "--plot", "none/out.png"], "--plot: no file can be written at 'none/out.png'"),
        (["FILE", "--json", "."], "--json: no file can be written at '.'"),
        (["none.npy"], "none.npy: no such file"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(file.parent)
    out, err, code = run(capsys, monkeypatch, *[str(file) if option == "FILE" else option for option in options])
    assert (out, code) == ("", 2)
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", b"\x93NUMPY", "x.npy: "),
        ("x.npy", b"hello, world", "is neither a .npy nor a .safetensors file"),
        ("x.safetensors", b"hello, world", "x.safetensors: "),
        ("ints.npy", None, "values must be float64, float32 or float16 (got int64)"),
    ],
)
def test_wrong_files(
    name: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    if content is None:
        np.save(path, np.arange(3))
    else:
        path.write_bytes(content)
    out, err, code = run(capsys, monkeypatch, path)
    assert (out, code) == ("", 2)
    assert message in err
    assert "Traceback" not in err
