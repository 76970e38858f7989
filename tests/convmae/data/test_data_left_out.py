"""Nothing is left out of a data set without being counted and named."""

from __future__ import annotations

import gzip
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from convmae.data import DataError, Source, open_source, shards
from convmae.data.left_out import KINDS_AT_MOST, OTHER, LeftOut
from convmae.data.samples import read_chosen
from tests.support.paths import FASHION
from tests.support.shard_files import TINY, picture, sample, values, write_shard

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("webdataset")

ARCHIVE = "a.tar"


def kinds(source: Source) -> dict[str, int]:
    """How many of each kind are left out, in all."""
    total: dict[str, int] = {}
    for left_out in source.left_out:
        for kind, count in left_out.counts.items():
            total[kind] = total.get(kind, 0) + count
    return total


def keys_of(source) -> list[str]:
    """The names of all samples, in the order of the archive."""
    chosen = read_chosen(source.shards, range(source.pictures))
    return [raw.name.rpartition(": ")[2] for raw in chosen]


# -- the count itself -----------------------------------------------------------------------------


def test_kinds_are_counted_and_the_first_names_told() -> None:
    left_out = LeftOut()
    for name in ("d.txt", "b.txt", "a.txt", "c.txt", "x.xyz"):
        left_out.add(f".{name[2:]}", name)
    assert str(left_out) == (
        "5 files are left out: 4 .txt (a.txt, b.txt, c.txt, ...), 1 .xyz (x.xyz)"
    )
    other = LeftOut()
    other.add(".txt", "aa.txt", count=1000)
    left_out.merge([other])
    assert left_out.total == 1005 and left_out.names[".txt"] == ["a.txt", "aa.txt", "b.txt"]
    one = LeftOut()
    one.add(".txt", "line\nbreak.txt")
    assert str(one) == r"1 file is left out: 1 .txt (line\nbreak.txt)"
    for number in range(2 * KINDS_AT_MOST):
        other.add(f".{number}", "a")
    assert len(other.counts) == KINDS_AT_MOST + 1
    assert other.counts[OTHER] == KINDS_AT_MOST + 1 and other.total == 1000 + 2 * KINDS_AT_MOST


# -- folders --------------------------------------------------------------------------------------


def test_files_of_other_kinds_in_a_folder(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/a/2.v2.png", "train/b.c/3.jpg", "train/b.c/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(3))
    for name in ("train/readme", "train/a/.DS_Store", "train/a/4.XYZ", "train/a/5.xyz", "list.csv"):
        (tmp_path / name).write_text("no picture")
    for name in ("train/empty", "extra"):
        (tmp_path / name).mkdir()
    (tmp_path / "extra" / "6.png").write_bytes(picture(6))
    os.symlink(tmp_path / "train" / "a", tmp_path / "train" / "a" / "again")
    source = open_source(tmp_path)
    assert source.pictures == 3 and source.classes == ["a", "b.c"]
    assert kinds(source) == {
        ".xyz": 2,
        ".txt": 1,
        "hidden": 1,
        "without an ending": 1,
        "folders that a link shows again": 1,
        "folders without a picture": 1,
        ".csv": 1,
        "folders": 1,
    }
    beside, inside = map(str, source.left_out)
    assert beside == f"2 files in {tmp_path} are left out: 1 .csv (list.csv), 1 folders (extra)"
    assert f"files in {tmp_path / 'train'} are left out: 2 .xyz (a/4.XYZ, a/5.xyz), " in inside


def test_a_folder_of_other_kinds_alone_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.psd").write_text("no picture")
    with pytest.raises(DataError, match=r"holds no picture .*; 1 file in .* left out: 1 .psd \(a"):
        open_source(tmp_path)


def test_a_folder_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.png", "locked/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(3))
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(tmp_path)
    assert source.pictures == 1 and kinds(source)["folders that cannot be opened"] == 1


def test_arrays_and_what_lies_beside_them(tmp_path: Path) -> None:
    np.save(tmp_path / "a.1.npy", np.zeros((8, 8), np.uint8))
    np.savez(tmp_path / "b.npz", np.zeros((8, 8), np.uint8))
    source = open_source(tmp_path)
    assert source.pictures == 1 and kinds(source) == {".npz": 1}


def test_what_lies_beside_idx_files(tmp_path: Path) -> None:
    shutil.copytree(FASHION, tmp_path / "data")
    (tmp_path / "data" / "a.png").write_bytes(picture(1))
    before, after = kinds(open_source(FASHION)), kinds(open_source(tmp_path / "data"))
    assert after == {**before, ".png": 1}


# -- shards ---------------------------------------------------------------------------------------


def labelled(stem: str, value: int, label: int) -> list[tuple[str, bytes]]:
    return [(f"{stem}.png", picture(10 * value)), (f"{stem}.cls", b"%d" % label)]


