"""What docs/segmentation.md and docs/detection.md show runs as it stands, and recipes are read."""

import re
import shlex
from pathlib import Path

import pytest

from convmae.cli import COMMANDS
from convmae.config import config_from_mapping, read_yaml
from tests.support.paths import ROOT

PAGES = {"segmentation": "segment", "detection": "detect"}
RECIPES = {
    "composites_pretrain": "pretrain",
    "composites_segment": "segment train",
    "composites_detect": "detect train",
    "small-targets_segment": "segment train",
}


def commands(page):
    """The words of each `convmae` command that stands in a block of the page, `...` left out."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line.partition("#")[0]) for line in lines if " convmae " in f" {line}"]
    return [[word for word in words[1:] if word != "..."] for words in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_program_runs(page, capsys):
    pytest.importorskip("torchvision")
    text = (ROOT / "docs" / f"{page}.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, {})
    assert "loss_" in capsys.readouterr().out


@pytest.mark.parametrize("page, first", PAGES.items())
def test_commands_have_options_that_there_are(page, first):
    shown = commands(page)
    assert {words[1] for words in shown if words[0] == first} >= {"train", "evaluate", "predict"}
    for words in shown:
        name = words[0] if words[0] in COMMANDS else " ".join(words[:2])
        fields = set(COMMANDS[name].options.__dataclass_fields__) | {"config"}
        flags = [word.removeprefix("--") for word in words if word.startswith("--")]
        assert {flag.removeprefix("no_") for flag in flags} <= fields, words
        if "--config" in words:
            assert (ROOT / words[words.index("--config") + 1]).is_file()


@pytest.mark.parametrize("recipe, command", RECIPES.items())
def test_recipes_are_valid(recipe, command):
    path = ROOT / "recipes" / f"{recipe}.yaml"
    config = config_from_mapping(
        COMMANDS[command].options, {**read_yaml(path), "data_path": str(Path("data"))}
    )
    config.validate()
