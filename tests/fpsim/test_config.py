from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import accel
from accel.block_formats import PADDINGS, SCALE_RULES
from accel.formats import POLICIES
from accel.presets import to_mapping
from accel.rounding import FLUSHES, ROUNDINGS
from fpsim.config import (
    BlockFormatSpec,
    Config,
    FormatSpec,
    GradientSpec,
    Pruning,
    TensorSpec,
    config_hash,
    config_to_yaml,
    json_schema,
    load_config,
    load_format,
    number_format,
    parse_config,
    preset_folder,
    presets,
)
from fpsim.config.tree import to_data
from fpsim.config.yaml_loader import MAX_BYTES, dump_yaml, parse_yaml
from fpsim.errors import ConfigError

BASE = """\
data: {name: digits}
model: {name: mlp}
training:
  epochs: 2
  batch_size: 32
  optimizer: {name: sgd, learning_rate: 0.1}
"""
EXPERIMENTS = [preset.path for preset in presets() if preset.kind == "experiments"]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file in an empty current directory; returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str | bytes, name: str = "c.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def problems(path: Path | str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The first line of every problem of a file."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [str(problem).splitlines()[0] for problem in caught.value.problems]


def error_of(name: str) -> ValueError:
    """What accel says of a name that is not a format's."""
    with pytest.raises(ValueError, match="did you mean") as caught:
        accel.format(name)
    return caught.value


def base() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(BASE)
    return data


# --- YAML 1.2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E+2", 500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("+12", 12),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("True", True),
        ("", None),
        ("~", None),
        ("Null", None),
        ("on", "on"),
        ("no", "no"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2026-01-31", "2026-01-31"),
        ("=", "="),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    read = parse_yaml(f"k: {text}", "f").value["k"].value
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml(".nan", "f").value)


SCALARS = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text()
NAMES = st.text().filter(lambda name: name != "<<")


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)))
def test_dumped_data_reads_back(data: object) -> None:
    text = dump_yaml({"k": data})
    assert to_data(parse_yaml(text, "f")) == {"k": data}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3:1: a: duplicate key (first given at line 1, column 1)"),
        (
            "a:\n\tb: 1\n",
            "c.yaml:2:1: found character '\\t' that cannot start any token, while scanning for the next token",
        ),
        ("a: [1, 2\nb: 3\n", "c.yaml:2:2: expected ',' or ']', but got ':', while parsing a flow sequence"),
        ("- 1\n", "c.yaml:1:1: the top level must be a mapping (got a list)"),
        ("", "c.yaml:1:1: the top level must be a mapping (got null)"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2:1: but found another document, expected a single document in the stream"),
        ("a: &x [*x]\n", "c.yaml:1:4: a.0: an alias refers to a value that contains it"),
        ("b: &x {c: 1}\na: {<<: *x}\n", "c.yaml:2:5: a: merge keys (<<) are not supported; use `extends`"),
        ("1: x\n", "c.yaml:1:1: a key must be a string (got '1')"),
        ("? [a]\n: x\n", "c.yaml:1:3: a key must be a string (got a sequence)"),
        ("a: !!python/object:os.system x\n", "c.yaml:1:4: a: the tag '!!python/object:os.system' is not supported"),
        ("a: !!int x\n", "c.yaml:1:4: a: not a value of type int (got 'x')"),
        ("a: " + "9" * 5000, "c.yaml:1:4: a: the integer has more than 64 digits (got"),
        ("a: *x\n", "c.yaml:1:4: found undefined alias 'x'"),
        ('a: "\\Uffffffff"\n', "c.yaml:1:7: invalid YAML ("),
        (b"a: 1\nb: \xff\n", "c.yaml:2:4: not UTF-8 text (got byte 0xff)"),
        ("a: 1\nb: \0\n", "c.yaml:2:4: the character '\\x00' is not allowed in YAML"),
        ("a: " + "[" * 100_000, "c.yaml:1:67: nested deeper than 64 levels"),
        ("a: [" + "1," * 100_001 + "]", "c.yaml:1:199999: more than 100000 values"),
        ("#" * (MAX_BYTES + 1), f"c.yaml: larger than {MAX_BYTES} bytes"),
    ],
)
def test_broken_yaml_is_one_placed_error(write: Write, text: str | bytes, expected: str) -> None:
    (found,) = problems(write(text))
    assert found.startswith(expected)


def test_aliases_are_bounded(write: Write) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    (found,) = problems(write(bomb))
    assert "aliases expand to more than 100000 values" in found


def test_aliases_may_be_used(write: Write) -> None:
    text = BASE + "emulation:\n  weights: &t {format: e4m3fn}\n  activations: *t\n"
    emulation = load_config(write(text)).emulation
    assert emulation is not None
    assert emulation.weights == emulation.activations


