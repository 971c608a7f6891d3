"""Malformed configurations: whatever is wrong with a file, `fpsim run` says so in one line that begins with the file
and the line, exits with code 2, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import typer
import yaml

from accel import Machine
from fpsim import cli
from fpsim.config import Config, config_to_yaml, json_schema, load_config, parse_config, presets
from fpsim.config.tree import Path as KeyPath
from fpsim.config.tree import to_data
from fpsim.config.yaml_loader import MAX_BYTES, parse_yaml
from fpsim.errors import MOST_SHOWN
from tests.fpsim.command_line import command

pytestmark = pytest.mark.usefixtures("restored_threads")

FILE = "bad.yaml"
WIDEST = 620  # characters of a line: an unknown format's lists all those that there are
SECONDS = 5.0  # of processor time for one file
COMMANDS = typer.main.get_command(cli.app)  # built once, not for every file

# --- valid configurations, in which the mistakes are made ------------------------------------------------------------

TINY = """\
name: tiny
threads: 1
data: {name: synthetic, train_samples: 24, test_samples: 8, image_size: 4}
model: {name: mlp, hidden: [8]}
training:
  epochs: 2
  batch_size: 8
  optimizer: {name: sgd, learning_rate: 0.1}
"""
SECTIONS = {
    "data": [
        "{name: digits, train_limit: 3}",
        "{name: mnist, root: x}",
        "{name: cifar100, root: x}",
        "{name: imagefolder, root: x}",
        "{name: wine}",
    ],
    "model": [f"{{name: {name}}}" for name in ("resnet18", "vgg16", "densenet121", "mobilenet_v2", "gpt")],
    "training.schedule": ["{name: step, milestones_epochs: [1, 2], factor: 0.5}", "{name: constant}"],
    "training.optimizer": ["{name: adam, learning_rate: 0.1}"],
    "training.communication": ["{format: e5m2, scale: 0.5, codec: bitmask, sparsity: 0.5}"],
    "emulation.weight_pruning": [
        "{name: dense}",
        "{name: dpf, sparsity: 0.5, ramp_epochs: 1}",
        "{name: gmp, sparsity: 0.5, ramp_epochs: 1, exclude: [first]}",
        "{name: magnitude, sparsity: 0.5, at_epochs: 1}",
    ],
}
EMULATIONS = """\
weights: {format: {name: own, exponent_bits: 4, mantissa_bits: 3}, rounding: stochastic}
activations:
  format: {element: {exponent_bits: 2, mantissa_bits: 1}, scale: {exponent_bits: 8, mantissa_bits: 0, policy: scale},
    block_size: 4}
gradients: {format: e5m2, scale: 0.5, pruning: {sparsity: 0.8, refresh: 3}, codec: alpha}
datapath: {forward: fp32, dgrad: {base: bf16-acc, chunk: 4, outer: fp32}}
overrides: [{match: first, weights: null}, {match: last, gradients: {format: e4m3fn, scale: amax}}]
products: [{match: "*", datapath: {forward: {accumulator: {exponent_bits: 8, mantissa_bits: 10}}}}]
weight_pruning: {name: snr, estimator: ema, threshold: {false_prune_rate: 0.1}, exclude: [last]}
saved_activations: {format: bf16}
accelerator: edge-npu
exclude: [first, "re:x.*"]
"""


def valid_configurations() -> Iterator[Config]:
    """The sections above one by one, and the experiments."""
    tiny: dict[str, Any] = to_data(parse_yaml(TINY, FILE))
    for key, sections in SECTIONS.items():
        for section in sections:
            yield parse_config(tiny, [f"{key}={section}"])
    for key, section in to_data(parse_yaml(EMULATIONS, FILE)).items():
        yield parse_config(tiny | {"emulation": {key: section}})
    yield from (load_config(preset.path) for preset in presets() if preset.kind == "experiments")


# --- places in them ---------------------------------------------------------------------------------------------------

SCHEMAS: list[tuple[KeyPath, dict[str, Any]]] = [
    (("emulation", "machine"), Machine.model_json_schema()),
    ((), Config.model_json_schema()),
]


class Spot(NamedTuple):
    """A value in a text of one key or item a line. `key_line` counts from 1: of its key, else of the item."""

    text: str
    path: KeyPath
    node: yaml.Node
    key_line: int
    schemas: list[dict[str, Any]]

    @property
    def id(self) -> str:
        return ".".join(map(str, self.path)) or "top"

    def replaced(self, new: str) -> str:
        """The text with another value here, on the line of its key."""
        start, end = self.node.start_mark.index, self.node.end_mark.index
        before, after = self.text[:start], self.text[start:end].rstrip()
        return f"{before.rstrip()} {new}{self.text[start + len(after) :]}"

    def with_key(self, key: str) -> str:
        """The text with another key before those of this mapping."""
        start, column = self.node.start_mark.index, self.node.start_mark.column
        return f"{self.text[:start]}{key}: 1\n{' ' * column}{self.text[start:]}"

    def without(self, key: str) -> str:
        """The text without a key of this mapping."""
        if len(self.node.value) == 1:
            return self.replaced("{}")
        starts = [key_node.start_mark.index for key_node, _ in self.node.value]
        at = [key_node.value for key_node, _ in self.node.value].index(key)
        if at < len(starts) - 1:
            return self.text[: starts[at]] + self.text[starts[at + 1] :]
        through = self.text[: self.node.end_mark.index].rstrip()
        return self.text[: starts[at]].rstrip() + self.text[len(through) :]


def spots(text: str) -> Iterator[Spot]:
    """Every value of a configuration's text, mappings and lists included."""

    def walk(node: yaml.Node, path: KeyPath, key_line: int, schemas: list[dict[str, Any]]) -> Iterator[Spot]:
        if path == SCHEMAS[0][0]:
            schemas = [SCHEMAS[0][1]]
        root = SCHEMAS[0 if path[:2] == SCHEMAS[0][0] else 1][1]
        found = members(schemas, root, node)
        yield Spot(text, path, node, key_line, found)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                below = [schema["properties"][key.value] for schema in found if key.value in schema["properties"]]
                yield from walk(value, (*path, key.value), key.start_mark.line + 1, below)
        elif isinstance(node, yaml.SequenceNode):
            below = [schema["items"] for schema in found if "items" in schema]
            for index, item in enumerate(node.value):
                yield from walk(item, (*path, index), item.start_mark.line + 1, below)

    yield from walk(yaml.compose(text, yaml.SafeLoader), (), 1, [SCHEMAS[1][1]])


