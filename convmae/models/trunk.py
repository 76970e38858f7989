"""What ConvMAE and its classifier share: patch embeddings, blocks of the three stages, checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convmae.models.adapt import fit_positions
from convmae.models.image_model import ImageModel
from convmae.models.layers import CONV_EPS, Block, ConvBlock, Linear, PatchEmbed
from convmae.models.maps import stage1_map, stage2_map, tokens_of_map
from convmae_kernels import BlockMask, gather_visible, scatter_visible
from convmae_kernels.ops.support.arithmetic import cast_together
from convmae_kernels.recording import is_exported

PATCH_SIZE = 16


class Trunk(ImageModel):
    """Patch embeddings, position embedding and blocks of the three stages.

    Stages 1 and 2 are convolution blocks on 4x4 and 2x2 positions of each visible 16x16-pixel
    patch, stage 3 is transformer blocks on one token of each.

    Args:
        img_size: height and width of the images, one number for squares; multiples of 16.
        in_chans: channels of the images.
        embed_dim: channels of the three stages.
        depth: blocks of the three stages.
        num_heads: attention heads of stage 3; they divide `embed_dim[2]`.
        mlp_ratio: hidden / outer channels of the MLPs of the three stages.
        drop_path_rate: rate of the last block; it rises linearly from 0 at the first.
        fusion: with the convolutions that bring the outputs of stages 1 and 2 to those of stage 3.
        token_block: makes block `i` of stage 3 with a rate of stochastic depth, in the place of
            `Block`; called as `token_block(i, rate)`.
        conv_eps: of the LayerNorms of the blocks of stages 1 and 2.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    fixed_positions = False  # whether the position embedding is sin-cos and frozen
    antialiased_positions = True  # how that of another size is resampled: `resample_pos_embed`

    def __init__(
        self,
        img_size: int | Sequence[int],
        in_chans: int,
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: int,
        mlp_ratio: Sequence[float],
        drop_path_rate: float = 0.0,
        fusion: bool = False,
        token_block: Callable[[int, float], nn.Module] | None = None,
        conv_eps: float = CONV_EPS,
    ) -> None:
        super().__init__()
        self.patch_size = PATCH_SIZE
        self.grad_checkpointing = False
        self.in_chans = check_positive("in_chans", in_chans)
        self.img_size = check_img_size(img_size)
        dims = [check_positive("embed_dim", dim) for dim in _one_per_stage("embed_dim", embed_dim)]
        depths = [check_positive("depth", n) for n in _one_per_stage("depth", depth)]
        ratios = _one_per_stage("mlp_ratio", mlp_ratio)
        check_heads("embed_dim[2]", dims[2], "num_heads", num_heads)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")

        positions = self.position_grid[0] * self.position_grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dims[2]))
        self.patch_embed1 = PatchEmbed(in_chans, dims[0], 4)
        self.patch_embed2 = PatchEmbed(dims[0], dims[1], 2)
        self.patch_embed3 = PatchEmbed(dims[1], dims[2], 2)
        self.patch_embed4 = Linear(dims[2], dims[2])
        if fusion:
            self.stage1_output_decode = nn.Conv2d(dims[0], dims[2], 4, 4)
            self.stage2_output_decode = nn.Conv2d(dims[1], dims[2], 2, 2)
        blocks, last = sum(depths), max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(blocks)])
        self.blocks1 = nn.ModuleList(
            ConvBlock(dims[0], ratios[0], next(rates), conv_eps) for _ in range(depths[0])
        )
        self.blocks2 = nn.ModuleList(
            ConvBlock(dims[1], ratios[1], next(rates), conv_eps) for _ in range(depths[1])
        )
        self.blocks3 = nn.ModuleList(
            token_block(i, next(rates))
            if token_block
            else Block(dims[2], num_heads, ratios[2], next(rates))
            for i in range(depths[2])
        )

    @property
    def position_grid(self) -> tuple[int, int]:
        """The patches that the position embedding is of: those of the model's `img_size`."""
        return self.grid

    @property
    def reference_parameter(self) -> nn.Parameter:
        """The position embedding."""
        return self.pos_embed

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks forget what is inside them and compute it again for gradients.

        The numbers stay the same; training needs less memory and about a third more time.
        """
        self.grad_checkpointing = enable

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` of every patch embedding and block, each for itself, in place.

        Blocks of the same sizes share their code, whatever their masks and rates of stochastic
        depth, so it takes a part of the time that compiling the whole model takes.

        Args:
            backend: as in `torch.compile`.
        """
        for module in self.modules():
            if isinstance(module, PatchEmbed | ConvBlock | Block):
                module.compile(backend=backend, dynamic=False)

    def run_block(self, block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`block(*arguments)`, checkpointed if that is on; exported programs do not train."""
        if self.grad_checkpointing and torch.is_grad_enabled() and not is_exported():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def pixels(self, images: Tensor, mask: BlockMask) -> Tensor:
        """Images `[N, C, H, W]` to the pixels of visible patches, `[T, 256, C]`."""
        return gather_visible(images, mask)

    def stage1(self, images: Tensor, mask: BlockMask) -> Tensor:
        """Images `[N, C, H, W]` to `[T, 16, embed_dim[0]]`, visible patches only."""
        x = self.patch_embed1(self.pixels(images, mask))  # [T, 256, C] -> [T, 16, D1]
        for block in self.blocks1:
            x = self.run_block(block, x, mask)
        return x

    def stage2(self, x: Tensor, mask: BlockMask) -> Tensor:
        """`[T, 16, embed_dim[0]] -> [T, 4, embed_dim[1]]`."""
        x = self.patch_embed2(x)
        for block in self.blocks2:
            x = self.run_block(block, x, mask)
        return x

    def tokens(self, x: Tensor) -> Tensor:
        """`[T, 4, embed_dim[1]] -> [T, embed_dim[2]]`, without the position embedding."""
        x = self.patch_embed3(x).flatten(1)
        with cast_together(list(self.patch_embed4.parameters()), x):
            return self.patch_embed4(x)

    def whole_stages(self, images: Tensor, last: int = 2) -> list[Tensor]:
        """Stages 1 and 2 of whole images, then tokens `[N, L, D]` without positions.

        Stages 1 and 2 are packed features, which are computed faster; in exported programs they are
        maps `[N, C, H, W]`, for which PyTorch's own ops do. `stage_map` gives maps of either.

        Args:
            images: `[N, C, H, W]`, of sides that 16 divides.
            last: the last stage that is wanted, from 0.
        """
        if is_exported():
            stage1, stage2 = partial(stage1_map, self), partial(stage2_map, self)
            tokens = partial(tokens_of_map, self)
        else:
            mask = self._full_mask(images)
            stage1, stage2 = partial(self.stage1, mask=mask), partial(self.stage2, mask=mask)
            tokens = partial(self.tokens)
        outputs = [stage1(images)]
        if last >= 1:
            outputs.append(stage2(outputs[0]))
        if last >= 2:
            outputs.append(tokens(outputs[1]).view(images.shape[0], -1, self.pos_embed.shape[2]))
        return outputs

    def stage_map(self, x: Tensor, images: Tensor) -> Tensor:
        """What `whole_stages` gives of stage 1 or 2 of `images`, as a map `[N, C, H, W]`."""
        return scatter_visible(x, self._full_mask(images)) if x.dim() == 3 else x

    def _full_mask(self, images: Tensor) -> BlockMask:
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        return BlockMask.full(images.shape[0], grid, images.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As `torch.nn.Module` has it; position embeddings of other sizes are resampled before."""
        fit_positions(self, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def check_positive(name: str, value: int) -> int:
    """`value` if it is a positive whole number.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return value


def check_heads(dim_name: str, dim: int, heads_name: str, heads: int) -> None:
    """The heads divide the width.

    Raises:
        ValueError: they do not.
    """
    if dim % check_positive(heads_name, heads):
        raise ValueError(f"{dim_name} = {dim} must be a multiple of {heads_name} = {heads}")


def _one_per_stage(name: str, values: Sequence) -> list:
    if not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"{name} must have one value for each of the 3 stages, got {values!r}")
    return list(values)


def check_img_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """`(height, width)` of `img_size`.

    Raises:
        ValueError: a side is not a positive multiple of 16.
    """
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or any(n < 1 or n % PATCH_SIZE for n in pair):
        raise ValueError(
            f"img_size must be a positive multiple of {PATCH_SIZE}, or (height, width) of such, "
            f"got {img_size!r}"
        )
    return pair
