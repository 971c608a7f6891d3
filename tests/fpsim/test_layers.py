"""Layer patterns: what they match, what they resolve to, and the error of one that matches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fpsim.config import parse_emulation
from fpsim.config.schema import TensorSpec
from fpsim.layers import (
    LayerSpec,
    PatternError,
    channel_dim,
    layer_specs,
    matching,
    matrix_layers,
    output_dim,
    unsupported_layers,
)

FLOAT32 = LayerSpec(None, None, None)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2 = nn.ConvTranspose2d(4, 3, 3)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.stem = nn.Embedding(7, 3), nn.Conv1d(3, 3, 1)
        self.layer1, self.layer10 = Block(), Block()
        self.norm, self.activation, self.fc = nn.LayerNorm([3, 3]), nn.PReLU(3), nn.Linear(3, 2)


NAMES = ["stem", "layer1.conv1", "layer1.conv2", "layer10.conv1", "layer10.conv2", "fc"]


def specs(**emulation: Any) -> dict[str, LayerSpec]:
    return layer_specs(Network(), parse_emulation(emulation))


def test_matrix_layers_are_those_with_a_weight_matrix_in_module_order() -> None:
    model = Network()
    layers = matrix_layers(model)
    assert list(layers) == NAMES
    assert layers["layer1.conv2"] is model.layer1.conv2
    assert list(matrix_layers(nn.Linear(2, 2))) == [""]
    assert matrix_layers(nn.ReLU()) == {}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", NAMES),
        ("fc", ["fc"]),
        ("layer1.*", ["layer1.conv1", "layer1.conv2"]),
        ("layer1*", ["layer1.conv1", "layer1.conv2", "layer10.conv1", "layer10.conv2"]),
        ("*.conv?", NAMES[1:5]),
        ("*conv[2-9]", ["layer1.conv2", "layer10.conv2"]),
        ("FC", []),
        ("layer1", []),
        ("re:layer\\d+\\.conv1", ["layer1.conv1", "layer10.conv1"]),
        ("re:layer1", []),  # the whole name
        ("re:.*1", ["layer1.conv1", "layer10.conv1"]),
        ("type:Conv2d", ["layer1.conv1", "layer10.conv1"]),
        ("type:Linear", ["fc"]),
        ("type:Embedding", []),
        ("first", ["stem"]),
        ("last", ["fc"]),
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    assert matching(pattern, matrix_layers(Network())) == set(names)


def test_bilinear_layers_are_no_matrix_layers() -> None:
    assert matrix_layers(nn.Sequential(nn.Bilinear(2, 3, 4), nn.Linear(4, 2))).keys() == {"1"}


def test_unsupported_layers_are_those_whose_products_are_not_seen() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 1),
            "gru": nn.GRU(3, 3),
            "cell": nn.LSTMCell(3, 3),
            "bilinear": nn.Bilinear(2, 3, 4),
            "normed": parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 3)),
            "bias_only": nn.Linear(3, 3),
            "supported": Network(),
        }
    )
    parametrize.register_parametrization(model["bias_only"], "bias", nn.Tanh())
    parametrize.register_parametrization(model["supported"].norm, "weight", nn.Tanh())
    assert unsupported_layers(model) == [
        "attention (MultiheadAttention)",
        "gru (GRU)",
        "cell (LSTMCell)",
        "bilinear (Bilinear)",
        "normed (ParametrizedConv2d)",
        "orthogonal (ParametrizedLinear)",
    ]
    assert unsupported_layers(Network()) == []
    assert "normed" not in matrix_layers(model)
    assert "bias_only" in matrix_layers(model)


@pytest.mark.parametrize(
    ("layer", "x_shape", "channel", "output"),
    [
        (nn.Linear(4, 3), (5, 4), 1, 0),
        (nn.Linear(4, 3), (4,), 0, 0),
        (nn.Linear(4, 3), (2, 5, 4), 2, 0),
        (nn.Conv1d(4, 3, 2), (2, 4, 5), 1, 0),
        (nn.Conv1d(4, 3, 2), (4, 5), 0, 0),
        (nn.Conv2d(4, 3, 2), (2, 4, 5, 5), 1, 0),
        (nn.Conv2d(4, 3, 2), (4, 5, 5), 0, 0),
        (nn.Conv3d(4, 3, 2), (4, 5, 5, 5), 0, 0),
        (nn.ConvTranspose2d(4, 3, 2), (2, 4, 5, 5), 1, 1),
    ],
)
def test_channels_lie_where_the_layer_counts_them(
    layer: nn.Module, x_shape: tuple[int, ...], channel: int, output: int
) -> None:
    x = torch.zeros(x_shape)
    assert channel_dim(layer, x) == channel
    assert x.shape[channel] == 4
    y = layer(x)
    assert y.shape[channel_dim(layer, y)] == 3
    assert output_dim(layer) == output
    assert layer.weight.shape[output] == 3


def test_first_and_last_of_a_model_without_matrix_layers_match_nothing() -> None:
    assert matching("first", {}) == matching("last", {}) == set()


def test_include_and_exclude() -> None:
    found = specs(weights={"format": "e4m3fn"}, include=["layer*", "fc"], exclude=["type:ConvTranspose2d", "last"])
    emulated = LayerSpec(TensorSpec(format="e4m3fn"), None, None)
    assert found == {name: emulated if name in ("layer1.conv1", "layer10.conv1") else FLOAT32 for name in NAMES}


def test_overrides_replace_only_the_given_roles_and_later_ones_win() -> None:
    found = specs(
        weights={"format": "e4m3fn"},
        activations={"format": "e4m3fn"},
        exclude=["fc"],
        overrides=[
            {"match": "layer1.*", "weights": {"format": "e5m2"}},
            {"match": "*.conv2", "weights": None},
            {"match": "fc", "activations": {"format": "e3m2"}},
        ],
    )
    e4m3, e5m2 = TensorSpec(format="e4m3fn"), TensorSpec(format="e5m2")
    assert found == {
        "stem": LayerSpec(e4m3, e4m3, None),
        "layer1.conv1": LayerSpec(e5m2, e4m3, None),
        "layer1.conv2": LayerSpec(None, e4m3, None),
        "layer10.conv1": LayerSpec(e4m3, e4m3, None),
        "layer10.conv2": LayerSpec(None, e4m3, None),
        "fc": LayerSpec(None, TensorSpec(format="e3m2"), None),
    }


@pytest.mark.parametrize(
    ("emulation", "path", "words"),
    [
        ({"include": ["*", "layer2.conv1"]}, "include.1", ["'layer2.conv1'", "did you mean 'layer1.conv1'?"]),
        ({"exclude": ["type:Conv2D"]}, "exclude.0", ["'type:Conv2D'", "did you mean 'type:Conv2d'?"]),
        ({"overrides": [{"match": "fcc", "weights": None}]}, "overrides.0.match", ["'fcc'", "did you mean 'fc'?"]),
        ({"exclude": ["re:zzz"]}, "exclude.0", ["'re:zzz'", "layers: stem, layer1.conv1"]),
        ({"include": ["embedding"]}, "include.0", ["'embedding'", "matches no matrix layer"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(emulation: dict[str, Any], path: str, words: list[str]) -> None:
    with pytest.raises(PatternError) as caught:
        specs(**emulation)
    assert caught.value.path == path
    for word in words:
        assert word in str(caught.value)


def test_a_model_without_matrix_layers_says_so() -> None:
    with pytest.raises(PatternError, match="layers: none"):
        layer_specs(nn.ReLU(), parse_emulation({}))
