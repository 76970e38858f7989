"""`convmae embed`: the features of every kind of model, in every format, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae import OptionError, cli, embed, load_model, normalise
from convmae.commands.embed import features
from convmae.models.registry import SIZES
from convmae_kernels import BlockMask
from tests.support.inference_runs import (
    STATISTICS,
    classifier,
    draw,
    embedding,
    plain_images,
    pretrained,
    table,
)

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("tqdm")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps
WIDTHS = SIZES["tiny"]["embed_dim"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every kind."""
    folder = tmp_path_factory.mktemp("models")
    pretrained(folder / "convmae")
    pretrained(folder / "fastconvmae", "fastconvmae_tiny")
    classifier(folder / "mean", img_size=(32, 48))
    classifier(folder / "token", img_size=(32, 48), global_pool=False)
    classifier(folder / "encoder", img_size=(32, 48), num_classes=0, classes=None)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        draw(folder / f"{number}.png", number, (70, 50))
    return folder


def plain_features(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Stage 3 by the public methods of the models, a picture at a time."""
    with torch.no_grad():
        if isinstance(model, convmae.ConvViT):
            tokens = torch.cat([model.forward_features(image[None]) for image in images])
            seen = model.forward_head(tokens, pre_logits=True)
        else:
            mask = BlockMask.full(1, model.grid, images.device)
            tokens = torch.cat([model.forward_encoder(image[None], mask) for image in images])
            seen = tokens.mean(1)
    height, width = model.grid
    maps = tokens.reshape(len(images), height, width, -1).permute(0, 3, 1, 2)
    return {"auto": seen, "mean": tokens.mean(1), "token": maps[:, :, 0, 0], "map": maps}


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convmae", "fastconvmae", "mean", "token", "encoder"])
def test_features_are_those_of_the_model(
    name: str, tmp_path: Path, models: Path, folder: Path
) -> None:
    model = load_model(models / name)
    paths = sorted(folder.iterdir())
    images = normalise(plain_images(paths, (32, 48)), *STATISTICS)
    wanted = plain_features(model, images)
    for what in ("auto", "mean", "token", "map"):
        output = tmp_path / f"{what}.npz"
        options = {"features": "map"} if what == "map" else {"pool": what}
        summary = embed(embedding(models / name, folder, output=str(output), **options))
        assert (summary.pictures, summary.unreadable) == (7, 0)
        with np.load(output) as found:
            assert found["name"].tolist() == [path.name for path in paths]
            assert found["error"].tolist() == [""] * 7 and "label" not in found
            assert found["features"].dtype == np.float32
            values = torch.from_numpy(found["features"])
        torch.testing.assert_close(values, wanted[what], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(wanted["mean"], wanted["token"], atol=1e-2)
    # The same in float64, where rounding hides nothing.
    double = model.double()
    for what, right in plain_features(double, images.double()).items():
        options = {"features": "map"} if what == "map" else {"pool": what}
        config = embedding(models / name, folder, output="e.npz", **options)
        with torch.no_grad():
            values = features(double, images.double(), config)
        torch.testing.assert_close(values, right, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("stage", [1, 2])
def test_maps_of_the_stages_before(stage: int, tmp_path: Path, models: Path, folder: Path) -> None:
    images = normalise(plain_images(sorted(folder.iterdir()), (32, 48)), *STATISTICS)
    model: Any = load_model(models / "mean")
    with torch.no_grad():
        wanted = model.forward_intermediates(images, [stage - 1], intermediates_only=True)[0]
    assert wanted.shape == (7, WIDTHS[stage - 1], 32 >> (stage + 1), 48 >> (stage + 1))
    for what, right in (("map", wanted), ("pooled", wanted.mean((2, 3)))):
        output = tmp_path / f"{what}.npz"
        options = {"features": what, "stage": stage, "output": str(output)}
        embed(embedding(models / "mean", folder, **options))
        found = torch.from_numpy(np.load(output)["features"])
        torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-4)
    # A pretrained model with the classifier's weights has the same first stages.
    from convmae.weights.checkpoint import open_weights, save_weights

    weights = open_weights(models / "convmae")
    mae: Any = weights.build_model()
    mae.load_state_dict(model.state_dict(), strict=False)
    save_weights(tmp_path / "mae", mae, weights.model, None, weights.pictures)
    embed(embedding(tmp_path / "mae", folder, **options | {"output": str(tmp_path / "mae.npz")}))
    again = torch.from_numpy(np.load(tmp_path / "mae.npz")["features"])
    torch.testing.assert_close(again, found, atol=1e-6, rtol=1e-6)


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_format_holds_the_same(
    dtype: str, tmp_path: Path, models: Path, folder: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "data"
    for number, path in enumerate(sorted(folder.iterdir())):
        draw(data / "ab"[number % 2] / path.name, number)
    (data / "b" / "broken.png").write_text("no")
    common: dict[str, Any] = {"features": "map", "dtype": dtype, "save_every": 0.0}
    for kind in ("npz", "npy", "parquet"):
        output = tmp_path / f"all.{kind}"
        summary = embed(embedding(models / "convmae", data, output=str(output), **common))
        assert (summary.pictures, summary.unreadable) == (8, 1)
    with np.load(tmp_path / "all.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    values = np.load(tmp_path / "all.npy", mmap_mode="r")
    assert values.dtype == dtype and values.shape == (8, WIDTHS[2], 2, 3)
    np.testing.assert_array_equal(values, arrays["features"])
    assert np.isnan(values).any(axis=(1, 2, 3)).tolist() == [False] * 7 + [True]
    rows = table((tmp_path / "all.csv").read_text())
    found = parquet.read_table(tmp_path / "all.parquet")
    assert found.schema.metadata[b"shape"] == b"[%d, 2, 3]" % WIDTHS[2]
    for name in ("name", "label", "error"):
        texts = arrays[name].tolist()
        assert texts == [row[name] for row in rows] == found[name].to_pylist()
    assert arrays["label"].tolist() == list("aaaabbbb")
    assert arrays["error"][7] == "not a picture that Pillow knows"
    lists = np.array(found["features"].to_pylist(), dtype).reshape(values.shape)
    np.testing.assert_array_equal(lists, values)


def test_half_the_bytes_and_nearly_the_same(tmp_path: Path, models: Path, folder: Path) -> None:
    for dtype in ("float32", "float16"):
        output = str(tmp_path / f"{dtype}.npy")
        embed(embedding(models / "convmae", folder, output=output, dtype=dtype))
    exact, half = (np.load(tmp_path / f"{dtype}.npy") for dtype in ("float32", "float16"))
    np.testing.assert_array_equal(half, exact.astype(np.float16))


def test_a_number_that_float16_cannot_hold(tmp_path: Path, folder: Path) -> None:
    from convmae.weights.checkpoint import open_weights, save_weights

    weights = open_weights(pretrained(tmp_path / "mae"))
    model: Any = weights.build_model()
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    save_weights(tmp_path / "large", model, weights.model, None, weights.pictures)
    config = embedding(tmp_path / "large", folder, output=str(tmp_path / "e.npy"), dtype="float16")
    with pytest.raises(OptionError, match=r"float16 holds no more than 65504, .*use float32"):
        embed(config)
    assert not (tmp_path / "e.npy").exists()
    embed(dataclasses.replace(config, dtype="float32", overwrite=True))
    assert np.isfinite(np.load(tmp_path / "e.npy")).all()


def test_the_whole_is_never_in_memory(
    tmp_path: Path, models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are read one at a time while the table is written, whatever its format."""
    from convmae.records import parts

    read, alive = parts._read_part, [0, 0]

    def counting(path: Path, columns: bool) -> Any:
        rows = read(path, columns)
        if columns:
            alive[0] += 1
            alive[1] = max(alive[1], len(rows))
        return rows

    monkeypatch.setattr(parts, "_read_part", counting)
    options = {"output": str(tmp_path / "e.npy"), "batch_size": 2, "save_every": 0.0}
    embed(embedding(models / "convmae", folder, **options))
    assert alive == [4, 2]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": None}, "output is needed: a .npz, .npy or .parquet file"),
        ({"output": "e.csv"}, "output 'e.csv' ends in .csv; expected .npz, .npy, .parquet"),
        ({"output": "e.csv", "format": "npy"}, "the .csv of names beside it"),
        ({"features": "maps"}, "features must be one of pooled, map, got 'maps'"),
        ({"features": "map", "pool": "mean"}, "pool mean has no effect on features map"),
        ({"pool": "cls"}, "pool must be one of auto, mean, token, got 'cls'"),
        ({"pool": "token", "stage": 2}, "pool token needs stage 3, the tokens; got stage 2"),
        ({"stage": 5}, "stage must be one of 1, 2, 3, 4, got 5"),
        ({"stage": 4}, "stage 4, of stride 32, is of networks of timm; the ConvMAE of checkpoint"),
        ({"dtype": "bfloat16"}, "dtype must be one of float32, float16, got 'bfloat16'"),
        ({"input_size": 64}, "input_size 64 x 64: the ConvMAE of checkpoint takes 32 x 48 only"),
        ({"save_every": -1.0}, "save_every must be a number at least 0"),
    ],
)
def test_wrong_options(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    models: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = embedding(models / "convmae", folder, output="e.npz")
    with pytest.raises(OptionError, match=message):
        embed(dataclasses.replace(config, **changes))
    assert not list(tmp_path.iterdir())


def test_names_are_not_written_over_another_file(
    tmp_path: Path, models: Path, folder: Path
) -> None:
    (tmp_path / "e.csv").write_text("mine")
    config = embedding(models / "convmae", folder, output=str(tmp_path / "e.npy"))
    with pytest.raises(OptionError, match=r"e.csv, where the names go, exists; overwrite"):
        embed(config)
    assert (tmp_path / "e.csv").read_text() == "mine"
    embed(dataclasses.replace(config, overwrite=True))
    assert len(table((tmp_path / "e.csv").read_text())) == 7


def test_the_command(
    tmp_path: Path, models: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "e.npz")
    flags = ["--data", str(folder), "-b", "4", "-j", "0", "--output", output]
    assert cli.main(["embed", "--checkpoint", str(models / "convmae"), *flags]) == 0
    assert f"wrote {output}: 7 pictures, 0 of them unreadable" in capsys.readouterr().out
    assert cli.main(["embed", "--checkpoint", str(models / "convmae"), *flags]) == 2
    assert capsys.readouterr().err == (
        f"convmae: error: --output '{output}' exists; --overwrite replaces it\n"
    )
