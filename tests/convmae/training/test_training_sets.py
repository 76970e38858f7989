"""Which pictures a run trains on, and what they are normalised with: measured, kept, and told."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from convmae import (
    EvaluateConfig,
    FinetuneConfig,
    ReconstructConfig,
    StatsConfig,
    evaluate,
    finetune,
    pretrain,
    reconstruct,
    stats,
)
from convmae.commands import evaluate as evaluation
from convmae.commands import reconstruct as reconstruction
from convmae.commands.reconstruct import draw
from convmae.config import ReadOptions
from convmae.data import IMAGENET, DataError, open_source
from convmae.data.fingerprint import Fingerprint
from convmae.data.statistics import measure
from convmae.records.log import read_log
from convmae.training import setup
from convmae.training.distributed import World
from convmae.weights.checkpoint import STATE, open_weights, write_weights
from convmae.weights.digest import file_digest
from tests.support.training_runs import curve, folder_of, interrupt_after, options, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


def arrays(folder: Path, values: np.ndarray) -> Path:
    """A file for each picture of `[N, H, W, C]`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, value in enumerate(values):
        np.save(folder / f"{index:04}.npy", value)
    return folder


def random_arrays(folder: Path, dtype: type, channels: int = 3, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (count, 4, 4, channels)).repeat(12, 1).repeat(12, 2)
    return arrays(folder, coarse.astype(dtype))


def told(run: Path, event: str) -> list[dict[str, Any]]:
    return [entry for entry in read_log(run) if entry.get("event") == event]


# -- mean and deviation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [(np.uint8, 3), (np.uint16, 3), (np.float32, 3), (np.uint8, 1), (np.uint8, 2), (np.uint8, 4)],
)
def test_statistics_are_imagenets_for_rgb_of_8_bits_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: type, channels: int
) -> None:
    data = random_arrays(tmp_path / "data", dtype, channels)
    pretrain(options(data, tmp_path / "run", epochs=1))
    found = open_weights(tmp_path / "run").statistics
    said = capsys.readouterr().out
    if (dtype, channels) == (np.uint8, 3):
        assert found == IMAGENET
        assert "(ImageNet's, as for all pictures of 3 channels of 8 bits)" in said
        return
    scale = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    stored = np.stack([np.load(path) for path in sorted(data.iterdir())])
    pixels = stored.astype(np.float64) / scale
    assert found.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert found.std == pytest.approx(pixels.std((0, 1, 2)))
    assert "(measured on all 12 pictures)" in said and f"mean {found.mean[0]:.4g}" in said


def test_an_even_sample_is_measured(tmp_path: Path) -> None:
    data = random_arrays(tmp_path / "data", np.float32, count=12)
    (data / "0004.npy").write_bytes(b"broken")
    source = open_source(data, max_unreadable=0.5)
    every_fourth = np.stack([np.load(data / f"{index:04}.npy") for index in (0, 8)])
    found = [measure(source, 3, workers=workers) for workers in (0, 1, 2)]
    assert found[0] == found[1] == found[2]
    assert found[0].statistics.mean == pytest.approx(every_fourth.mean((0, 1, 2)))
    assert (found[0].pictures, len(found[0].failures)) == (2, 1)


@pytest.mark.parametrize("readable", [True, False])
def test_statistics_are_measured_once_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """The main process measures; the others take what it found, an error too."""
    data = random_arrays(tmp_path / "data", np.float32, count=4)
    source = open_source(data)
    if not readable:
        for path in data.iterdir():
            path.write_bytes(b"broken")
    config, sent = options(data, tmp_path / "run"), []
    measuring: list[bool] = []
    measure_here = setup.measure

    class TwoProcesses(World):
        def share(self, value: Any) -> Any:
            sent.append(value)
            return sent[0]

    def noted(*arguments: Any) -> Any:
        measuring.append(True)
        return measure_here(*arguments)

    monkeypatch.setattr(setup, "measure", noted)
    found = []
    for rank in range(2):
        world = TwoProcesses(rank, 2, torch.device("cpu"), "ddp")
        try:
            found.append(setup._measured(config, source, world, 4))
        except DataError as error:
            found.append(str(error))
    assert measuring == [True] and found[0] == found[1]
    assert ("none of the 4 pictures can be read" in str(found[0])) != readable


