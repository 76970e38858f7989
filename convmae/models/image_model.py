"""What all models of pictures of one size share, and those besides that predict hidden pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from convmae.models.tokens import HiddenPatches, hidden_patches, removed_mask
from convmae_kernels import BlockMask
from convmae_kernels.ops.support.autocast import autocast_is_on
from convmae_kernels.recording import is_exported

if TYPE_CHECKING:
    from collections.abc import Callable

NORM_PIX_EPS = 1e-6


class ImageModel(nn.Module):
    """A model of pictures of one size, cut into patches.

    Attributes:
        img_size: `(height, width)`.
        patch_size: side of a patch in pixels.
        in_chans: channels of the pictures.
    """

    img_size: tuple[int, int]
    patch_size: int
    in_chans: int

    @property
    def grid(self) -> tuple[int, int]:
        """`(gh, gw)`, the patches of a column and of a row of an image."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, `L = gh * gw`."""
        return self.grid[0] * self.grid[1]

    @property
    def reference_parameter(self) -> nn.Parameter:
        """A parameter of the dtype and on the device that pictures must have."""
        raise NotImplementedError

    # -- checks -----------------------------------------------------------------------------------

    def check_images(self, images: Tensor) -> None:
        """The images fit the model.

        Raises:
            TypeError: not a floating tensor, or not in the model's dtype (outside autocast).
            ValueError: rank, batch, channels, size or device do not fit.
        """
        check_pictures(images, self.in_chans, self.reference_parameter, self.check_size)

    def check_size(self, height: int, width: int) -> None:
        """The images are of the model's size.

        Raises:
            ValueError: they are not.
        """
        if (height, width) != self.img_size:
            raise ValueError(
                f"images are {height} x {width}, but the model takes {self.img_size[0]} x "
                f"{self.img_size[1]} (img_size)"
            )

    def check_mask(self, images: Tensor, mask: BlockMask) -> None:
        """The mask fits the images, and shows something of every image.

        That every image has a visible block is checked on the host, from what the mask knows.

        Raises:
            TypeError: not a `BlockMask`.
            ValueError: grid, batch size or device do not fit, or an image has no visible block.
        """
        if not isinstance(mask, BlockMask):
            raise TypeError(f"mask must be a convmae_kernels.BlockMask, got {type(mask).__name__}")
        if mask.grid != self.grid:
            raise ValueError(
                f"mask has a grid of {mask.grid[0]} x {mask.grid[1]} blocks, but images of "
                f"{self.img_size[0]} x {self.img_size[1]} have {self.grid[0]} x {self.grid[1]} "
                f"patches of {self.patch_size} x {self.patch_size} pixels"
            )
        self.check_mask_batch(images, mask)
        if mask.device != images.device:
            raise ValueError(f"mask is on {mask.device}, but images are on {images.device}")
        if is_exported() and not mask.knows_numbers:
            raise ValueError(
                "mask does not know how many blocks of an image are visible, which an exported "
                "program of this model must; expected a mask from from_noise, from_ids or full, or "
                "one from from_visible that is made outside and is an input of the program"
            )
        if mask.min_per_image == 0:
            raise ValueError(
                "mask must leave at least one visible block in every image, got an image with "
                f"0 of {self.num_patches} (a lower mask_ratio keeps more)"
            )

    def check_mask_batch(self, images: Tensor, mask: BlockMask) -> None:
        """There is one mask for each image.

        Raises:
            ValueError: there is not.
        """
        if mask.batch_size != images.shape[0]:
            raise ValueError(
                f"mask is for a batch of {mask.batch_size}, but images has {images.shape[0]}"
            )


