"""The benchmark of busy neighbours measures real trainings, with the settings that it names."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING

import pytest

from benchmarks import shared_machine

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
pytest.importorskip("skimage")


@pytest.mark.thorough
def test_a_real_run_has_a_rate() -> None:
    given = Namespace(model="convmae_tiny", batch_size=128, img_size=32, amp="float32", threads=1)
    assert shared_machine.images_per_second({"GOMP_SPINCOUNT": "0"}, given) > 0
    given.model = "convmae_tine"
    with pytest.raises(RuntimeError, match="convmae_tine"):
        shared_machine.images_per_second({}, given)


def test_it_measures_in_turn_and_writes_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    busy, rates = [], iter([10.0, 20.0, 4.0, 6.0, 12.0, 24.0, 5.0, 9.0])
    started = shared_machine.subprocess.Popen

    class Neighbour(started):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            busy.append(self)

    def rate(setting: dict[str, str], given: Namespace) -> float:
        settings.append((setting, sum(one.poll() is None for one in busy)))
        return next(rates)

    settings: list[tuple[dict[str, str], int]] = []
    monkeypatch.setattr(shared_machine.subprocess, "Popen", Neighbour)
    monkeypatch.setattr(shared_machine, "images_per_second", rate)
    file = tmp_path / "shared.json"
    words = ["--setting", "spin 0", "OpenMP's default", "--rounds", "2", "--busy", "1"]
    assert shared_machine.main([*words, "--json", str(file)]) == 0
    zero, default = {"GOMP_SPINCOUNT": "0"}, {"GOMP_SPINCOUNT": "300000"}
    assert settings == 2 * [(zero, 0), (default, 0), (zero, 1), (default, 1)]
    assert all(one.poll() is not None for one in busy)
    found = json.loads(file.read_text())
    assert found["images_per_s"]["spin 0"] == {"idle": [10.0, 12.0], "shared": [4.0, 5.0]}
    assert found["median"]["OpenMP's default"] == {"idle": 22.0, "shared": 7.5}
    assert found["times_as_fast"]["spin 0"] == pytest.approx({"idle": 0.5, "shared": 0.6})
    assert "spin 0" in capsys.readouterr().out
