"""`fpsim timeloop`: its problems are the layers' products, its densities and masks those of the run's own step."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import accel
import fpsim
import models
from fpsim import runner
from fpsim.runner import opened
from fpsim.session import forward_and_backward
from fpsim.timeloop import RANKS, SPACES, describe
from tests.fpsim.command_line import command

timeloop = partial(command, "timeloop")

EMULATION: dict[str, Any] = {
    "weight_pruning": {"name": "dpf", "sparsity": 0.6, "ramp_epochs": 1, "interval": 1},
    "weights": {"format": "e4m3fn", "codec": "csr", "scale": "amax"},
    "activations": {"format": "e4m3fn", "codec": "rle(3)", "scale": "amax"},
    "gradients": {"format": "e5m2", "codec": "alpha", "scale": "amax", "pruning": {"sparsity": 0.6}},
    "overrides": [
        {"match": "grouped", "weights": {"format": "e4m3fn", "codec": "nm(4:4)", "scale": "amax"}},
        {"match": "last", "activations": {"format": "e4m3fn", "codec": "coo"}, "gradients": None},
    ],
}
RUN: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "data": {"name": "synthetic", "train_samples": 12, "test_samples": 4, "image_size": 7, "classes": 3},
    "model": {"name": "mlp", "hidden": [1]},
    "training": {
        "epochs": 2,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "checkpoint": {"every_steps": 2, "keep": 2},
    },
    "emulation": EMULATION,
}


class Net(nn.Module):
    """Convolutions of 1 to 3 dimensions, strided, dilated, in groups, one transposed, and a linear layer that runs on
    every position."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, hidden: list[int]) -> None:
        super().__init__()
        self.strided = nn.Conv2d(image_shape[0], 4, 3, stride=(2, 3), padding=(1, 2))
        self.grouped = nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(2, 1), padding=1)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.line = nn.Conv1d(4, 4, 3, stride=2, dilation=2, groups=4)
        self.volume = nn.Conv3d(1, 2, (2, 1, 3), stride=(1, 1, 2), padding=(0, 0, 1))
        self.each = nn.Linear(2, 3)
        self.head = nn.LazyLinear(classes)
        self(torch.zeros(1, *image_shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.grouped(self.strided(x).relu()).relu()).relu()
        x = self.line(x.flatten(2)).relu()
        x = self.volume(x.unflatten(2, (2, -1)).unsqueeze(1)).relu()
        return self.head(self.each(x.movedim(1, -1)).relu().flatten(1))  # type: ignore[no-any-return]


IMAGE = (1, 7, 7)
NO_DGRAD = "strided.dgrad"
LAYERS = ("strided", "grouped", "transposed", "line", "volume", "each", "head")


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run but those of `timeloop`."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "timeloop"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run() -> Iterator[pytest.MonkeyPatch]:
    """The network in place of the model `mlp`."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "mlp", Net)
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(run: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, described; nothing else of it has changed."""
    place = tmp_path_factory.mktemp("runs") / "run"
    fpsim.run(RUN, place, quiet=True)
    before = contents(place)
    describe(place)
    assert contents(place) == before
    return place


@pytest.fixture(scope="module")
def again(folder: Path) -> tuple[dict[str, Tensor], accel.Ledger]:
    """The same step once more, its tensors seen by hooks, and its ledger."""
    session, seen = opened(folder), {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        samples = (lambda x: x.reshape(-1, x.shape[-1])) if isinstance(module, nn.Linear) else (lambda x: x)
        seen[f"{name}/activation"] = samples(inputs[0].detach())
        output.register_hook(lambda dy: seen.update({f"{name}/gradient": samples(dy)}))

    for name, layer in session.emulator.layers.items():
        layer.register_forward_pre_hook(
            lambda module, _, name=name: seen.update({f"{name}/weight": module._parameters["weight"].detach().clone()})
        )
        layer.register_forward_hook(partial(keep, name))
    session.emulator.sample_this_step()
    forward_and_backward(session)
    return seen, session.emulator.ledger


def layer_of(name: str) -> Any:
    """A layer of the network as torch has it, in float64, without a bias."""
    layer = Net(IMAGE, 3, [1]).get_submodule(name).double()
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def problem(folder: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((folder / "timeloop" / f"{name}.problem.yaml").read_text())["problem"]  # type: ignore[no-any-return]


def sparse(folder: Path, name: str) -> dict[str, Any]:
    text = (folder / "timeloop" / f"{name}.sparse_optimizations.yaml").read_text()
    return yaml.safe_load(text)["sparse_optimizations"]  # type: ignore[no-any-return]


def sizes(found: dict[str, Any]) -> dict[str, int]:
    return {name: found["instance"][name] for name in found["shape"]["dimensions"]}


# --- problems -------------------------------------------------------------------------------------------------------


def test_a_problem_for_each_product_with_its_macs(folder: Path, again: tuple[Any, accel.Ledger]) -> None:
    expected = {f"{one.layer}.{one.pass_name}": one for one in again[1].products}
    assert set(expected) == {f"{layer}.{which}" for layer in LAYERS for which in SPACES} - {NO_DGRAD}
    files = {path.name for path in (folder / "timeloop").glob("*.yaml")}
    assert files == {f"{name}.{kind}.yaml" for name in expected for kind in ("problem", "sparse_optimizations")}
    said = {row["file"]: row for row in json.loads((folder / "timeloop" / "densities.json").read_text())["problems"]}
    for name, one in expected.items():
        found = problem(folder, name)
        assert (found["version"], found["shape"]["name"]) == (0.4, name)
        assert all(len(dimension) == 1 for dimension in found["shape"]["dimensions"])
        assert math.prod(sizes(found).values()) == one.macs
        row = said[f"{name}.problem.yaml"]
        assert (row["macs"], row["effectual_macs"]) == (one.macs, one.effectual[1].both)


def indices(found: dict[str, Any], space: dict[str, Any]) -> tuple[npt.NDArray[np.int64], ...]:
    """Where each iteration of a problem lies in a data space, by what the file says alone."""
    dimensions = sizes(found)
    place = dict(zip(dimensions, np.indices(tuple(dimensions.values())), strict=True))
    at = found["instance"]
    return tuple(sum(place[t[0]] * (at[t[1]] if len(t) > 1 else 1) for t in terms) for terms in space["projection"])


def evaluated(found: dict[str, Any], operands: dict[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """What a problem computes from its two operands."""
    product: Any = 1.0
    for space in found["shape"]["data_spaces"]:
        at = indices(found, space)
        if space.get("read_write"):
            out = np.zeros([int(i.max()) + 1 for i in at])
            np.add.at(out, at, product)
            return out
        product = product * operands[space["name"]][at]
    raise AssertionError("nothing is written")


def in_groups(tensor: Tensor, found: dict[str, Any], dim: int) -> npt.NDArray[np.float64]:
    groups = sizes(found).get("G")
    return (tensor if groups is None else tensor.unflatten(dim, (groups, -1))).detach().numpy()


def padded(tensor: Tensor, paddings: tuple[int, ...]) -> Tensor:
    """A tensor that a kernel moves over as a problem has it, and zeros beyond."""
    return functional.pad(tensor, [n for p in reversed(paddings) for n in (p, p + 9)])


@pytest.mark.parametrize("name", LAYERS)
def test_the_projections_are_the_layers_arithmetic(folder: Path, name: str) -> None:
    layer = layer_of(name)
    masks = load_file(folder / "timeloop" / "masks.safetensors")
    x = torch.randn(masks[f"{name}/activation"].shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert (layer.weight.shape, y.shape) == (masks[f"{name}/weight"].shape, masks[f"{name}/gradient"].shape)
    read = {"x": x.detach(), "w": layer.weight.detach(), "y": dy}
    made = {"x": x.grad, "w": layer.weight.grad, "y": y.detach()}
    moved_over = "y" if isinstance(layer, nn.ConvTranspose2d) else "x"
    paddings: tuple[int, ...] = getattr(layer, "padding", ())
    for which, spaces in SPACES.items():
        if f"{name}.{which}" == NO_DGRAD:
            continue
        found, written = problem(folder, f"{name}.{which}"), list(spaces)[-1]
        assert {space["name"] for space in found["shape"]["data_spaces"]} == set(spaces.values())
        operands = {
            spaces[place]: in_groups(
                padded(read[place], paddings) if place == moved_over else read[place], found, int(place != "w")
            )
            for place in list(spaces)[:2]
        }
        out, expected = evaluated(found, operands), in_groups(made[written], found, int(written != "w"))
        if written == moved_over:  # what lies in the padding is nobody's
            sides = [(0, 0)] * (out.ndim - len(paddings)) + [(0, p + 9) for p in paddings]
            wanted = zip([0] * (out.ndim - len(paddings)) + list(paddings), expected.shape, strict=True)
            out = np.pad(out, sides)[tuple(slice(first, first + size) for first, size in wanted)]
        np.testing.assert_allclose(out, expected, atol=1e-12)


def test_coefficients_are_those_of_the_layers(folder: Path) -> None:
    found = problem(folder, "strided.forward")
    coefficients = {"Hstride": 2, "Wstride": 3, "Hdilation": 1, "Wdilation": 1}
    assert {one["name"]: one["default"] for one in found["shape"]["coefficients"]} == coefficients
    assert {key: found["instance"][key] for key in coefficients} == coefficients
    assert "coefficients" not in problem(folder, "head.forward")["shape"]
    kernel = {name: size for name, size in sizes(problem(folder, "volume.forward")).items() if name in "TSR"}
    assert kernel == {"T": 2, "S": 1, "R": 3}
    assert sizes(problem(folder, "line.dgrad"))["G"] == 4


# --- densities and masks --------------------------------------------------------------------------------------------


def test_masks_are_the_nonzeros_of_the_steps_tensors(folder: Path, again: tuple[dict[str, Tensor], Any]) -> None:
    masks = load_file(folder / "timeloop" / "masks.safetensors")
    assert set(masks) == set(again[0]) == {f"{a}/{b}" for a in LAYERS for b in ("activation", "weight", "gradient")}
    for key, tensor in again[0].items():
        assert masks[key].dtype == torch.uint8
        assert torch.equal(masks[key], (tensor != 0).to(torch.uint8)), key
    zeros = sum(int((mask == 0).sum()) for key, mask in masks.items() if key.endswith("/weight"))
    assert zeros > 100


def test_densities(folder: Path, again: tuple[dict[str, Tensor], Any]) -> None:
    said = json.loads((folder / "timeloop" / "densities.json").read_text())
    assert said["step"] == 6
    assert set(said["tensors"]) == set(again[0])
    for key, tensor in again[0].items():
        one, values = said["tensors"][key], tensor.numpy()
        nonzeros = int(np.count_nonzero(values))
        assert (one["shape"], one["numel"], one["nonzeros"]) == (list(values.shape), values.size, nonzeros)
        assert one["density"] == nonzeros / values.size
        for length in (4, 8, 16, 32):
            vectors = [
                np.count_nonzero(values[:, first : first + length], axis=1) > 0
                for first in range(0, values.shape[1], length)
            ]
            assert one["vector_density"][str(length)] == np.mean(vectors)
        tiles = [np.count_nonzero(values.flatten()[i : i + 64]) for i in range(0, values.size, 64)]
        assert one["tile_nonzeros"] == np.bincount(tiles, minlength=65).tolist()


def test_densities_of_the_problems(folder: Path, again: tuple[dict[str, Tensor], Any]) -> None:
    of = {"Activations": "activation", "Weights": "weight", "Gradients": "gradient"}
    for name in LAYERS:
        for which in SPACES:
            if f"{name}.{which}" == NO_DGRAD:
                continue
            found = problem(folder, f"{name}.{which}")
            densities = found["instance"]["densities"]
            assert list(densities) == list(SPACES[which].values())
            for space in list(densities)[:2]:
                tensor = again[0][f"{name}/{of[space]}"]
                is_structured = (name, space) == ("grouped", "Weights")
                kind = "fixed_structured" if is_structured else "hypergeometric"
                expected = int((tensor != 0).sum()) / tensor.numel()
                assert densities[space] == {"distribution": kind, "density": expected}


@pytest.mark.parametrize("name", ["grouped", "transposed", "each"])
def test_a_result_is_zero_where_nothing_is_added(folder: Path, name: str) -> None:
    masks = load_file(folder / "timeloop" / "masks.safetensors")
    layer = layer_of(name)
    with torch.no_grad():
        layer.weight.copy_(masks[f"{name}/weight"])
    x = masks[f"{name}/activation"].double().requires_grad_()
    y = layer(x)
    y.backward(masks[f"{name}/gradient"].double())
    expected: dict[str, Tensor] = {"forward": y, "dgrad": x.grad, "wgrad": layer.weight.grad}  # type: ignore[dict-item]
    for which, tensor in expected.items():
        density = list(problem(folder, f"{name}.{which}")["instance"]["densities"].values())[-1]["density"]
        assert density == pytest.approx(float((tensor > 0.5).double().mean()), abs=0)


def test_padding_is_told(folder: Path, again: tuple[dict[str, Tensor], Any]) -> None:
    text = (folder / "timeloop" / "strided.forward.problem.yaml").read_text()
    x = again[0]["strided/activation"]
    height, width = 1 + 3 * 2 + 2, 1 + 2 * 3 + 2  # (positions - 1) * stride + taps
    inside = x[..., : width - 2]
    density = int((inside != 0).sum()) / (4 * height * width)
    said = f"# Activations: 4x1x7x7 as a tensor; 4x1x{height}x{width} in the problem, where padding has density"
    assert text.startswith(f"{said} {density!r}\n")
    assert not (folder / "timeloop" / "head.forward.problem.yaml").read_text().startswith("#")


# --- encodings ------------------------------------------------------------------------------------------------------


def test_encodings_of_the_run(folder: Path) -> None:
    assert set(RANKS) == set(accel.CODECS)
    found = sparse(folder, "grouped.dgrad")
    assert found["version"] == 0.4
    storage, compute = found["targets"]
    assert storage["name"] == "DRAM"
    assert compute == {"name": "MAC", "compute_optimization": [{"type": "skipping"}]}
    assert storage["representation_format"]["data_spaces"] == [
        {"name": "Gradients", "ranks": [
            {"format": "UB", "flattened_rankIDs": [["N", "G", "M", "Q", "P"]], "metadata_word_bits": 1}
        ]},
        {"name": "Weights", "ranks": [
            {"format": "CP", "flattened_rankIDs": [["G", "M", "C", "S", "R"]], "metadata_word_bits": 2}
        ]},
    ]  # fmt: skip
    assert storage["action_optimization"] == [
        {"type": "skipping", "options": [{"target": "Gradients", "condition_on": ["Weights"]}]},
        {"type": "skipping", "options": [{"target": "Weights", "condition_on": ["Gradients"]}]},
        {"type": "skipping", "options": [{"target": "ActivationGradients", "condition_on": ["Gradients", "Weights"]}]},
    ]
    text = (folder / "timeloop" / "grouped.dgrad.sparse_optimizations.yaml").read_text()
    assert text.startswith("# Gradients: alpha: +-alpha count as values; in the run they cost bits of tags alone\n")
    formats = sparse(folder, "line.forward")["targets"][0]["representation_format"]["data_spaces"]
    assert formats[0]["ranks"] == [
        {"format": "RLE", "flattened_rankIDs": [["N", "G", "C", "P", "R"]], "metadata_word_bits": 3}
    ]
    assert formats[1]["ranks"] == [
        {"format": "UOP", "flattened_rankIDs": [["G", "M", "C", "R"]]},
        {"format": "CP", "flattened_rankIDs": [["C", "R"]]},
    ]


def test_what_is_dense_and_float32_is_not_encoded(folder: Path) -> None:
    storage = sparse(folder, "head.wgrad")["targets"][0]
    assert [one["name"] for one in storage["representation_format"]["data_spaces"]] == ["Activations"]
    density = problem(folder, "head.wgrad")["instance"]["densities"]["Gradients"]["density"]
    assert density == 1.0
    assert [one["options"] for one in storage["action_optimization"]] == [
        [{"target": "Gradients", "condition_on": ["Activations"]}],
        [{"target": "WeightGradients", "condition_on": ["Activations"]}],
    ]


def test_names_of_levels_and_gating(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--output", tmp_path / "out", "--storage", "hbm", "--compute", "pe", "--action", "gating", "--json")
    out, err, code = timeloop(capsys, monkeypatch, folder, *options)
    assert (err, code) == ("", 0)
    assert [row["layer"] for row in json.loads(out)["problems"][:7]] == list(LAYERS)
    text = (tmp_path / "out" / "each.forward.sparse_optimizations.yaml").read_text()
    targets = yaml.safe_load(text)["sparse_optimizations"]["targets"]
    assert [one["name"] for one in targets] == ["hbm", "pe"]
    assert {one["type"] for one in targets[0]["action_optimization"]} == {"gating"}
    for path in (folder / "timeloop").glob("*.problem.yaml"):  # the same step, the same files
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    name = "masks.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / "timeloop" / name).read_bytes()


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, _ = timeloop(capsys, monkeypatch, folder)
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "pass", "MACs", "effectual", "%", "densities"]
    assert lines[1].split()[:2] == ["strided", "forward"]
    assert lines[-1] == f"step 7: {2 * 20 + 2} files in {folder / 'timeloop'}"


# --- runs of other kinds --------------------------------------------------------------------------------------------


def test_an_interrupted_run_with_micro_batches(
    run: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, steps = runner._train_step, []

    def step(session: Any) -> dict[str, Any]:
        steps.append(session.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return train_step(session)

    monkeypatch.setattr(runner, "_train_step", step)
    with pytest.raises(KeyboardInterrupt):
        fpsim.run({**RUN, "training": {**RUN["training"], "micro_batches": 2}}, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "checkpoints" / ".step-9.1.tmp").mkdir()  # what a kill leaves behind stays, too
    before = contents(tmp_path / "run")
    found = describe(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert (tmp_path / "run" / "checkpoints" / ".step-9.1.tmp").is_dir()
    assert found.step == 3
    assert {row["layer"] for row in found.problems} == {*LAYERS, *(f"{name}@2" for name in LAYERS)}
    masks = load_file(tmp_path / "run" / "timeloop" / "masks.safetensors")
    assert masks["strided/activation"].shape[0] == masks["strided@2/activation"].shape[0] == 2
    monkeypatch.setattr(runner, "_train_step", train_step)
    assert fpsim.resume(tmp_path / "run", quiet=True).results["steps"] == 6


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*arguments: object) -> tuple[str, int]:
        _, err, code = timeloop(capsys, monkeypatch, *arguments)
        assert "Traceback" not in err
        return err, code

    err, code = failed(folder, "--output", tmp_path / "out", "--action", "jumping")
    assert (err, code) == ("--action: must be one of skipping, gating (got 'jumping')\n", 2)
    assert failed(tmp_path / "nothing") == (f"{tmp_path / 'nothing'}: no config.yaml in it: not a run directory\n", 2)
    (tmp_path / "file").write_text("")
    err, code = failed(folder, "--output", tmp_path / "file")
    assert (err, code) == (f"{tmp_path / 'file'}: --output: cannot be made: File exists\n", 2)
    err, code = failed(folder, "--output", tmp_path / "file" / "below")
    assert (err, code) == (f"{tmp_path / 'file' / 'below'}: --output: cannot be made: Not a directory\n", 2)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((folder / "config.yaml").read_text())
    assert failed(bare) == (f"fpsim: {bare}: has no checkpoint yet\n", 1)
    assert not (bare / "timeloop").exists()


def test_a_run_without_emulation(
    run: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fpsim.run({**RUN, "emulation": None}, tmp_path / "run", quiet=True)
    _, err, code = timeloop(capsys, monkeypatch, tmp_path / "run")
    assert code == 2
    assert "emulation: is null: the run emulates nothing that could be described" in err
    assert not (tmp_path / "run" / "timeloop").exists()


def test_a_damaged_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("timeloop"))
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    (newest / "model.safetensors").write_bytes(b"")
    _, err, code = timeloop(capsys, monkeypatch, tmp_path / "run")
    assert (code, "model.safetensors: damaged" in err) == (1, True)