def test_source_line_and_caret(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(BASE.replace("epochs: 2", "epochs: two")))
    assert str(caught.value) == (
        "c.yaml:4:11: training.epochs: must be an integer (got 'two')\n      epochs: two\n              ^"
    )


# --- keys and values ------------------------------------------------------------------------------------------------


def test_every_problem_at_once(write: Write) -> None:
    text = """\
version: 1
modle: 3
data: {name: mnist5l}
model: {name: resnet18, widht: 4, stem: cifr}
training:
  epochs: 0
  optimizer: {name: sgd, learning_rate: .inf, momentum: 1, nesterov: on}
  schedule: {name: step, milestones_epochs: [1, x], factor: 0.5}
emulation:
  include: []
  exclude: ["re:("]
  weights: {format: e4m3fm, rounding: nearest}
  gradients: {format: {exponent_bits: 9, mantissa_bits: 2}, pruning: {sparsity: 1.5, refresh: epoc}, codec: alfa}
  overrides: [{match: first, activations: {format: 8}}]
"""
    assert problems(write(text)) == [
        "c.yaml:2:1: modle: unknown key; did you mean 'model'?",
        "c.yaml:3:14: data.name: must be 'mnist5k', 'digits', 'mnist', 'fashion_mnist', 'cifar10', 'cifar100', "
        "'imagefolder', 'synthetic', 'text', 'wine', 'breast_cancer' or 'module:function' (got 'mnist5l'); did you "
        "mean 'mnist5k'?",
        "c.yaml:4:25: model.widht: unknown key; did you mean 'width'?",
        "c.yaml:4:41: model.stem: must be 'cifar' or 'imagenet' (got 'cifr'); did you mean 'cifar'?",
        "c.yaml:5:1: training.batch_size: missing; this key is required",
        "c.yaml:6:11: training.epochs: must be >= 1 (got 0)",
        "c.yaml:7:41: training.optimizer.learning_rate: must be finite (got inf)",
        "c.yaml:7:57: training.optimizer.momentum: must be < 1 (got 1)",
        "c.yaml:7:70: training.optimizer.nesterov: must be true or false (got 'on')",
        "c.yaml:8:49: training.schedule.milestones_epochs.1: must be a number (got 'x')",
        "c.yaml:11:13: emulation.exclude.0: not a regular expression: missing ), unterminated subpattern at position 0 "
        "(got 're:(')",
        f"c.yaml:12:21: emulation.weights.format: {error_of('e4m3fm')}",
        "c.yaml:12:39: emulation.weights.rounding: must be 'nearest_even', 'nearest_away', 'toward_zero', 'up', 'down' "
        "or 'stochastic' (got 'nearest'); did you mean 'nearest_even'?",
        "c.yaml:13:39: emulation.gradients.format.exponent_bits: must be <= 8 (got 9)",
        "c.yaml:13:81: emulation.gradients.pruning.sparsity: must be < 1 (got 1.5)",
        "c.yaml:13:95: emulation.gradients.pruning.refresh: must be a number of steps or 'epoch' (got 'epoc')",
        "c.yaml:13:109: emulation.gradients.codec: unknown codec 'alfa' (did you mean 'alpha'?); allowed: dense, "
        "bitmask, bitmask2, rle, coo, csr, nm, alpha_tag, alpha, alpha_entropy, also rle(BITS) and nm(N:M), "
        "and your own by --import MODULE",
        "c.yaml:14:52: emulation.overrides.0.activations.format: must be the name of a format, a file or a mapping "
        "(got 8)",
    ]


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"version": 2, "new_key": 1}, "version", "config of a newer version (got 2); this fpsim reads version 1"),
        ({"version": True}, "version", "must be 1 (got true)"),
        ({"version": 0}, "version", "must be 1 (got 0)"),
        ({"seed": -1}, "seed", "must be >= 0 (got -1)"),
        ({"seed": 2**63}, "seed", "must be <= 9223372036854775807 (got 9223372036854775808)"),
        ({"seed": True}, "seed", "must be an integer (got true)"),
        ({"seed": 1.0}, "seed", "must be an integer (got 1.0)"),
        ({"name": "a/b"}, "name", "must match ^[A-Za-z0-9][A-Za-z0-9._-]*$ (got 'a/b')"),
        ({"name": 3}, "name", "must be a string (got 3)"),
        ({"data": None}, "data", "must be a mapping (got null)"),
        ({"data": {}}, "data.name", "missing; this key is required"),
        ({"data": {"name": "mnist"}}, "data.root", "missing; this key is required"),
        ({"data": {"name": "digits", "root": "x"}}, "data.root", "unknown key"),
        ({"model": "resnet18"}, "model", "must be a mapping (got 'resnet18')"),
        ({"model": {"name": "mlp", "hidden": 3}}, "model.hidden", "must be a list (got 3)"),
        ({"model": {"name": "densenet121", "width": 9}}, "model.width", "must be a multiple of 2 (got 9)"),
        ({"model": {"name": "gpt", "width": 8, "heads": 3}}, "model.heads", "must divide the width of 8 (got 3)"),
        ({"emulation": {"acelerator": "x"}}, "emulation.acelerator", "unknown key; did you mean 'accelerator'?"),
        ({"extend": "x"}, "extend", "unknown key; did you mean 'extends'?"),
        (
            {"emulation": {"weights": {"format": "e4m3fn", "codec": "alpha"}}},
            "emulation.weights.codec",
            "'alpha' is allowed only for gradients that are pruned: no value is +-alpha here",
        ),
        (
            {"emulation": {"gradients": {"format": "e5m2", "codec": "alpha"}}},
            "emulation.gradients.codec",
            "'alpha' is allowed only for gradients that are pruned: no value is +-alpha here",
        ),
    ],
)
def test_one_problem(changes: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(base() | changes)
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [(path, message)]


@pytest.mark.parametrize(
    ("optimizer", "schedule", "expected"),
    [
        ("{name: sgd, learning_rate: 1, momentum: 0, nesterov: true}", "{name: constant}", "optimizer.nesterov: needs"),
        (
            "{name: sgd, learning_rate: 1}",
            "{name: cosine, warmup_epochs: 2}",
            "schedule.warmup_epochs: must be less than the 2 epochs of training (got 2)",
        ),
        ("{name: adam, learning_rate: 1, betas: [0.9]}", "{name: constant}", "optimizer.betas: must have at least 2"),
    ],
)
def test_keys_that_do_not_fit_together(write: Write, optimizer: str, schedule: str, expected: str) -> None:
    text = BASE.replace("{name: sgd, learning_rate: 0.1}", optimizer) + f"  schedule: {schedule}\n"
    (found,) = problems(write(text))
    assert f"training.{expected}" in found


def test_an_integer_is_a_fine_float() -> None:
    config = parse_config(base(), ["training.optimizer.learning_rate=1"])
    assert config.training.optimizer.learning_rate == 1.0
    assert type(config.training.optimizer.learning_rate) is float


def test_refresh_interval() -> None:
    assert Pruning(sparsity=0.5).refresh_interval == 10
    assert Pruning(sparsity=0.5, threshold="lognormal").refresh_interval == "epoch"
    assert Pruning(sparsity=0.5, threshold="lognormal", refresh=3).refresh_interval == 3


def test_a_later_problem_is_placed_where_it_was_written(write: Write) -> None:
    write("exclude: [first]\nweights: {format: e4m3fn}\n", "chip.yaml")
    config = load_config(write(BASE + "emulation:\n  accelerator: chip.yaml\n"))
    assert str(config.problem("emulation.exclude.0", "matches no layer")) == (
        "chip.yaml:1:11: emulation.exclude.0: matches no layer\n    exclude: [first]\n              ^"
    )
    assert str(config.problem("emulation.include.0", "x")).startswith("c.yaml:7:1: emulation.include.0: x\n")
    assert str(parse_config(base()).problem("data.root", "missing")) == "data.root: missing"
    assert str(parse_config(base(), ["seed=3"]).problem("seed", "unlucky")) == "<overrides>: seed: unlucky"


# --- files that build on files --------------------------------------------------------------------------------------


def test_extends_merges_relative_to_the_file(write: Write) -> None:
    write(BASE + "seed: 7\nname: base\n", "bases/a.yaml")
    write("extends: a.yaml\ntraining: {epochs: 9, optimizer: {momentum: 0.5}}\nmodel: {name: lenet}\n", "bases/b.yaml")
    config = load_config(write("extends: [bases/b.yaml]\nname: top\n"))
    assert (config.name, config.seed, config.training.epochs, config.training.batch_size) == ("top", 7, 9, 32)
    assert config.training.optimizer.model_dump()["momentum"] == 0.5
    assert config.model.name == "lenet"


def test_extends_an_experiment_by_name_and_replaces_a_union_whole(write: Write) -> None:
    text = "extends: digits\ntraining: {optimizer: {name: adam, learning_rate: 1e-3}}\nemulation: null\n"
    config = load_config(write(text))
    assert config.training.optimizer.name == "adam"
    assert config.emulation is None


def test_a_problem_in_a_base_is_placed_there(write: Write) -> None:
    write(BASE + "sed: 7\n", "a.yaml")
    assert problems(write("extends: a.yaml\n")) == ["a.yaml:7:1: sed: unknown key; did you mean 'seed'?"]


def test_cycles_and_missing_files_are_refused(write: Write) -> None:
    write("extends: c.yaml\n", "a.yaml")
    assert problems(write("extends: a.yaml\n")) == ["a.yaml:1:10: extends: 'c.yaml' builds on itself"]
    (found,) = problems(write(BASE + "emulation: {accelerator: fp8-trainin}\n"))
    assert found.startswith("c.yaml:7:26: emulation.accelerator: no such file, nor one of the accelerators ")
    assert found.endswith("(got 'fp8-trainin'); did you mean 'fp8-training'?")
    assert problems("quickstrat")[0].endswith("(got 'quickstrat'); did you mean 'quickstart'?")
    assert problems(write("extends: [3]\n")) == ["c.yaml:1:11: extends: must be a name or a path (got 3)"]


def test_accelerator_keys_are_overridden_mapping_by_mapping(write: Write) -> None:
    text = "emulation:\n  accelerator: fp8-training\n  exclude: []\n  weights: null\n"
    text += "  gradients: {pruning: {sparsity: 0.5}}\n"
    emulation = load_config(write(BASE + text)).emulation
    preset = load_config(write(BASE + "emulation: {accelerator: fp8-training}\n")).emulation
    assert emulation is not None
    assert preset is not None
    assert emulation.gradients is not None
    assert preset.gradients is not None
    assert emulation.gradients.pruning == Pruning(sparsity=0.5)
    assert emulation.gradients.model_copy(update={"pruning": None}) == preset.gradients.model_copy(
        update={"pruning": None}
    )
    assert (emulation.exclude, emulation.weights, emulation.activations) == ([], None, preset.activations)


def test_a_dense_preset_differs_only_in_pruning() -> None:
    pruned = parse_config(base() | {"emulation": {"accelerator": "fp8-training"}}).emulation
    dense = parse_config(base() | {"emulation": {"accelerator": "fp8-dense"}}).emulation
    assert pruned is not None
    assert pruned.gradients is not None
    gradients = pruned.gradients.model_copy(update={"codec": "dense", "pruning": None})
    assert dense == pruned.model_copy(update={"gradients": gradients})


def test_format_files_become_part_of_the_config(write: Write) -> None:
    write("exponent_bits: 4\nmantissa_bits: 1\nbias: 9\npolicy: finite\n", "chips/small.yaml")
    write("weights: {format: small.yaml}\nactivations: {format: fp6-e3m2-b6}\n", "chips/chip.yaml")
    config = load_config(write(BASE + "emulation: {accelerator: chips/chip.yaml}\n"))
    weights, activations = (config.model_dump()["emulation"][role]["format"] for role in ("weights", "activations"))
    assert weights == {
        "name": "small",
        "exponent_bits": 4,
        "mantissa_bits": 1,
        "bias": 9,
        "policy": "finite",
        "subnormals": True,
        "signed": None,
        "alpha_codes": False,
    }
    assert (activations["name"], activations["bias"]) == ("fp6-e3m2-b6", 6)
    write("exponent_bits: 4\nmantisa_bits: 1\n", "chips/small.yaml")
    assert problems("c.yaml") == [
        "chips/small.yaml:1:1: emulation.weights.format.mantissa_bits: missing; this key is required",
        "chips/small.yaml:2:1: emulation.weights.format.mantisa_bits: unknown key; did you mean 'mantissa_bits'?",
    ]


def test_a_format_that_cannot_exist_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(base() | {"emulation": {"weights": {"format": {"exponent_bits": 0, "mantissa_bits": 0}}}})
    (problem,) = caught.value.problems
    assert problem.path == "emulation.weights.format.exponent_bits"


# --- formats --------------------------------------------------------------------------------------------------------


def tensor(text: str, role: str = "weights") -> TensorSpec:
    """The tensor specification of a role, written in YAML."""
    emulation = parse_config(base(), [f"emulation.{role}={text}"]).emulation
    assert emulation is not None
    spec = getattr(emulation, role)
    assert isinstance(spec, TensorSpec)
    return spec


def format_of(text: str) -> accel.Format | accel.BlockFormat:
    """The format that a value of the key `format` means."""
    return number_format(tensor(f"{{format: {text}}}").format)


def test_the_choices_are_those_of_accel() -> None:
    def choices(section: type[BaseModel], key: str) -> tuple[object, ...]:
        """The values of a Literal, or of a Literal or null."""
        annotation = section.model_fields[key].annotation
        inner = [argument for argument in get_args(annotation) if get_origin(argument) is Literal]
        return get_args(inner[0] if inner else annotation)

    assert choices(FormatSpec, "policy") == tuple(POLICIES)
    assert choices(BlockFormatSpec, "scale_rule") == tuple(SCALE_RULES)
    assert choices(BlockFormatSpec, "padding") == tuple(PADDINGS)
    assert choices(TensorSpec, "rounding") == ROUNDINGS
    assert choices(TensorSpec, "flush_subnormals") == FLUSHES
    for section, made in ((FormatSpec, accel.Format), (BlockFormatSpec, accel.BlockFormat)):
        assert set(section.model_fields) == {field.name for field in dataclasses.fields(made)}


@pytest.mark.parametrize("fmt", accel.formats(), ids=lambda fmt: fmt.name)
def test_every_preset_can_be_said_by_name_and_in_full(fmt: accel.Format | accel.BlockFormat) -> None:
    assert format_of(fmt.name) == fmt
    mapping = to_mapping(fmt)
    assert format_of(json.dumps(mapping)) == fmt
    assert load_format(json.dumps(mapping)) == fmt
    assert dataclasses.replace(format_of(f"{{base: {fmt.name}}}"), name=fmt.name) == fmt


@pytest.mark.parametrize("text", ["e3m4", "int6", "uint8", '"fixed<8,4>"', "bfp8", "e5m2p3109", "mxfp4"])
def test_the_texts_of_accel_are_formats(text: str) -> None:
    assert format_of(text) == accel.format(text.strip('"'))


def test_scalar_keys() -> None:
    fmt = format_of("{exponent_bits: 4, mantissa_bits: 4, signed: false, policy: finite, subnormals: false, name: u}")
    assert fmt == accel.Format("u", 4, 4, 7, "finite", subnormals=False, signed=False)
    fmt = format_of("{exponent_bits: 8, mantissa_bits: 0, policy: scale}")
    assert fmt == accel.Format("e8m0", 8, 0, 127, "scale", signed=False)
    fmt = format_of("{exponent_bits: 0, mantissa_bits: 7, policy: integer}")
    assert fmt == accel.Format("e0m7", 0, 7, -6, "integer")


def test_a_base_gives_what_is_not_said() -> None:
    fmt = format_of("{base: mxfp4, block_size: 16}")
    assert fmt == dataclasses.replace(accel.format("mxfp4"), name="mxfp4*", block_size=16)
    fmt = format_of("{base: e4m3fn, bias: 9, name: low}")
    assert fmt == accel.Format("low", 4, 3, 9, "fn")
    assert format_of("{base: e4m3fn, bias: null}") == accel.Format("e4m3fn*", 4, 3, 7, "fn")
    fmt = format_of("{base: {base: mxfp6-block16, axis: 0}, element: {base: e3m2, bias: 6}, name: b}")
    assert isinstance(fmt, accel.BlockFormat)
    assert (fmt.name, fmt.block_size, fmt.axis, fmt.element.bias, fmt.element.name) == ("b", 16, 0, 6, "e3m2*")


def test_the_block_format_file() -> None:
    expected = accel.BlockFormat("mxfp6-block16", accel.Format("e3m2", 3, 2, 3, "finite"), accel.format("e8m0fnu"), 16)
    assert load_format("mxfp6-block16") == expected
    assert load_format(str(preset_folder() / "formats" / "mxfp6-block16.yaml")) == expected
    in_short = load_format("{base: mxfp6_e3m2, block_size: 16}")
    assert dataclasses.replace(in_short, name="mxfp6-block16") == expected


def test_files_build_on_files_and_have_files_as_parts(write: Write) -> None:
    write("base: e3m2\nbias: 6\n", "chips/low.yaml")
    write("element: low.yaml\nblock_size: 8\n", "chips/low8.yaml")
    write("weights: {format: low8.yaml}\nactivations: {format: {base: low8.yaml, block_size: 4}}\n", "chips/chip.yaml")
    config = load_config(write(BASE + "emulation: {accelerator: chips/chip.yaml}\n"))
    assert config.emulation is not None
    assert config.emulation.weights is not None
    assert config.emulation.activations is not None
    low = accel.Format("low", 3, 2, 6, "finite")
    expected = accel.BlockFormat("low8", low, accel.format("e8m0fnu"), 8)
    assert number_format(config.emulation.weights.format) == expected
    smaller = dataclasses.replace(expected, name="low8*", block_size=4)
    assert number_format(config.emulation.activations.format) == smaller
    assert load_config(write(config_to_yaml(config), "resolved.yaml")) == config
    assert load_format("chips/low8.yaml") == expected


def test_a_format_laid_on_one_of_another_kind_replaces_it(write: Write) -> None:
    write("weights: {format: {exponent_bits: 4, mantissa_bits: 3, policy: fn}}\n", "scalar.yaml")
    write("weights: {format: {element: e2m1, block_size: 16, axis: 0}}\n", "block.yaml")

    def weights(accelerator: str, own: str) -> accel.Format | accel.BlockFormat:
        text = f"emulation: {{accelerator: {accelerator}, weights: {{format: {own}}}}}\n"
        emulation = load_config(write(BASE + text)).emulation
        assert emulation is not None
        assert emulation.weights is not None
        return number_format(emulation.weights.format)

    assert weights("scalar.yaml", "{bias: 9}") == accel.Format("e4m3", 4, 3, 9, "fn")
    assert weights("scalar.yaml", "{element: e3m2, block_size: 8}") == accel.format(
        {"element": "e3m2", "block_size": 8}
    )
    assert weights("scalar.yaml", "{base: e5m2}") == dataclasses.replace(accel.format("e5m2"), name="e5m2*")
    block = weights("block.yaml", "{block_size: 8}")
    assert isinstance(block, accel.BlockFormat)
    assert (block.element.name, block.block_size, block.axis) == ("e2m1", 8, 0)
    assert weights("block.yaml", "{exponent_bits: 3, mantissa_bits: 2}") == accel.format("e3m2")


@pytest.mark.parametrize(
    ("text", "path", "message"),  # ^: where the problem is placed; nowhere: at the key `format`
    [
        ("{element: e2m1}", ".block_size", "missing; this key is required"),
        ("{block_size: 8}", ".element", "missing; this key is required"),
        ("{element: e2m1, block_size: ^0}", ".block_size", "must be >= 1 (got 0)"),
        ("{element: e2m1, ^blok_size: 8, block_size: 8}", ".blok_size", "unknown key; did you mean 'block_size'?"),
        ("{element: ^e4m3fm, block_size: 8}", ".element", str(error_of("e4m3fm"))),
        ("{element: ^mxfp4, block_size: 8}", ".element", "must be a scalar format (got the block format 'mxfp4')"),
        (
            "{element: ^{element: e2m1, block_size: 8}, block_size: 8}",
            ".element",
            "must be a scalar format: a name, a file or a mapping (got a mapping)",
        ),
        (
            "{element: {exponent_bits: 2, mantissa_bits: ^24}, block_size: 8}",
            ".element.mantissa_bits",
            "must be <= 23 (got 24)",
        ),
        (
            "{base: nvfp4, scale_rule: ^flor}",
            ".scale_rule",
            "must be 'floor', 'ceil', 'even', 'rceil' or 'amax' (got 'flor'); did you mean 'floor'?",
        ),
        (
            "{base: ^nvfp4, scale: e8m0fnu}",
            ".scale_rule",
            "format 'nvfp4*': scale_rule 'amax' does not go with a scale of policy 'scale': 'amax' makes any number, "
            "the other rules powers of two (policy 'scale', such as e8m0fnu)",
        ),
        (
            "{base: e2m1, policy: ^scale}",
            ".policy",
            "format 'e2m1*': policy 'scale' needs mantissa_bits = 0, signed: false and subnormals left true (got M=1, "
            "signed=True, subnormals=True)",
        ),
        ("{base: e2m1, ^block_size: 8}", ".block_size", "unknown key"),
        ("{base: ^[e2m1]}", ".base", "must be the name of a format, a file or a mapping (got a list)"),
        ("{^bsae: e2m1, exponent_bits: 2, mantissa_bits: 1}", ".bsae", "unknown key; did you mean 'base'?"),
        ("^mxfp6-blok16", "", "unknown format 'mxfp6-blok16' (did you mean the format file 'mxfp6-block16'?)"),
    ],
)
def test_one_problem_of_a_format(write: Write, text: str, path: str, message: str) -> None:
    line = f"emulation: {{weights: {{format: {text}}}}}\n"
    column = (line.index("^") if "^" in line else line.index("format")) + 1
    assert problems(write(BASE + line.replace("^", ""))) == [
        f"c.yaml:7:{column}: emulation.weights.format{path}: {message}"
    ]


def test_a_format_file_that_builds_on_itself(write: Write) -> None:
    write("base: b.yaml\nbias: 3\n", "a.yaml")
    write("base: a.yaml\n", "b.yaml")
    text = BASE + "emulation: {weights: {format: a.yaml}}\n"
    assert problems(write(text)) == ["b.yaml:1:7: emulation.weights.format.base.base: 'a.yaml' builds on itself"]


@pytest.mark.parametrize(
    ("role", "text", "key", "message"),
    [
        (
            "weights",
            "{format: e2m1, random_bits: 8}",
            "random_bits",
            "needs rounding stochastic: nearest_even draws no",
        ),
        (
            "weights",
            "{format: e2m1, rounding: up, random_bits: 8}",
            "random_bits",
            "needs rounding stochastic: up draws",
        ),
        ("weights", "{format: e2m1, rounding: stochastic, random_bits: 33}", "random_bits", "must be <= 32 (got 33)"),
        ("weights", "{format: e2m1, flush_subnormals: inputs}", "flush_subnormals", "must be false, true, 'input' or"),
        ("weights", "{format: mxfp4, scale: amax}", "scale", "must be 'none' with the block format 'mxfp4', whose"),
        ("weights", "{format: mxfp4, granularity: channel}", "granularity", "must be 'tensor' with the block format"),
        (
            "weights",
            "{format: {base: e4m3fn, alpha_codes: true}}",
            "format",
            "alpha_codes are allowed only for gradients",
        ),
        ("gradients", "{format: {base: e4m3fn, alpha_codes: true}}", "format", "alpha_codes are allowed only for"),
        ("gradients", "{format: mxfp4, pruning: {sparsity: 0.5}}", "codec", "must be 'alpha' or 'alpha_tag' with"),
        (
            "gradients",
            "{format: mxfp4, codec: rle}",
            "codec",
            "'rle' needs a scalar format (got the block format 'mxfp4')",
        ),
        ("weights", "{format: e5m2, codec: rle(17)}", "codec", "codec 'rle(17)': a run takes 1 to 16 bits"),
        ("weights", "{format: e5m2, codec: alpha_tag}", "codec", "'alpha_tag' is allowed only for gradients"),
        (
            "gradients",
            "{format: e5m2, granularity: channel, pruning: {sparsity: 0.5}}",
            "granularity",
            "'channel' with pruning needs a codec that tags alpha",
        ),
    ],
)
def test_keys_of_a_tensor_that_do_not_fit_together(role: str, text: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tensor(text, role)
    (problem,) = caught.value.problems
    assert problem.path == f"emulation.{role}.{key}"
    assert problem.message.startswith(message)


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("weights", "{format: mxfp4, rounding: stochastic, random_bits: 8, flush_subnormals: true}"),
        ("weights", "{format: e4m3fn, rounding: toward_zero, flush_subnormals: output}"),
        ("gradients", "{format: {base: e4m3fn, alpha_codes: true}, pruning: {sparsity: 0.5}}"),
        ("gradients", "{format: {base: e5m2, alpha_codes: true}, granularity: channel, pruning: {sparsity: 0.5}}"),
        ("gradients", "{format: nvfp4, codec: alpha, pruning: {sparsity: 0.5}}"),
        ("gradients", "{format: mxfp8_e5m2}"),
    ],
)
def test_keys_of_a_tensor_that_fit_together(role: str, text: str) -> None:
    spec = tensor(text, role)
    assert number_format(spec.format) == number_format(type(spec)(**spec.model_dump()).format)


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides(write: Write) -> None:
    text = BASE + "emulation:\n  accelerator: fp8-training\n  overrides: [{match: fc1, weights: null}]\n"
    given_overrides = [
        "seed=0x10",
        "training.optimizer.learning_rate=1e-3",
        "model={name: mlp, hidden: [4]}",
        "model.hidden.0=5",
        "emulation.exclude.1=fc3",
        "emulation.overrides.0.match=fc2",
        "emulation.gradients.pruning.sparsity=0.9",
        "output=a=b",
    ]
    config = load_config(write(text), given_overrides)
    assert (config.seed, config.training.optimizer.learning_rate, config.output) == (16, 0.001, "a=b")
    assert config.model.model_dump() == {"name": "mlp", "hidden": [5]}
    assert config.emulation is not None
    assert config.emulation.exclude == ["first", "fc3"]
    assert config.emulation.overrides[0].match == "fc2"
    assert isinstance(config.emulation.gradients, GradientSpec)
    assert config.emulation.gradients.pruning == Pruning(sparsity=0.9)
    assert load_config("c.yaml", ["emulation=null"]).emulation is None
    assert load_config("c.yaml", ["emulation=null", "emulation.ledger.every_steps=3"]).emulation is not None


