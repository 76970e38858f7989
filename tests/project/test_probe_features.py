"""The linear classifier on features: what it finds, which labels it sees, and wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convmae import EmbedConfig, create_model, embed
from convmae.data import open_source
from convmae.weights.checkpoint import save_weights
from examples import probe_features
from examples.probe_features import Features, accuracy, choose


def pictures_of(seed, count, classes=3, spread=1.0):
    """Points around a centre for each class, and noise in channels that tell nothing."""
    random = np.random.default_rng(seed)
    numbers = np.arange(count) % classes
    values = random.normal(size=(count, 8)) * spread
    values[:, :classes] += 6 * np.eye(classes)[numbers]
    values[:, 4:] *= 1000
    return Features(values, np.array([f"class {number}" for number in numbers]))


def written(file, pictures, changed=()):
    errors = np.full(len(pictures), "")
    content = {"features": pictures.values, "label": pictures.labels, "error": errors}
    content |= dict(changed)
    np.savez(file, **{name: array for name, array in content.items() if array is not None})
    return str(file)


def test_what_features_tell_is_found_and_nothing_else():
    train, test = pictures_of(0, 90), pictures_of(1, 300)
    assert accuracy(train, test, 0)[0] > 98
    shuffled = np.random.default_rng(2).permutation(train.labels)
    found, strength = accuracy(Features(train.values, shuffled), test, 0)
    assert found < 60 and strength < 0.1  # no better than guessing: kept close to zero
    assert accuracy(train, test, 0) == accuracy(train, test, 0)


def test_the_command_takes_what_embed_writes_and_the_labels_that_finetuning_sees(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                noise = random.integers(-50, 50, (32, 32, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    weights = tmp_path / "random"
    torch.manual_seed(0)
    save_weights(weights, create_model("convmae_tiny", img_size=32), "convmae_tiny")
    files = {}
    for split in ("train", "val"):
        files[split] = str(tmp_path / f"{split}.npz")
        options = {"checkpoint": str(weights), "data_path": str(tmp_path / "pictures")}
        embed(EmbedConfig(**options, split=split, output=files[split], num_workers=0))
    output = tmp_path / "probe.json"
    flags = ["--shares", "0.5", "1", "--seeds", "3", "4", "--output", str(output)]
    assert probe_features.main([files["train"], files["val"], *flags]) == 0
    runs = json.loads(output.read_text())
    assert [(r["share"], r["seed"], r["labels"]) for r in runs] == [
        (0.5, 3, 12),
        (0.5, 4, 12),
        (1.0, 3, 24),
        (1.0, 4, 24),
    ]
    assert all(run["acc1"] == 100 for run in runs)
    assert "24 labels, seed 4: accuracy 100.00 %" in capsys.readouterr().out

    content = np.load(files["train"])
    by_name = Features(content["name"], content["label"])
    for seed in (3, 4):
        source = open_source(str(tmp_path / "pictures"), "train", max_samples=12, seed=seed)
        paths = [Path(source.photos.name(index)) for index in range(len(source.photos))]
        names = [path.relative_to(tmp_path / "pictures").as_posix() for path in paths]
        assert choose(by_name, 0.5, seed).values.tolist() == names


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": None}, "no array 'label'"),
        (
            {"features": np.zeros((30, 8, 2, 2))},
            "shape [30, 8, 2, 2], expected [pictures, channels]",
        ),
        (
            {"features": np.zeros((30, 5))},
            "has 5 channels and ",
        ),
        ({"label": np.full(30, "class 0")}, "has the class 'class 1'"),
        ({"error": np.full(30, "cut off")}, "has no picture that could be read"),
        ({"error": np.array(["cut off"] * 27 + [""] * 3)}, "1 of 'class 0'; expected two classes"),
    ],
)
def test_wrong_files(tmp_path, capsys, changed, said):
    train = written(tmp_path / "train.npz", pictures_of(0, 30), changed)
    test = written(tmp_path / "val.npz", pictures_of(1, 30))
    assert probe_features.main([train, test, "--output", str(tmp_path / "out.json")]) == 2
    found = capsys.readouterr().err
    assert said in found and ("train.npz" in found or "labelled pictures" in found)
    assert not (tmp_path / "out.json").exists()


def test_wrong_options_and_no_file(tmp_path, capsys):
    file = written(tmp_path / "some.npz", pictures_of(0, 30))
    nowhere = ["--output", str(tmp_path / "none" / "probe.json")]
    wrong = [["--shares", "0"], ["--seeds", "-1"], nowhere]
    for flags, said in ((flags, flags[0]) for flags in wrong):
        with pytest.raises(SystemExit):
            probe_features.main([file, file, *flags])
        assert said in capsys.readouterr().err
    (tmp_path / "text.npz").write_text("no archive")
    for name, what in (("text.npz", "is something else"), ("none.npz", "does not exist")):
        assert probe_features.main([str(tmp_path / name), file]) == 2
        assert f"{name} {what}; expected a .npz file" in capsys.readouterr().err
