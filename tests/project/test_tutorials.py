"""The tutorials and the pages of concepts run as they stand, and print what they say."""

import importlib.util
import re
import sys
import warnings

import pytest

from tests.support import pages
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
RUN = [DOCS / "start.md", *sorted((DOCS / "concepts").glob("*.md"))]
RUN += [page for page in sorted((DOCS / "tutorials").glob("*.md")) if page.name != "index.md"]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # commands replace it
    assert pages.steps(page.read_text())
    pages.run(page)


def test_another_output_is_found():
    shown = "loss 0.95\n[...]\n3 rows in a.csv\n"
    assert pages.difference(shown, "loss 0.93 \nx\ny\n3 rows in a.csv") is None
    for other in ("loss 0.5\n\n3 rows in a.csv", "loss 0.95\n\n4 rows in a.csv", ""):
        assert pages.difference(shown, other) is not None


def test_a_failing_command_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```console\n$ convmae stats --data_path \\\n      nowhere\n```\n")
    with pytest.raises(AssertionError, match="exit status 2 of convmae stats"):
        pages.run(page)
    page.write_text("```console\n$ rm -r x\n```\n")
    with pytest.raises(ValueError, match="only commands of convmae run"):
        pages.run(page)


def test_every_public_name_is_in_the_reference():
    import convmae
    import convmae_kernels

    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE))
    names = {f"convmae.{name}" for name in convmae.__all__}
    names |= {f"convmae_kernels.{name}" for name in convmae_kernels.__all__}
    assert names - documented == {"convmae.__version__", "convmae_kernels.nn"}


def test_every_command_is_in_the_reference():
    from convmae.cli import COMMANDS

    text = (DOCS / "reference" / "commands.md").read_text()
    assert set(re.findall(r"^```\{command-options\} (.+)$", text, re.MULTILINE)) == set(COMMANDS)


def test_the_drawings_are_those_of_the_library():
    spec = importlib.util.spec_from_file_location("drawings", DOCS / "drawings.py")
    drawings = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = drawings
    try:
        spec.loader.exec_module(drawings)
    finally:
        del sys.modules[spec.name]
    for draw in drawings.DRAWINGS:
        written = (drawings.FOLDER / f"{draw.__name__}.svg").read_text()
        assert written == str(draw()), "python docs/drawings.py"
