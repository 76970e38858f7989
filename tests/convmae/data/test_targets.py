"""Pictures with targets: what belongs to a picture goes with it, through every kind of loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from convmae.data import DataError, PhotoSource, Transform, UnreadableError
from convmae.data.picture import NO_LABEL, Subset

BROKEN = 3


class NumberedPhotos:
    """Pictures of 2 x 2 pixels, all of which have the number of the picture; one target is lost."""

    channels, dtype = 1, torch.uint8

    def __init__(self, count: int, stacked: bool, broken: int | None = BROKEN) -> None:
        self.count, self.stacked, self.broken = count, stacked, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"number {index}"

    def label(self, index: int) -> int:
        return NO_LABEL

    def load(self, index: int) -> Tensor:
        return torch.full((1, 2, 2), index, dtype=torch.uint8)

    def measured(self, index: int) -> Tensor:
        return self.load(index).float()

    def crop(self, index: int, pick: Any, size: Any) -> Tensor:
        return self.load(index)

    def target(self, index: int) -> Any:
        if index == self.broken:
            raise UnreadableError("the target is lost")
        return torch.full((2, 2), index) if self.stacked else {"boxes": torch.zeros(index, 4)}


class Together(Transform):
    """Picture and target as they are, with a random number of the sample in the last pixel."""

    size = (2, 2)

    def __call__(self, picture: Any) -> tuple[Tensor, Any]:
        image = picture.load()
        image[0, 1, 1] = torch.randint(256, ())
        return image, picture.target()

    def target_of_filler(self, size: tuple[int, int]) -> Any:
        return torch.full(size, 255)


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_go_with_their_pictures_and_a_lost_one_is_replaced(workers: int) -> None:
    source = PhotoSource(NumberedPhotos(6, stacked=True))
    batches = list(source.batches(Together(), 3, 0, 4, seed=5, workers=workers))
    seen = [int(number) for batch in batches for number in batch.images[:, 0, 0, 0]]
    for batch in batches:
        assert batch.targets.dtype == torch.int64 and batch.targets.shape == (3, 2, 2)
        assert batch.targets[:, 0, 0].tolist() == batch.images[:, 0, 0, 0].tolist()
    assert BROKEN not in seen and seen.count(BROKEN + 1) == 4
    failures = [failure for batch in batches for failure in batch.failures]
    assert [tuple(f) for f in failures] == [("number 3", "the target is lost")] * 2
    later = list(source.batches(Together(), 3, 2, 4, seed=5, workers=workers))
    for batch, again in zip(batches[2:], later, strict=True):
        assert torch.equal(batch.images, again.images) and torch.equal(batch.targets, again.targets)


def test_targets_that_cannot_be_stacked_are_a_list() -> None:
    source = PhotoSource(Subset(NumberedPhotos(9, stacked=False), [1, 2, 5, 7]))
    (batch,) = source.batches(Together(), 4, 0, 1)
    assert [len(target["boxes"]) for target in batch.targets] == batch.images[:, 0, 0, 0].tolist()


def test_evaluation_fills_up_what_is_missing() -> None:
    source = PhotoSource(NumberedPhotos(5, stacked=True))
    batches = list(source.evaluation_batches(Together(), 3))
    targets = torch.cat([batch.targets[:, 0, 0] for batch in batches]).tolist()
    assert targets == [0, 1, 2, 255, 4, 255]
    assert [f.name for batch in batches for f in batch.failures] == ["number 3"]


def test_pictures_of_several_sizes_are_evaluated_one_by_one() -> None:
    class Growing(Together):
        def __call__(self, picture: Any) -> tuple[Tensor, Any]:
            side = 1 + int(picture.load()[0, 0, 0])
            return torch.zeros(1, side, 2, dtype=torch.uint8), torch.zeros(side, 2)

    source = PhotoSource(NumberedPhotos(3, stacked=True, broken=None))
    heights = [b.targets.shape[1] for b in source.evaluation_batches(Growing(), 1)]
    assert heights == [1, 2, 3]
    with pytest.raises(DataError, match="sizes of 1 x 2 and 2 x 2 pixels; give eval_batch_size 1"):
        list(source.evaluation_batches(Growing(), 2))


def test_pictures_without_targets_have_none() -> None:
    class ImageAlone(Transform):
        size = (2, 2)

        def __call__(self, picture: Any) -> Tensor:
            return picture.load()

    (batch,) = PhotoSource(NumberedPhotos(2, stacked=True)).batches(ImageAlone(), 2, 0, 1)
    assert batch.targets is None
