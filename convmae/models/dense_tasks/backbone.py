"""What the three ConvViT backbones share: pictures of any size, maps of several scales."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from convmae.config import WeightsWarning
from convmae.models.dense_tasks.positions import (
    Grid,
    resample_distances,
    resample_table,
    square_grid,
)
from convmae.models.image_model import at_least_float
from convmae.models.layers import add_parameter, resample_pos_embed
from convmae.models.trunk import PATCH_SIZE, Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from convmae.models.dense_tasks.token_blocks import MapBlock

LEAST_SIDE = 32  # pixels
INDEX_BUFFER = "relative_position_index"  # of official files; it follows from the size of a table
FIRST_LAYERS = ("patch_embed", "blocks1.", "blocks2.")


class ConvViTBackbone(Trunk):
    """ConvMAE's encoder on whole pictures of any size, for detection and segmentation.

    A picture is padded with zeros at the bottom and at the right to sides that 16 divides; the maps
    are cut to `ceil(side / stride)`. The zeros are pixels like all others: tokens attend to them.

    Args:
        img_size: height and width that the tables of positions are made for, multiples of 16; for
            pictures of other sizes they are resampled in every pass.
        in_chans: channels of the pictures.
        embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in `Trunk`.
        token_block, conv_eps: as in `Trunk`.

    Attributes:
        channels: of each map.
        strides: pixels of the picture to a position of each map, a side.
        num_layers: number of layers for layer decay, see `layer_ids`.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    antialiased_positions = False
    least_grid = 1  # patches of a side that the network needs

    def __init__(
        self,
        img_size: int | Sequence[int],
        in_chans: int,
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: int,
        mlp_ratio: Sequence[float],
        drop_path_rate: float,
        token_block: Callable[[int, float], MapBlock],
        **options: Any,
    ) -> None:
        super().__init__(
            *(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate),
            token_block=token_block,
            **options,
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps `[N, C, h, w]` of the scales of `strides`, finest first.

        Args:
            images: floating `[N, in_chans, H, W]`, normalised; sides of 32 pixels at least.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        self.check_images(images)
        height, width = images.shape[2:]
        maps = self.maps(pad_images(images, PATCH_SIZE, self.least_grid * PATCH_SIZE))
        return [
            crop_map(x, height, width, stride) for x, stride in zip(maps, self.strides, strict=True)
        ]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of pictures whose sides 16 divides."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Pictures of any size from 32 pixels a side on.

        Raises:
            ValueError: a side is less.
        """
        check_least_side(height, width)

    def add_positions(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens `[N, L, D]` to maps `[N, gh, gw, D]`, with the position embedding."""
        positions = resample_pos_embed(self.pos_embed, self.position_grid, grid, antialias=False)
        return add_parameter(x, positions).unflatten(1, grid)

    # -- training ---------------------------------------------------------------------------------

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` of every patch embedding and block, each for itself, in place.

        Args:
            backend: as in `torch.compile`.
        """
        super().compile_blocks(backend)
        for block in self.blocks3:
            block.compile(backend=backend, dynamic=False)

    @property
    def num_layers(self) -> int:
        """One for stages 1 and 2, one for each block of stage 3, one for all that is behind them."""
        return len(self.blocks3) + 2

    def layer_ids(self) -> dict[str, int]:
        """The layer of each parameter by its name, from 0, for layer decay.

        A parameter of layer `i` learns at `decay ** (num_layers - 1 - i)` of the full rate. Stages
        1 and 2 with all patch embeddings are layer 0, block `i` of stage 3 is layer `i + 1`, the
        rest is the last layer, as are the heads of a model.
        """
        return {name: self._layer_id(name) for name, _ in self.named_parameters()}

    def _layer_id(self, name: str) -> int:
        if name.startswith(FIRST_LAYERS):
            return 0
        if name.startswith("blocks3."):
            return int(name.split(".")[1]) + 1
        return self.num_layers - 1

    def no_weight_decay(self) -> set[str]:
        """Names of all parameters that the official recipe does not decay, vectors among them."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """As `torch.nn.Module` has it, before which tables of other grids are resampled.

        A warning names them. Official index buffers are left out.
        """
        fitted = fit_relative_positions(self, state_dict, prefix)
        if fitted:
            warnings.warn(
                "relative positions are of pictures or windows of another size: resampled "
                f"({len(fitted)} tables, such as {prefix}{fitted[0]})",
                WeightsWarning,
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def fit_relative_positions(model: nn.Module, state: dict[str, Any], prefix: str = "") -> list[str]:
    """Fits the relative positions of a state dict to those of a model, in place.

    Tables must be of a square grid. Index buffers of official files are taken out.

    Args:
        model: with `relative_position_bias_table` or `rel_pos_h` and `rel_pos_w` in its modules.
        state: a state dict.
        prefix: what its names begin with.

    Returns:
        The names, without the prefix, of those that were of another grid.
    """
    for name in [n for n in state if n.startswith(prefix) and n.endswith("." + INDEX_BUFFER)]:
        del state[name]
    fitted = []
    for path, module in model.named_modules():
        for name, own in module.named_parameters(path, recurse=False):
            value, kind = state.get(prefix + name), name.rpartition(".")[2]
            if not isinstance(value, Tensor) or value.shape == own.shape or value.dim() != 2:
                continue
            if value.shape[1] != own.shape[1] or value.is_meta:
                continue
            if kind in ("rel_pos_h", "rel_pos_w"):
                fit = resample_distances(at_least_float(value), own.shape[0])
            elif kind == "relative_position_bias_table" and square_grid(value.shape[0]):
                old: Any = square_grid(value.shape[0])
                new: Any = module.grid
                fit = resample_table(at_least_float(value), old, new)
            else:
                continue
            state[prefix + name] = fit.to(value.dtype).contiguous()
            fitted.append(name)
    return fitted


def pad_images(images: Tensor, multiple: int, least: int = 0) -> Tensor:
    """Zeros at the bottom and at the right of `[N, C, H, W]`, up to a multiple and a least side."""
    height, width = images.shape[2:]
    down, right = (max(least, side + -side % multiple) - side for side in (height, width))
    return F.pad(images, (0, right, 0, down)) if down or right else images


def crop_map(x: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The positions of a map `[N, C, h, w]` in which a picture of `height x width` is."""
    return x[:, :, : -(-height // stride), : -(-width // stride)]


def check_least_side(height: int, width: int) -> None:
    """Pictures have at least `LEAST_SIDE` pixels a side.

    Raises:
        ValueError: they have less.
    """
    if min(height, width) < LEAST_SIDE:
        raise ValueError(
            f"images are {height} x {width}, expected at least {LEAST_SIDE} pixels a side; pad or "
            "enlarge smaller ones"
        )
