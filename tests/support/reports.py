"""Folders of runs to report on, their page taken apart, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from convmae import PretrainConfig
from convmae.config import config_to_mapping
from convmae.records.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
yaml = pytest.importorskip("yaml")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>&amp;"
VOID = {"meta", "img", "input", "link", "br", "hr"}


# -- folders to report on -------------------------------------------------------------------------


def loss_lines(count: int, steps_per_epoch: int = 100) -> list[dict[str, Any]]:
    """A run whose loss falls, with one spike; logged every 10 steps."""
    lines: list[dict[str, Any]] = []
    for index in range(1, count + 1):
        line = {
            "step": 10 * index,
            "epoch": 10 * index / steps_per_epoch,
            "loss": 1 / index + 0.5,
            "lr": 1e-3 / index,
            "grad_norm": 2.0 / index,
            "images_per_s": 100.0,
            "model_images_per_s": 400.0,
            "input_images_per_s": 110.0,
            "bottleneck": "input",
            "memory_mib": 2048.0,
            "seconds": 2.0 * index,
        }
        lines.append(line)
    if count > 20:
        lines[count // 3]["loss"] = 77.0
    return lines


def run_folder(path: Path, lines: list[dict[str, Any]], pictures: int = 0, **options: Any) -> Path:
    """A run's folder as `convmae pretrain` leaves it, without weights."""
    path.mkdir(parents=True)
    config = config_to_mapping(
        PretrainConfig(**{"model": "convmae_tiny", "epochs": 3, **options}).filled()
    )
    (path / "args.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {"command": "pretrain", "device": "cpu", "torch": "2.11.0"}
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "reconstructions").mkdir()
    for index in range(1, pictures + 1):
        colour = (index, 100, 200)
        file = path / "reconstructions" / f"step-{10 * index:08}.png"
        Image.new("RGB", (60, 40), colour).save(file)
    return path


def old(folder: Path) -> Path:
    """The folder, as if nothing had been logged for days."""
    os.utime(folder / "log.txt", (0, 0))
    return folder


class Page(HTMLParser):
    """A page taken apart; fails where tags do not close in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.html = write_report(folder).read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # of the innermost tag
        self.feed(self.html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        """All that is read on the page, spaces as one."""
        seen = " ".join(text for tag, text in self.texts if tag not in ("script", "style"))
        return " ".join(seen.split())

    def data(self) -> dict[str, Any]:
        (text,) = (text for tag, text in self.texts if tag == "script" and text.startswith("{"))
        return json.loads(text)

    def cards(self) -> dict[str, str]:
        found = re.findall(r'<div class="card"><h3>(.*?)</h3>(.*?)</div>\n', self.html + "\n")
        return {name: " ".join(re.sub(r"<[^>]+>", " ", rest).split()) for name, rest in found}


# -- in a browser ---------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's elements once its scripts ran, and what was written to the browser's console."""
    result = subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update"),
            *("--enable-logging=stderr", "--virtual-time-budget=3000", "--window-size=1200,1600"),
            *(f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