def members(schemas: list[dict[str, Any]], root: dict[str, Any], node: yaml.Node) -> list[dict[str, Any]]:
    """The schemas without references and unions; of a mapping, those that know its name and all its keys."""
    found = []
    for schema in schemas:
        if "$ref" in schema:
            found += members([root["$defs"][schema["$ref"].rpartition("/")[2]]], root, node)
        elif "anyOf" in schema or "oneOf" in schema:
            found += members(schema.get("anyOf") or schema["oneOf"], root, node)
        else:
            found.append(schema)
    if isinstance(node, yaml.MappingNode):
        keys = {key.value: value.value for key, value in node.value}
        found = [schema for schema in found if keys.keys() <= schema.get("properties", {}).keys()]
        found = [one for one in found if one["properties"].get("name", {}).get("const") in (None, keys.get("name"))]
    return found


def all_spots() -> list[Spot]:
    """The places of all valid configurations, each kind of place once."""
    found: dict[object, Spot] = {}
    for config in valid_configurations():
        for spot in spots(config_to_yaml(config)):
            titles = [schema.get("title") for schema in spot.schemas]
            found.setdefault((re.sub(r"\d+", "0", spot.id), spot.node.id, *titles), spot)
    return list(found.values())


SPOTS = all_spots()
MAPPINGS = [spot for spot in SPOTS if isinstance(spot.node, yaml.MappingNode) and spot.node.value]


# --- mistakes that are made everywhere --------------------------------------------------------------------------------


class Case(NamedTuple):
    """A malformed file; `place`: how the first line of the errors begins after its name; `says`: what is in it."""

    kind: str
    id: str
    text: str | bytes
    place: str
    says: str = ""
    files: dict[str, str] = {}  # noqa: RUF012


WRONG_KEYS = [
    *("zzz", "Name", "'na me'", "''", "'a.b'", "'a: b'", "0x", "名前", "😀", "naïve", "'0'", "²", "x" * 1000),
    *("\u202ename", "name\u200b", "\u200f\u05d0", "'\u00a0name'", "\ufeffname", '"\\e[31mred"', '"a\\nb"', '"\\0"'),
]


def wrong_keys() -> Iterator[Case]:
    for spot, key in zip(MAPPINGS, itertools.cycle(WRONG_KEYS), strict=False):
        yield Case("wrong key", spot.id, spot.with_key(key), f"{spot.node.start_mark.line + 1}:", "unknown key")


def wrong_types() -> Iterator[Case]:
    for spot in SPOTS:
        if spot.path:
            new = _of_wrong_type(spot.node)
            yield Case("wrong type", f"{spot.id}={new}", spot.replaced(new), f"{spot.key_line}:")


def _of_wrong_type(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode) or re.fullmatch(r"[-+.\de]+|true|false", str(node.value)):
        return "zzz"
    return "{zzz: 1}" if node.value == "null" else "[1]"


def out_of_range() -> Iterator[Case]:
    by_limits = {(spot.path[-1:], str(spot.schemas)): spot for spot in SPOTS}
    for spot in by_limits.values():
        for new in dict.fromkeys(new for schema in spot.schemas for new in _out_of_range(schema)):
            yield Case("out of range", f"{spot.id}={new:.20}", spot.replaced(new), f"{spot.key_line}:", "must ")


def _out_of_range(schema: dict[str, Any]) -> Iterator[str]:
    """Values that the limits of a schema exclude."""
    if "minimum" in schema:
        yield str(schema["minimum"] - 1)
    if "maximum" in schema:
        yield str(2 * schema["maximum"] + 1)
    if "exclusiveMinimum" in schema:
        yield str(schema["exclusiveMinimum"])
    if "exclusiveMaximum" in schema:
        yield str(schema["exclusiveMaximum"])
    if "multipleOf" in schema:
        yield str(8 * schema["multipleOf"] + 1)
    if "minItems" in schema:
        yield "[]"
    if "minLength" in schema:
        yield "''"
    if "maxLength" in schema:
        yield "x" * (schema["maxLength"] + 1)
    if "pattern" in schema and "name" in schema.get("title", "").lower():
        yield "../up"
    if "enum" in schema:
        yield "ZZZ"
    if schema.get("type") == "number":
        yield "1e999"
    if schema.get("type") == "integer":
        yield "1.5"


def missing_keys() -> Iterator[Case]:
    for spot in MAPPINGS:
        for key in sorted({key for schema in spot.schemas for key in schema.get("required", [])}):
            yield Case("missing key", f"{spot.id}.{key}", spot.without(key), f"{spot.key_line}:", "missing; this key")


# --- mistakes of the text ---------------------------------------------------------------------------------------------