def check_pictures(
    images: Tensor, in_chans: int, own: Tensor, check_size: Callable[[int, int], None]
) -> None:
    """The pictures fit a model.

    Args:
        images: what is checked.
        in_chans: channels of the model.
        own: a tensor of the dtype and on the device that pictures must have.
        check_size: raises `ValueError` where a height and width do not fit.

    Raises:
        TypeError: not a floating tensor, or not in the model's dtype (outside autocast).
        ValueError: rank, batch, channels, size or device do not fit.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"images must be a floating tensor of normalised pixels, got {images.dtype}"
        )
    if images.dim() != 4:
        raise ValueError(
            f"images must be [N, C, H, W], got {images.dim()} dimensions: {list(images.shape)}"
        )
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one image, got {list(images.shape)}")
    if images.shape[1] != in_chans:
        raise ValueError(
            f"images have {images.shape[1]} channels, but the model takes {in_chans} (in_chans)"
        )
    check_size(*images.shape[2:])
    if images.device != own.device:
        raise ValueError(f"images are on {images.device}, but the model is on {own.device}")
    mixed = autocast_is_on(images.device.type) and images.dtype != torch.float64
    if images.dtype != own.dtype and not mixed:
        raise TypeError(f"images are {images.dtype}, but the model is {own.dtype}")


class ConvMAEOutput(NamedTuple):
    """What `forward` of a model that predicts hidden patches returns.

    Attributes:
        loss: mean squared error over the hidden patches, a float32 scalar (float64 for float64).
        mask: float32 `[N, L]`, 1 = removed (hidden), 0 = kept, as in MAE.
        pred: `[N, L, p * p * C]`, the prediction of every patch; None unless asked for.
    """

    loss: Tensor
    mask: Tensor
    pred: Tensor | None


class Reconstruction(NamedTuple):
    """What `reconstruct` of such a model returns: `[N, C, H, W]` in the units of the input.

    Attributes:
        masked: the input, its hidden patches 0 (grey, where pixels are normalised).
        reconstruction: the prediction, at every patch.
        pasted: the input's visible patches, and the prediction at the hidden ones.
        mask: float32 `[N, L]`, 1 = removed (hidden), 0 = kept, as in MAE.
    """

    masked: Tensor
    reconstruction: Tensor
    pasted: Tensor
    mask: Tensor


class MaskedImageModel(ImageModel):
    """`loss = mean((pred - patches) ** 2)` over hidden patches; a subclass says what `pred` is.

    Attributes:
        mask_ratio: share of hidden patches, where none is given.
        mask_rounding: "floor" or "round", see `BlockMask.from_noise`.
        norm_pix_loss: predict pixels normalised by the mean and deviation of their own patch.
        config: the arguments of the class as plain values.
        predicts_every_patch: whether the prediction of hidden patches alone is not possible.
    """

    mask_ratio: float = 0.75
    mask_rounding: Literal["floor", "round"] = "floor"
    norm_pix_loss: bool
    config: dict[str, Any]
    predicts_every_patch = False

    def predict(
        self, images: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`[N, L, p * p * C]`: the prediction of every patch, of rows, columns, channels each.

        Args:
            images: `[N, in_chans, H, W]`; hidden pixels are not read.
            mask: the visible patches.
            hidden: the patches whose prediction is wanted: `[N, H, p * p * C]`; None for all.
        """
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
        return_pred: bool = False,
    ) -> ConvMAEOutput:
        """`mean((pred - patches) ** 2)` over the hidden patches of a batch.

        Args:
            images: floating `[N, in_chans, H, W]` of the model's `img_size`, normalised.
            mask_ratio: share of hidden patches, in `[0, 1)`, the model's own if None; with `mask`
                it is not looked at.
            noise: floating `[N, L]`: the `L * (1 - mask_ratio)` patches of smallest noise stay
                visible, a number that is rounded by the model's `mask_rounding`. Drawn uniformly if
                neither `noise` nor `mask` is given.
            mask: a mask of one's own, on the grid of patches; the number of visible patches may
                differ between images, and the loss is the mean over all hidden ones.
            generator: source of the noise that is drawn.
            return_pred: also return the prediction of every patch, which costs more.

        Returns:
            `ConvMAEOutput(loss, mask, pred)`; its mask is MAE's, 1 = removed. Where nothing is
            hidden the loss is `0 * pred`: 0, with gradients of 0.

        Raises:
            TypeError: an argument has another type or dtype.
            ValueError: shapes, devices or `mask_ratio` do not fit, both `noise` and `mask` are
                given, or an image has no visible patch.
        """
        mask = self.make_mask(images, mask_ratio, noise, mask, generator)
        return self.forward_masked(images, mask, return_pred)

    def forward_masked(
        self, images: Tensor, mask: BlockMask, return_pred: bool = False
    ) -> ConvMAEOutput:
        """`forward` with a mask that fits the images; arguments and result are those of it."""
        hidden = None if return_pred or self.predicts_every_patch else hidden_patches(mask)
        pred = self.predict(images, mask, hidden)
        loss = self.forward_loss(images, pred, mask, hidden)
        return ConvMAEOutput(loss, removed_mask(mask), pred if return_pred else None)

    def make_mask(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
    ) -> BlockMask:
        """One mask for each image, as in `forward`: the same arguments, the same errors."""
        self.check_images(images)
        if mask is None:
            noise = self.make_noise(images, noise, generator)
            ratio = self.mask_ratio if mask_ratio is None else mask_ratio
            mask = BlockMask.from_noise(noise, self.grid, ratio, self.mask_rounding)
        elif noise is not None:
            raise ValueError("noise and mask are both given, expected at most one of them")
        self.check_mask(images, mask)
        return mask

    def make_noise(
        self, images: Tensor, noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """`noise` if it is `[N, L]`; drawn uniformly if it is None."""
        shape = (images.shape[0], self.num_patches)
        if noise is None:
            device = images.device if generator is None else generator.device
            return torch.rand(shape, generator=generator, device=device).to(images.device)
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a floating tensor, got {type(noise).__name__}")
        if noise.shape != shape:
            raise ValueError(
                f"noise must be {list(shape)} (images, patches), got {list(noise.shape)}"
            )
        return noise

    def forward_loss(
        self, images: Tensor, pred: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`mean((pred - target) ** 2)` over the hidden patches, in float32 at least.

        Args:
            images: `[N, in_chans, H, W]`.
            pred: from `forward_decoder`, with the same `hidden`.
            mask: the mask; of `G * N` images if each has `G` masks: first all images with their
                first mask, then all with their second, and so on.
            hidden: the patches that `pred` is of; None for all.

        Returns:
            A scalar; 0 where nothing is hidden.
        """
        patches = self._patches(images)  # a view [N, gh, gw, p, p, C]
        if hidden is None:
            weight: Tensor | None = removed_mask(mask)
        else:
            weight = hidden.real
            image = torch.arange(mask.batch_size, device=images.device) % images.shape[0]
            image = image.unsqueeze(1)
            row, column = hidden.patches // self.grid[1], hidden.patches % self.grid[1]
            patches = patches[image, row, column].unsqueeze(1)  # hidden patches only
        target = at_least_float(patches.flatten(3).flatten(1, 2))
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        pred = at_least_float(pred).unflatten(0, (-1, target.shape[0]))  # one target, G masks
        error = (pred - target).square().mean(dim=3).flatten(0, 1)
        if weight is None:
            return error.mean()
        return (error * weight).sum() / weight.sum().clamp(min=1)

    # -- pictures ---------------------------------------------------------------------------------

    def patchify(self, images: Tensor) -> Tensor:
        """`[N, C, H, W] -> [N, L, p * p * C]`: of rows, columns, channels each.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        self.check_images(images)
        return self._patches(images).reshape(images.shape[0], self.num_patches, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`[N, L, p * p * C] -> [N, C, H, W]`: the inverse of `patchify`.

        Raises:
            ValueError: the patches do not fit the model.
        """
        size, channels, (gh, gw) = self.patch_size, self.in_chans, self.grid
        expected = (self.num_patches, size**2 * channels)
        if patches.dim() != 3 or patches.shape[1:] != expected:
            raise ValueError(
                f"patches must be [N, {expected[0]}, {expected[1]}], got {list(patches.shape)}"
            )
        x = patches.reshape(-1, gh, gw, size, size, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, *self.img_size)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """The prediction as pictures: `unpatchify(pred)`, in the units of the input.

        With `norm_pix_loss` the model predicts patches without their brightness and contrast; mean
        and deviation are then taken from the true patches, hidden ones included. The pictures so
        look better than what the model knows: do not measure reconstruction errors on them.

        Args:
            images, mask_ratio, noise, mask, generator: as in `forward`.

        Returns:
            `Reconstruction(masked, reconstruction, pasted, mask)`.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        mask = self.make_mask(images, mask_ratio, noise, mask, generator)
        pred = at_least_float(self.predict(images, mask))
        patches = self.patchify(images)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(at_least_float(patches))
            pred = pred * deviation + mean
        pred = pred.to(images.dtype)
        hidden = ~mask.visible.flatten(1).unsqueeze(2)
        return Reconstruction(
            self.unpatchify(patches.masked_fill(hidden, 0.0)),
            self.unpatchify(pred),
            self.unpatchify(torch.where(hidden, pred, patches)),
            removed_mask(mask),
        )

    def _patches(self, images: Tensor) -> Tensor:
        """A view `[N, gh, gw, p, p, C]` of images `[N, C, H, W]`."""
        size, (gh, gw) = self.patch_size, self.grid
        tiles = images.unflatten(3, (gw, size)).unflatten(2, (gh, size))
        return tiles.permute(0, 2, 4, 3, 5, 1)


# -- patches --------------------------------------------------------------------------------------


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """`mean` and `sqrt(var + 1e-6)` of each patch, over pixels and channels; unbiased variance.

    Args:
        patches: `[..., 16 * 16 * C]`.

    Returns:
        Two tensors `[..., 1]`.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + NORM_PIX_EPS).sqrt()


def at_least_float(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