def test_an_override_can_change_the_accelerator(write: Write) -> None:
    path = write(BASE + "emulation: {accelerator: fp8-training, exclude: [last]}\n")
    emulation = load_config(path, ["emulation.accelerator=fp8-dense"]).emulation
    assert emulation is not None
    assert emulation.gradients is not None
    assert (emulation.exclude, emulation.gradients.pruning) == (["last"], None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epoch=3", "<overrides>: training.epoch: unknown key; did you mean 'epochs'?"),
        ("training.epochs=x", "<overrides>: training.epochs: must be an integer (got 'x')"),
        ("training.epochs=", "<overrides>: training.epochs: must be an integer (got null)"),
        ("training", "<overrides>: an override must be key=value (got 'training')"),
        ("a..b=1", "<overrides>: an override must be key=value (got 'a..b=1')"),
        ("seed.x=1", "<overrides>: seed.x: seed is not a mapping (it is 5)"),
        (
            "model.hidden.3=1",
            "<overrides>: model.hidden.3: model.hidden is a list of 1: its indices count from 0 (got '3')",
        ),
        ("seed=[1", "<overrides>: seed: expected ',' or ']', but got '<stream end>', while parsing a flow sequence"),
        ("extends=digits", "<overrides>: extends: can be given only in a file"),
        (".".join("a" * 5000) + "=1", "<overrides>: a.a.a: nested deeper than 64 levels"),
    ],
)
def test_bad_overrides(write: Write, override: str, expected: str) -> None:
    path = write(BASE.replace("{name: mlp}", "{name: mlp, hidden: [8]}") + "seed: 5\n")
    assert problems(path, (override,)) == [expected]


