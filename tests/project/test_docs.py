"""Documents say what is there: the files that they name, and the rooms as they are drawn."""

import re

import pytest

from tests.project.test_imports import ROOMS
from tests.support.paths import ROOT

FILES = (".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".sh", ".yaml", ".toml", ".txt")


def named_paths(text):
    """What a document links to or names as `a/path` or `file.py`; `<op>` stands for any name."""
    words = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    paths = [
        w for w in words if re.fullmatch(r"\w[\w.<>/-]*", w) and ("/" in w or w.endswith(FILES))
    ]
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    return paths, links


def is_there(path, folder=ROOT):
    return any(folder.glob(path.replace("<op>", "*").rstrip("/")))


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_document_names_exist(document):
    file = ROOT / document
    paths, links = named_paths(file.read_text())
    assert len(paths) > 10
    missing = [path for path in paths if not is_there(path)]
    missing += [link for link in links if not is_there(link, file.parent)]
    assert not missing


def test_a_name_that_is_not_there_is_found():
    text = (
        "`convmae/nowhere.py`, `csrc/<op>.cpp -k halo`, `x.py`, `a b/`, [a](b.md#c), [d](http://e)"
    )
    paths, links = named_paths(text)
    assert paths == ["convmae/nowhere.py", "csrc/<op>.cpp", "x.py", "b/"] and links == ["b.md"]
    assert [is_there(path) for path in paths] == [False, True, False, False]


def test_the_rooms_are_drawn_as_they_are():
    """The drawing has the floors of `convmae` as the test of imports holds them, in its order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawing = text.partition("```text\nconvmae\n")[2].partition("\n      |\n")[0]
    floors = [tuple(re.split(r" {3,}", line.strip())[0].split()) for line in drawing.splitlines()]
    assert tuple(floors) == ROOMS
