"""The documentation is built without a warning, and its pages take nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    call = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-n",
        "--keep-going",
        "-d",
        place / "trees",
        "docs",
        place / "html",
    ]
    ran = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    return place / "html"


def test_every_page_is_built(built: Path) -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if not {"_build", "_generated"} & set(page.parts)]
    assert len(pages) > 20
    for page in pages:
        assert (built / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


def test_nothing_comes_from_elsewhere(built: Path) -> None:
    for page in built.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)[^>]*(?:src|href)=\"(https?:[^\"]*)", page.read_text(encoding="utf-8")
        )
        assert not loaded, page
    for style in built.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8"), style


def test_the_reference_has_every_key_and_command(built: Path) -> None:
    configuration = (built / "reference" / "configuration.html").read_text(encoding="utf-8")
    for key in ("saved_activations", "false_prune_rate", "scale_history", "error_feedback"):
        assert f">{key}<" in configuration
    commands = (built / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="fpsim-{verb}"' in commands for verb in ("run", "recommend", "bench"))