# --- out again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_loads_and_fits_the_schema_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load_config(path.stem)
    assert config.name == path.stem
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(to_data(parse_yaml(path.read_text("utf-8"), path.name)))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config_to_yaml(config), "utf-8")
    again = load_config(resolved)
    assert again == config
    assert config_hash(again) == config_hash(config)
    validator.validate(to_data(parse_yaml(resolved.read_text("utf-8"), path.name)))


def test_an_override_keeps_the_difference_of_unset_and_null(write: Write) -> None:
    config = load_config(write(BASE + "emulation: {overrides: [{match: fc, weights: null}]}\n"))
    again = load_config(write(config_to_yaml(config), "again.yaml"))
    assert again.emulation is not None
    assert again.emulation.overrides[0].model_fields_set == {"match", "weights"}
    unset = parse_config(base() | {"emulation": {"overrides": [{"match": "fc"}]}})
    assert config_hash(config) != config_hash(unset)


def test_hash_leaves_out_what_changes_no_result() -> None:
    config = parse_config(base())
    assert config_hash(parse_config(base(), ["output=elsewhere", "threads=1"])) == config_hash(config)
    assert config_hash(parse_config(base(), ["seed=1"])) != config_hash(config)
    assert config_hash(parse_config(base(), ["name=x"])) != config_hash(config)
    assert len(config_hash(config)) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"modle": 1},
        {"data": {"name": "mnist5l"}},
        {"training": {"optimizer": {"name": "sgd", "betas": [0, 0]}}},
        {"emulation": {"gradients": {"pruning": {"sparsity": 1}}}},
        {"seed": "0"},
    ],
)
def test_schema_refuses(changes: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(base())
    assert not validator.is_valid(base() | changes)


@pytest.mark.parametrize(
    ("fmt", "is_valid"),
    [
        ({"base": "mxfp4", "block_size": 16}, True),
        ({"base": {"element": "e2m1", "block_size": 16}, "axis": 0}, True),
        ({"element": {"base": "e3m2", "bias": 6}, "block_size": 8, "scale_rule": "rceil"}, True),
        ({"exponent_bits": 4, "mantissa_bits": 3, "policy": "p3109", "alpha_codes": True}, True),
        ({"base": "mxfp4", "block_size": 8, "exponent_bits": 3}, False),
        ({"base": "mxfp4", "scale_rule": "flor"}, False),
        ({"base": 3}, False),
    ],
)
def test_schema_of_formats(fmt: dict[str, Any], is_valid: bool) -> None:
    config = base() | {"emulation": {"weights": {"format": fmt, "flush_subnormals": "input"}}}
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(config) == is_valid


def test_schema_file_is_up_to_date_and_describes_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads((preset_folder() / "fpsim.schema.json").read_text("utf-8")) == schema
    objects = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    keys = [item for part in objects for item in part["properties"].items()]
    sections = {f"#/$defs/{name}": part for name, part in schema["$defs"].items()}
    undescribed = [key for key, value in keys if "description" not in value | sections.get(value.get("$ref"), {})]
    assert undescribed == []


def test_presets_are_found_with_their_first_comment() -> None:
    found = {(preset.kind, preset.name): preset for preset in presets()}
    assert {("experiments", "quickstart"), ("accelerators", "fp8-dense"), ("formats", "fp6-e3m2-b6")} <= set(found)
    assert found["experiments", "digits"].summary.startswith("A small MLP on the 8x8 digits")
    assert all(preset.summary and preset.path.is_file() for preset in found.values())


# --- anything at all ------------------------------------------------------------------------------------------------


def valid_or_config_error(read: Callable[[], Config]) -> None:
    """Fails for any other exception."""
    with contextlib.suppress(ConfigError):
        assert isinstance(read(), Config)


KEYS = st.sampled_from(sorted(json_schema()["$defs"]["TensorSpec"]["properties"])) | st.text(max_size=5)
KEYS |= st.sampled_from(["version", "name", "seed", "data", "model", "training", "emulation", "extends", "accelerator"])
KEYS |= st.sampled_from(["weights", "gradients", "overrides", "pruning", "refresh", "optimizer", "schedule", "hidden"])
VALUES = SCALARS | st.sampled_from(["e4m3fn", "digits", "mlp", "sgd", "alpha", "quickstart", "re:["]) | st.binary()
TREES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=4),
    max_leaves=12,
)
SLOW_START = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


@SLOW_START
@given(st.dictionaries(KEYS, TREES, max_size=5), st.booleans())
def test_any_mapping_is_valid_or_a_config_error(mapping: dict[str, Any], with_base: bool) -> None:
    valid_or_config_error(lambda: parse_config(base() | mapping if with_base else mapping))


@SLOW_START
@given(st.sampled_from(["emulation.weights", "emulation.overrides.0", "training.optimizer.betas.1", ""]), st.text())
def test_any_override_is_valid_or_a_config_error(key: str, text: str) -> None:
    valid_or_config_error(lambda: parse_config(base(), [f"{key}={text}", text]))


@SLOW_START
@given(st.text(alphabet=" \n\t:-[]{}&*!|>'\"%@,#?ab1\\", max_size=40))
def test_any_text_is_yaml_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_yaml(text, "f")
