"""The experiment that compares starts: its pictures, its pretraining without masks, its runs."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from convmae import create_model, full_name
from convmae.data import Statistics
from convmae.data.idx import IdxPhotos
from convmae.weights.checkpoint import open_weights, save_weights
from convmae_kernels import BlockMask
from examples import dense_pretrain, does_it_work, does_it_work_results, fetch_emoji, part_of_idx
from examples.dense_pretrain import LEAKY, ZEROED, unmasked

DOCS = Path(__file__).parents[2] / "docs"

# -- pretraining without masked convolution -------------------------------------------------------


def test_dense_convmae_sees_hidden_pixels_or_the_mask():
    torch.manual_seed(0)
    model = create_model("convmae_tiny", img_size=64).eval()
    twin, leaky = unmasked(model, ZEROED), unmasked(model, LEAKY)
    images, other = torch.randn(2, 2, 3, 64, 64)
    noise = torch.rand(2, 16)
    mask = BlockMask.from_noise(noise, (4, 4), 0.75)
    changed = torch.where(mask.to_dense(16), images, other)
    with torch.no_grad():
        latent = twin.forward_encoder(images, mask)
        assert torch.equal(twin.forward_encoder(changed, mask), latent)
        assert not torch.allclose(model.forward_encoder(images, mask), latent, atol=1e-3)
        seen = leaky.forward_encoder(images, mask)
        assert not torch.allclose(leaky.forward_encoder(changed, mask), seen, atol=1e-3)
        whole = BlockMask.full(2, (4, 4))
        expected = model.forward_encoder(images, whole)
        for other in (twin, leaky):
            torch.testing.assert_close(other.forward_encoder(images, whole), expected)
    loss, expected = twin(images, noise=noise).loss, model(images, noise=noise).loss
    assert loss != expected and abs(loss - expected) < 0.2
    loss.backward()
    trained = {name for name, p in twin.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.thorough(but_every=3)
@pytest.mark.parametrize("hidden", [LEAKY, ZEROED])
def test_dense_spark_is_the_network_as_it_is(hidden):
    torch.manual_seed(0)
    options = {"method": "spark", "img_size": 64, "decoder_width": 32}
    model = create_model("timm:test_resnet", **options).double().train()
    twin = unmasked(model, hidden).double()
    images, noise = torch.randn(4, 3, 64, 64).double(), torch.rand(4, 4)
    mask = twin.make_mask(images, noise=noise)
    with torch.no_grad():
        maps = twin.forward_encoder(images, mask)
        seen = torch.where(mask.to_dense(32), images, 0.0) if hidden == ZEROED else images
        plain = twin.maps.read(twin.network, seen)  # BatchNorm counts what is hidden
    for packed, dense in zip(maps, plain):
        expected = torch.where(mask.to_dense(dense.shape[2] // 2), dense, 0.0)
        torch.testing.assert_close(packed.dense(), expected)
    assert twin.state_dict().keys() == model.state_dict().keys() and twin.config == model.config
    with pytest.raises(TypeError, match="FastConvMAE"):
        unmasked(create_model("fastconvmae_tiny", img_size=64), hidden)


# -- the experiment -------------------------------------------------------------------------------


def read(recipe):
    return yaml.safe_load(Path(recipe).read_text())


def numbers_behind(words, flag):
    following = words[words.index(flag) + 1 :]
    return [float(w) for w in itertools.takewhile(lambda w: not w.startswith("--"), following)]


GREY = Statistics((0.3,), (0.4,))  # of the pictures; as if they had one channel


class Runs:
    """Stands for the programs: writes logs as they do; masked weights are worth 5 per cent."""

    def __init__(self):
        self.calls, self.fails_at = [], None

    def __call__(self, words, output, module="convmae"):
        self.calls.append((module, words))
        if len(self.calls) == self.fails_at:
            return 1, ""
        flags = dict(zip(words, words[1:]))
        if words[0] == "embed":
            assert (Path(flags["--checkpoint"]) / "model.safetensors").is_file()
            return 0, ""
        if module == "examples.probe_features":
            shares, seeds = (numbers_behind(words, flag) for flag in ("--shares", "--seeds"))
            accuracy = 30.0 + 5 * ("masked" in words[0])
            runs = [
                {"share": share, "seed": int(seed), "acc1": accuracy + seed, "seconds": 1.0}
                for share in shares
                for seed in seeds
            ]
            Path(flags["--output"]).write_text(json.dumps(runs))
            return 0, ""
        config = read(flags.get("--config", words[-1]))
        folder = output.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        line = {"step": config["steps"], "epoch": 1.0, "loss": 0.5, "seconds": 60.0}
        lines = [line | {"images_per_s": 100.0}]
        if "--seed" in flags:
            accuracy = 50.0 + int(flags["--seed"]) + 5 * ("masked" in flags.get("--finetune", ""))
            lines.append({"event": "evaluation", "step": 1, "epoch": 1.0, "acc1": accuracy})
        else:
            name, options = config["model"], {"method": config["method"], "decoder_width": 64}
            model = create_model(name, img_size=config["input_size"], in_chans=1, **options)
            save_weights(folder, model, full_name(name), pictures=GREY)
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0, ""


@pytest.fixture
def arguments(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for number in range(100 if split == "train" else 1):
                file = tmp_path / "pictures" / split / label / f"{number}.png"
                Image.new("RGB", (4, 4), (number, 0, 0)).save(file)
    flags = ["--data_path", tmp_path / "pictures", "--output_dir", tmp_path / "out"]
    return ["emoji", "--networks", "cnn", *map(str, flags), "--budget"]


def test_all_starts_are_trained_alike_and_what_is_done_is_skipped(
    arguments, tmp_path, monkeypatch, capsys
):
    steps = {0.01: 2, 0.1: 2, 1.0: 2}
    small = does_it_work.Budget({"cnn": 4}, steps, (0, 1))
    monkeypatch.setitem(does_it_work.BUDGETS, "smoke", small)
    runs = Runs()
    runs.fails_at = 2
    with pytest.raises(SystemExit, match="cnn, leaky: exit status 1"):
        does_it_work.main([*arguments, "smoke"], runs)
    runs.fails_at = 5
    with pytest.raises(SystemExit, match="goes on from here"):
        does_it_work.main([*arguments, "smoke"], runs)
    content = does_it_work.main([*arguments, "smoke"], runs)
    modules = [module for module, _ in runs.calls[:4]]
    assert modules == ["convmae", "examples.dense_pretrain", "examples.dense_pretrain", "convmae"]
    probes = 3 * (2 + 1 + 1)  # features of two splits and the probe; two random starts, two others
    finetunings = 3 * 3 * 2  # shares, starts, seeds
    again = 3  # two failed, and features that the second had before it
    assert len(runs.calls) == 2 + probes + finetunings + again
    recipes = {file.stem: read(file) for file in (tmp_path / "out/cnn/recipes").iterdir()}
    masked, other = recipes.pop("masked"), recipes.pop("leaky")
    assert masked | {"output_dir": other["output_dir"]} == other and masked["seed"] == 0
    assert {name: r["max_samples"] for name, r in recipes.items()} == {
        f"finetune-{share}": 2 * share for share in (1, 10, 100)
    }
    files = [tmp_path / f"out/cnn/probe/random-{seed}/model.safetensors" for seed in (0, 1)]
    assert files[0].read_bytes() != files[1].read_bytes()
    drawn = open_weights(files[0])
    assert drawn.config["in_chans"] == 1 and drawn.pictures == GREY
    figures = content["networks"]["cnn"]["accuracies"]["finetune-10"]
    assert [run[1] for run in figures["masked"]] == [55.0, 56.0]
    table = (tmp_path / "out/results.md").read_text()
    assert "| finetune, 1 % | **50.5** ± 0.71 (50, 51) | **55.5** ± 0.71 (55, 56) |" in table
    assert "| probe, 100 % | **30.5** ± 0.71 (30, 31) | **35.5** ± 0.71 (35, 36) |" in table
    assert table.count("| +5 ± 0 | +5 ± 0 |") == 6 and "| leaky | 4 | 1.0 |" in table
    assert (tmp_path / "out/results.png").stat().st_size > 1000

    assert re.match("b?float(16|32), auto: ", content["environment"]["arithmetic"])
    before = len(runs.calls)
    assert does_it_work.main([*arguments, "smoke"], runs) == content and len(runs.calls) == before
    with pytest.raises(SystemExit):
        does_it_work.main([*arguments, "short"], runs)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        does_it_work.main([*arguments, "smoke", "--output_dir", str(tmp_path / "file")], runs)
    assert f"--output_dir: {tmp_path / 'file'} cannot be written" in capsys.readouterr().err


def test_the_seed_of_a_pretraining_is_that_of_its_folder(arguments, tmp_path, capsys):
    runs = Runs()
    does_it_work.main([*arguments, "smoke", "--pretrain_seed", "3"], runs)
    recipes = {file.stem: read(file) for file in (tmp_path / "out/cnn/recipes").iterdir()}
    assert recipes["masked"]["seed"] == recipes["leaky"]["seed"] == 3
    assert "seed" not in recipes["finetune-10"]  # has seeds of its own
    before = len(runs.calls)
    with pytest.raises(SystemExit):
        does_it_work.main([*arguments, "smoke"], runs)
    assert "another pretrain_seed (3, now 0)" in capsys.readouterr().err
    assert len(runs.calls) == before


def test_pictures_and_options_that_are_not_there(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = ["--data_path", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        does_it_work.main(["emoji", *places], Runs())
    assert "--data_path" in (said := capsys.readouterr().err) and "holds no picture" in said
    for flags, said in (
        (["--pretrain_seed", "-1"], "--pretrain_seed -1: expected a number of 0 or more"),
        (["--pretrainings", "leaky", "leaky"], "--pretrainings leaky leaky: expected each name"),
        (["--networks", "cnn", "cnn"], "--networks cnn cnn: expected each name once"),
    ):
        with pytest.raises(SystemExit):
            does_it_work.main(["emoji", *places, *flags], Runs())
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert dense_pretrain.main([LEAKY, str(tmp_path / "none.yaml")]) == 2
    assert f"{tmp_path / 'none.yaml'}" in capsys.readouterr().err


def test_times_of_a_pretraining_add_up_over_its_processes(tmp_path):
    lines = [(1, 5.0), (2, 10.0), (3, 4.0), (4, 8.0)]
    entries = [
        {"step": step, "epoch": 1.0, "loss": 1.0 / step, "seconds": seconds, "images_per_s": 7.0}
        for step, seconds in lines
    ]
    entries.insert(2, {"event": "resumed", "step": 2})
    (tmp_path / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = does_it_work_results.pretraining(tmp_path)
    assert found["seconds"] == 18.0 and found["last_loss"] == 0.25 and found["steps"] == 4


def test_the_tables_of_the_page_are_those_of_its_results():
    page = (DOCS / "does_it_work.md").read_text()
    files = sorted((DOCS / "generated").glob("does_it_work_*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        rows = [line for line in does_it_work_results.tables(content).splitlines() if "|" in line]
        assert len(rows) > 10
        for row in rows:
            assert row in page, f"{file.name}: {row}"
        assert f"generated/{file.name}" in page


# -- its pictures ---------------------------------------------------------------------------------


def test_the_first_pictures_of_idx_files(tmp_path, capsys):
    generator = np.random.default_rng(0)
    (tmp_path / "whole").mkdir()
    for prefix, count in (("train", 7), ("t10k", 5)):
        for what, shape in (("images-idx3", (count, 4, 6)), ("labels-idx1", (count,))):
            file = tmp_path / "whole" / f"{prefix}-{what}-ubyte.gz"
            part_of_idx.write_idx(file, generator.integers(0, 10, shape, np.uint8))
    folders = [str(tmp_path / "whole"), str(tmp_path / "part")]
    part_of_idx.main([*folders, "--train", "3", "--val", "5"])
    for split, count in (("train", 3), ("val", 5)):
        whole, part = (IdxPhotos(Path(folder), split) for folder in folders)
        np.testing.assert_array_equal(part.images, whole.images[:count])
        np.testing.assert_array_equal(part.labels, whole.labels[:count])
    for flags, word in (
        ([*folders, "--train", "3", "--val", "5"], "is there already"),
        ([folders[0], f"{folders[1]}2", "--train", "8", "--val", "5"], "--train 8: .*whole has 7"),
        ([folders[0], f"{folders[1]}2", "--train", "0", "--val", "5"], "expected 1 or more"),
        ([str(tmp_path), f"{folders[1]}2", "--train", "3", "--val", "5"], "no IDX files"),
    ):
        with pytest.raises(SystemExit):
            part_of_idx.main(flags)
        assert re.search(word, capsys.readouterr().err)
    assert not Path(f"{folders[1]}2").exists()


EMOJI = {"1F600": "Smileys & Emotion", "1F468-200D-1F373": "People & Body", "1F1E6": "Flags"}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages with these emoji, under other names in one, and one that a single drawer has."""
    (tmp_path / "packages").mkdir()
    found = {}
    for drawer, package in fetch_emoji.PACKAGES.items():
        codes = [*EMOJI, "1F999"] if drawer == "noto" else [*EMOJI]
        names = [c.replace("-200D", "") if drawer == "emojione" else c.lower() for c in codes]
        files = {f"{package.pictures}/{name}.png": picture(drawer) for name in names}
        files |= {f"{package.pictures}/more/{names[0]}.png": b"", "package/LICENSE": b"free"}
        entries = [{"unified": c, "category": EMOJI.get(c, "Objects")} for c in codes]
        if drawer == "noto":
            files["package/emoji.json"] = json.dumps(entries).encode()
        path = tmp_path / "packages" / package.file
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        found[drawer] = dataclasses.replace(package, sha512=digest)
    monkeypatch.setattr(fetch_emoji, "PACKAGES", found)
    return tmp_path / "packages"


