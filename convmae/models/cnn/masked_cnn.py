"""What SparK and FCMAE share: the network on visible blocks, sizes and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from convmae.models.cnn.encoder import FeatureMaps, check_blocks, find_maps
from convmae.models.cnn.network_blocks import checkpoint_blocks, compile_blocks, network_blocks
from convmae.models.image_model import MaskedImageModel
from convmae.models.trunk import check_positive
from convmae_kernels import BlockMask, Packed
from convmae_kernels.zorder import BLOCK_SIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

ROUNDINGS = ("floor", "round")


class MaskedCNN(MaskedImageModel):
    """A convolutional network that learns to predict what is hidden; base of SparK and FCMAE.

    Attributes:
        maps: where the network has its maps, and their channels and strides, finest first.
        patch_size: the side of a block in pixels, `mask_size`.
        config: the arguments as plain values, without the network.
        unused_parameters: names of parameters of the network that no map depends on, such as a norm
            before the classifier: they get no gradient.
    """

    maps: FeatureMaps

    def __init__(
        self,
        encoder: nn.Module,
        img_size: int | Sequence[int],
        in_chans: int,
        mask_ratio: float,
        mask_size: int | None,
        mask_rounding: Literal["floor", "round"],
        norm_pix_loss: bool,
        min_stride: int | None = None,
        coarsest_only: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans = check_positive("in_chans", in_chans)
        self.img_size = _pair(img_size)
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must be in (0, 1), got {mask_ratio}")
        if mask_rounding not in ROUNDINGS:
            raise ValueError(
                f"mask_rounding must be one of {', '.join(ROUNDINGS)}, got {mask_rounding!r}"
            )
        self.mask_ratio, self.mask_rounding = mask_ratio, mask_rounding
        self.norm_pix_loss = norm_pix_loss
        self.maps = find_maps(encoder, self.img_size, in_chans, min_stride)
        if coarsest_only:
            self.maps = self.maps.coarsest()
        self.patch_size = check_mask_size(mask_size, self.maps.stride)
        check_divides(self.img_size, self.patch_size, self.maps.stride)
        # A block of packed features has 32 pixels a side at most; a larger one is some of them.
        self.block_size = max(size for size in BLOCK_SIZES if self.patch_size % size == 0)
        height, width = (n // self.block_size for n in self.img_size)
        self.unused_parameters = check_blocks(
            encoder, self.maps, (height, width), self.block_size, in_chans
        )
        self.config = {
            "img_size": list(self.img_size),
            "in_chans": in_chans,
            "mask_ratio": mask_ratio,
            "mask_size": self.patch_size,
            "mask_rounding": mask_rounding,
            "norm_pix_loss": norm_pix_loss,
        }

    @property
    def network(self) -> nn.Module:
        """The network that is pretrained, as it was given."""
        raise NotImplementedError

    def forward_encoder(self, images: Tensor, mask: BlockMask) -> list[Packed]:
        """The maps of the network at visible positions, finest first.

        Args:
            images: floating `[N, in_chans, H, W]`; hidden pixels are not read.
            mask: the visible blocks.
        """
        self.check_images(images)
        self.check_mask(images, mask)
        mask = finer_mask(mask, self.patch_size // self.block_size)
        return self.maps.read(self.network, Packed.gather(images, mask))

    # -- training ---------------------------------------------------------------------------------

    def _blocks(self) -> list[nn.Module]:
        """The blocks of the network and of the decoder."""
        return [*network_blocks(self.network), *self.decoder_blocks()]

    def decoder_blocks(self) -> list[nn.Module]:
        """The blocks of the decoder."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks forget what is inside them and compute it again for gradients.

        The numbers stay the same, running statistics included; training needs less memory and about
        a third more time.
        """
        checkpoint_blocks(self._blocks(), enable)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` of every block of the network and of the decoder, each for itself.

        Blocks of the same sizes share their code, so it takes a part of the time that compiling the
        whole model takes. A network without blocks stays as it is.

        Args:
            backend: as in `torch.compile`.
        """
        compile_blocks(self._blocks(), backend)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, besides vectors: the network's own."""
        function = getattr(self.network, "no_weight_decay", None)
        own: set[str] = set() if function is None else function()
        prefix = next(name for name, module in self.named_modules() if module is self.network)
        return {f"{prefix}.{name}" for name in own}

    # -- checks -----------------------------------------------------------------------------------

    def check_mask(self, images: Tensor, mask: BlockMask) -> None:
        """The mask fits the images, shows something of every image, and hides something.

        Raises:
            TypeError, ValueError: as in `ImageModel.check_mask`, or nothing is hidden, or a
                BatchNorm would have a single value of each channel to train with.
        """
        super().check_mask(images, mask)
        if mask.hides_nothing or (mask.knows_numbers and mask.num_visible == mask.num_blocks):
            raise ValueError(
                f"mask hides none of the {self.num_patches} blocks of a picture, so there is "
                "nothing to predict; expected a larger mask_ratio"
            )
        if not self.training:
            return
        positions = mask.num_visible * (self.patch_size // self.maps.stride) ** 2
        if positions == 1 and any(isinstance(m, _BatchNorm) for m in self.modules()):
            raise ValueError(
                "a batch of one picture with one visible position gives BatchNorm a single value "
                "of each channel; expected more pictures in a batch, a larger img_size or a "
                "smaller mask_ratio"
            )


def _pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(
            f"img_size must be a positive whole number or (height, width), got {img_size!r}"
        )
    return pair


def check_mask_size(mask_size: int | None, stride: int) -> int:
    """The side of a block in pixels: `mask_size`, or the stride of the network.

    Raises:
        ValueError: the stride does not divide it.
    """
    if mask_size is None:
        return stride
    if not isinstance(mask_size, int) or mask_size < 1 or mask_size % stride:
        raise ValueError(
            f"mask_size must be a multiple of the stride {stride} of the network, got "
            f"{mask_size!r}; smaller blocks need a network that is cut (timm's features_only=True "
            "with out_indices, or output_stride)"
        )
    return mask_size


def finer_mask(mask: BlockMask, times: int) -> BlockMask:
    """The same mask on a grid of blocks that are `times` smaller, a side."""
    if times == 1:
        return mask
    (gh, gw), many = mask.grid, times**2
    visible = mask.to_dense(times)[:, 0]
    place = mask.block_index % (gh * gw)
    first = mask.image_index * gh * gw * many + place // gw * gw * many + place % gw * times
    step = torch.arange(times, device=mask.device)
    within = (step.unsqueeze(1) * gw * times + step).flatten()
    index = (first.unsqueeze(1) + within).flatten().sort().values
    extremes = None
    if mask.knows_numbers:
        extremes = mask.min_per_image * many, mask.max_per_image * many
    same = mask.visible_per_image
    return BlockMask(visible, index, None if same is None else same * many, extremes)


def check_divides(img_size: tuple[int, int], mask_size: int, stride: int) -> None:
    """Blocks tile the picture.

    Raises:
        ValueError: they do not.
    """
    height, width = img_size
    if height % mask_size or width % mask_size:
        near = [max(round(n / mask_size), 1) * mask_size for n in img_size]
        raise ValueError(
            f"img_size {height} x {width} must be a multiple of mask_size = {mask_size} pixels "
            f"(the stride of the network is {stride}), for example {near[0]} x {near[1]}"
        )
