"""FastConvMAE: masks that complement each other, so that every patch is visible to one of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from convmae.models.convmae import ConvMAE
from convmae_kernels import BlockMask, gather_visible

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from convmae.models.image_model import ConvMAEOutput


class FastConvMAE(ConvMAE):
    """`loss = mean over g of ConvMAE's loss with mask g`; masks `0 ... G - 1` share a picture.

    A random order of the patches is cut into `G` groups of `k = int(L * (1 - mask_ratio))`; mask
    `g` shows group `g` and hides the rest. Each patch is visible once, so the convolutions of all
    `G` masks cost one pass over the picture. The decoder runs for each mask.

    Arguments, attributes and the state dict are those of `ConvMAE`: weights fit both ways. Outputs
    are group-major: row `g * N + n` belongs to group `g` of image `n`.

    `make_mask`, `reconstruct` and an encoder that is given one mask for each image work as in
    `ConvMAE`, at any ratio: the mask that they draw from some noise is that of group 0.
    """

    def forward(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
        return_pred: bool = False,
    ) -> ConvMAEOutput:
        """`mean((pred - patches) ** 2)` over the hidden patches of all `G` masks of a batch.

        Args:
            images: floating `[N, in_chans, H, W]` of the model's `img_size`, normalised.
            mask_ratio: share of patches that each mask hides; `int(L * (1 - mask_ratio))` must
                divide `L`, as for 0.5 or 0.75 in a picture of 224 x 224 pixels (`L` = 196).
            noise: floating `[N, L]`; group 0 is the patches of smallest noise, and so on. Drawn
                uniformly if not given.
            mask: must be None: the masks complement each other, so they come from noise.
            generator: source of the noise that is drawn.
            return_pred: also return the prediction of every patch, which costs more.

        Returns:
            `ConvMAEOutput(loss, mask, pred)` with mask `[G * N, L]` and pred
            `[G * N, L, 16 * 16 * C]`, group-major.

        Raises:
            TypeError: an argument has another type or dtype.
            ValueError: shapes, devices or `mask_ratio` do not fit, or `mask` is given.
        """
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} takes noise, not mask: it makes masks that complement each "
                "other. Expected mask=None; ConvMAE takes any mask and has the same parameters"
            )
        masks = self.make_masks(images, mask_ratio, noise, generator)
        return self.forward_masked(images, masks, return_pred)

    def make_masks(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> BlockMask:
        """The masks that `forward` works with, of `G * N` images; arguments and errors are its."""
        self.check_images(images)
        noise = self.make_noise(images, noise, generator)
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        masks = complementary_masks(noise, self.grid, ratio)
        self.check_mask(images, masks)
        return masks

    def check_mask_batch(self, images: Tensor, mask: BlockMask) -> None:
        """There are one or more masks for each image.

        Raises:
            ValueError: there are not.
        """
        if mask.batch_size == 0 or mask.batch_size % images.shape[0]:
            raise ValueError(
                f"mask is for a batch of {mask.batch_size}, expected a multiple of the "
                f"{images.shape[0]} images"
            )

    def pixels(self, images: Tensor, mask: BlockMask) -> Tensor:
        """The pixels of visible patches `[T, 256, C]`, without repeating an image for each mask."""
        count = images.shape[0]
        if mask.batch_size == count:
            return gather_visible(images, mask)
        patches = gather_visible(images, BlockMask.full(count, self.grid, images.device))
        return patches.index_select(0, mask.block_index % (count * self.num_patches))


def complementary_masks(noise: Tensor, grid: tuple[int, int], mask_ratio: float) -> BlockMask:
    """Mask `g` shows `argsort(noise)[:, g * k : (g + 1) * k]`, `k = int(L * (1 - mask_ratio))`.

    Args:
        noise: floating `[N, L]` with `L = gh * gw`, in raster order.
        grid: `(gh, gw)` patches.
        mask_ratio: share of patches that each mask hides.

    Returns:
        A mask for `G * N` images, `G = L / k`, group-major: row `g * N + n` is group `g` of
        image `n`.

    Raises:
        TypeError: `noise` is not floating.
        ValueError: `mask_ratio` is outside `[0, 1)`, or `k` does not divide `L`.
    """
    if not noise.is_floating_point():
        raise TypeError(f"noise must be a floating tensor, got {noise.dtype}")
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    images, length = noise.shape
    keep = int(length * (1 - mask_ratio))
    if keep == 0 or length % keep:
        raise ValueError(
            f"mask_ratio = {mask_ratio} leaves groups of {keep} of {length} patches, expected a "
            f"divisor of {length}: for example {', '.join(map(str, fitting_ratios(length)))}"
        )
    groups = length // keep
    order = noise.argsort(dim=1, stable=True).view(images, groups, keep)
    shown = order.transpose(0, 1).reshape(groups * images, keep)
    return BlockMask.from_ids(shown, grid, check=False)


def fitting_ratios(length: int, most: int = 6) -> list[float]:
    """Mask ratios that cut `length` patches into 2 equal groups, 3, ...; the first `most`."""
    groups = [g for g in range(2, length + 1) if length % g == 0]
    return [_ratio(length, length // g) for g in groups[:most]] or [0.0]


def _ratio(length: int, keep: int) -> float:
    """`1 - keep / length`, cut to a short decimal `r` that has `int(length * (1 - r)) == keep`."""
    exact = 1 - keep / length
    for digits in range(4, 17):
        ratio = math.floor(exact * 10**digits) / 10**digits  # rounded down, as int() rounds
        if int(length * (1 - ratio)) == keep:
            return ratio
    return exact
