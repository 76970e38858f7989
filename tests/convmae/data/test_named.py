"""Batches of chosen numbers, with names: each picture once, and its own image beside its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from convmae.data import PhotoSource, Pixels, UnreadableError
from convmae.data.named import contiguous_runs, named_batches
from tests.support.shard_files import TINY

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from convmae.data.crops import PickBox, Size

pytest.importorskip("torchvision")


class Flat:
    """Ten flat pictures whose value is their number; one cannot be read, one has 2 channels."""

    channels = 3
    dtype = torch.uint8

    def __len__(self) -> int:
        return 10

    def name(self, index: int) -> str:
        return f"root/{index}"

    def label(self, index: int) -> int:
        return index % 3

    def load(self, index: int) -> Tensor:
        if index == 4:
            raise UnreadableError("torn")
        return torch.full((2 if index == 8 else 3, 12, 12), index, dtype=torch.uint8)

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return Pixels(self.load(index)).crop(pick, size)


@pytest.mark.parametrize("workers", [0, 2])
def test_chosen_batches_hold_their_own_pictures(workers: int) -> None:
    source = PhotoSource(Flat(), root="root/")
    batches = list(named_batches(source, TINY, 3, [0, 1, 3], workers=workers))
    assert [(batch.number, batch.names) for batch in batches] == [
        (0, ["0", "1", "2"]),
        (1, ["3", "4", "5"]),
        (3, ["9"]),
    ]
    assert [batch.images.flatten(1).float().mean(1).tolist() for batch in batches] == [
        [0, 1, 2],
        [3, 0, 5],
        [9],
    ]
    assert batches[1].reasons == ["", "torn", ""]
    assert batches[1].labels.tolist() == [0, 1, 2]  # known, though the picture is not
    (other,) = named_batches(source, TINY, 3, [2], workers=0, labelled=False)
    unlike = "2 channels of uint8, where other pictures have 3 of uint8"
    assert other.reasons == ["", "", unlike]
    assert other.labels.tolist() == [-1, -1, -1]


def test_runs_of_numbers() -> None:
    assert list(contiguous_runs([1, 2, 3, 7, 9, 10])) == [range(1, 4), range(7, 8), range(9, 11)]
    assert list(contiguous_runs([])) == []


def test_pictures_of_a_folder_have_paths_below_it(tmp_path: Path) -> None:
    from convmae.data import open_source
    from tests.support.inference_runs import draw

    for name in ("b/2.png", "a/deep/1.png", "0.png"):
        draw(tmp_path / "data" / name, 0)
    for where in (tmp_path / "data", f"{tmp_path}/data/", f"{tmp_path}/./data"):
        source = open_source(str(where), split=None)
        (batch,) = named_batches(source, TINY, 8, [0], workers=0)
        assert batch.names == ["0.png", "a/deep/1.png", "b/2.png"]