SYNTAX = [  # the text from line 9 on, where the mistake is, what is said
    ("a:\n\tb: 1\n", "10:1:", "'\\t' that cannot start any token"),
    ("a: [1, 2\n", "9:4:", "flow sequence"),
    ("a: [1, 2\nb: 3\n", "10:2:", "expected ',' or ']'"),
    ("a: {b: 1\n", "9:4:", "flow mapping"),
    ("a: ]\n", "9:4:", "']'"),
    ("a: }\n", "9:4:", "'}'"),
    ("a: ,\n", "9:4:", "','"),
    ("a: 'x\n", "9:4:", "quoted scalar"),
    ('a: "x\n\n\n', "9:4:", "quoted scalar"),
    ('a: "x\nb: 1\nc: "y"\n', "11:5:", ""),
    (" a: b\n", "9:2:", "block mapping"),
    ("a: 1\n b: 2\n", "10:3:", "mapping values are not allowed"),
    ("a: b: c\n", "9:5:", "mapping values are not allowed"),
    ("a: - b\n", "9:4:", "sequence entries are not allowed"),
    ("- a\n", "9:1:", "'-'"),
    ("a\n", "9:1:", "could not find expected ':'"),
    ("a\nb: 1\n", "9:1:", "could not find expected ':'"),
    ("x" * 2000 + ": 1\n", "9:1:", "could not find expected ':'"),
    ("---\na: 1\n", "9:1:", "another document"),
    ("...\n---\na: 1\n", "10:1:", "another document"),
    ("? : 1\n", "9:3:", "':'"),
    ("<<: {a: 1}\n", "9:1:", "merge keys"),
    ("a: &a {}\nb: {<<: *a}\n", "10:5:", "merge keys"),
    ("a: *nowhere\n", "9:4:", "undefined alias 'nowhere'"),
    ("a: *\n", "9:4:", "alias"),
    ("a: &\n", "9:4:", "anchor"),
    ("a: &b *b\n", "9:7:", "'<alias>'"),
    ("a: &b 1\nc: &b 2\n", "10:4:", "duplicate anchor"),
    ("a: !!python/object:os.system x\n", "9:4:", "tag '!!python/object:os.system'"),
    ("a: !!python/object/apply:os.system [ls]\n", "9:4:", "tag"),
    ("a: !!binary aGVsbG8=\n", "9:4:", "tag '!!binary'"),
    ("a: !!set {x}\n", "9:4:", "tag '!!set'"),
    ("a: !own x\n", "9:4:", "tag '!own'"),
    ("a: !e!x y\n", "9:4:", "undefined tag handle '!e!'"),
    ("a: !<x\n", "9:4:", "while parsing a tag"),
    ("a: !!int x\n", "9:4:", "not a value of type int"),
    ("a: !!float x\n", "9:4:", "not a value of type float"),
    ("a: !!bool 7\n", "9:4:", "not a value of type bool"),
    ("a: @b\n", "9:4:", "'@'"),
    ("a: `b\n", "9:4:", "'`'"),
    ("a: %b\n", "9:4:", "'%'"),
    ("a: |x\n", "9:5:", "block scalar"),
    ("name: again\n", "9:1:", "duplicate key (first given at line 1"),
    ('"name": again\n', "9:1:", "duplicate key (first given at line 1"),
    ("~: 1\n", "9:1:", "a key must be a string"),
    ("7: 1\n", "9:1:", "a key must be a string"),
    ("[a]: 1\n", "9:1:", "a key must be a string (got a sequence)"),
    ("{a: b}: 1\n", "9:1:", "a key must be a string (got a mapping)"),
    ('a: "\\q"\n', "9:6:", "unknown escape character 'q'"),
    ('a: "\\x"\n', "9:7:", "2 hexadecimal numbers"),
    ('a: "\\U00110000"\n', "9:7:", "invalid YAML"),
    ('a: "\\Uffffffff"\n', "9:7:", "invalid YAML"),
]
UNICODE: list[tuple[str | bytes, str, str]] = [
    ('a: "\\ud800"\n', "9:4:", "half of a surrogate pair"),
    ('"\\udcff": 1\n', "9:1:", "half of a surrogate pair"),
    (b"a: \xff\n", "9:4:", "not UTF-8 text (got byte 0xff)"),
    (b"a: \xc3\x28\n", "9:4:", "not UTF-8 text (got byte 0xc3)"),
    (b"a: \xed\xa0\x80\n", "9:4:", "not UTF-8 text (got byte 0xed)"),
    (b"a: \xc0\xaf\n", "9:4:", "not UTF-8 text (got byte 0xc0)"),
    ("a: \0\n", "9:4:", "'\\x00' is not allowed"),
    ("\x1b[2J: 1\n", "9:1:", "'\\x1b' is not allowed"),
    ("a: \x07\n", "9:4:", "'\\x07' is not allowed"),
    ("a: \x9b31m\n", "9:4:", "'\\x9b' is not allowed"),
    ("a: \ufffe\n", "9:4:", "'\\ufffe' is not allowed"),
    ("a: 1 # \u202e hidden \u2066\n", "9:1:", "unknown key"),
    ("a: [\u2028 1\n", "9:4:", ""),
    ("\x85b: 1\n", "10:1:", "unknown key"),
    ("😀: {\U0001f1e9\U0001f1ea: [👩\u200d👩\u200d👧]}\n", "9:1:", "unknown key"),
    ("\u0430: 1\n", "9:1:", "unknown key"),
    ('emulation: {exclude: ["\\e]0;title\\a"], weights: {format: "\\e[31me4m3"}}\n', "9:58:", "unknown format"),
    ("emulation: {weights: {format: e4m3, codec: \u202ealpha}}\n", "9:44:", "unknown codec"),
    ("emulation: {weights: {format: int\u0664\u0664}}\n", "9:31:", "int"),
    ("emulation: {accelerator: \u202egnp.yaml}\n", "9:26:", "no such file"),
    ('output: "a\\0b"\n', "9:9:", "must not hold a NUL character"),
]
HUGE = [
    ("seed: " + "9" * 100_000 + "\n", "9:7:", "more than 64 digits"),
    ("seed: 0x" + "f" * 100_000 + "\n", "9:7:", "more than 64 digits"),
    ("seed: 1e999\n", "9:7:", "must be an integer"),
    ("seed: -1\n", "9:7:", "must be >= 0"),
    ("seed: 1e2\n", "9:7:", "must be an integer"),
    ("seed: .nan\n", "9:7:", "must be an integer"),
    ("version: " + "9" * 64 + "\n", "9:10:", "config of a newer version"),
    ("version: -0.0\n", "9:10:", "must be 1"),
    ("output: " + "x/" * 400_000 + "\nseed: x\n", "10:7:", "must be an integer"),
    ("x" * 1000 + ": 1\n", "9:1:", "unknown key"),
    ("'" + "x" * 900_000 + "'\n", "9:1:", "could not find expected ':'"),
    ("a: " + "[" * 10_000 + "\n", "9:67:", "nested deeper than 64 levels"),
    ("a: " + "[" * 100 + "]" * 100 + "\n", "9:67:", "nested deeper than 64 levels"),
    ("a: " + "{a: " * 10_000 + "\n", "9:", "nested deeper than 64 levels"),
    ("a:\n" + "".join(f"{' ' * depth}- \n" for depth in range(1, 100)), "73:", "nested deeper than 64 levels"),
    ("? " * 10_000 + "\n", "9:", "nested deeper than 64 levels"),
    ("".join(f"{' ' * depth}'{'k' * 80}':\n" for depth in range(60)) + " " * 60 + "!x y\n", "69:61:", "tag '!x'"),
    ("a: [" + "1," * 100_001 + "]\n", "9:", "more than 100000 values"),
    ("a: &a [*a]\n", "9:4:", "an alias refers to a value that contains it"),
    ("a: &a {b: [1, {c: *a}]}\n", "9:", "an alias refers to a value that contains it"),
    ("a: &a [&b [*a, *b]]\n", "9:", "an alias refers to a value that contains it"),
    (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
        "",
        "aliases expand to more than 100000 values",
    ),
    ("a0: &a0 {}\n" + "".join(f"a{n}: &a{n} {{b: *a{n - 1}}}\n" for n in range(1, 80)), "", "nested deeper than 64"),
    ("".join(f"k{n}: 1\n" for n in range(2000)), "9:1:", "unknown key"),
    (f"emulation: {{weights: {{format: {'x' * 100_000}}}}}\n", "9:31:", "unknown format"),
    (f"emulation: {{weights: {{format: int{'9' * 10_000}}}}}\n", "9:31:", "unknown format"),
    (f"emulation: {{weights: {{format: e4m3, codec: rle({'9' * 10_000})}}}}\n", "9:44:", "unknown codec"),
    (f"emulation: {{weights: {{format: e4m3, codec: {'x' * 100_000}}}}}\n", "9:44:", "unknown codec"),
    (f"emulation: {{datapath: {{forward: {'x' * 100_000}}}}}\n", "9:33:", "unknown mac"),
    (f"emulation: {{accelerator: {'x' * 100_000}}}\n", "9:26:", "no such file"),
    (f"emulation: {{exclude: ['{'[' * 30_000}']}}\n", "9:23:", "must have at most 1000 characters"),
]
TEXTS: list[tuple[str | bytes, str, str]] = [  # whole files
    (b"", "1:1:", "must be a mapping (got null)"),
    (b"\xef\xbb\xbf", "1:1:", "must be a mapping (got null)"),
    (b"# nothing\n", "1:1:", "must be a mapping (got null)"),
    (b"---\n...\n", "", "must be a mapping (got null)"),
    (b"[]\n", "1:1:", "must be a mapping (got a list)"),
    (b"- data\n- model\n", "1:1:", "must be a mapping (got a list)"),
    (b"data\n", "1:1:", "must be a mapping (got 'data')"),
    (b"7\n", "1:1:", "must be a mapping (got 7)"),
    (b"!!python/object:os.system {}\n", "1:1:", "tag"),
    (b"{}\n", "1:1:", "missing; this key is required"),
    (b"%YAML 2.0\n---\na: 1\n", "1:1:", "version 1.* is required"),
    (b"%YAML x\n---\na: 1\n", "1:7:", "expected a digit"),
    (b"%YAML 1.1\n%YAML 1.1\n---\na: 1\n", "2:1:", "duplicate YAML directive"),
    (TINY.encode("utf-16"), "1:1:", "not UTF-8 text (got byte 0xff)"),
    (TINY.encode("utf-16-be"), "1:1:", "'\\x00' is not allowed"),
    (TINY.encode("utf-32"), "1:1:", "not UTF-8 text (got byte 0xff)"),
    (b"\x7fELF\x02\x01\x01\0\0\0", "1:1:", "'\\x7f' is not allowed"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "1:1:", "not UTF-8 text (got byte 0x89)"),
    (b"PK\x03\x04\x14\0\0\0", "1:3:", "'\\x03' is not allowed"),
    (bytes(range(256)), "", "not UTF-8 text"),
    (b"\r\r\r\t\tx", "4:", ""),
    (b"{" * 10_000, "1:65:", "nested deeper than 64 levels"),
    (b"&a " * 1000, "1:4:", "'<anchor>'"),
    (b"x" * 500_000, "1:1:", "must be a mapping"),
    (b"#" * (MAX_BYTES + 1), "", f"larger than {MAX_BYTES} bytes"),
    (b"extends: bad.yaml\n", "1:10:", "builds on itself"),
    (b"extends: ./x/../bad.yaml\n", "1:10:", "no such file"),
    (b"extends: digit\n", "1:10:", "did you mean 'digits'?"),
    (b"extends: .\n", "1:10:", "no such file"),
    (b"extends: 3\n", "1:10:", "must be a name or a path (got 3)"),
    (b"extends: ''\n", "1:10:", "must be a name or a path (got '')"),
    (b"extends: {a: b}\n", "1:10:", "must be a name or a path (got a mapping)"),
    (b"extends: [digits, [digits]]\n", "1:19:", "must be a name or a path (got a list)"),
    (b"extends: [digits, digits]\n", "1:10:", "names a file twice"),
    (b'extends: "a\\0b"\n', "1:10:", "no such file"),
    (b"extends: " + b"x/" * 10_000 + b"\n", "1:10:", "no such file"),
    (b"extends: digits\nmodle: {}\n", "2:1:", "did you mean 'model'?"),
    (b"extends: digits\nmodel: null\n", "2:8:", "must be a mapping (got null)"),
]
EMULATION = [  # the value of the key `emulation` on line 9, where the mistake is, what is said
    ("[]", "9:12:", "must be a mapping (got a list)"),
    ("{weights: {format: e4m3fm}}", "9:31:", "did you mean 'e4m3fn'?"),
    ("{weights: {format: e9m3}}", "9:31:", "e9m3"),
    ("{weights: {format: int0}}", "9:31:", "int0"),
    ("{weights: {format: 'fixed<8>'}}", "9:31:", "unknown format"),
    ("{weights: {format: nowhere.yaml}}", "9:31:", "no such file"),
    ("{weights: {format: {base: [x]}}}", "9:38:", "must be the name of a format"),
    ("{weights: {format: {base: {base: e4m3m}}}}", "9:45:", "unknown format"),
    ("{weights: {format: {base: e4m3fn, block_size: 4}}}", "9:46:", "unknown key"),
    ("{weights: {format: {exponent_bits: 0, mantissa_bits: 0}}}", "9:", "mantissa"),
    ("{weights: {format: {exponent_bits: 4, mantissa_bits: 3, bias: 1000}}}", "9:", "not carried by float32"),
    ("{weights: {format: {element: mxfp4, block_size: 4}}}", "9:41:", "must be"),
    ("{weights: {format: e4m3fn, codec: nm(5:4)}}", "9:46:", "1 <= n <= m <= 256"),
    ("{weights: {format: e4m3fn, codec: nm(0:4)}}", "9:46:", "1 <= n <= m <= 256"),
    ("{weights: {format: e4m3fn, codec: rle(17)}}", "9:46:", "1 to 16 bits"),
    ("{weights: {format: e4m3fn, codec: rle(-1)}}", "9:46:", "unknown codec"),
    ("{weights: {format: e4m3fn, codec: alpha}}", "9:46:", "only for gradients that are pruned"),
    ("{weights: {format: e4m3fn, pruning: {}}}", "9:39:", "unknown key"),
    ("{weights: {format: e4m3fn, scale: amx}}", "9:46:", "must be none, amax"),
    ("{weights: {format: e4m3fn, scale: true}}", "9:46:", "must be none, amax"),
    ("{weights: {format: mxfp4, scale: amax}}", "9:45:", "must be"),
    ("{gradients: {format: e5m2, adapt: epoch}}", "9:46:", "needs scale lognormal_error"),
    ("{gradients: {format: e5m2, pruning: {sparsity: 0.5, refresh: 0}}}", "9:73:", "must be >= 1"),
    ("{gradients: {format: e5m2, pruning: {policy: homogenous, sparsity: 0.5}}}", "9:57:", "did you mean"),
    ("{exclude: ['re:(']}", "9:23:", "not a regular expression"),
    ("{exclude: ['re:[[a]']}", "9:23:", "not a regular expression"),
    ("{exclude: ['re:a{99999999999}']}", "9:23:", "not a regular expression"),
    (f"{{exclude: ['re:{'(' * 900}']}}", "9:23:", "not a regular expression"),
    ("{exclude: ['re:(?P<a>x)(?P<a>y)']}", "9:23:", "not a regular expression"),
    ("{exclude: ['']}", "9:23:", "must not be empty"),
    ("{exclude: first}", "9:22:", "must be a list"),
    ("{overrides: {match: first}}", "9:24:", "must be a list"),
    ("{overrides: [{weights: null}]}", "9:25:", "missing; this key is required"),
    ("{overrides: [{match: first, pruning: null}]}", "9:40:", "unknown key"),
    ("{products: [{match: '*'}]}", "9:24:", "missing; this key is required"),
    ("{products: [{match: '*', datapath: null}]}", "9:47:", "must be a mapping"),
    ("{datapath: {forward: fp33}}", "9:33:", "unknown mac"),
    ("{datapath: {forward: {}}}", "9:", "is required where there is no base"),
    ("{datapath: {forward: {base: fp32, fraction_bits: 3}}}", "9:", "fraction_bits"),
    ("{datapath: {forward: {accumulator: mxfp4}}}", "9:47:", "must be a scalar format"),
    ("{datapath: {backward: fp32}}", "9:24:", "unknown key"),
    ("{weight_pruning: {sparsity: 0.5}}", "9:13:", "name: missing"),
    ("{weight_pruning: {name: snr}}", "5:1:", "training.micro_batches: must be 2 or more"),
    ("{weight_pruning: {name: snr, estimator: ema, beta: 0}}", "9:63:", "must be above 0"),
    ("{weight_pruning: {name: snr, threshold: {false_prune_rat: 0.1}}}", "9:41:", "did you mean"),
    ("{weight_pruning: {name: gmp, sparsity: 0.5}}", "9:13:", "ramp_epochs: missing"),
    ("{saved_activations: {codec: csr}}", "9:40:", "must be dense"),
    ("{saved_activations: {format: mxfp4}}", "9:41:", "must be a scalar format"),
    ("{saved_activations: {format: e8m0fnu}}", "9:41:", "must be a signed format"),
    ("{accelerator: [fp8-dense, nowhere]}", "9:38:", "no such file"),
    ("{accelerator: {name: x}}", "9:26:", "must be a name or a path"),
    ("{accelerator: bad.yaml}", "1:1:", "unknown key"),
    ("{machine: edge-npu}", "9:22:", "must be a mapping"),
    ("{machine: {}}", "9:13:", "machine.name: missing"),
    ("{accelerator: edge-npu, machine: {'a: b': {c: d}}}", "9:54:", "unknown key"),
    ("{accelerator: edge-npu, machine: {array: {precisions: [{bits: 8, 'x.y': 1, pj_per_mac: 1}]}}}", "9:", "unknown"),
    ("{accelerator: edge-npu, machine: {levels: []}}", "9:54:", "must have 2 or more"),
    ("{accelerator: edge-npu, machine: {clock_mhz: 1e999}}", "9:57:", "must be finite"),
    ("{accelerator: edge-npu, machine: {skips: {granularity: 3}}}", "9:67:", "must be one of"),
]
OTHER_SECTIONS = [  # replaced text of TINY, by what, where, what is said
    ("name: mlp, hidden: [8]", "name: mpl", "4:15:", "did you mean 'mlp'?"),
    ("name: mlp, hidden: [8]", "hidden: [8]", "4:1:", "name: missing"),
    ("name: mlp, hidden: [8]", "name: gpt, width: 8, heads: 3", "4:37:", "must divide the width of 8"),
    ("name: mlp, hidden: [8]", "name: densenet121, width: 9", "4:35:", "must be a multiple of 2"),
    ("hidden: [8]", "hidden: [8, 0]", "4:32:", "must be >= 1"),
    ("hidden: [8]", "hidden: [" + "x," * 5000 + "]", "4:29:", "must be an integer"),
    ("name: synthetic", "name: digits", "3:22:", "unknown key"),
    ("image_size: 4", "image_size: 4, image_size: 4", "3:76:", "duplicate key"),
    ("epochs: 2", "epochs: 2_000", "6:11:", "must be an integer (got '2_000')"),
    ("epochs: 2", "epochs: yes", "6:11:", "must be an integer (got 'yes')"),
    ("epochs: 2", "epochs: 1:30", "6:11:", "must be an integer (got '1:30')"),
    ("epochs: 2", "epochs: 2026-01-31", "6:11:", "must be an integer (got '2026-01-31')"),
    ("epochs: 2", "epochs:", "6:", "must be an integer (got null)"),
    ("epochs: 2", "epochs 2", "7:13:", "mapping values are not allowed"),
    ("batch_size: 8", "batch_size: 8\n  micro_batches: 3", "8:18:", "must divide the batch size of 8"),
    (
        "batch_size: 8",
        "batch_size: 8\n  schedule: {name: cosine, warmup_epochs: 2}",
        "8:43:",
        "must be less than the 2",
    ),
    ("learning_rate: 0.1", "learning_rate: -0", "8:41:", "must be > 0"),
    ("learning_rate: 0.1", "learning_rate: -0.0", "8:41:", "must be > 0"),
    ("learning_rate: 0.1", "learning_rate: 1e300", "8:41:", "must be <= 1e+30"),
    ("learning_rate: 0.1", "learning_rate: 1" + "0" * 400 + ".0", "8:41:", "must be finite"),
    ("learning_rate: 0.1", "learning_rate: 1, nesterov: true, momentum: 0", "8:54:", "needs momentum > 0"),
    ("name: sgd, learning_rate: 0.1", "name: adam, learning_rate: 1, betas: [0.9]", "8:52:", "at least 2"),
    ("name: tiny", "name: .hidden", "1:7:", "must match"),
    ("name: tiny", "name: " + "x" * 300, "1:7:", "must have at most 100 characters"),
    ("threads: 1", "threads: 0", "2:10:", "must be >= 1"),
    ("threads: 1", "threads: 100000", "2:10:", "must be <= 1024"),
]
FILES = [  # files on which bad.yaml builds, its text from line 9 on, where the mistake is, what is said
    ({"a.yaml": "extends: bad.yaml\n"}, "extends: a.yaml\n", "a.yaml:1:10:", "builds on itself"),
    (
        {"a.yaml": "extends: b.yaml\n", "b.yaml": "\nextends: [digits, a.yaml]\n"},
        "extends: a.yaml\n",
        "b.yaml:2:19:",
        "",
    ),
    ({"a.yaml": "emulation: {ledger: {every_steps: x}}\n"}, "extends: a.yaml\n", "a.yaml:1:35:", "must be an integer"),
    ({"a.yaml": "- 1\n"}, "extends: a.yaml\n", "a.yaml:1:1:", "must be a mapping"),
    ({"a.yaml": "x: [\n"}, "extends: a.yaml\n", "a.yaml:1:5:", "flow node"),
    ({"a.yaml": "emulaton: {}\n"}, "extends: a.yaml\n", "a.yaml:1:1:", "did you mean 'emulation'?"),
    (
        {f"{n}.yaml": f"extends: {n + 1}.yaml\n" for n in range(30)},
        "extends: 0.yaml\n",
        "14.yaml:1:10:",
        "more than 16",
    ),
    ({"sub/a.yaml": "seed: x\n"}, "extends: sub\n", f"{FILE}:9:10:", "no such file"),
    ({"sub/a.yaml": "seed: x\n"}, "extends: sub/a.yaml\n", "sub/a.yaml:1:7:", "must be an integer"),
    ({"a.yaml": "weights: {formt: e4m3}\n"}, "emulation: {accelerator: a.yaml}\n", "a.yaml:1:", ""),
    ({"a.yaml": "accelerator: a.yaml\n"}, "emulation: {accelerator: a.yaml}\n", "a.yaml:1:14:", "builds on itself"),
    ({"a.yaml": "machine: 3\n"}, "emulation: {accelerator: a.yaml}\n", "a.yaml:1:10:", "must be a mapping"),
    ({"f.yaml": "exponent_bits: 99\n"}, "emulation: {weights: {format: f.yaml}}\n", "f.yaml:1:", ""),
    ({"f.yaml": "base: f.yaml\n"}, "emulation: {weights: {format: f.yaml}}\n", "f.yaml:1:7:", "builds on itself"),
    ({"f.yaml": "e4m3fn\n"}, "emulation: {weights: {format: f.yaml}}\n", "f.yaml:1:1:", "must be a mapping"),
]