def test_a_resumed_run_keeps_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = random_arrays(tmp_path / "data", np.uint16)
    config = options(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        pretrain(config)
    stored = open_weights(tmp_path / "run").statistics
    values = np.load(data / "0000.npy")
    np.save(data / "0000.npy", values + 50)  # the same size: not noticed, and not measured again
    pretrain(dataclasses.replace(config, resume="auto"))
    assert open_weights(tmp_path / "run").statistics == stored
    assert "(of the run so far)" in capsys.readouterr().out
    again = dataclasses.replace(config, resume="auto", epochs=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    pretrain(again)
    assert open_weights(tmp_path / "run").statistics == ((0.5,) * 3, (0.2,) * 3)


@pytest.mark.thorough
def test_statistics_of_other_pictures_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = random_arrays(tmp_path / "data", np.uint8)
    given: dict[str, Any] = {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}
    pretrain(options(data, tmp_path / "far", epochs=1, **given))
    assert open_weights(tmp_path / "far").statistics == tuple(given.values())
    said = capsys.readouterr().out
    assert "note: mean and deviation as given are not those of such pictures in 3 of 3" in said
    stored = np.stack([np.load(path) for path in sorted(data.iterdir())]) / 255
    assert f"all 12 pictures have mean {stored[..., 0].mean():.4g} " in said
    labelled = tmp_path / "labelled"
    for split in ("train", "val"):
        for name in ("a", "b"):
            random_arrays(labelled / split / name, np.uint8, count=4)
    values: dict[str, Any] = dict(
        data_path=str(labelled),
        model="convvit_tiny",
        input_size=32,
        epochs=1,
        batch_size=4,
        num_workers=0,
        finetune=str(tmp_path / "far"),
    )
    finetune(FinetuneConfig(output_dir=str(tmp_path / "fine"), **values))
    assert open_weights(tmp_path / "fine").statistics == tuple(given.values())
    said = capsys.readouterr().out
    assert "(of the weights to start from)" in said
    assert "note: mean and deviation of the weights to start from are not those of such" in said
    near: dict[str, Any] = {"mean": (0.4,) * 3, "std": (0.25,) * 3}
    finetune(FinetuneConfig(output_dir=str(tmp_path / "near"), **values, **near))
    assert open_weights(tmp_path / "near").statistics == tuple(near.values())
    assert "not those of such" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["constant", "nearly", "wide"])
def test_a_channel_that_is_the_same_everywhere_is_refused(tmp_path: Path, change: str) -> None:
    pictures = np.random.default_rng(0).random((12, 48, 48, 4)).astype(np.float32)
    pictures[..., 2] = 7.0
    if change == "nearly":
        pictures[0, 0, 0, 2] = np.nextafter(np.float32(7.0), np.float32(8.0))
    data = arrays(tmp_path / "data", pictures)
    config = options(data, tmp_path / "run", epochs=1)
    output = tmp_path / "stats.yaml"
    if change == "wide":
        wide = {"mean": (0.5,) * 4, "std": (0.3, 0.3, 1.0, 0.3)}
        assert pretrain(dataclasses.replace(config, **wide)).steps == 3
        return
    told = r"channel 3 \(mean 7, deviation .*\) of 4 of .* cannot be normalised \(counted from 1\)"
    with pytest.raises(DataError, match=told) as error:
        pretrain(config)
    assert "--bands, or give the --mean and --std" in error.value.with_flags
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=told):
        stats(StatsConfig(str(data), output=str(output), num_workers=0))
    assert not output.exists()


