"""Networks of several families under emulation: every matrix layer takes part, and a run trains them."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from fpsim.config import parse_config
from fpsim.emulation import Emulator, emulate
from fpsim.errors import ConfigError
from fpsim.layers import matrix_layers
from fpsim.runner import run
from fpsim.training import cross_entropy, evaluate

FORWARD = {"format": "e4m3fn", "scale": "power_of_two"}
SPEC: dict[str, Any] = {
    "weights": FORWARD,
    "activations": FORWARD,
    "gradients": {
        "format": "e5m2",
        "rounding": "stochastic",
        "scale": "lognormal_mean",
        "pruning": {"sparsity": 0.8},
        "codec": "alpha",
    },
}
CLASSES, CONTEXT = 5, 16
NETWORKS: dict[str, dict[str, Any]] = {
    "vgg16": {"width": 4},
    "densenet121": {"width": 4},
    "mobilenet_v2": {"width": 8},
    "gpt": {"layers": 2, "heads": 2, "width": 16},
}


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """Tensors this small are not worth a team of threads."""
    torch.set_num_threads(1)


def batch_for(name: str) -> tuple[Tensor, Tensor]:
    if name == "gpt":
        return torch.randint(0, CLASSES, (8, CONTEXT)), torch.randint(0, CLASSES, (8, CONTEXT))
    return torch.randn(8, 3, 32, 32), torch.randint(0, CLASSES, (8,))


def train_two_steps(model: nn.Module, inputs: Tensor, labels: Tensor, **emulation: Any) -> tuple[Emulator, list[float]]:
    """Two steps of emulated training, every warning an error."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = emulate(model, {**SPEC, "ledger": {"every_steps": 1}, **emulation}, optimizer=optimizer)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        handle.step()
        losses.append(float(loss.detach()))
    return handle, losses


def check_every_layer_took_part(handle: Emulator, model: nn.Module) -> None:
    layers = set(matrix_layers(model))
    assert {row["layer"] for row in handle.statistics} == layers
    records = handle.ledger.records
    for role in ("activation", "weight", "gradient"):
        formats = {record.layer: record.stored.format for record in records if record.role == role}
        assert layers <= set(formats)
        assert {formats[layer] for layer in layers} == {"e5m2" if role == "gradient" else "e4m3fn"}
    assert {record.step for record in records} == {0, 1}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    shape = (CONTEXT,) if name == "gpt" else (3, 32, 32)
    return models.build(name, input_shape=shape, classes=CLASSES, **NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_two_emulated_steps(name: str) -> None:
    model = network(name)
    handle, losses = train_two_steps(model, *batch_for(name))
    assert all(0 < loss < 10 for loss in losses)
    check_every_layer_took_part(handle, model)
    assert all(0.7 < row["achieved_sparsity"] < 0.95 for row in handle.statistics)


@pytest.mark.parametrize("name", ["mobilenet_v2", "gpt"])
def test_packing_what_autograd_saves_changes_no_bit(name: str) -> None:
    plain, packed = network(name), network(name)
    inputs, labels = batch_for(name)
    with torch.random.fork_rng():
        train_two_steps(plain, inputs, labels)
    handle, _ = train_two_steps(packed, inputs, labels, saved_activations={})
    assert handle.saved_activations["layer_input"].tensors > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), packed.parameters(), strict=True))


def test_depthwise_convolutions_are_emulated() -> None:
    model = network("mobilenet_v2")
    depthwise = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels}
    assert len(depthwise) == 17
    assert depthwise <= set(matrix_layers(model))


def test_a_gpts_embeddings_stay_float32() -> None:
    model = network("gpt")
    names = list(matrix_layers(model))
    assert names[:4] == ["blocks.0.attention.qkv", "blocks.0.attention.projection", "blocks.0.fc1", "blocks.0.fc2"]
    assert names[-1] == "head"
    assert not any("embedding" in name for name in names)
    before = model.token_embedding.weight.detach().clone()
    handle = emulate(model, SPEC)
    seen: list[Tensor] = []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    tokens = torch.randint(0, CLASSES, (2, CONTEXT))
    model(tokens)
    assert torch.equal(seen[0], before[tokens])
    handle.detach()


# --- other people's modules ----------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A module that owns layers in the ways of other libraries: lists, dictionaries, keyword arguments, aliases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList([nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1, groups=width)])
        self.extra = nn.ModuleDict({"squeeze": nn.Linear(width, 2), "excite": nn.Linear(2, width)})
        self.norm = nn.GroupNorm(2, width)

    def forward(self, features: Tensor, *, scale: float = 1.0) -> Tensor:
        y = self.norm(sum(path(input=features) for path in self.paths))
        gate = self.extra["excite"](self.extra["squeeze"](y.mean((2, 3))).relu()).sigmoid()
        return features + scale * y * gate[:, :, None, None]


def third_party_network() -> nn.Sequential:
    stem = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)), nn.SiLU())
    return nn.Sequential(stem, Gate(4), nn.Sequential(Gate(4)), nn.Flatten(), nn.Linear(4 * 15 * 15, CLASSES))