def of_texts() -> Iterator[Case]:
    """The cases of the lists above."""
    for kind, endings in (("YAML syntax", SYNTAX), ("unicode", UNICODE), ("huge, deep, aliases", HUGE)):
        for number, (ending, place, says) in enumerate(endings):
            ending = ending if isinstance(ending, bytes) else ending.encode()
            yield Case(kind, str(number), TINY.encode() + ending, place, says)
    for number, (text, place, says) in enumerate(TEXTS):
        yield Case("whole file", str(number), text, place, says)
    for number, (value, place, says) in enumerate(EMULATION):
        yield Case("emulation", str(number), f"{TINY}emulation: {value}\n", place, says)
    for number, (old, new, place, says) in enumerate(OTHER_SECTIONS):
        assert old in TINY
        yield Case("other sections", str(number), TINY.replace(old, new), place, says)
    for number, (files, ending, place, says) in enumerate(FILES):
        yield Case("several files", str(number), TINY + ending, place, says, files)


CASES = [*wrong_keys(), *wrong_types(), *out_of_range(), *missing_keys(), *of_texts()]
PLACELESS = ["larger than"]  # what is wrong with a file as a whole


# --- what must come of them -------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The first line of every problem that `fpsim run` finds, after what holds of every refusal."""
    monkeypatch.setattr(cli, "app", COMMANDS)
    before, started = sorted(Path().rglob("*")), time.process_time()
    out, err, code = command("run", capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert time.process_time() - started < SECONDS
    assert sorted(Path().rglob("*")) == before
    return checked(err)


def checked(err: str) -> list[str]:
    """The first line of every problem in what is printed, which a terminal can show."""
    lines = err.split("\n")
    assert lines.pop() == ""
    assert 1 <= len(lines) <= 3 * MOST_SHOWN + 1
    assert "Traceback" not in err
    for line in lines:
        assert len(line) <= WIDEST
        assert line.replace("\t", "").isprintable()
    return [line for line in lines if not line.startswith("    ")]


def write(case: Case) -> None:
    Path(FILE).write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    for name, text in case.files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.kind}-{case.id}"[:90]) for case in CASES])
