"""From a picture and its label map to a training crop, or to what is evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from convmae.config.label_maps import IGNORED
from convmae.data.crops import resized
from convmae.data.errors import UnreadableError
from convmae.data.transforms import Transform, flipped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from convmae.data.crops import Box, Size
    from convmae.data.picture import ChosenPicture, Picture

LONGEST = (
    4  # times the short side that a picture is resized to: its long side at most (2048 of 512)
)
MOST_OF_ONE_CLASS = 0.75  # of the labelled pixels of a crop
CROPS = 10  # draws, until a crop has less of one class
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, 0.5, 0.5, 18 / 180  # of the distortion


def fitted_size(size: Size, short: float) -> Size:
    """The size of a picture whose sides become at most `short` and `4 * short`, ratio kept.

    That is mmcv's way: the short side becomes `short`, unless the long one would be too long.
    """
    factor = min(short / min(size), LONGEST * short / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


class WholeTransform(Transform):
    """A picture as it is stored.

    Args:
        size: `(H, W)` of what stands for a picture that cannot be read.
    """

    def __init__(self, size: Size) -> None:
        self.size = size

    def __call__(self, picture: Picture) -> Tensor:
        return picture.load()


class _Labelled(Transform):
    """What transforms of pictures with label maps share."""

    def target_of_filler(self, size: Size) -> Tensor:
        return torch.full(size, IGNORED, dtype=torch.int64)

    def read(self, picture: ChosenPicture) -> tuple[Tensor, Tensor]:
        """The picture `[C, h, w]` as stored, and its label map, uint8 `[h, w]`.

        Raises:
            UnreadableError: one of them cannot be read, or their sizes differ.
        """
        image, labels = picture.load(), picture.target()
        if image.shape[1:] != labels.shape:
            sizes = [" x ".join(map(str, shape)) for shape in (image.shape[1:], labels.shape)]
            raise UnreadableError(f"it has {sizes[0]} pixels, but its label map {sizes[1]}")
        return image, labels


class SegmentEvalTransform(_Labelled):
    """A picture and its label map whole, as stored.

    Args:
        size: `(H, W)` of what stands for a picture that cannot be read.
    """

    def __init__(self, size: Size) -> None:
        self.size = size

    def __call__(self, picture: Any) -> tuple[Tensor, Tensor]:
        image, labels = self.read(picture)
        return image, labels.long()


class SegmentTransform(_Labelled):
    """A random scale, a crop, a flip, colours distorted, and padding: the published pipeline.

    The picture is resized (bilinear, antialiased; the label map by the nearest pixel) so that its
    short side is `short * r`, `r` uniform in `scale`, and its long side at most four times that; or
    by the factor `r`, where `short` is None. Of
    up to ten random crops the first is taken in which no class has more than 75 % of the labelled
    pixels; the tenth, if none is such. What a crop lacks is padded at the right and at the bottom,
    the label map with 255.

    Args:
        size: `(H, W)` of the crops in pixels.
        short: pixels of the short side at `r = 1`; None keeps the picture's own size there.
        scale: range of `r`.
        hflip: share of the crops that is flipped left to right.
        distort: change brightness, contrast, saturation and hue of 8-bit pictures of 3 channels, by
            up to 32 of 255, a half, a half and a tenth of the circle; each in half of the crops.
            Saturation is changed by blending with grey, not in HSV as the published code does.
        most: the 75 %, as a share; 1 takes the first crop.
        fill: of each channel the value, as stored, of padding; the mean of pictures becomes 0 when
            they are normalised, but for the rounding of whole numbers. 0 if not given.
    """

    def __init__(
        self,
        size: Size,
        short: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        hflip: float = 0.5,
        distort: bool = True,
        most: float = MOST_OF_ONE_CLASS,
        fill: Sequence[float] | None = None,
    ) -> None:
        self.size, self.short, self.scale, self.hflip = size, short, scale, hflip
        self.distort, self.most, self.fill = distort, most, fill

    def __call__(self, picture: Any) -> tuple[Tensor, Tensor]:
        image, labels = self.read(picture)
        image, labels = self._rescaled(image, labels)
        top, left, height, width = self._box(labels)
        image = image[:, top : top + height, left : left + width]
        labels = labels[top : top + height, left : left + width]
        if torch.rand(()) < self.hflip:
            image, labels = flipped(image), labels.flip(-1)
        if self.distort and image.dtype == torch.uint8 and len(image) == 3:
            image = distorted(image)
        return self._padded(image, labels)

    def _rescaled(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.scale
        ratio = float(torch.empty(()).uniform_(low, high)) if high > low else low
        before = (image.shape[1], image.shape[2])
        if self.short is None:
            size = (max(1, round(before[0] * ratio)), max(1, round(before[1] * ratio)))
        else:
            size = fitted_size(before, self.short * ratio)
        if size == before:
            return image, labels
        near = F.interpolate(labels[None, None], size=size, mode="nearest-exact")
        return resized(image, size, linear=True), near[0, 0]

    def _box(self, labels: Tensor) -> Box:
        """The crop, as far as it lies in the picture."""
        height, width = labels.shape
        h, w = min(self.size[0], height), min(self.size[1], width)
        for _ in range(CROPS if self.most < 1 else 1):
            top = int(torch.randint(height - h + 1, ()))
            left = int(torch.randint(width - w + 1, ()))
            if self._is_mixed(labels[top : top + h, left : left + w]):
                break
        return top, left, h, w

    def _is_mixed(self, labels: Tensor) -> bool:
        """Whether there are several classes in a crop, and none has nearly all of it."""
        counts = torch.bincount(labels.flatten(), minlength=256)[:IGNORED]
        largest, total = int(counts.max()), int(counts.sum())
        return 0 < largest < total and largest < self.most * total

    def _padded(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape
        target = self.target_of_filler(self.size)
        target[:height, :width] = labels
        if (height, width) == self.size:
            return image, target
        fill = torch.tensor(self.fill or [0.0] * len(image))[:, None, None]
        if image.dtype != torch.float32:
            fill = fill.round()
        # numbers of uint16 pass through float32, which holds them exactly
        result = fill.expand(-1, *self.size).clone()
        result[:, :height, :width] = image.float()
        return result.to(image.dtype), target


def distorted(image: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of uint8 `[3, H, W]`, each changed or not.

    Contrast multiplies all values, as in the published code, before or after the colours.
    """
    from torchvision.transforms.v2 import functional as T

    if torch.rand(()) < 0.5:
        shift = float(torch.empty(()).uniform_(-BRIGHTNESS, BRIGHTNESS))
        image = (image.float() + shift).clamp(0, 255).to(torch.uint8)
    colours = [(T.adjust_saturation, 1.0, SATURATION), (T.adjust_hue, 0.0, HUE)]
    contrast = (T.adjust_brightness, 1.0, CONTRAST)
    order = [contrast, *colours] if torch.rand(()) < 0.5 else [*colours, contrast]
    for change, middle, most in order:
        if torch.rand(()) < 0.5:
            image = change(image, middle + float(torch.empty(()).uniform_(-most, most)))
    return image