def test_stats_names_what_it_cannot_read_and_leaves_out(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    data = folder_of(tmp_path / "data", 21)
    (data / "004.png").write_text("broken")
    (data / "odd\nname.txt").write_text("no picture")
    config = StatsConfig(str(data), output=str(tmp_path / "stats.yaml"), num_workers=0)
    text = stats(config)
    assert "# 1 of 21 cannot be read and are left out:" in text
    assert f"# {data / '004.png'}: not a picture that Pillow knows" in text
    assert r"left out: 1 .txt (odd\nname.txt)" in text
    values = yaml.safe_load((tmp_path / "stats.yaml").read_text())
    assert set(values) == {"mean", "std"} and len(values["std"]) == 3


# -- the same pictures ----------------------------------------------------------------------------


def test_a_fingerprint_is_of_names_and_sizes_alone(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "a" / "data", 5)
    other = folder_of(tmp_path / "b" / "moved", 5)
    os.utime(other / "000.png", (1, 1))
    (other / "notes.txt").write_text("no picture")
    first, second = open_source(one).fingerprint(), open_source(other).fingerprint()
    assert first == second and first.count == 5
    again = Fingerprint.from_state(first.state())
    assert again == first and second.changes_since(again) is None
    (other / "000.png").rename(other / "00x.png")
    Image.new("RGB", (48, 48)).save(other / "001.png")
    changed = open_source(other, max_samples=2).fingerprint()
    assert changed.changes_since(first) == (
        "1 added (00x.png); 1 removed (000.png); 1 of another size (001.png)"
    )
    assert Fingerprint.from_state({"digest": 3}) is None and Fingerprint.from_state(None) is None
    unlisted = dataclasses.replace(first, listed=None)
    assert changed.changes_since(unlisted) == "5 files then, 5 now"
    damaged = dataclasses.replace(first, listed=first.listed[:-9])
    assert changed.changes_since(damaged) == "5 files then, 5 now"


def test_many_files_are_listed_by_digest_alone() -> None:
    entries = [(f"{number}.png", "1") for number in range(100_001)]
    many, fewer = Fingerprint.of(entries), Fingerprint.of(entries[1:])
    assert many.listed is None and fewer.listed is not None
    assert fewer.changes_since(many) == "100,001 files then, 100,000 now"
    assert Fingerprint.of(entries[1:]) == fewer


@pytest.mark.thorough
def test_another_set_of_pictures_is_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path / "data", 12)
    config = options(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        pretrain(config)
    for index in range(4):
        os.link(data / "000.png", data / f"new-{index}.png")
    (data / "003.png").unlink()
    before = (tmp_path / "run" / "log.txt").read_bytes()
    resumed = dataclasses.replace(config, resume="auto")
    with pytest.raises(
        ValueError,
        match=r"are not those of before: 4 added \(new-0.png, new-1.png, "
        r"new-2.png, ...\); 1 removed \(003.png\); give those of before, or",
    ):
        pretrain(resumed)
    assert (tmp_path / "run" / "log.txt").read_bytes() == before
    pretrain(dataclasses.replace(resumed, allow_changed_data=True))
    (entry,) = told(tmp_path / "run", "data")
    assert "going on with these (--allow_changed_data)" in entry["what"]
    assert "note: --resume auto: the pictures of" in capsys.readouterr().out
    more = dataclasses.replace(resumed, epochs=3)
    pretrain(more)  # the checkpoint is of these pictures now
    assert len(told(tmp_path / "run", "data")) == 1


@pytest.mark.thorough
def test_a_moved_set_and_an_old_checkpoint_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path / "data", 12)
    config = options(data, tmp_path / "parts")
    pretrain(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        pretrain(config)
    data.rename(tmp_path / "moved")
    pretrain(dataclasses.replace(config, data_path=str(tmp_path / "moved"), resume="auto"))
    assert told(tmp_path / "parts", "data") == []
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))
    file = tmp_path / "parts" / "checkpoint" / STATE
    state = torch.load(file, weights_only=True)
    assert state.pop("data")["count"] == 12
    weights = open_weights(tmp_path / "parts")
    torch.save(state, file)
    described = (weights.pictures, weights.classes, weights.reading, file_digest(file))
    write_weights(weights.path, weights.model, weights.config, weights.state, *described)
    moved = dataclasses.replace(config, data_path=str(tmp_path / "moved"), resume="auto", epochs=3)
    pretrain(moved)
    assert "whether the pictures are those of before is not known" in capsys.readouterr().out


