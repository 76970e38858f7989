"""Boxes, and cutting and resizing a picture by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MIN_CROP = 0.2  # share of the picture's area, as the official recipe
CROP_RATIO = (3 / 4, 4 / 3)  # width / height

Box = tuple[int, int, int, int]  # top, left, height, width
Size = tuple[int, int]  # height, width
PickBox = Callable[[int, int], Box]  # the box to cut from a picture of that height and width


def random_box(height: int, width: int, min_crop: float = MIN_CROP) -> Box:
    """torchvision's `RandomResizedCrop.get_params`: from `min_crop` of the area on, 3:4 to 4:3."""
    from torchvision.transforms import RandomResizedCrop

    shape_only = torch.empty(3, height, width, device="meta")
    scale, ratio = [min_crop, 1.0], list(CROP_RATIO)
    top, left, h, w = RandomResizedCrop.get_params(shape_only, scale, ratio)
    return top, left, h, w


def single_draw_box(height: int, width: int, min_crop: float = 0.08) -> Box:
    """One draw of area (from `min_crop` on) and ratio (3:4 to 4:3), cut off at the picture's edges.

    What TensorFlow's pipelines do: where the box does not fit it is clamped, not drawn again.
    """
    area = height * width * float(torch.empty(()).uniform_(min_crop, 1.0))
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = math.exp(float(torch.empty(()).uniform_(low, high)))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    top = int(torch.randint(0, height - h + 1, ()))
    return top, int(torch.randint(0, width - w + 1, ())), h, w


def centre_box(size: Size) -> PickBox:
    """Picks the largest centred box of the aspect ratio of `size`, `(H, W)`."""

    def pick(height: int, width: int) -> Box:
        scale = min(height / size[0], width / size[1])
        h, w = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        return (height - h) // 2, (width - w) // 2, h, w

    return pick


def resized(image: Tensor, size: Size, linear: bool = False) -> Tensor:
    """`resize(image, size)`, `[C, h, w] -> [C, H, W]`, bicubic, antialiased, in the same dtype.

    uint16 is resized in float32, rounded and clamped. float32 is not clamped: bicubic
    interpolation may overshoot. `linear` interpolates bilinearly instead.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    wide = image.float() if image.dtype == torch.uint16 else image
    mode = InterpolationMode.BILINEAR if linear else InterpolationMode.BICUBIC
    result = resize(wide, size=list(size), interpolation=mode, antialias=True)
    if image.dtype == torch.uint16:
        return result.round().clamp(0, 65535).to(torch.uint16)
    return result


def resized_crop(image: Tensor, box: Box, size: Size) -> Tensor:
    """`resize(image[box], size)`, `[C, h, w] -> [C, H, W]`; see `resized`."""
    top, left, height, width = box
    return resized(image[:, top : top + height, left : left + width], size)
