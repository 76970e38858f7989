"""Pretraining on what is no folder of RGB files, and in other ways to compute the same losses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from convmae import (
    ReconstructConfig,
    StatsConfig,
    pretrain,
    reconstruct,
    stats,
)
from convmae.models.trunk import Trunk
from convmae.weights.checkpoint import open_weights
from tests.support.training_runs import curve, interrupt_after, options, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def infrared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of 4 channels and 16 bits."""
    folder = tmp_path_factory.mktemp("infrared")
    rng = np.random.default_rng(0)
    for index in range(12):
        coarse = rng.integers(0, 60_000, (4, 4, 4), dtype=np.uint16)
        np.save(folder / f"{index:03}.npy", coarse.repeat(12, 0).repeat(12, 1))
    return folder


def test_pictures_of_four_channels_and_16_bits(infrared: Path, tmp_path: Path) -> None:
    summary = pretrain(options(infrared, tmp_path / "run", epochs=1))
    assert summary.steps == 3 and np.isfinite(summary.last_loss)
    weights = open_weights(tmp_path / "run")
    assert weights.config["in_chans"] == 4
    pixels = np.stack([np.load(path) for path in sorted(infrared.iterdir())]) / 65535
    assert weights.statistics.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert weights.statistics.std == pytest.approx(pixels.std((0, 1, 2)))
    output = tmp_path / "out.png"
    config = ReconstructConfig(str(tmp_path / "run"), (str(infrared),), str(output), max_images=2)
    assert reconstruct(config) == output and output.is_file()
    with pytest.raises(ValueError, match="images have 3 channels, but the model"):
        reconstruct(dataclasses.replace(config, images=("demo",)))


def test_stats_prints_what_a_run_can_read(infrared: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = stats(StatsConfig(str(infrared), output=str(tmp_path / "stats.yaml")))
    assert (tmp_path / "stats.yaml").read_text() == text
    values = yaml.safe_load(text)
    assert len(values["mean"]) == len(values["std"]) == 4
    mean, std = tuple(values["mean"]), tuple(values["std"])
    pretrain(options(infrared, tmp_path / "run", epochs=1, mean=mean, std=std))
    assert open_weights(tmp_path / "run").statistics.mean == mean


def test_shards_are_streamed_and_resumed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wds = pytest.importorskip("webdataset")
    (tmp_path / "shards").mkdir()
    rng = np.random.default_rng(0)
    for shard in range(3):
        with wds.TarWriter(str(tmp_path / "shards" / f"{shard}.tar")) as writer:
            for index in range(8):
                picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                writer.write({"__key__": f"{shard}-{index}", "png": picture.resize((48, 48))})
    config = options(tmp_path / "shards", tmp_path / "whole", epochs=2, num_workers=1)
    assert pretrain(config).steps == 12
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert pretrain(parts).steps == 8
    pretrain(dataclasses.replace(parts, resume="auto"))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_fastconvmae_is_pretrained_and_resumed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"model": "fastconvmae_tiny", "mask_ratio": 0.5}
    config = options(pictures, tmp_path / "whole", **changes)
    assert pretrain(config).steps == 6
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        pretrain(parts)
    pretrain(dataclasses.replace(parts, resume="auto"))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert (tmp_path / "whole" / "reconstruction.png").is_file()


@pytest.mark.parametrize(
    "changes", [{"grad_checkpointing": True}, {"torchcompile": "aot_eager"}], ids=str
)
@pytest.mark.thorough(but_every=3)
def test_other_ways_to_compute_give_the_same_losses(
    pictures: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    common = {"epochs": 1, "amp": "float32"}
    pretrain(options(pictures, tmp_path / "plain", **common))
    pretrain(options(pictures, tmp_path / "other", **common, **changes))
    wanted, found = curve(tmp_path / "plain"), curve(tmp_path / "other")
    assert [point[2] for point in found] == pytest.approx([point[2] for point in wanted], rel=1e-5)


@pytest.mark.thorough
def test_torchcompile_blocks(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_blocks = Trunk.compile_blocks
    monkeypatch.setattr(Trunk, "compile_blocks", lambda model: compile_blocks(model, "aot_eager"))
    common = {"epochs": 1, "amp": "float32"}
    pretrain(options(pictures, tmp_path / "plain", **common))
    pretrain(options(pictures, tmp_path / "blocks", torchcompile="blocks", **common))
    wanted, found = curve(tmp_path / "plain"), curve(tmp_path / "blocks")
    assert [point[2] for point in found] == pytest.approx([point[2] for point in wanted], rel=1e-5)
    with pytest.raises(ValueError, match="torchcompile must be blocks, .* got 'block'"):
        pretrain(options(pictures, tmp_path / "wrong", torchcompile="block"))
    assert not (tmp_path / "wrong").exists()
