"""Pictures with objects on a canvas: pixels, boxes and masks go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from convmae.data.objects.annotations import ObjectPicture
from convmae.data.objects.shapes import encoded_mask
from convmae.data.objects.transforms import (
    FitTransform,
    JitterTransform,
    Placement,
    boxes_of,
    fitted,
    placed,
)

SIZE = (48, 60)
CANVAS = (64, 64)


class OnePicture:
    """A dark picture with two bright rectangles, and what is annotated of them."""

    def __init__(self, dtype: Any = torch.uint8, as_code: bool = False) -> None:
        boxes = [(10, 8, 30, 40), (40, 20, 56, 44)]
        image = torch.zeros(1, *SIZE)
        shapes = []
        for left, top, right, bottom in boxes:
            mask = np.zeros(SIZE, dtype=np.uint8)
            mask[top:bottom, left:right] = 1
            image[0, top:bottom, left:right] = 200
            polygon = [[left, top, right, top, right, bottom, left, bottom]]
            shapes.append(encoded_mask(mask) if as_code else polygon)
        self.image = image.to(dtype)
        self.objects = ObjectPicture(
            "a.png",
            SIZE,
            1,
            np.array(boxes, dtype=np.float64),
            np.array([0, 1]),
            np.array([False, False]),
            np.array([640.0, 384.0]),
            shapes,
        )

    def load(self) -> torch.Tensor:
        return self.image

    def target(self) -> ObjectPicture:
        return self.objects


@pytest.mark.parametrize("flip_first", [False, True])
@pytest.mark.parametrize("as_code", [False, True])
def test_masks_lie_where_the_bright_pixels_are(flip_first, as_code):
    picture = OnePicture(as_code=as_code)
    transform = JitterTransform(CANVAS, 0.3, 2.0, 0.5, flip_first)
    flips = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = transform(picture)
        torch.manual_seed(seed)
        flips.add(transform.draw(SIZE).flip)
        assert image.shape == (1, *CANVAS)
        bright = image[0] > 100
        union = target["masks"].any(0) if len(target["masks"]) else torch.zeros(CANVAS).bool()
        # Pixels on the edges of the rectangles are of either side, after a resize.
        perimeter = 8 * sum(CANVAS)
        assert int((bright ^ union).sum()) < 0.25 * perimeter
        left, top, right, bottom = target["region"].tolist()
        outside = torch.ones(CANVAS, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert not bool(image[0][outside].any())
        assert not bool(target["masks"][:, outside].any())
    assert flips == {False, True}


def test_the_two_orders_differ_in_where_the_padding_is():
    first = Placement(SIZE, (24, 30), CANVAS, flip=True, flip_first=True)
    last = Placement(SIZE, (24, 30), CANVAS, flip=True)
    assert first.region == (0, 0, 30, 24)
    assert last.region == (34, 0, 64, 24)
    box = np.array([[10.0, 8, 30, 40]])
    assert first.boxes(box).tolist() == [[15, 4, 25, 20]]
    assert last.boxes(box).tolist() == [[49, 4, 59, 20]]


def test_boxes_are_those_of_what_is_left_of_the_masks():
    objects = OnePicture().objects
    # The left 20 columns are cut off, and with them half of the first object.
    placement = Placement(SIZE, SIZE, (48, 30), top=0, left=20)
    target = placed(objects, placement, masks=True)
    assert target["boxes"].tolist() == [[0, 8, 10, 40], [20, 20, 30, 44]]
    assert target["labels"].tolist() == [0, 1]
    gone = placed(objects, Placement(SIZE, SIZE, (48, 8), left=31), masks=True)
    assert len(gone["boxes"]) == len(gone["labels"]) == len(gone["masks"]) == 0
    alone = placed(objects, placement, masks=False)
    assert alone["boxes"].tolist() == target["boxes"].tolist()
    assert "masks" not in alone


def test_crowds_are_not_learned():
    objects = OnePicture().objects
    objects.crowd[0] = True
    target = placed(objects, Placement(SIZE, SIZE, CANVAS), masks=True)
    assert target["labels"].tolist() == [1]


def test_large_scale_jitter_is_uniform_and_cuts_both_axes_at_one_share():
    transform = JitterTransform((100, 100), 0.1, 2.0)
    drawn = [transform.draw((200, 400)) for _ in range(3000)]
    factors = np.array([placement.resized[1] / 100 for placement in drawn])
    assert 0.1 <= factors.min() < 0.12 and 1.98 < factors.max() <= 2.0
    assert abs(factors.mean() - 1.05) < 0.03
    assert abs((factors < 0.575).mean() - 0.25) < 0.04
    large = JitterTransform((100, 100), 2.0, 2.0)
    for placement in (large.draw((300, 200)) for _ in range(50)):
        assert placement.resized == (200, 133)
        assert abs(placement.top / 100 - placement.left / 33) < 0.03


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (768, 1024)), ((640, 427), (1024, 683)), ((10, 10), (1024,) * 2)],
)
def test_the_longer_side_fills_the_canvas(size, expected):
    assert fitted(size, (1024, 1024)) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_fit_keeps_the_type_and_tells_where_the_picture_is(dtype):
    image, target = FitTransform((32, 32))(OnePicture(dtype))
    assert image.dtype == dtype and image.shape == (1, 32, 32)
    assert target["region"].tolist() == [0, 0, 32, 26]
    assert target["size"].tolist() == list(SIZE)
    assert abs(float(image[0, 12, 10].float()) - 200) < 2  # inside the first rectangle
    torch.manual_seed(1)
    jittered, _ = JitterTransform((32, 32))(OnePicture(dtype))
    assert jittered.dtype == dtype


def test_boxes_of_masks_are_their_edges():
    masks = torch.zeros(2, 6, 9, dtype=torch.bool)
    masks[0, 2:5, 3:4] = True
    assert boxes_of(masks).tolist() == [[3, 2, 4, 5], [0, 0, 0, 0]]
