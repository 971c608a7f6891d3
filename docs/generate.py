"""Parts of the reference that come from what they describe: keys of YAML files from their schemas, commands from the
command line's own help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accel import Machine
from fpsim.config import json_schema
from fpsim.files import write_text
from fpsim.report.results import results_schema
from fpsim.sweep.schema import json_schema as sweep_schema

Schema = dict[str, Any]
ROOT = Path(__file__).parents[1]
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}
NOT_NAMED = 2**31 - 1  # limits from here on only keep numbers within their types


def write(folder: Path) -> None:
    """Write configuration.md, machine.md, sweep.md, results.md and commands.md for the pages that include them."""
    folder.mkdir(exist_ok=True)
    machine = Machine.model_json_schema()
    of_machines = {*machine["$defs"], "Machine"}
    write_text(folder / "configuration.md", keys_of(json_schema(), "configuration", skip=of_machines))
    write_text(folder / "machine.md", keys_of(machine, "machine"))
    write_text(folder / "sweep.md", keys_of(sweep_schema(), "sweep"))
    write_text(folder / "results.md", keys_of(results_schema(), "results"))
    write_text(folder / "commands.md", commands())


def keys_of(schema: Schema, file: str, skip: Collection[str] = ()) -> str:
    """Markdown of all keys of a kind of file: a section for each mapping, in the order in which one meets them."""
    places: dict[str, list[str]] = {}
    _meet(schema, "", schema["$defs"], places, skip)
    parts = [_section(schema, "Top level", f"{file}-top", file, schema["$defs"])]
    for name, paths in places.items():
        definition = schema["$defs"][name]
        fixed = _fixed_name(definition)
        title = ", ".join(f"`{path}`" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        title += f": {fixed}" if fixed else ""
        parts.append(_section(definition, title, _anchor(file, name), file, schema["$defs"]))
    return "\n".join(parts)


def _meet(schema: Schema, path: str, definitions: Schema, places: dict[str, list[str]], skip: Collection[str]) -> None:
    for key, value in schema.get("properties", {}).items():
        below = f"{path}.{key}" if path else key
        for name in _referred(value):
            if name in skip:
                continue
            if name in places:
                places[name].append(below)
            else:
                places[name] = [below]
                _meet(definitions[name], below, definitions, places, skip)


def _referred(value: Any) -> list[str]:
    """Names of the definitions that a key's schema refers to, each once."""
    found: dict[str, None] = {}
    if isinstance(value, dict):
        if "$ref" in value:
            found[value["$ref"].rpartition("/")[2]] = None
        for key, below in value.items():
            if key not in ("discriminator", "default"):
                found |= dict.fromkeys(_referred(below))
    elif isinstance(value, list):
        for below in value:
            found |= dict.fromkeys(_referred(below))
    return list(found)


def _section(schema: Schema, title: str, anchor: str, file: str, definitions: Schema) -> str:
    lines = [f"({anchor})=", f"## {title}", "", _text(schema.get("description", "")), ""]
    for key, value in schema.get("properties", {}).items():
        default = f", default `{json.dumps(value['default'])}`" if "default" in value and "const" not in value else ""
        written = f"`{key}` : {_kind(value, file, definitions)}{default}"
        text = _text(value.get("description") or _described(value, definitions))
        lines += [written, f": {text}", ""] if text else [f"- {written}", ""]
    return "\n".join([*lines, ""])


def _described(value: Schema, definitions: Schema) -> str:
    """Of a key without a description: that of the only mapping that it takes, if any."""
    referred = _referred(value)
    return definitions[referred[0]].get("description", "") if len(referred) == 1 else ""


def _kind(value: Schema, file: str, definitions: Schema) -> str:
    """The type of a value and what is allowed, in words."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        if name == "Machine":
            return "[machine](#machine-top)"
        return f"[{_fixed_name(definitions[name]) or 'mapping'}](#{_anchor(file, name)})"
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(one, file, definitions) for one in value["anyOf"]))
    if "enum" in value:
        return ", ".join(f"`{_plain(one)}`" for one in value["enum"])
    if "const" in value:
        return f"`{_plain(value['const'])}`"
    kind = value.get("type", "any value")
    if isinstance(below := value.get("additionalProperties"), dict) and below:
        return f"mapping to: {_kind(below, file, definitions)}"
    if kind == "object":
        return "mapping"
    if kind == "array":
        return f"list of: {_kind(value.get('items', {}), file, definitions)}"
    limits = [f"{sign} {value[key]:g}" for key, sign in LIMITS.items() if abs(value.get(key, NOT_NAMED)) < NOT_NAMED]
    return " or ".join([kind] if isinstance(kind, str) else kind) + (f" {', '.join(limits)}" if limits else "")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fixed_name(definition: Schema) -> str | None:
    name = definition["properties"].get("name", {})
    return name.get("const") or ("module:function" if name.get("default") == "module:function" else None)


def _anchor(file: str, name: str) -> str:
    return f"{file}-{name.lower()}"


def _text(description: str) -> str:
    """A description in one line; of its characters only `backticks` mean something to Markdown."""
    parts = " ".join(description.split()).split("`")
    parts[::2] = [re.sub(r"([\\*_<>\[\]$])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"^(\d+)\.", r"\1\\.", "`".join(parts))  # no list


def commands() -> str:
    """Markdown of every command, with its arguments and options, as typer writes it; without its title."""
    call = [sys.executable, "-m", "typer", "fpsim.cli", "utils", "docs", "--name", "fpsim"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    written = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    return written.partition("\n")[2]
