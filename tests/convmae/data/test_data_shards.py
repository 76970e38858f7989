"""WebDataset shards: counted, streamed, shared among processes, resumed, and never trusted."""

from __future__ import annotations

import io
import itertools
import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from convmae.data import (
    DataError,
    EvalTransform,
    FinetuneTransform,
    PretrainTransform,
    channel_statistics,
    open_source,
    samples,
    stream,
)
from convmae.data.source import ExpectedLabels
from tests.support.shard_files import (
    SIZES,
    TINY,
    Payload,
    damage,
    keys,
    picture,
    sample,
    values,
    write_shard,
    write_shards,
)

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("webdataset")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps


# -- what there is --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "npy"])
def test_a_folder_of_shards(tmp_path: Path, kind: str) -> None:
    source = open_source(write_shards(tmp_path, kind))
    assert (source.pictures, source.samples_per_epoch) == (25, 25)
    assert source.classes == ["0", "1", "2"] and source.failures == []
    wanted = (2, torch.uint16) if kind == "npy" else (3, torch.uint8)
    assert (source.channels, source.dtype) == wanted
    (batch,) = source.batches(TINY, 25, 0, 1, workers=0)
    numbers = batch.keys[:, 1].tolist()
    assert sorted(numbers) == list(range(25)) != numbers
    assert values(batch) == numbers
    assert batch.labels.tolist() == [number % 3 for number in numbers]
    assert source.preview(3, (8, 8))[:, 0, 0, 0].tolist() == pytest.approx([0, 10, 20], abs=1)


def test_patterns_splits_and_shards_without_labels(tmp_path: Path) -> None:
    write_shards(tmp_path / "train")
    write_shard(tmp_path / "val" / "a.tar", sample(3) + sample(4))
    train, val = open_source(tmp_path), open_source(tmp_path, "val")
    assert (train.pictures, val.pictures, val.classes) == (25, 2, None)
    (batch,) = val.evaluation_batches(TINY, 2, workers=0)
    assert values(batch) == [3, 4] and batch.labels.tolist() == [-1, -1]
    pattern = str(tmp_path / "train" / "shard-{000001..000002}.tar")
    assert open_source(pattern).pictures == 13
    assert open_source(str(tmp_path / "train" / "shard-000001.tar")).pictures == 4


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    for address in ("pipe:touch trap", "pipe:touch trap.tar", "s3://bucket/a.tar", "file:a.tar"):
        scheme = address.partition(":")[0]
        with pytest.raises(DataError, match=f"{scheme}: is no way to fetch shards"):
            open_source(address)
    with pytest.raises(DataError, match="pipe: is no way to fetch shards"):
        open_source("{a,pipe:touch trap;}.tar")
    with pytest.raises(DataError, match="mixes addresses and files"):
        open_source("{http://x/a,b}.tar")
    assert not (tmp_path / "trap").exists()
    with pytest.raises(DataError, match=r"1 of 5 shards do not exist, the first .*-000004.tar"):
        open_source(str(tmp_path / "shard-{000000..000004}.tar"))
    with pytest.raises(DataError, match="a pattern names the shards of one split"):
        open_source(str(tmp_path / "shard-{000000..000003}.tar"), "val")
    with pytest.raises(DataError, match="max_samples 5 cannot choose from shards"):
        open_source(tmp_path, max_samples=5)
    (tmp_path / "b.png").write_bytes(picture(0))
    with pytest.raises(DataError, match="two kinds, shard-000000.tar and b.png"):
        open_source(tmp_path)


def test_names_that_look_like_addresses_are_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "data" / "pipe:touch trap;.tar", sample(3))
    (batch,) = open_source("data").evaluation_batches(TINY, 1, workers=0)
    assert values(batch) == [3] and not (tmp_path / "trap").exists()


def test_nothing_is_unpickled_or_extracted(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    evil = pickle.dumps(Payload(trap))
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(trap)], dtype=object))
    torch.save(Payload(trap), buffer_of_torch := io.BytesIO())
    members = []
    for number in range(4):
        members += sample(number)
        for suffix in ("pickle", "pyd", "pkl", "png.pickle"):
            members.append((f"s{number:03}.{suffix}", evil))
        members.append((f"s{number:03}.pth", buffer_of_torch.getvalue()))
    members += [("x.npy", buffer.getvalue()), ("y.png", evil), ("z.npy", evil), ("p.pyd", evil)]
    members += [("../escape.png", picture(40))]
    write_shard(tmp_path / "data" / "a.tar", members)
    source = open_source(tmp_path / "data")
    assert source.pictures == 8
    for batches in (source.batches(TINY, 8, 0, 2, workers=0), source.evaluation_batches(TINY, 8)):
        named = {failure.name.rpartition(": ")[2] for b in batches for failure in b.failures}
        assert named == {"x", "y", "z"}
    assert not trap.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "data"]
    pickle.loads(evil)
    assert trap.exists()  # the trap would have sprung