def test_a_malformed_file(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(case)
    problems = refusal(capsys, monkeypatch, FILE)
    assert case.says in "\n".join(problems)
    is_placed = re.compile(rf"({re.escape(FILE)}|[\w/]+\.yaml):\d+:\d+: ")
    if not case.says.startswith(tuple(PLACELESS)):
        assert all(is_placed.match(line) for line in problems if not line.startswith("... and "))
    place = case.place if ".yaml" in case.place else f"{FILE}:{case.place}"
    assert problems[0].startswith(place)


# The mistakes that are found only with the data and the model: replaced text of TINY, and more of it.
DATA = "name: synthetic, train_samples: 24, test_samples: 8, image_size: 4"
MET_BY_A_RUN = [
    ("batch_size: 8", "batch_size: 80", "", "7:15:", "larger than the training set of 24"),
    ("", "", "emulation: {exclude: [fc9]}", "9:23:", "matches no matrix layer"),
    ("", "", "emulation: {include: ['re:.*x']}", "9:23:", "matches no matrix layer"),
    ("", "", "emulation: {include: ['type:Conv2d']}", "9:23:", "matches no matrix layer"),
    ("", "", "emulation: {overrides: [{match: '99'}]}", "9:33:", "matches no matrix layer"),
    ("", "", "emulation: {products: [{match: no, datapath: {}}]}", "9:32:", "matches no module"),
    ("", "", "emulation: {datapath: {dgrad: int8}}", "9:31:", "multiplies integers"),
    ("", "", "emulation: {overrides: [{match: last, datapath: {wgrad: int8}}]}", "9:57:", "multiplies integers"),
    (
        "",
        "",
        "emulation: {weights: {format: e4m3, scale: amax, granularity: channel}, datapath: {dgrad: fp32}}",
        "9:91:",
        "several scales",
    ),
    ("", "", "emulation: {weights: {format: {base: mxfp4, axis: 3}}}", "9:31:", "axis 3 is out of range"),
    ("", "", "emulation: {weights: {format: {base: mxfp4, padding: refuse}}}", "9:31:", "no multiple of block_size"),
    (
        "",
        "",
        "emulation: {overrides: [{match: last, weights: {format: {base: mxfp4, axis: -3}}}]}",
        "9:57:",
        "axis -3 is out of range",
    ),
    (
        "",
        "",
        "emulation: {weight_pruning: {name: magnitude, sparsity: 0.5, at_epochs: 0, exclude: ['*']}}",
        "9:29:",
        "leaves no layer",
    ),
    ("name: mlp, hidden: [8]", "name: vgg16", "", "4:8:", "at least 32x32 pixels"),
    ("name: mlp, hidden: [8]", "name: gpt", "", "4:8:", "gpt takes text, but the data are images"),
    ("hidden: [8]", "hidden: [1000000, 1000000]", "", "4:8:", "cannot be built"),
    ("image_size: 4", "image_size: 2000000000", "", "3:7:", "synthetic images of"),
    ("train_samples: 24", "train_samples: 2000000000", "", "3:7:", "synthetic images of"),
    (DATA, "name: mnist, root: x", "", "3:27:", "not found"),
    (DATA, "name: cifar10, root: ~nobody-x/x", "", "3:29:", "no such user's home directory"),
    (DATA, "name: imagefolder, root: .", "", "3:33:", "not found"),
    (DATA, "name: text, path: bad.yaml", "", "3:26:", "too short"),
    ("", "", "output: bad.yaml", "9:9:", "run directory cannot be made: Not a directory"),
    ("", "", "output: " + "x" * 5000, "9:9:", "run directory cannot be made: File name too long"),
]


@pytest.mark.parametrize(("old", "new", "more", "place", "says"), MET_BY_A_RUN)
def test_a_mistake_that_a_run_meets(
    old: str, new: str, more: str, place: str, says: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text = TINY.replace(old, new) + more + "\n"
    assert text != TINY + "\n"
    Path(FILE).write_text(text)
    (problem,) = refusal(capsys, monkeypatch, FILE)
    assert problem.startswith(f"{FILE}:{place} ")
    assert says in problem


OVERRIDES = [  # and what is said of them, behind <overrides>
    ("seed", "an override must be key=value (got 'seed')"),
    ("", "an override must be key=value (got '')"),
    ("=3", "an override must be key=value (got '=3')"),
    ("training..epochs=3", "an override must be key=value"),
    (".seed=3", "an override must be key=value"),
    ("seed=x", "seed: must be an integer (got 'x')"),
    ("seed=[", "seed: expected the node content"),
    ("seed='", "seed: found unexpected end of stream"),
    ("seed=\t!", "seed: found character '\\t'"),
    ("seed=*a", "seed: found undefined alias"),
    ("seed=&a [*a]", "seed: an alias refers to a value that contains it"),
    ("seed=!!python/object:os.system x", "seed: the tag"),
    ("seed=" + "9" * 5000, "seed: the integer has more than 64 digits"),
    ("seed=" + "[" * 5000, "seed: nested deeper than 64 levels"),
    ("seed=1\n---\n2", "seed: but found another document"),
    ("seed=\0", "seed: the character '\\x00' is not allowed"),
    ("seed=\udcff", "seed: the character '\\udcff' is not allowed"),
    ("se\u202eed=1", "'se\\u202eed': unknown key; did you mean 'seed'?"),
    ("\x1b[31m=1", "'\\x1b[31m': unknown key"),
    ("x" * 5000 + "=1", "unknown key"),
    (".".join("a" * 100) + "=1", "a.a.a: nested deeper than 64 levels"),
    ("training.epoch=3", "training.epoch: unknown key; did you mean 'epochs'?"),
    ("training.epochs.x=3", "training.epochs.x: training.epochs is not a mapping (it is 2)"),
    ("model.hidden.1=3", "model.hidden.1: model.hidden is a list of 1"),
    ("model.hidden.-1=3", "model.hidden.-1: model.hidden is a list of 1"),
    ("model.hidden.²=3", "model.hidden.²: model.hidden is a list of 1"),
    ("model.hidden." + "9" * 5000 + "=3", "model.hidden is a list of 1"),
    ("extends=digits", "extends: can be given only in a file"),
    ("emulation.accelerator=nowhere", "emulation.accelerator: no such file"),
    ("emulation.weights.format=e4m3fm", "emulation.weights.format: unknown format 'e4m3fm'"),
    ("data={name: mnist, root: x}", "data.root:"),
]


@pytest.mark.parametrize(("override", "says"), OVERRIDES, ids=range(len(OVERRIDES)))
def test_a_malformed_override(
    override: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    problems = refusal(capsys, monkeypatch, "tiny.yaml", override)
    assert problems[0].startswith("<overrides>: ")
    assert says in problems[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.yaml", "no such file, nor one of the experiments"),
        ("digit", "did you mean 'digits'?"),
        (".", "no such file"),
        ("sub", "no such file"),
        ("sub/", "no such file"),
        ("a\nb‮.yaml", "(got 'a\\nb\\u202e.yaml')"),
        ("x" * 5000, "no such file"),
        ("loop.yaml", "no such file"),
        ("pipe.yaml", "no such file"),
    ],
)
def test_a_file_that_cannot_be_read(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("loop.yaml").symlink_to("loop.yaml")
    os.mkfifo("pipe.yaml")
    (problem,) = refusal(capsys, monkeypatch, name)
    assert says in problem
    assert repr(name)[1:40] in problem


def test_control_characters_in_the_name_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\x1b[31m‮.yaml").write_text("seed: 1")
    problems = refusal(capsys, monkeypatch, "a\x1b[31m‮.yaml")
    assert problems[0].startswith("a\\x1b[31m\\u202e.yaml:1:1: data: missing")


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in ("unicode", "whole file")][::12])
def test_as_a_process(case: Case, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    arguments = [sys.executable, "-m", "fpsim", "run", FILE]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert checked(done.stderr.decode("utf-8"))[0].startswith(f"{FILE}:{case.place}")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# --- what the lists above cover ---------------------------------------------------------------------------------------


def test_every_key_of_every_section_is_among_the_places() -> None:
    """A new section, or a new kind of data or model, has to be added to the valid configurations above."""
    met = {(schema.get("title"), key) for spot in MAPPINGS for schema in spot.schemas for key in schema["properties"]}
    sections = [section for _, root in SCHEMAS for section in (root, *root["$defs"].values())]
    sections = [one for one in sections if one.get("additionalProperties") is not True]  # a user's own have any key
    assert {(one["title"], key) for one in sections for key in one.get("properties", {})} <= met


def test_editors_refuse_wrong_keys_types_and_ranges() -> None:
    """All but infinity, which JSON does not have."""
    validator = jsonschema.Draft202012Validator(json_schema())
    for case in CASES:
        if case.kind in ("wrong key", "wrong type", "out of range") and not case.id.endswith("=1e999"):
            assert isinstance(case.text, str)
            assert not validator.is_valid(to_data(parse_yaml(case.text, FILE))), case.id


def test_there_are_enough_of_them() -> None:
    kinds = Counter(case.kind for case in CASES)
    assert len({case.text for case in CASES}) >= 200
    assert min(kinds.values()) >= 15
