"""The benchmark of busy neighbours measures real trainings, with the settings that it names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks import shared_machine

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
pytest.importorskip("skimage")


def test_it_measures_both_and_writes_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "shared.json"
    small = ["--batch_size", "128", "--img_size", "32", "--threads", "1", "--rounds", "1"]
    settings = ["--setting", "spin 0", "OpenMP's default"]
    assert shared_machine.main([*small, "--busy", "1", *settings, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found["images_per_s"]) == {"spin 0", "OpenMP's default"}
    for name, both in found["median"].items():
        for where, rate in both.items():
            assert rate == found["images_per_s"][name][where][0] > 0
            default = found["median"]["OpenMP's default"][where]
            assert found["times_as_fast"][name][where] == pytest.approx(rate / default)
    assert "spin 0" in capsys.readouterr().out
