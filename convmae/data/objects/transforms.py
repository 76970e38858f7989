"""Pictures with objects on a canvas of one size: large-scale jitter to train, a resize to test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.data.objects.annotations import SMALLEST
from convmae.data.objects.shapes import encoded_shape, shape_mask
from convmae.data.transforms import Transform, flipped

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.data.crops import Size
    from convmae.data.objects.annotations import ObjectPicture


@dataclass(frozen=True)
class Placement:
    """Where a picture lies on a canvas: resized, cut, laid into the upper left corner, flipped.

    Attributes:
        picture, resized, canvas: heights and widths.
        top, left: the corner of the cut in the resized picture.
        flip: left to right.
        flip_first: the resized picture is flipped, before it is cut; else the canvas.
    """

    picture: Size
    resized: Size
    canvas: Size
    top: int = 0
    left: int = 0
    flip: bool = False
    flip_first: bool = False

    @property
    def filled(self) -> Size:
        """Height and width of the part of the canvas that the picture covers."""
        height = min(self.canvas[0], self.resized[0] - self.top)
        return height, min(self.canvas[1], self.resized[1] - self.left)

    @property
    def region(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of that part."""
        height, width = self.filled
        left = self.canvas[1] - width if self.flip and not self.flip_first else 0
        return left, 0, left + width, height

    def image(self, image: Tensor) -> Tensor:
        """`[C, h, w]` on the canvas, `[C, H, W]`; 0 where there is no picture."""
        return self._laid(_resized(image, self.resized, nearest=False))

    def mask(self, shape: Any) -> Tensor:
        """A shape on the canvas, bool `[H, W]`; polygons are moved, then pixels made of them."""
        if isinstance(shape, list):
            moved = [self.points(np.reshape(part, (-1, 2))).ravel().tolist() for part in shape]
            whole = torch.from_numpy(shape_mask(moved, self.canvas)).bool()
            left, top, right, bottom = self.region
            inside = torch.zeros_like(whole)
            inside[top:bottom, left:right] = whole[top:bottom, left:right]
            return inside
        stored = torch.from_numpy(shape_mask(encoded_shape(shape, self.picture), self.picture))
        return self._laid(_resized(stored[None], self.resized, nearest=True))[0].bool()

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points `[n, 2]` of the picture, x and y, on the canvas."""
        scale = np.array([self.resized[1] / self.picture[1], self.resized[0] / self.picture[0]])
        moved = points * scale
        if self.flip and self.flip_first:
            moved[:, 0] = self.resized[1] - moved[:, 0]
        moved -= [self.left, self.top]
        if self.flip and not self.flip_first:
            moved[:, 0] = self.canvas[1] - moved[:, 0]
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes `[n, 4]` of the picture on the canvas, cut off where the picture ends there."""
        ends = self.points(boxes.reshape(-1, 2)).reshape(-1, 2, 2)
        moved = np.concatenate([ends.min(1), ends.max(1)], axis=1)
        left, top, right, bottom = self.region
        return np.clip(moved, [left, top, left, top], [right, bottom, right, bottom])

    def _laid(self, image: Tensor) -> Tensor:
        if self.flip and self.flip_first:
            image = flipped(image)
        height, width = self.filled
        canvas = torch.zeros(len(image), *self.canvas, dtype=image.dtype)
        canvas[:, :height, :width] = image[
            :, self.top : self.top + height, self.left : self.left + width
        ]
        return flipped(canvas) if self.flip and not self.flip_first else canvas