@pytest.mark.parametrize("beside", [False, True])
def test_dots_in_the_names_of_samples(tmp_path: Path, beside: bool) -> None:
    """Dates, versions and folders with dots; counted and streamed alike, with or without sizes."""
    stems = ["IMG_2024.01.01", "IMG_2024.01.02", "IMG_2024.02.01", "a.b/c.d", "a.b/c.e", "plain"]
    members = [m for place, stem in enumerate(stems) for m in labelled(stem, place + 1, place % 2)]
    write_shard(tmp_path / ARCHIVE, members)
    if beside:
        shards.write_sizes(tmp_path)
    source = open_source(tmp_path)
    assert source.pictures == len(stems) and keys_of(source) == stems
    assert list(source.left_out) == [] and source.failures == [] and list(source.notes) == []
    (batch,) = source.evaluation_batches(TINY, 6, workers=1)
    assert values(batch) == [1, 2, 3, 4, 5, 6] and batch.failures == []
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 1]
    whole = list(source.batches(TINY, 2, 0, 6, seed=3, workers=0))
    later = list(source.batches(TINY, 2, 2, 6, seed=3, workers=0))
    for one, other in zip(whole[2:], later, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.keys, other.keys)


def test_middle_names_beside_a_plain_member(tmp_path: Path) -> None:
    """WebDataset's own way: what agrees up to the first dot is one sample with one picture."""
    members = []
    for number in range(3):
        members += [(f"s{number}.target.png", picture(200)), (f"s{number}.json", b"{}")]
        members += [(f"s{number}.input.PNG", picture(10 * number)), (f"s{number}.cls", b"1")]
    members += [("s3.seg.png", picture(200)), ("s3.png", picture(30)), ("s3.cls", b"0")]
    write_shard(tmp_path / ARCHIVE, members)
    source = open_source(tmp_path)
    assert keys_of(source) == ["s0", "s1", "s2", "s3"] and source.classes == ["0", "1"]
    (batch,) = source.evaluation_batches(TINY, 4, workers=0)
    assert values(batch) == [0, 1, 2, 3] and batch.labels.tolist() == [1, 1, 1, 0]
    assert kinds(source) == {".json": 3, "pictures beside another of the same sample": 4}
    (left_out,) = source.left_out
    assert str(left_out) == (
        "7 members of shards are left out: 4 pictures beside another of the same sample "
        "(s0.target.png, s1.target.png, s2.target.png, ...), 3 .json (s0.json, s1.json, s2.json)"
    )


def test_middle_names_alone_are_pictures_of_their_own_and_told(tmp_path: Path) -> None:
    members = []
    for number in range(2):
        members += [(f"s{number}.input.png", picture(10 * number))]
        members += [(f"s{number}.target.png", picture(200))]
    write_shard(tmp_path / ARCHIVE, members)
    source = open_source(tmp_path)
    assert keys_of(source) == ["s0.input", "s0.target", "s1.input", "s1.target"]
    assert kinds(source) == {}
    (note,) = source.notes
    assert "(2 'input', 2 'target'); each counts as a picture of its own" in note


def test_every_other_member_is_counted(tmp_path: Path) -> None:
    members = [
        *sample(0, label=0),
        ("README", b"text"),
        ("dir/.hidden.png", picture(0)),
        ("._s001.png", b"of macOS"),
        *sample(1, label=1),
        ("s001.png", picture(90)),  # the same name again
        ("alone.cls", b"1"),
        ("c.avi", b"no kind that is read"),
        ("trailing.", b""),
        ("s002.cls", b"0"),
        ("s002.cls", b"1"),
        ("s002.jpg", picture(20, "jpg")),
        ("s002.png", picture(90)),
    ]
    write_shard(tmp_path / ARCHIVE, members)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"packed"))
    source = open_source(tmp_path)
    (batch,) = source.evaluation_batches(TINY, 3, workers=0)
    assert keys_of(source) == ["s000", "s001", "s002"]
    assert values(batch) == [0, 1, 2] and batch.labels.tolist() == [0, 1, 0]
    assert kinds(source) == {
        ".avi": 1,
        "without an ending": 2,
        "hidden": 2,
        "pictures beside another of the same sample": 2,
        "labels beside another of the same sample": 1,
        "labels without a picture beside them": 1,
        ".gz": 1,
    }


def test_a_long_group_of_dotted_names_is_no_sample(tmp_path: Path) -> None:
    """More neighbours that agree up to the first dot than one sample ever has."""
    members = [(f"IMG.{number:03}.png", picture(number % 25 * 10)) for number in range(150)]
    write_shard(tmp_path / ARCHIVE, [*members, ("IMG.cls", b"0")])
    source = open_source(tmp_path)
    assert source.pictures == 150
    assert kinds(source) == {"labels without a picture beside them": 1}
    (batch,) = source.evaluation_batches(TINY, 150, workers=0)
    assert values(batch) == [number % 25 for number in range(150)]


def test_sizes_keep_what_is_left_out_and_say_if_they_do_not(tmp_path: Path) -> None:
    write_shard(tmp_path / ARCHIVE, [*sample(0, label=0), ("s000.json", b"{}")])
    counted = open_source(tmp_path)
    file = shards.write_sizes(tmp_path)
    listed = open_source(tmp_path)
    assert list(map(str, listed.left_out)) == list(map(str, counted.left_out))
    assert list(listed.notes) == [] and kinds(listed) == {".json": 1}
    file.write_text('{"a.tar": 1}')
    (note,) = open_source(tmp_path).notes
    assert "does not tell whether shards hold members that are left out" in note