def test_runs_lie_apart_from_their_pictures(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", 12)
    (tmp_path / "link").symlink_to(data)
    inside = [data / "run", data, tmp_path / "link" / "deep" / "run"]
    for output in inside:
        with pytest.raises(ValueError, match="output_dir .* lies in data_path"):
            pretrain(options(data, output))
    with pytest.raises(ValueError, match="data_path .* lies in output_dir"):
        pretrain(options(tmp_path / "link", tmp_path))
    with pytest.raises(ValueError, match="output_dir .* lies in data_path"):
        pretrain(options(tmp_path / "link", data / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "link"]
    assert len(list(data.iterdir())) == 12
    pretrain(options(data, tmp_path / "data-run", epochs=1))  # only the name begins alike


# -- pictures that cannot be read -----------------------------------------------------------------


def test_reconstruct_draws_what_it_can_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path / "data", 12)
    pretrain(options(data, tmp_path / "run", epochs=1))
    rows: list[torch.Tensor] = []
    paint = reconstruction.reconstruction_picture

    def noted(model, images, *more):
        rows.append(images)
        return paint(model, images, *more)

    monkeypatch.setattr(reconstruction, "reconstruction_picture", noted)
    for name in ("004.png", "005.png"):
        (data / name).write_text("broken")
    files = tuple(str(data / f"{index:03}.png") for index in (4, 3, 5))
    config = ReconstructConfig(str(tmp_path / "run"), files, str(tmp_path / "out.png"))
    capsys.readouterr()
    assert reconstruction.main(config) == 1
    assert len(rows[-1]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"wrote {tmp_path / 'out.png'}", "2 pictures could not be read:"]
    assert said[2:] == [f"  {files[i]}: not a picture that Pillow knows" for i in (0, 2)]
    good = dataclasses.replace(config, images=files[1:2])
    assert reconstruction.main(good) == 0 and torch.equal(rows[-1], rows[-2])
    with pytest.warns(UserWarning, match="2 pictures could not be read"):
        assert reconstruct(config) == tmp_path / "out.png"
    whole = dataclasses.replace(config, images=(str(data),))
    assert draw(whole).failed and len(rows[-1]) == 10  # 2 of 12 are more than a tenth
    assert len({row.numpy().tobytes() for row in rows[-1]}) == 10
    some = dataclasses.replace(whole, max_images=6, max_unreadable=0.2)
    assert not draw(some).failed and len(rows[-1]) == 6
    assert len({row.numpy().tobytes() for row in rows[-1]}) == 6
    with pytest.raises(DataError, match="none of the 2 pictures can be read. The first: .*004.png"):
        draw(dataclasses.replace(config, images=(files[0], files[2])))


def test_reconstruct_writes_nothing_among_its_pictures(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", 2)
    for output, images in (
        (data / "out.png", (str(data),)),
        (data / "000.png", (str(data / "000.png"),)),
    ):
        with pytest.raises(ValueError, match="^output .* (lies in images|over that of images)"):
            reconstruct(ReconstructConfig("none", images, str(output)))
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 3), np.uint8))
    mixed = (str(tmp_path / "a.npy"), str(data / "000.png"))
    with pytest.raises(
        ValueError, match="^images: what is named holds files of two kinds, .*a.npy"
    ):
        reconstruction._open(mixed, ReadOptions())


def test_evaluation_counts_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 4), ("val", 10)):
        for name in ("a", "b"):
            folder_of(tmp_path / "data" / split / name, count)
    broken = tmp_path / "data" / "val" / "a" / "003.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:60] + bytes(len(content) - 60))  # the header is good
    (tmp_path / "data" / "val" / "list.txt").write_text("no picture")
    config = FinetuneConfig(
        data_path=str(tmp_path / "data"),
        output_dir=str(tmp_path / "run"),
        model="convvit_tiny",
        input_size=32,
        epochs=1,
        batch_size=4,
        num_workers=0,
    )
    finetune(config)
    said = capsys.readouterr().out
    assert (
        f"note: 1 file in {tmp_path / 'data' / 'val'} is left out: 1 .txt (list.txt) (val)" in said
    )
    (entry,) = told(tmp_path / "run", "unreadable")
    assert entry["path"] == str(broken)
    assert told(tmp_path / "run", "evaluation")[-1]["unreadable"] == 1
    asked = EvaluateConfig(str(tmp_path / "run"), str(tmp_path / "data"), num_workers=0)
    result = evaluate(asked)
    assert (result["images"], result["unreadable"]) == (19, 1)
    assert (
        list(result["failures"]) == [str(broken)] and "1 .txt (list.txt)" in result["left_out"][0]
    )
    capsys.readouterr()
    assert evaluation.main(asked) == 0
    assert "unreadable, not counted: 1\n" in capsys.readouterr().out
