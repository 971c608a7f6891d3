"""How a page of the documentation is run: its blocks from top to bottom, in one folder, each by its fence's language.

    ```console or ```       every line is a command that must succeed
    ```console {.long}      takes minutes to hours, as the page says: the commands are only checked to be ones
    ```python               is executed; the blocks of a page share their names
    ```yaml                 is a part of a configuration, or of an accelerator's file
    ```text                 is output

A block of YAML or Python whose first line is `# NAME.yaml` or `# NAME.py` is written to that file instead.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typer.main import get_command
from typer.testing import CliRunner

from fpsim.cli import app
from fpsim.config import load_config, parse_emulation
from fpsim.config.schema import Config
from fpsim.figures import FIGURES

ROOT = Path(__file__).parents[1]
NOT_HERE = ("make demo", "make test", "make docs")  # minutes; this is a part of the second, test_docs_build the third
INSTALLS = ("make install", "pip install ")  # the environment that this runs in came from them
SECONDS = 100  # for one command, also where others use the machine
FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ((\S+)\.(?:yaml|py))\n")
TYPED = re.compile(r"[|&;<>$`\\]|^\w+=")  # what needs a shell


class Block(NamedTuple):
    """language: the fence's, with its attributes. line: of the page, where the content begins."""

    language: str
    content: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page; those of a directive (:::) are none."""
    return [
        Block(
            found[3].strip(),
            re.sub(f"^{found[1]}", "", found[4], flags=re.MULTILINE),
            text.count("\n", 0, found.start(4)) + 1,
        )
        for found in FENCE.finditer(text)
    ]


def run_page(page: Path) -> None:
    """Run the blocks of a page in the current directory. Raises AssertionError at the first that does not work."""
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in blocks(text):
        place = f"{page.name}:{block.line}"
        named = NAMED.match(block.content)
        if block.language in ("python", "yaml") and named:
            assert text.count(named[2]) > 1, f"{place}: nothing uses {named[1]}"
            Path(named[1]).write_text(block.content, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.content, str(page), "exec"), names)
        elif block.language == "yaml":
            check_yaml(block.content, place)
        elif block.language in ("", "console", "console {.long}"):
            for line in block.content.replace("\\\n", "").splitlines():
                (check_command if block.language.endswith("{.long}") else run_command)(line, place)
        else:
            assert block.language == "text", f"{place}: a block of {block.language!r}"


def run_command(line: str, place: str) -> None:
    """Run a command line: of fpsim in this process where that can be, else by a shell."""
    words = shlex.split(line, comments=True)
    command = " ".join(words)
    if not words or command in NOT_HERE or command.startswith(INSTALLS):
        return
    if line.startswith("fpsim ") and not TYPED.search(line) and "--nproc" not in line:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{place}: {line}\n{result.output}\n{result.exception}"
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["bash", "-c", line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{place}: {line}\ntook more than {SECONDS} s") from None
    assert process.returncode == 0, f"{place}: {line}\n{output}"


def check_command(line: str, place: str) -> None:
    """Check that a command line would be accepted, with the configuration that it names."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        script = ROOT / arguments[0]
        assert script.is_file(), f"{place}: no {script}"
        parsers = [path.read_text(encoding="utf-8") for path in (script, script.with_name("timing.py"))]
        options = [argument for argument in arguments if argument.startswith("--")]
        assert all(f'"{option}"' in "".join(parsers) for option in options), f"{place}: {line}"
        return
    assert program == "fpsim", f"{place}: {line}"
    verb, *arguments = arguments
    try:
        given: dict[str, Any] = get_command(app).commands[verb].make_context(verb, arguments).params  # type: ignore
    except Exception as error:  # of the click that comes inside typer, or the one beside it
        raise AssertionError(f"{place}: {line}\n{error}") from error
    if verb == "run":
        load_config(given["config"], given["overrides"] or [])
    elif verb == "reproduce":
        assert given["figure"] in FIGURES, f"{place}: {line}"


def check_yaml(content: str, place: str) -> None:
    """Check a part of a configuration, what it leaves out being that of `digits`; or of an accelerator's file."""
    keys = yaml.safe_load(content).keys()
    if not keys <= {*Config.model_fields, "extends"}:
        parse_emulation(yaml.safe_load(content))
        return
    part = Path(f"{place.replace(':', '-')}.yaml")
    part.write_text(content if "extends" in keys or "data" in keys else f"extends: digits\n{content}", encoding="utf-8")
    load_config(str(part))
