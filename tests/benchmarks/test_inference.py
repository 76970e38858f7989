"""The benchmark of predict and embed: it runs, measures, and finds a file that differs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from benchmarks import inference

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchmetrics")
SMALL = ["--pictures", "12", "--img_size", "32", "--num_workers", "0", "--rounds", "1"]


@pytest.mark.thorough
def test_it_measures_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main([*SMALL, "--kills", "0", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for name in ("evaluate", "predict", "embed"):
        row = re.search(rf"\| {name} \| ([\d.]+) \| ([\d.]+) \|", text)
        assert row and float(row[1]) > 0 and float(row[2]) > 0
    assert text.count("killed 0 times, then finished: the same bytes") == 2


def test_other_bytes_are_seen(tmp_path: Path) -> None:
    (tmp_path / "predicted.csv").write_text("a")
    (tmp_path / "killed-predicted.csv").write_text("b")
    assert inference.kill_and_resume("predict", tmp_path, [], 0, 1.0) == (0, False)
    (tmp_path / "killed-predicted.csv").write_text("a")
    assert inference.kill_and_resume("predict", tmp_path, [], 0, 1.0) == (0, True)
