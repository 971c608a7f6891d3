"""Layer patterns: what they match, what they resolve to, and the error of one that matches nothing."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fpsim.config import parse_emulation
from fpsim.config.schema import TensorSpec
from fpsim.layers import LayerSpec, PatternError, layer_specs, matching, matrix_layers

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