# -- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 3), (2, 2)])
def test_an_epoch_has_every_sample_once(tmp_path: Path, workers: int, world: int) -> None:
    source = open_source(write_shards(tmp_path))
    per_epoch = 25 // (2 * world)
    ranks = [
        list(source.batches(TINY, 2, 0, 3 * per_epoch, None, 5, rank, world, workers))
        for rank in range(world)
    ]
    assert [len(batches) for batches in ranks] == [3 * per_epoch] * world
    orders = []
    for epoch in range(3):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [key for batches in ranks for key in keys(batches[part])]
        assert {key[0] for key in seen} == {epoch}
        numbers = [number for _, number in seen]
        assert len(set(numbers)) == len(numbers) == per_epoch * 2 * world
        orders.append(numbers)
    assert orders[0] != orders[1] != orders[2]
    for batch in ranks[0]:
        assert values(batch) == batch.keys[:, 1].tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_that_begins_later_sees_the_same_batches(tmp_path: Path, workers: int) -> None:
    source = open_source(write_shards(tmp_path))
    transform = PretrainTransform((8, 8))
    for rank, per_epoch in ((0, None), (1, 3)):
        options = dict(batches_per_epoch=per_epoch, seed=3, rank=rank, world=2, workers=workers)
        whole = list(source.batches(transform, 3, 0, 11, **options))
        for first in (1, 4, 6, 9):
            later = list(source.batches(transform, 3, first, 11, **options))
            assert len(later) == 11 - first
            for one, other in zip(whole[first:], later, strict=True):
                assert torch.equal(one.images, other.images)
                assert torch.equal(one.keys, other.keys)
                assert torch.equal(one.labels, other.labels)


def test_samples_that_are_passed_over_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_shards(tmp_path))
    read: list[str] = []
    contents = samples._contents

    def noted(archive, members):
        read.append(members["__key__"])
        return contents(archive, members)

    monkeypatch.setattr(samples, "_contents", noted)
    (batch,) = source.batches(TINY, 5, 4, 5, workers=0)
    assert len(read) == 5 and sorted(read) == sorted(f"s{value:03}" for value in values(batch))


def test_a_transform_depends_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    write_shards(tmp_path / "a")
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    members = [(f"s{i:03}.png", buffer.getvalue()) for i in range(6)]
    source = open_source(write_shard(tmp_path / "b" / "a.tar", members).parent)
    transform = FinetuneTransform((16, 16))
    images = {}
    for workers in (0, 1, 2):
        for batch in source.batches(transform, 2, 0, 6, seed=1, workers=workers):
            for key, image in zip(batch.keys.tolist(), batch.images):
                images.setdefault(tuple(key), []).append(image)
    assert len(images) == 12 and {len(of_key) for of_key in images.values()} == {3}
    for of_key in images.values():
        assert torch.equal(of_key[0], of_key[1]) and torch.equal(of_key[0], of_key[2])
    assert len({image[0].numpy().tobytes() for image in images.values()}) == 12


