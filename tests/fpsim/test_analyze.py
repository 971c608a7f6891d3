"""`fpsim analyze` and the figures of real gradients: what they print and write, one clear error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from fpsim import figures
from fpsim.analyze import pages, sentence, to_data
from fpsim.lognormal import cosine
from tests.fpsim.command_line import command


def lognormal() -> torch.Tensor:
    random = np.random.default_rng(0)
    x = np.exp2(-20 + 2.0 * random.standard_normal(20_000)) * random.choice([-1.0, 1.0], 20_000)
    x[:5000] = 0
    return torch.from_numpy(x).float()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "g.safetensors"
    save_file({"dY": lognormal(), "normal": torch.randn(60, 70), "zeros": torch.zeros(9)}, path)
    return path


def test_a_row_and_a_sentence_for_each_tensor(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = command("analyze", capsys, monkeypatch, file, "--sparsity", 0.85, "--plot", tmp_path / "out.png")
    assert (err, code) == ("", 0)
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["tensor", "elements", "zeros"]
    rows = {line.split()[0]: line for line in lines[1:4]}
    assert rows["dY"].split()[1:4] == ["20,000", "25.0", "%"]
    assert rows["dY"].rstrip().endswith("one mode")
    assert sum("*" in cell for cell in rows["normal"].split()) == 1
    assert rows["zeros"].rstrip().endswith("fewer than 8 nonzeros")
    assert lines[-3].startswith("dY: nearest to lognormal (D = 0.00")
    assert "With 8 bits: e3m4 (3 exponent bits) at scale 2^-" in lines[-3]
    assert "for 85 % zeros, from the tensor itself: 85.0 % zeros" in lines[-3]
    assert lines[-1] == "zeros: fewer than 8 nonzeros: nothing to advise."
    assert imread(tmp_path / "out.png").shape[2] == 4


def test_json_holds_what_the_table_shows(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err, code = command("analyze", capsys, monkeypatch, file, "--json", "--tensor", "dY")
    assert (err, code) == ("", 0)
    (page,) = json.loads(out)
    assert (page["elements"], page["zeros"], page["best"]) == (20_000, 5000, "lognormal")
    assert page["mu_log2"] == pytest.approx(-20, abs=0.05)
    assert page["sigma_log2"] == pytest.approx(2, abs=0.05)
    assert page["mu"] == pytest.approx(page["mu_log2"] * np.log(2))
    assert page["p_values"]["lognormal"] > 0.05 > page["p_values"]["normal"]


def test_the_advice_is_what_it_says(file: Path) -> None:
    (page,) = pages(file, "dY", sparsity=0.9)
    advice = page.advice
    assert advice is not None
    assert advice.measured_error == pytest.approx(advice.expected_error, rel=0.03)
    itself, rule = page.thresholds
    assert itself.sparsity == pytest.approx(0.9, abs=1e-9)
    assert rule.sparsity == pytest.approx(0.9, abs=0.01)
    (asked,) = pages(file, "dY", target=0.95)
    itself, rule = asked.thresholds
    assert itself.cosine == pytest.approx(0.95, abs=1e-6)
    assert asked.mu is not None
    assert asked.sigma is not None
    assert float(cosine(rule.alpha, asked.mu, asked.sigma)) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["FOLDER"], "holds neither a run nor runs"),
        (["none.npy"], "none.npy: no such file"),
        (["FILE", "--tensor", "a"], "--tensor: g.safetensors has no tensor 'a' of floats; it has"),
        (["FILE", "--sparsity", "1"], "--sparsity: must lie in [0, 1) (got 1.0)"),
        (["FILE", "--cosine", "1"], "--cosine: must lie in (0, 1) (got 1.0)"),
        (["FILE", "--cosine", "0.9", "--sparsity", "0.9"], "--cosine: give either --sparsity or --cosine"),
        (["FILE", "--bits", "1"], "--bits: must lie in 2..16 (got 1)"),
        (["FILE", "--plot", "out.txt"], "--plot: must end in .png"),
        (["nan.npy"], "nan.npy: x must be finite, got 1 NaN"),
    ],
)
def test_mistakes(
    options: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    np.save("nan.npy", np.array([1.0, np.nan]))
    places = {"FILE": str(file), "FOLDER": str(file.parent)}
    out, err, code = command("analyze", capsys, monkeypatch, *[places.get(option, option) for option in options])
    assert (out, code) == ("", 2)
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["fig2", "fig4", "table1"])
def test_figures_of_real_gradients(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures.neural_gradients, "STEPS", 2)
    monkeypatch.setattr(figures.neural_gradients, "BATCH_SIZE", 4)
    monkeypatch.setattr(figures.neural_gradients, "TABLE_TIMES", 2)
    monkeypatch.setattr(figures.neural_gradients, "_describe", quick)
    networks = {"resnet18": {"width": 2}, "mlp": {}}
    monkeypatch.setattr(figures.neural_gradients, "NETWORKS", networks)
    _, err, code = command("reproduce", capsys, monkeypatch, name, "--output", tmp_path, "--seed", 1)
    assert (err, code) == ("", 0)
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["results"]["seed"] == 1
    if name == "fig4":
        assert written["results"]["sparsities"]["0.8"]["zeros after"] == pytest.approx(0.8, abs=0.02)
    assert imread(tmp_path / f"{name}.png").shape[2] == 4


def quick(x: torch.Tensor) -> dict[str, object]:
    """A description without the fits."""
    names = figures.neural_gradients.FAMILIES
    return {
        "zero_share": 0.0, "mu": 0.0, "sigma": 1.0, "best": "normal", "modes": "one mode",
        "statistics": dict.fromkeys(names, 0.1), "p_values": dict.fromkeys(names, 0.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig3a", "--data", "mnist5k"], "--data: fig3a takes no data (got 'mnist5k')"),
        (["fig2", "--data", "mnist5k", "--data", "digits"], "--data: fig2 takes 1 image set (got 2)"),
        (["fig2", "--data", "mnist6k"], "data.name: must be 'mnist5k'"),
    ],
)
def test_wrong_data_of_a_figure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err, code = command("reproduce", capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in err


def test_missing_files_of_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err, code = command("reproduce", capsys, monkeypatch, "fig2", "--data", f"fashion_mnist={tmp_path}/none")
    assert code == 1
    assert "not found" in err


def test_tensors_at_the_edge_have_a_page(tmp_path: Path) -> None:
    """Beyond float32, of one magnitude, in half precision, of integers' steps."""
    random = np.random.default_rng(0)
    x = np.exp(random.standard_normal(500))
    cases = {
        "tiny": x * 1e-300,
        "one": np.where(random.random(500) < 0.5, 1.0, -1.0),
        "half": x.astype(np.float16),
        "steps": np.round(3 * random.standard_normal(500)),
    }
    found = {}
    for name, values in cases.items():
        np.save(tmp_path / f"{name}.npy", values)
        (found[name],) = pages(tmp_path / f"{name}.npy", sparsity=0.8)
        json.dumps(to_data(found[name]), allow_nan=False)
    assert found["tiny"].best == "lognormal"
    assert "No format: float32 does not reach" in sentence(found["tiny"])
    assert found["one"].too_few == "one single magnitude"
    assert found["half"].best == "lognormal"
    assert found["steps"].zeros == int((cases["steps"] == 0).sum())