def picture(drawer):
    size = 256 if drawer == "fluent" else 64
    image = Image.new("RGBA", (size, size), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, size // 2, size))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_emoji_that_all_drawers_have_become_class_folders(packages, tmp_path):
    output = tmp_path / "emoji"
    fetch_emoji.main([str(output), "--packages", str(packages), "--test", "twemoji"])
    trained = {str(file.relative_to(output / "train")) for file in output.glob("train/*/*")}
    drawers = ("noto", "emojione", "fluent")
    expected = {f"smileys-emotion/{drawer}-1f600.png" for drawer in drawers}
    assert trained == expected | {f"people-body/{drawer}-1f468-1f373.png" for drawer in drawers}
    tested = {file.name for file in output.glob("val/*/*")}
    assert tested == {"twemoji-1f600.png", "twemoji-1f468-1f373.png"}
    with Image.open(output / "train/smileys-emotion/fluent-1f600.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        assert image.getpixel((8, 8)) == (0, 0, 255) and image.getpixel((60, 8)) == (255,) * 3
    assert len(list((output / "licences").iterdir())) == 4

    damaged = packages / fetch_emoji.PACKAGES["emojione"].file
    damaged.write_bytes(damaged.read_bytes() + b"more")
    with pytest.raises(SystemExit, match="expected .* of emojione 2.2.7"):
        fetch_emoji.main([str(tmp_path / "again"), "--packages", str(packages)])
    assert not (tmp_path / "again").exists()


def test_without_a_network_the_file_and_the_way_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_emoji, "REGISTRY", "file:///no-such-registry")
    package = fetch_emoji.PACKAGES["noto"]
    with pytest.raises(SystemExit, match=f"{package.file}.* cannot be downloaded .*--packages"):
        fetch_emoji.download(package, tmp_path)
    assert not (tmp_path / package.file).exists()
