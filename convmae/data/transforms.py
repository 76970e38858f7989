"""From a stored picture to the input of a network: one picklable class for each use."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.data.crops import MIN_CROP, centre_box, random_box, resized, single_draw_box
from convmae.data.errors import DataError
from convmae.data.normalisation import IMAGENET_MEAN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image as PILImage
    from torch import Tensor

    from convmae.data.crops import PickBox, Size
    from convmae.data.picture import Picture

NO_AUGMENT = ("", "none")


class Transform:
    """A picture to a tensor of `size`, `[C, H, W]`, in the dtype of the picture.

    A transform of pictures with targets (`TargetPhotos`) gives the tensor and the target. Random
    numbers come from the global generators of torch, `random` and NumPy, which the loader seeds for
    each sample.
    """

    size: Size

    def __call__(self, picture: Picture) -> Any:
        raise NotImplementedError

    def target_of_filler(self, size: Size) -> Any:
        """The target of a picture of `size` that stands for none, or for one that is unreadable."""
        return None

    def check(self, channels: int, dtype: torch.dtype) -> None:
        """Raises `DataError` where pictures of that kind cannot be transformed."""


class _CropAndFlip(Transform):
    """A random box, resized, and flipped left to right in the share `hflip` of the draws."""

    def __init__(self, size: Size, pick: PickBox, hflip: float) -> None:
        self.size, self.pick, self.hflip = size, pick, hflip

    def __call__(self, picture: Picture) -> Tensor:
        flip = bool(torch.rand(()) < self.hflip)
        image = picture.crop(self.pick, self.size)
        return flipped(image) if flip else image


def flipped(image: Tensor) -> Tensor:
    """`image.flip(-1)`, which PyTorch 2.11 does not have for uint16."""
    if image.dtype == torch.uint16:
        return image.view(torch.int16).flip(-1).view(torch.uint16)
    return image.flip(-1)


class PretrainTransform(_CropAndFlip):
    """torchvision's RandomResizedCrop (bicubic) and a horizontal flip.

    Args:
        size: `(H, W)` of the crops in pixels.
        min_crop: smallest share of a picture's area that a crop takes, in `(0, 1]`.
        hflip: share of the crops that is flipped left to right, in `[0, 1]`.
    """

    def __init__(self, size: Size, min_crop: float = MIN_CROP, hflip: float = 0.5) -> None:
        super().__init__(size, partial(random_box, min_crop=min_crop), hflip)


class LinprobeTransform(_CropAndFlip):
    """A crop of one draw, clamped to the picture (TensorFlow's way), and a horizontal flip.

    Args:
        size: `(H, W)` of the crops in pixels.
    """

    def __init__(self, size: Size) -> None:
        super().__init__(size, single_draw_box, 0.5)


class FinetuneTransform(_CropAndFlip):
    """RandomResizedCrop (bicubic), a horizontal flip, then timm's RandAugment or AutoAugment.

    Augmentation has the parameters that timm's `create_transform` gives it, and works on 8-bit
    pictures of 1 or 3 channels.

    Args:
        size: `(H, W)` of the crops in pixels.
        min_crop: smallest share of a picture's area that a crop takes, in `(0, 1]`.
        hflip: share of the crops that is flipped left to right, in `[0, 1]`.
        aa: a policy in timm's words: `rand-...`, `original...`, `v0...` or `3a`; None, "" or "none"
            for none.
        color_jitter: strength of torchvision's ColorJitter (brightness, contrast, saturation); as
            in timm, only where `aa` is none.
        mean: the fill colour of what moves into the picture, in units of full scale; for 1 channel
            the mean of these numbers.

    Raises:
        DataError: timm knows no such policy; the message names `--aa`.
    """

    def __init__(
        self,
        size: Size,
        min_crop: float = 0.08,
        hflip: float = 0.5,
        aa: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
    ) -> None:
        super().__init__(size, partial(random_box, min_crop=min_crop), hflip)
        self.aa = None if aa is None or aa.lower() in NO_AUGMENT else aa
        self.color_jitter = color_jitter if self.aa is None else None
        grey = sum(mean) / len(mean)
        self._augment = {}
        if self.aa is not None:
            self._augment = {1: _policy(self.aa, size, (grey,)), 3: _policy(self.aa, size, mean)}

    def check(self, channels: int, dtype: torch.dtype) -> None:
        """Raises `DataError` where pictures of that kind cannot be augmented."""
        flag = f"--aa {self.aa!r}" if self.aa is not None else "--color_jitter"
        if self.aa is None and not self.color_jitter:
            return
        if dtype != torch.uint8 or channels not in (1, 3):
            raise DataError(
                f"{flag} needs 8-bit pictures of 1 or 3 channels, but these are "
                f"{str(dtype).removeprefix('torch.')} of {channels}; give --aa none"
                + (" and no --color_jitter" if self.aa is None else "")
            )

    def __call__(self, picture: Picture) -> Tensor:
        image = super().__call__(picture)
        self.check(image.shape[0], image.dtype)
        if self.aa is not None:
            return _augmented(image, self._augment[image.shape[0]])
        if self.color_jitter:
            from torchvision.transforms.v2 import ColorJitter

            strength = float(self.color_jitter)
            image = ColorJitter(strength, strength, strength)(image)
        return image


def _policy(aa: str, size: Size, mean: Sequence[float]) -> Any:
    """timm's augmentation of PIL pictures with as many channels as `mean` has numbers."""
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    fill = tuple(min(255, round(255 * value)) for value in mean)
    hparams = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": fill if len(fill) > 1 else fill[0],  # for grey pictures Pillow wants a number
    }
    make = rand_augment_transform if aa.startswith("rand") else auto_augment_transform
    try:
        policy = make(aa, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"--aa {aa!r} is no policy of timm ({error}); expected rand-m9-mstd0.5-inc1 and the "
            "like, original, originalr, v0, v0r, 3a, or none"
        ) from error
    for op in getattr(policy, "ops", None) or itertools.chain.from_iterable(policy.policy):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return policy