def test_a_network_of_nested_modules() -> None:
    torch.manual_seed(0)
    model = third_party_network()
    names = list(matrix_layers(model))
    assert names[:3] == ["0.0.0", "1.paths.0", "1.paths.1"]
    assert len(names) == 10
    handle, losses = train_two_steps(model, *batch_for("third party"))
    assert all(0 < loss < 10 for loss in losses)
    check_every_layer_took_part(handle, model)


def test_layer_patterns_choose_within_nested_modules() -> None:
    model = third_party_network()
    only = {**SPEC, "include": ["*.paths.*", "re:.*(squeeze|excite)"], "exclude": ["2.0.*", "1.paths.0"]}
    handle = emulate(model, only)
    assert set(handle.pruning) == {"1.paths.1", "1.extra.squeeze", "1.extra.excite"}
    handle.detach()


@pytest.mark.parametrize(
    ("library", "build"),
    [
        ("torchvision", lambda library: library.models.squeezenet1_1(num_classes=CLASSES)),
        ("timm", lambda library: library.create_model("resnet10t", num_classes=CLASSES)),
    ],
)
def test_image_networks_of_other_libraries(library: str, build: Any) -> None:
    pytest.importorskip(library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = build(importlib.import_module(library))
    handle, losses = train_two_steps(model, torch.randn(4, 3, 64, 64), torch.randint(0, CLASSES, (4,)))
    assert all(0 < loss < 10 for loss in losses)
    check_every_layer_took_part(handle, model)


def test_a_bert_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, num_labels=CLASSES, **sizes)
    network = transformers.BertForSequenceClassification(config)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: Tensor) -> Tensor:
            return self.network(tokens).logits

    model = Logits()
    handle, losses = train_two_steps(model, torch.randint(0, 50, (4, 12)), torch.randint(0, CLASSES, (4,)))
    assert all(0 < loss < 10 for loss in losses)
    check_every_layer_took_part(handle, model)


# --- runs ------------------------------------------------------------------------------------------------------------


def settings(data: dict[str, Any], model: dict[str, Any], batch_size: int = 8) -> dict[str, Any]:
    optimizer = {"name": "adam", "learning_rate": 0.01}
    training = {"epochs": 1, "batch_size": batch_size, "optimizer": optimizer}
    return {"data": data, "model": model, "training": training, "emulation": {**SPEC, "exclude": ["last"]}}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "abc.txt"
    path.write_text("the cat sat on the mat. " * 80, encoding="utf-8")
    return path


def test_a_run_of_a_gpt_learns_a_text(tmp_path: Path, text_file: Path) -> None:
    data = {"name": "text", "path": str(text_file), "context": CONTEXT}
    config = settings(data, {"name": "gpt", **NETWORKS["gpt"]}, batch_size=4)
    result = run(
        parse_config({**config, "training": {**config["training"], "epochs": 4}}), tmp_path / "run", quiet=True
    )
    history = result.results["history"]
    assert history[-1]["test_loss"] < history[0]["test_loss"] < 2.4  # of 12 characters: ln 12 = 2.48
    assert result.accuracy_percent > 40
    assert result.results["gradients"]
    assert result.ledger.records
    rows = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    steps = [row["accuracy_percent"] for row in rows if row["kind"] == "step" and row["epoch"] == 1]
    assert history[0]["train_accuracy_percent"] == pytest.approx(sum(steps) / len(steps))
    assert all(0 <= accuracy <= 100 for accuracy in steps)


def test_evaluation_of_text_is_by_character() -> None:
    class Bigram(nn.Module):
        def forward(self, text: Tensor) -> Tensor:
            return 3.0 * nn.functional.one_hot((text + 1) % CLASSES, CLASSES).float()

    class Text:
        def __len__(self) -> int:
            return 3

        def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
            text = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [4, 4, 4, 4]])
            labels = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 0], [4, 4, 4, 0]])
            return text[indices], labels[indices]

    loss, accuracy = evaluate(Bigram(), Text())
    right, wrong = (torch.tensor([3.0, 0, 0, 0, 0]).log_softmax(0)[i].item() for i in (0, 1))
    assert accuracy == 75
    assert loss == pytest.approx(-(9 * right + 3 * wrong) / 12)


@pytest.mark.parametrize(
    ("data", "model", "path", "message"),
    [
        (
            {"name": "synthetic", "image_size": 28},
            {"name": "densenet121", "width": 4, "stem": "imagenet"},
            "model",
            "densenet121 (stem: imagenet) needs images of at least 29x29 pixels, got 28x28",
        ),
        ({"name": "synthetic"}, {"name": "gpt"}, "model", "gpt takes text, but the data are images"),
        ({"name": "text"}, {"name": "vgg16"}, "model", "vgg16 takes images, but the data are text"),
        ({"name": "text"}, {"name": "gpt", "context": 64}, "model", "context: must be at least the 128 of the data"),
        ({"name": "text", "path": "/nowhere/at/all.txt"}, {"name": "gpt"}, "data.path", "not found"),
    ],
)
def test_a_network_that_cannot_take_the_data(
    tmp_path: Path, data: dict[str, Any], model: dict[str, Any], path: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(settings(data, model), tmp_path / "run", quiet=True)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert message in problem.message
    assert not (tmp_path / "run").exists()
