"""`report.html`: what it says, that it is one file, and that nothing in it acts."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from convmae.cli import COMMANDS
from convmae.config import RunConfig, config_to_mapping
from convmae.records.charts import MAX_POINTS
from convmae.records.curves import smooth, thin
from convmae.records.gallery import MAX_PICTURES
from convmae.records.report import write_report
from convmae.records.wording import clock, mebibytes, number, plain
from tests.support.reports import EVIL, Image, Page, loss_lines, old, run_folder, yaml

if TYPE_CHECKING:
    from pathlib import Path


# -- what it says ---------------------------------------------------------------------------------


def test_a_finished_run(tmp_path: Path) -> None:
    lines = loss_lines(30)
    lines.insert(20, {"event": "evaluation", "step": 200, "epoch": 2.0, "acc1": 71.5, "acc5": 90.0})
    lines.append({"event": "evaluation", "step": 300, "epoch": 3.0, "acc1": 70.0, "acc5": 91.0})
    page = Page(run_folder(tmp_path / "run", lines, pictures=3))
    assert page.cards() == {
        "Steps": "300 3 of 3 epochs",
        "Loss": "0.5333 from 1.5 (−64 %)",
        "Best accuracy": "71.50 % top 5: 90.0 %, epoch 2",
        "Throughput": "100 images/s model 400/s input 110/s the input pipeline is the bottleneck",
        "Memory": "2 GiB peak",
        "Time": "1 min 0 s 200 ms a step",
    }
    text = page.text()
    assert text.startswith("convmae_tiny: finished convmae pretrain convmae_tiny finished")
    assert "224 × 224 pixels" in text and "75 % hidden" in text
    data = page.data()
    assert [chart["title"] for chart in data["charts"]] == [
        *("Loss", "Accuracy", "Learning rate", "Gradient norm", "Throughput", "Memory")
    ]
    loss, smoothed = data["charts"][0]["series"]
    assert loss["x"] == list(range(10, 301, 10))
    assert loss["y"] == [float(f"{e['loss']:.6g}") for e in loss_lines(30)]
    assert smoothed["y"] == pytest.approx(smooth(np.array(loss["y"])).tolist(), rel=1e-4)
    assert data["charts"][1]["series"][0] == {"name": "top 1", "x": [200, 300], "y": [71.5, 70.0]}
    assert [picture["step"] for picture in data["pictures"]] == [10, 20, 30]


@pytest.mark.parametrize(
    ("count", "where", "event", "status"),
    [
        (20, 20, None, "stopped at step 200"),
        (20, 20, {"event": "interrupted", "step": 1203}, "interrupted at step 1,203"),
        (20, 20, {"event": "failed", "step": 204}, "failed at step 204"),
        (20, 9, {"event": "interrupted", "step": 95}, "stopped at step 200"),
        (30, 9, {"event": "interrupted", "step": 95}, "finished"),
        (0, 0, None, "not trained"),
    ],
)
def test_status_of_a_run_that_no_longer_logs(
    tmp_path: Path, count: int, where: int, event: dict[str, Any] | None, status: str
) -> None:
    lines = loss_lines(count)
    lines[where:where] = [event] if event else []
    page = Page(old(run_folder(tmp_path / "run", lines)))
    assert ("title", f"convmae_tiny: {status}") in page.texts


def test_a_run_that_logs_is_running(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path / "run", loss_lines(20)))
    assert ("title", "convmae_tiny: running") in page.texts
    assert "width:66.7%" in page.html


def test_time_adds_up_over_resumes(tmp_path: Path) -> None:
    lines = loss_lines(10) + [line | {"step": line["step"] + 100} for line in loss_lines(10)]
    lines.insert(10, {"event": "resumed", "step": 100})
    page = Page(run_folder(tmp_path / "run", lines))
    assert page.cards()["Time"].startswith("40 s")
    assert page.data()["marks"] == [{"step": 100, "label": "resumed"}]


def test_options_that_differ_from_their_defaults_are_marked(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path / "run", [], input_size=(64, 32), warmup_epochs=40.0))
    marked = re.findall(r'<div class="changed"><dt>(.*?)</dt><dd>(.*?)</dd>', page.html)
    assert {name: re.sub(r"<[^>]+>", "", shown) for name, shown in marked} == {
        "model": "convmae_tiny default convmae_base",
        "epochs": "3 default 400",
        "input_size": "64 x 32 default 224",
    }


def test_defaults_are_those_that_the_method_sets(tmp_path: Path) -> None:
    """A network of timm hides 0.6 by default, and a run of an earlier version has no method."""
    spark = {"model": "timm:resnet18", "method": "spark", "decoder_width": 256}
    page = Page(run_folder(tmp_path / "spark", [], **spark)).html
    marked = dict(re.findall(r'<div class="changed"><dt>(.*?)</dt><dd>(.*?)</dd>', page))
    assert set(marked) == {"model", "epochs", "method", "decoder_width"}
    assert "default fcmae" in marked["method"] and "default 768" in marked["decoder_width"]
    folder = run_folder(tmp_path / "earlier", [])
    options = yaml.safe_load((folder / "args.yaml").read_text())
    del options["method"]
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    assert marked_options(folder) == ["epochs", "model"]


def test_events_are_told_and_not_endlessly(tmp_path: Path) -> None:
    lines = [{"event": "nonfinite", "step": 5000 + n, "loss": None} for n in range(1001)]
    text = Page(run_folder(tmp_path / "run", lines)).text()
    assert "Events 1,001" in text and "and 801 more, in log.txt" in text
    assert "5,199 nonfinite loss none" in text and "5,200" not in text


def test_unreadable_pictures_are_counted_once_and_named(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"event": "unreadable", "step": n, "path": f"{n % 1000}.jpg", "reason": "truncated"}
        for n in range(2000)  # a resumed run names them again
    ]
    page = Page(run_folder(tmp_path / "run", lines))
    assert page.cards()["Unreadable pictures"] == "1,000 skipped; named below"
    text = page.text()
    assert "Unreadable pictures 1,000 Picture Reason 0.jpg truncated" in text
    assert "199.jpg truncated and 800 more, in log.txt" in text and "200.jpg" not in text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    reason = "no space left in <b>/data</b>"
    failed = {"event": "failed", "step": 31, "reason": reason}
    for count, name in ((3, "late"), (0, "early")):
        page = Page(old(run_folder(tmp_path / name, [*loss_lines(count), failed])))
        assert ("p", reason) in page.texts
        assert ("title", "convmae_tiny: failed at step 31") in page.texts
    resumed = [*loss_lines(3), failed, {"event": "resumed", "step": 30}]
    page = Page(run_folder(tmp_path / "resumed", resumed))
    assert ("title", "convmae_tiny: running") in page.texts and ("p", reason) not in page.texts


def test_options_that_are_none_name_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "my run", loss_lines(2))
    options = {"model": None, "input_size": None, "data_path": None, "epochs": None}
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    page = Page(folder)
    assert ("title", "my run: running") in page.texts
    assert "None" not in page.html


@pytest.mark.parametrize(
    "line",
    [
        {"loss": 0.5},
        {"step": 5, "loss": 10**400},
        {"step": "5", "loss": 1.0},
        {"step": 5, "loss": 1.0, "epoch": "1", "seconds": "2", "lr": "a"},
        {"event": None, "step": None},
        {"event": ["failed"], "step": {}},
        {"event": "failed", "step": "soon", "reason": None},
        {"event": "evaluation", "acc1": "all"},
        {"event": "unreadable", "path": "/\udcff.png"},
    ],
)
def test_strange_lines_do_not_stop_a_report(tmp_path: Path, line: dict[str, Any]) -> None:
    page = Page(run_folder(tmp_path / "run", [line, *loss_lines(2), line]))
    assert page.cards()["Steps"].split()[0] in ("20", "5")


def test_non_finite_losses_are_marked_and_not_drawn(tmp_path: Path) -> None:
    lines = loss_lines(10)
    lines[4]["loss"] = None
    lines.insert(5, {"event": "nonfinite", "step": 50})
    data = Page(run_folder(tmp_path / "run", lines)).data()
    assert 50 not in data["charts"][0]["series"][0]["x"]
    assert data["marks"] == [{"step": 50, "label": "not finite"}]


@pytest.mark.parametrize("missing", ["nothing", "log.txt", "args.yaml", "environment.json", "all"])
def test_folders_that_lack_something(tmp_path: Path, missing: str) -> None:
    folder = run_folder(tmp_path / "run", [] if missing == "nothing" else loss_lines(3))
    if missing == "all":
        shutil.rmtree(folder)
        folder.mkdir()
    elif missing != "nothing":
        (folder / missing).write_bytes(b"\xff\x00: [")  # damaged
    page = Page(folder)
    has_log = missing not in ("nothing", "log.txt", "all")
    assert bool(page.data()["charts"]) == has_log
    assert page.cards()["Steps"].startswith("30 " if has_log else "0 nothing was logged yet")
    hidden = [("hidden" in attrs) for tag, attrs in page.tags if tag == "section"]
    assert hidden == [
        *(False, not has_log, True, True, missing in ("args.yaml", "all")),
        *(missing in ("environment.json", "all"), True, True),
    ]


def test_no_folder_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path / "run", loss_lines(3))
    before = write_report(folder).read_bytes()

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


# -- one file, and nothing in it that acts ---------------------------------------------------------


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path / "run", loss_lines(30), pictures=2))
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "style"):
            value = attrs.get(name) or ""
            assert "//" not in value and "url(" not in value, (tag, name, value)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    (policy,) = (a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy and policy.startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    for picture in page.data()["pictures"]:
        kind, _, content = picture["src"].partition(";base64,")
        assert kind in ("data:image/webp", "data:image/png")
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (60, 40)


def test_texts_of_the_run_are_no_markup(tmp_path: Path) -> None:
    lines = loss_lines(3) + [{"event": EVIL, "step": 30, EVIL: EVIL}]
    folder = run_folder(tmp_path / "run", lines, data_path=EVIL, model=EVIL)
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL, "command": EVIL}))
    page = Page(folder)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.text().count("onerror=alert(1)>&amp;") >= 9  # told as they are


def test_embedded_data_closes_no_script(tmp_path: Path) -> None:
    from convmae.records import report

    text = report._embeddable({"a": "</script><!--&"})
    assert not set(text) & set("<>&")
    assert json.loads(text) == {"a": "</script><!--&"}


def test_pictures_are_chosen_evenly(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", loss_lines(3), pictures=100)
    (folder / "reconstructions" / "step-other.png").write_bytes(b"")
    steps = [picture["step"] for picture in Page(folder).data()["pictures"]]
    assert len(steps) == MAX_PICTURES
    assert steps[0] == 10 and steps[-1] == 1000 and len(set(np.diff(steps))) == 2


def test_damaged_pictures_are_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", loss_lines(3), pictures=3)
    (folder / "reconstructions" / "step-00000020.png").write_bytes(b"damaged")
    page = Page(folder)
    assert [picture["step"] for picture in page.data()["pictures"]] == [10, 30]
    assert ("p", "cannot be read: step-00000020.png") in page.texts


def test_the_newest_picture_stands_in_for_a_series(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", loss_lines(3))
    Image.new("RGB", (2400, 100)).save(folder / "reconstruction.png")
    (picture,) = Page(folder).data()["pictures"]
    assert picture["step"] == 30
    content = base64.b64decode(picture["src"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (1200, 50)


# -- curves and numbers ---------------------------------------------------------------------------


def test_a_long_log_is_thinned_with_its_extremes(tmp_path: Path) -> None:
    lines = loss_lines(30_000, steps_per_epoch=100_000)
    chart = Page(run_folder(tmp_path / "run", lines)).data()["charts"][0]
    assert all(MAX_POINTS / 2 < len(series["x"]) <= MAX_POINTS for series in chart["series"])
    loss = chart["series"][0]
    assert len(loss["x"]) > 0.9 * MAX_POINTS
    assert max(loss["y"]) == 77.0 and loss["x"][loss["y"].index(77.0)] == 10 * (30_000 // 3 + 1)
    assert (loss["x"][0], loss["x"][-1]) == (10, 300_000)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50, 1001])
def test_thin_keeps_ends_extremes_and_order(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    kept = thin(values, 8)
    assert len(kept) <= 8 and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == count - 1
    assert {values.argmin(), values.argmax()} <= set(kept)
    if count <= 8:
        assert len(kept) == count


def test_numbers_as_one_reads_them() -> None:
    assert [number(x) for x in (0.76178, 166.34, 12340.2, 3.21e-5, 0, 2.5e9)] == [
        *("0.7618", "166.3", "12,340", "3.21e-05", "0", "2.5e+09")
    ]
    assert [clock(x) for x in (0.0854, 7.49, 724, 12_000, 187_300)] == [
        *("85.4 ms", "7.49 s", "12 min 4 s", "3 h 20 min", "2 d 4 h")
    ]
    assert [mebibytes(x) for x in (512.2, 12_595)] == ["512 MiB", "12.3 GiB"]
    assert [plain(x) for x in (None, True, 1e-3, [64, 32], "a")] == [
        *("none", "true", "0.001", "64 x 32", "a")
    ]


def marked_options(folder: Path) -> list[str]:
    return re.findall(r'<div class="changed"><dt>(.*?)</dt>', Page(folder).html)


TRAININGS = {n: c.options for n, c in COMMANDS.items() if issubclass(c.options, RunConfig)}


@pytest.mark.parametrize("command", TRAININGS)
def test_defaults_are_those_of_the_recorded_command(tmp_path: Path, command: str) -> None:
    """Options that the command does not have, as of an older version, do not hide the others."""
    folder = run_folder(tmp_path / "run", [])
    config = config_to_mapping(TRAININGS[command](epochs=7).filled()) | {"forgotten": 1}
    (folder / "args.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"command": command}))
    assert marked_options(folder) == ["epochs"]


@pytest.mark.parametrize("environment", ["{}", '{"command": "forget"}', '{"command": ""}'])
def test_no_option_is_marked_without_a_known_command(tmp_path: Path, environment: str) -> None:
    folder = run_folder(tmp_path / "run", [])
    (folder / "environment.json").write_text(environment)
    assert marked_options(folder) == []
    assert "epochs 3" in Page(folder).text()