def _posterize(picture: PILImage.Image, bits: int, **others: Any) -> PILImage.Image:
    """Keeps the highest bits. Policies ask for 0 too, black, which newer Pillows refuse."""
    from PIL import Image, ImageOps

    if bits < 1:
        return Image.new(picture.mode, picture.size)
    return ImageOps.posterize(picture, bits) if bits < 8 else picture


def _augmented(image: Tensor, augment: Any) -> Tensor:
    """`augment(PIL picture)`, uint8 `[C, H, W]`, C 1 or 3."""
    from PIL import Image

    grey = image.shape[0] == 1
    values = (image[0] if grey else image.permute(1, 2, 0)).contiguous().numpy()
    result = torch.from_numpy(np.array(augment(Image.fromarray(values))))
    return result[None] if grey else result.permute(2, 0, 1)


class EvalTransform(Transform):
    """Resizes to `round(size / crop_pct)` (bicubic, antialiased), then crops the centre.

    Of a square size the shorter side becomes `round(size / crop_pct)`: 256 for 224. Of another, the
    picture is resized, keeping its aspect ratio, to the smallest that covers
    `(round(H / crop_pct), round(W / crop_pct))`.

    Args:
        size: `(H, W)` of the result in pixels.
        crop_pct: share of the resized side that the crop keeps, in `(0, 1]`.
    """

    def __init__(self, size: Size, crop_pct: float = 0.875) -> None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
        self.size, self.crop_pct = size, crop_pct

    def __call__(self, picture: Picture) -> Tensor:
        image = picture.load()
        height, width = image.shape[-2:]
        tall, wide = (round(side / self.crop_pct) for side in self.size)
        if tall * width >= wide * height:
            new = (tall, max(wide, int(tall * width / height)))
        else:
            new = (max(tall, int(wide * height / width)), wide)
        from torchvision.transforms.v2.functional import center_crop

        return center_crop(resized(image, new), list(self.size))


class CentreTransform(Transform):
    """The largest centred box of the aspect ratio of `size`, resized: for previews."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def __call__(self, picture: Picture) -> Tensor:
        return picture.crop(centre_box(self.size), self.size)
