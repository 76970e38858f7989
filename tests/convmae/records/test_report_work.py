"""What a page costs: counted in pictures encoded, lines read and bytes written, not in time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from convmae.records import gallery
from convmae.records.charts import MAX_POINTS
from convmae.records.curves import Curve, EvenSample, smooth
from convmae.records.folder import RunFolder
from convmae.records.gallery import MAX_PICTURES
from convmae.records.history import MAX_EVENTS, LogFollower
from convmae.records.report import Report, write_report
from tests.support.reports import Image, loss_lines, run_folder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every picture that was encoded for a page."""
    made: list[Any] = []
    encode = gallery.encoded

    def counting(picture: Any) -> bytes:
        made.append(picture)
        return encode(picture)

    monkeypatch.setattr(gallery, "encoded", counting)
    return made


def picture(step: int) -> Any:
    return Image.new("RGB", (60, 40), (step % 256, 100, 200))


def append(folder: Path, lines: list[dict[str, Any]]) -> None:
    with (folder / "log.txt").open("a") as log:
        log.write("".join(json.dumps(line) + "\n" for line in lines))


def shown_steps(page: Path) -> list[int]:
    data = page.read_text().partition('id="data">')[2].partition("</script>")[0]
    return [shown["step"] for shown in json.loads(data)["pictures"]]


def test_a_save_encodes_one_picture_and_reads_the_new_lines(
    tmp_path: Path, encodings: list[Any]
) -> None:
    folder = run_folder(tmp_path / "run", [])
    report = Report(RunFolder.of(folder))
    lines = loss_lines(300)
    for save in range(100):
        append(folder, lines[3 * save : 3 * save + 3])
        report.add_picture(picture(save), 30 * (save + 1))
        page = report.write()
        assert len(encodings) == save + 1
        assert report.log.lines_read == 3 * (save + 1)
    steps = shown_steps(page)
    assert len(steps) == MAX_PICTURES and (steps[0], steps[-1]) == (30, 3000)


def test_a_resumed_run_keeps_its_pictures_and_encodes_none_again(
    tmp_path: Path, encodings: list[Any]
) -> None:
    folder = run_folder(tmp_path / "run", loss_lines(3))
    first = Report(RunFolder.of(folder))
    for step in (10, 20):
        first.add_picture(picture(step), step)
    resumed = Report(RunFolder.of(folder))
    resumed.add_picture(picture(30), 30)
    assert shown_steps(resumed.write()) == [10, 20, 30]
    assert shown_steps(write_report(folder)) == [10, 20, 30]
    assert len(encodings) == 3


def test_pictures_without_a_copy_are_encoded_once(tmp_path: Path, encodings: list[Any]) -> None:
    folder = run_folder(tmp_path / "run", loss_lines(3), pictures=3)
    assert shown_steps(write_report(folder)) == shown_steps(write_report(folder)) == [10, 20, 30]
    assert len(encodings) == 3
    changed = folder / "reconstructions" / "step-00000020.png"
    picture(0).save(changed)
    write_report(folder)
    assert len(encodings) == 4


@pytest.mark.thorough
def test_the_page_of_a_long_run_is_no_larger(tmp_path: Path) -> None:
    """Ten times the lines, events and pictures: the page's size stays within a tenth."""
    sizes = []
    for times in (1, 10):
        noise = np.random.default_rng(0).random(4000 * times)
        lines: list[dict[str, Any]] = loss_lines(4000 * times, steps_per_epoch=100_000)
        for line, value in zip(lines, noise, strict=True):
            line |= {"loss": value, "grad_norm": value, "lr": value}
        lines += [{"event": "nonfinite", "step": n} for n in range(MAX_EVENTS * times)]
        folder = run_folder(tmp_path / str(times), lines, pictures=MAX_PICTURES * times)
        sizes.append(write_report(folder).stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def test_memory_of_a_curve_is_bounded_and_keeps_ends_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=50_001)
    curve, sample = Curve(), EvenSample()
    for x, y in enumerate(values):
        curve.add(float(x), float(y))
        sample.add(float(y))
        assert len(curve._stretches) <= Curve.STRETCHES
    assert len(sample.values) <= EvenSample.LIMIT
    assert sample.middle() == pytest.approx(np.median(values), abs=0.05)
    points = curve.points(MAX_POINTS)
    x, y = np.array(points).T
    assert len(points) <= MAX_POINTS and (np.diff(x) > 0).all()
    assert (y == values[x.astype(int)]).all() and (x[0], x[-1]) == (0, 50_000)
    assert {values.min(), values.max()} <= set(y)
    means = np.array(curve.smoothed(MAX_POINTS))
    inner = means[(means[:, 0] > 2000) & (means[:, 0] < 48_000)]
    exact = smooth(values)[inner[:, 0].astype(int)]
    assert np.abs(inner[:, 1] - exact).max() < 0.02


def test_a_log_is_followed_through_half_lines_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    follower = LogFollower(path)
    assert follower.read().losses == 0
    one, two = (json.dumps(line) + "\n" for line in loss_lines(2))
    path.write_text(one + two[:9])
    assert follower.read().losses == 1
    path.write_text(one + two)
    assert follower.read().losses == 2 and follower.lines_read == 2
    path.unlink()
    assert follower.read().losses == 0
    path.write_text(one)
    assert follower.read().last["step"] == 10 and follower.history.losses == 1