def test_the_buffer_mixes_and_the_seed_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_shards(tmp_path))
    orders = [keys(source.batches(TINY, 5, 0, 5, seed=seed, workers=0)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    monkeypatch.setattr(stream, "BUFFER", 1)
    plain = [number for _, number in keys(source.batches(TINY, 5, 0, 5, workers=0))]
    ends = list(itertools.accumulate(SIZES))
    shards = {end - size: list(range(end - size, end)) for end, size in zip(ends, SIZES)}
    order = [number for number in plain if number in shards]
    assert plain == [number for first in order for number in shards[first]]  # whole shards
    assert plain != sorted(plain)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("batch_size", "world"), [(4, 2), (10, 3), (1, 1)])
def test_evaluation_sees_every_sample_once(
    tmp_path: Path, workers: int, batch_size: int, world: int
) -> None:
    source = open_source(write_shards(tmp_path))
    ranks = [
        list(source.evaluation_batches(EvalTransform((8, 8)), batch_size, rank, world, workers))
        for rank in range(world)
    ]
    steps = source.evaluation_steps(batch_size, world)
    assert [len(batches) for batches in ranks] == [steps] * world
    batches = [batch for of_rank in ranks for batch in of_rank]
    assert sorted(keys(batches)) == [(0, i) for i in range(steps * batch_size * world)]
    for batch in batches:
        assert batch.images.shape == (batch_size, 3, 8, 8) and batch.failures == []
        for number, value, label in zip(batch.keys[:, 1].tolist(), values(batch), batch.labels):
            assert (value, label) == ((number, number % 3) if number < 25 else (0, -1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_statistics_of_shards(tmp_path: Path, workers: int) -> None:
    source = open_source(write_shards(tmp_path))
    mean, std = channel_statistics(source, workers=workers)
    numbers = np.arange(25) * 10 / 255
    assert mean == pytest.approx([numbers.mean()] * 3) and std == pytest.approx([numbers.std()] * 3)
    part, _ = channel_statistics(source, max_pictures=6, workers=workers)
    assert part == pytest.approx([numbers[[0, 4, 8, 12, 16, 20]].mean()] * 3)


# -- damage ---------------------------------------------------------------------------------------


def broken_members() -> list[tuple[str, bytes]]:
    return [
        *sample(0, label=0),
        ("s001.png", b"no picture"),
        ("s001.cls", b"1"),
        *sample(2),  # no label
        ("s003.png", picture(30)),
        ("s003.cls", b"cat"),
        ("s004.npy", picture(40, "npy")),
        ("s004.cls", b"1"),
        ("s005.jpg", picture(50)),  # a PNG: the content decides
        ("s005.cls", b"1"),
        *sample(6, label=2),
        ("s007.cls", b"2"),  # no picture: no sample
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_read_are_replaced_and_named(tmp_path: Path, workers: int) -> None:
    path = write_shard(tmp_path / "a.tar", broken_members())
    source = open_source(tmp_path)
    assert source.pictures == 7
    (batch,) = source.evaluation_batches(TINY, 7, workers=workers)  # as labels are not needed yet
    assert len(batch.failures) == 2 and batch.labels.tolist() == [0, -1, -1, -1, -1, 1, 2]
    assert values(batch) == [0, 0, 2, 3, 0, 5, 6]
    source.expect_labels(ExpectedLabels(3))
    (batch,) = source.batches(TINY, 7, 0, 1, workers=workers)
    reasons = {f.name.removeprefix(f"{path}: "): f.reason for f in batch.failures}
    assert reasons == {
        "s001": "not a picture that Pillow knows",
        "s002": "it has no .cls, as others have",
        "s003": "its .cls is 'cat'; expected a whole number",
        "s004": "2 channels of uint16, where other pictures have 3 of uint8",
    }
    assert sorted(batch.keys[:, 1].tolist()) == list(range(7))
    assert set(values(batch)) == {0, 5, 6}
    labels = {0: 0, 5: 1, 6: 2}
    assert all(label == labels[value] for value, label in zip(values(batch), batch.labels))
    (batch,) = source.evaluation_batches(TINY, 7, workers=workers)
    assert values(batch) == [0, 0, 0, 0, 0, 5, 6] and batch.labels.tolist() == [0, *[-1] * 4, 1, 2]
    assert len(batch.failures) == 4


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(f"{i}.png", b"no") for i in range(5)])
    with pytest.raises(DataError, match="no sample that can be read; the first, .*a.tar: 0: not a"):
        open_source(tmp_path)
    write_shard(tmp_path / "a.tar", [("notes.txt", b"no")])
    with pytest.raises(DataError, match="holds no sample that can be read"):
        open_source(tmp_path)


@pytest.mark.parametrize("how", ["cut in a picture", "cut between samples", "a broken header"])
def test_a_damaged_shard_is_named_and_its_good_samples_are_kept(tmp_path: Path, how: str) -> None:
    write_shards(tmp_path)
    path = tmp_path / "shard-000001.tar"
    damage(path, how)
    told = "2 samples before that are good, the last is s008"
    with pytest.raises(DataError, match=rf"1 of 4 shards cannot be read .*000001.tar: .*; {told}"):
        open_source(tmp_path)
    source = open_source(tmp_path, max_unreadable=0.25)
    assert source.pictures == 23
    (failure,) = source.failures
    assert failure.name == str(path) and failure.reason.endswith(told)
    batches = list(source.batches(TINY, 23, 0, 2, workers=0))
    for batch in batches:
        assert batch.failures == []
        assert sorted(values(batch)) == [*range(9), *range(11, 25)]


def test_no_archive_at_all(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for content in (b"", b"hello", bytes(100)):
        (tmp_path / "shard-000001.tar").write_bytes(content)
        (failure,) = open_source(tmp_path, max_unreadable=0.25).failures
        assert failure.name.endswith("shard-000001.tar")
        assert failure.reason.endswith("0 samples before that are good, the last is none")


def test_a_shard_that_shrinks_while_training_is_told(tmp_path: Path) -> None:
    source = open_source(write_shards(tmp_path))
    damage(tmp_path / "shard-000001.tar", "cut in a picture")
    (batch,) = source.batches(TINY, 25, 0, 1, workers=0)
    assert len(batch.images) == 25
    named = {failure.name for failure in batch.failures}
    assert named == {f"{tmp_path / 'shard-000001.tar'}: sample {i}" for i in (2, 3)}
