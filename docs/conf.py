"""The documentation: MyST-Markdown pages, and a reference made of the schemas, the command line and the docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.shell import BashLexer
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402

project = "fpsim"
copyright = "the authors of fpsim, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated"]
highlight_language = "text"
smartquotes = False

html_theme = "furo"
html_title = "fpsim"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["formulas.css"]
html_copy_source = False
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
nitpicky = True
# Types in signatures: those of other libraries, whose documentation is not fetched, and those that have no page here.
nitpick_ignore_regex = [("py:class", ".*")]

FIELD = re.compile(r"[A-Za-z_0-9]+(, [A-Za-z_0-9]+)*: |Raises |Returns ")


def mathml(translator: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show without scripts or fonts from elsewhere."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def as_markup(lines: list[str]) -> list[str]:
    """The lines of a docstring, which is plain text with `names` and indented formulas, as reStructuredText."""
    marked: list[str] = []
    is_formula = False
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("    ") and (is_formula or not before.strip()):
            if not is_formula:
                marked += ["::", ""]
            is_formula = True
            marked.append(line)
            continue
        if line.strip():
            if is_formula:
                marked.append("")
            is_formula = False
            if FIELD.match(line):
                marked.append("")
            line = re.sub(r"([\\*|_])", r"\\\1", line.strip())
            line = re.sub(r"`([^`]*)`", lambda found: "``" + found[1].replace("\\", "") + "``", line)
        marked.append(line)
    return marked


def process_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [] if lines[:1] and lines[0].startswith("Alias for field number") else as_markup(lines)


def setup(app: Sphinx) -> None:
    generate.write(DOCS / "_generated")
    app.add_lexer("console", BashLexer)  # commands without a prompt
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", process_docstring)