def _resized(image: Tensor, size: Size, nearest: bool) -> Tensor:
    """`[C, h, w] -> [C, H, W]`: bilinear and antialiased, or the nearest pixel; the same dtype."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    if tuple(image.shape[-2:]) == tuple(size):
        return image
    mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
    if image.dtype == torch.uint16:  # which torchvision does not resize
        return resize(image.float(), list(size), mode, antialias=True).round().to(torch.uint16)
    return resize(image, list(size), mode, antialias=True)


def fitted(size: Size, canvas: Size, scale: float = 1.0) -> Size:
    """The largest size of the same shape inside `scale * canvas`, in whole pixels."""
    factor = min(scale * canvas[0] / size[0], scale * canvas[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class ObjectTransform(Transform):
    """A picture and its objects on a canvas.

    The target is a dict: `boxes` float32 `[n, 4]`, `labels` int64 `[n]`, with masks `masks` bool
    `[n, H, W]`, and for all `region` int64 `[4]`, the part of the canvas that has the picture
    (left, top, right, bottom), and `size` int64 `[2]`, height and width of the picture as stored.
    """

    def target_of_filler(self, size: Size) -> dict[str, Tensor]:
        nothing = torch.zeros(4, dtype=torch.int64)
        return {"region": nothing, "size": nothing[:2].clone()}


class JitterTransform(ObjectTransform):
    """Large-scale jitter: the picture is resized by a random factor, cut or laid on a canvas.

    The factor is uniform between `scale_min` and `scale_max` times what fits into the canvas. Where
    the picture is larger then, one random share decides where it is cut, of both axes. Boxes of
    objects with masks are those of the pixels that are left; what has none left is dropped. Crowds
    are left out.

    Args:
        size: `(H, W)` of the canvas.
        scale_min, scale_max: of the factor.
        hflip: share of the pictures that is flipped left to right.
        flip_first: the picture is flipped before it is cut, else the canvas after it.
        masks: whether there are masks in the target.
    """

    def __init__(
        self,
        size: Size,
        scale_min: float = 0.1,
        scale_max: float = 2.0,
        hflip: float = 0.5,
        flip_first: bool = False,
        masks: bool = True,
    ) -> None:
        self.size, self.scale, self.hflip = size, (scale_min, scale_max), hflip
        self.flip_first, self.masks = flip_first, masks

    def __call__(self, picture: Any) -> tuple[Tensor, dict[str, Tensor]]:
        image, objects = picture.load(), picture.target()
        placement = self.draw((image.shape[-2], image.shape[-1]))
        return placement.image(image), placed(objects, placement, self.masks)

    def draw(self, size: Size) -> Placement:
        """A random placement of a picture of `size`."""
        scale, share, coin = torch.rand(3, dtype=torch.float64).tolist()
        low, high = self.scale
        resized = fitted(size, self.size, low + (high - low) * scale)
        top, left = (round(max(0, r - c) * share) for r, c in zip(resized, self.size))
        flip = coin < self.hflip
        return Placement(size, resized, self.size, top, left, flip, self.flip_first)


class FitTransform(ObjectTransform):
    """The picture is resized to fit into the canvas, and laid into its upper left corner.

    The target has `region` and `size` alone: results are compared with what is annotated.

    Args:
        size: `(H, W)` of the canvas.
    """

    def __init__(self, size: Size) -> None:
        self.size = size

    def __call__(self, picture: Any) -> tuple[Tensor, dict[str, Tensor]]:
        image = picture.load()
        size = (image.shape[-2], image.shape[-1])
        placement = Placement(size, fitted(size, self.size), self.size)
        target = {"region": torch.tensor(placement.region), "size": torch.tensor(size)}
        return placement.image(image), target


def placed(objects: ObjectPicture, placement: Placement, masks: bool) -> dict[str, Tensor]:
    """The objects to learn from on the canvas; what is not to be seen there is dropped."""
    objects = objects.only(~objects.crowd)
    boxes = torch.from_numpy(placement.boxes(objects.boxes))
    labels = torch.from_numpy(objects.labels)
    target = {"region": torch.tensor(placement.region), "size": torch.tensor(placement.picture)}
    pixels = None
    if masks:
        made = [placement.mask(shape) for shape in objects.shapes]
        pixels = torch.stack(made) if made else torch.zeros(0, *placement.canvas, dtype=torch.bool)
        boxes = boxes_of(pixels)
    kept = ((boxes[:, 2:] - boxes[:, :2]) > SMALLEST).all(1)
    target |= {"boxes": boxes[kept].float(), "labels": labels[kept]}
    return target if pixels is None else target | {"masks": pixels[kept]}


def boxes_of(masks: Tensor) -> Tensor:
    """The boxes of the pixels of masks, `[n, H, W] -> [n, 4]` float64; zeros where there is none.

    torchvision's `masks_to_boxes` gives the last pixels; these are their right and lower edges.
    """
    ends = []
    for seen in (masks.any(1), masks.any(2)):  # [n, W], [n, H]
        first = seen.int().argmax(1)
        after = seen.shape[1] - seen.flip(1).int().argmax(1)
        ends.append(torch.stack([first, after], 1) * seen.any(1, keepdim=True))
    (left, right), (top, bottom) = (pair.unbind(1) for pair in ends)
    return torch.stack([left, top, right, bottom], 1).double()
