"""Training on TIFFs of 16 bits, of five bands and of floats, and reading alike afterwards."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from convmae import (
    EvaluateConfig,
    FinetuneConfig,
    OptionError,
    ReconstructConfig,
    StatsConfig,
    evaluate,
    finetune,
    pretrain,
    reconstruct,
    stats,
)
from convmae.config import ReadOptions
from convmae.weights.checkpoint import open_weights, stored_reading
from tests.support.training_runs import options

if TYPE_CHECKING:
    from pathlib import Path

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("torchvision")

NODATA = -9999.0


def write_tiffs(folder: Path, kind: str, count: int = 8) -> Path:
    """Coarse random pictures of 48 x 48 pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        bands = 5 if kind == "bands" else 1
        values = rng.integers(0, 60_000, (bands, 4, 4)).repeat(12, 1).repeat(12, 2)
        values = values.astype(np.float32 if kind == "float" else np.uint16)
        if kind == "float":
            values = values / 1000 + 270
            values[:, :12] = NODATA
        elif kind == "grey8":
            values = (values >> 8).astype(np.uint8)
        planar = {"planarconfig": "separate"} if bands > 1 else {}
        tifffile.imwrite(folder / f"{index}.tif", values, photometric="minisblack", **planar)
    return folder


@pytest.mark.parametrize(
    ("kind", "channels", "reading"),
    [
        ("deep", 1, {}),
        ("bands", 5, {}),
        ("bands", 2, {"bands": (5, 1)}),
        ("float", 1, {"nodata": NODATA}),
        ("grey8", 1, {"in_chans": 1}),
    ],
)
def test_a_run_reads_draws_and_says_how_it_read(tmp_path, kind, channels, reading) -> None:
    data = write_tiffs(tmp_path / "data", kind)
    config = options(data, tmp_path / "run", epochs=1, batch_size=4, **reading)
    summary = pretrain(config)
    assert summary.steps == 2 and np.isfinite(summary.last_loss) and summary.last_loss < 20
    weights = open_weights(tmp_path / "run")
    assert weights.config["in_chans"] == channels
    assert weights.reading == ReadOptions(**reading) == stored_reading(tmp_path / "run")
    output = tmp_path / "out.png"
    drawing = ReconstructConfig(str(tmp_path / "run"), (str(data),), str(output), max_images=2)
    assert reconstruct(drawing).is_file()  # reads as training did
    if kind == "float":
        assert 270 < weights.statistics.mean[0] < 330
        with pytest.raises(ValueError, match="-9999 far from all its other values"):
            stats(StatsConfig(str(data)))
    if reading.get("bands"):
        with pytest.raises(OptionError, match="images have 1 channels"):
            reconstruct(dataclasses.replace(drawing, bands=(3,)))
        again = dataclasses.replace(config, epochs=2, bands=None, resume="auto")
        assert pretrain(again).steps == 4
        assert open_weights(tmp_path / "run").reading == ReadOptions(**reading)


@pytest.mark.thorough
def test_a_classifier_reads_as_its_pretraining_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretraining = write_tiffs(tmp_path / "pictures", "bands")
    bands = options(pretraining, tmp_path / "pre", epochs=1, batch_size=4, bands=(5, 1))
    pretrain(bands)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "classes" / split).mkdir(parents=True, exist_ok=True)
            write_tiffs(tmp_path / "classes" / split / name, "bands", 4)
    tuned = FinetuneConfig(
        data_path=str(tmp_path / "classes"),
        output_dir=str(tmp_path / "tuned"),
        finetune=str(tmp_path / "pre"),
        input_size=bands.input_size,
        batch_size=4,
        epochs=1,
        warmup_epochs=0,
        aa="none",
        num_workers=0,
        device="cpu",
    )
    finetune(tuned)
    weights = open_weights(tmp_path / "tuned")
    assert weights.reading == ReadOptions(bands=(5, 1)) and weights.config["in_chans"] == 2
    measure = EvaluateConfig(
        str(tmp_path / "tuned"), str(tmp_path / "classes"), num_workers=0, device="cpu"
    )
    assert evaluate(measure)["images"] == 8
    capsys.readouterr()
    evaluate(dataclasses.replace(measure, bands=(4, 1)))
    said = "--bands 4 1 is given, but the checkpoint was trained with 5 1"
    assert said in capsys.readouterr().err


def test_options_of_reading_go_to_json_and_back() -> None:
    reading = ReadOptions(bands=(4, 2), nodata=float("nan"), layout="chw", max_pixels=5)
    assert reading.given() == {
        "bands": [4, 2],
        "nodata": "nan",
        "layout": "chw",
        "max_pixels": 5,
    }
    assert ReadOptions.of(reading.given()).given() == reading.given()
    own, notes = ReadOptions(bands=(1,)).over(ReadOptions(bands=(2,), nodata=3.0))
    assert own == ReadOptions(bands=(1,), nodata=3.0) and len(notes) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bands": ()}, "bands must name at least one band"),
        ({"bands": (0,)}, "bands must be a whole number at least 1, got 0"),
        ({"bands": (2, 2)}, "bands must name each band once, got 2 2"),
        ({"bands": (2, 1), "in_chans": 3}, "in_chans 3 does not fit the 2 bands 2 1"),
        ({"in_chans": 0}, "in_chans must be a whole number above 0"),
        ({"nodata": float("inf")}, "nodata must be a number"),
        ({"layout": "whc"}, "layout must be one of auto, hw"),
        ({"pages": "all"}, "pages must be one of first, bands"),
        ({"max_pixels": 0}, "max_pixels must be a whole number above 0"),
    ],
)
def test_options_of_reading_are_checked(tmp_path: Path, wrong, message: str) -> None:
    for config in (options(tmp_path, tmp_path / "run", **wrong), StatsConfig("demo", **wrong)):
        with pytest.raises(OptionError, match=message):
            config.validate()
