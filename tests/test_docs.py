"""What the README and the documentation show works: each page runs from top to bottom, as a reader would."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fpsim.config import load_config
from fpsim.errors import ConfigError
from tests.pages import ROOT, blocks, run_page

DOCS = ROOT / "docs"
BUILT = ("_build", "_generated")
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in BUILT),
]
WITH_LONG_COMMANDS = ("docs/performance.md", "docs/results/")


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_threads: None, own_forgotten: None
) -> Iterator[Path]:
    """A page's own folder, and its own modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(tmp_path)  # as for a script that lies there
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore:.*(num_workers|isinstance.treespec|LeafSpec)")  # of lightning
@pytest.mark.parametrize("page", [page.relative_to(ROOT) for page in PAGES], ids=str)
def test_a_page(page: Path, folder: Path) -> None:
    run_page(ROOT / page)


def test_the_quickstart_shows_the_demo(folder: Path) -> None:
    shown = next(one for one in blocks((DOCS / "quickstart.md").read_text(encoding="utf-8")) if one.language == "yaml")
    (folder / "shown.yaml").write_text(shown.content, encoding="utf-8")
    assert load_config("shown.yaml") == load_config("quickstart")


def test_only_measurements_have_commands_that_are_not_run() -> None:
    for page in PAGES:
        if any("{.long}" in block.language for block in blocks(page.read_text(encoding="utf-8"))):
            assert page.relative_to(ROOT).as_posix().startswith(WITH_LONG_COMMANDS)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("```console\nfpsim validate no-such-experiment\n```", "page.md:2: fpsim validate no-such-experiment"),
        ("```\nfpsim formats e4m3fn | grep -q no-such-word\n```", "grep -q no-such-word"),
        ("text\n\n```console\necho one\nfalse\n```", "page.md:4: false"),
        ("```console {.long}\nfpsim run digits training.epoch=3\n```", "training.epoch"),
        ("```console {.long}\nfpsim estimate runs/x --machin edge-npu\n```", "--machin"),
        ("```console {.long}\npython benchmarks/matmul.py --quik\n```", "--quik"),
        ("```console {.long}\nfpsim reproduce fig9\n```", "fig9"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2, 'another x'\n```", "another x"),
        ("```yaml\nemulation: {weights: {format: e9m9}}\n```", "e9m9"),
        ("```yaml\nmachine: {clock_mhz: 1000}\n```", "machine"),
        ("```yaml\n# unused.yaml\nextends: digits\n```", "nothing uses unused.yaml"),
        ("```sh\nls\n```", "a block of 'sh'"),
        ("1. one\n\n   ```python\n   assert 0, 'indented'\n   ```", "indented"),
    ],
)  # fmt: skip
def test_a_page_with_a_mistake_fails(content: str, complaint: str, folder: Path) -> None:
    page = folder / "page.md"
    page.write_text(content + "\n", encoding="utf-8")
    with pytest.raises((AssertionError, ConfigError), match=re.escape(complaint)):
        run_page(page)


def test_blocks_of_a_page_see_the_files_before_them(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text(
        "```yaml\n# own.yaml\nextends: digits\nmodel: {name: 'nets:build'}\n```\n"
        "```python\n# nets.py\nfrom torch import nn\n\n\ndef build(input_shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n```\n"
        "```console\nfpsim run own.yaml --dry-run  # of own.yaml and nets.py\n```\n"
        "```python\nimport nets\n```\n",
        encoding="utf-8",
    )
    run_page(page)
