"""How Sphinx makes the documentation site: `make docs` writes it to build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import convmae_kernels  # noqa: E402 (the checkout's own, installed or not)

project = "convmae"
version = release = convmae_kernels.__version__
copyright = "the convmae developers, MIT licence"
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_options",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["sass"]
highlight_language = "bash"  # of indented blocks: they are commands
html_theme = "furo"
html_title = "convmae"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # links such as training.md#one-machine-or-many, as code hosts have them
myst_links_external_new_tab = False

# Docstrings: code between single backquotes, signatures without the folders of modules.
default_role = "code"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes that the class documents itself are not told twice
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False

# Only what is typed is copied from blocks with prompts, not what is printed.
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

_ITEM = re.compile(r"\s*- ")
_FIELD = re.compile(r"\s*:\w+.*:$")


def _as_restructured_text(app, what, name, obj, options, lines) -> None:
    """Mends what docstrings leave out for readers of code, and reStructuredText asks for.

    An empty line before a list; a second colon before an indented block of code.
    """
    place = 1
    while place < len(lines):
        line, before = lines[place], lines[place - 1]
        if _ITEM.match(line) and before.strip() and not _ITEM.match(before) and before[0] != " ":
            lines.insert(place, "")
            place += 1
        place += 1
    for place in range(len(lines) - 2):
        line, gap, block = lines[place : place + 3]
        if line.endswith(":") and not gap.strip() and _indent(block) > _indent(line) >= 0:
            lines[place] = line + ("" if _FIELD.match(line) or line.endswith("::") else ":")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip()) if line.strip() else -1


def _without_options(app, what, name, obj, options, signature, returned):
    """No signature of a dataclass of options: reference/commands.md has them, one in a row."""
    return ("", None) if what == "class" and name.endswith("Config") else None


REPORT = "benchmarks-report.html"
MEASURED = ("full-cpu.json", "cpu.json")  # of benchmarks/results


def _write_report(app, exception) -> None:
    """The figures and charts of a CPU as one page of its own, linked from benchmarks.md."""
    if exception is None and app.builder.name == "html":
        from benchmarks.page import page

        files = [ROOT / "benchmarks" / "results" / name for name in MEASURED]
        (Path(app.outdir) / REPORT).write_text(page(files), encoding="utf-8")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _as_restructured_text)
    app.connect("autodoc-process-signature", _without_options)
    app.connect("build-finished", _write_report)
