"""Which blocks of a batch of images are visible, and the packed layout that follows from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

BLOCK_SIZES = (1, 2, 4, 8, 16, 32)


class BlockMask:
    """Which blocks of a `[gh, gw]` grid are visible, for each image of a batch.

    One mask serves every resolution of a network: a block is `s x s` positions of a feature map of
    `gh * s` by `gw * s`, for any block side `s`. Packed features `[T, s*s, C]` hold the `T` visible
    blocks of the whole batch, image after image and in raster order within an image; the `s*s`
    positions of a block are in Z-order (see `to_zorder`).

    Make one with `random`, `from_noise`, `from_visible` or `full`. A mask is immutable, is a pytree
    (its tensors are the leaves), and `print(mask)` draws it.

    Attributes:
        visible: bool `[B, gh, gw]`, True where a block is kept. (MAE's `mask` is the opposite.)
        block_index: int64 `[T]`, the flat index of each visible block into `[B * gh * gw]`.
        visible_per_image: the number of visible blocks of every image where all images have the
            same number, else None.
    """

    visible: Tensor
    block_index: Tensor
    visible_per_image: int | None
    _neighbours: Tensor

    def __init__(
        self, visible: Tensor, block_index: Tensor, visible_per_image: int | None = None
    ) -> None:
        self.visible = visible
        self.block_index = block_index
        self.visible_per_image = visible_per_image
        self._neighbours = torch.ops.convmae.neighbour_table(visible, block_index, 1)

    # -- constructors -----------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        batch_size: int,
        grid: tuple[int, int],
        mask_ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Hides a random share `mask_ratio` of the blocks, the same number in every image.

        Args:
            batch_size: number of images, `B`.
            grid: `(gh, gw)` blocks.
            mask_ratio: share of hidden blocks, in `[0, 1)`; `int(L * (1 - mask_ratio))` of the
                `L = gh * gw` blocks stay visible, as in MAE.
            generator: source of the random noise; the default generator if None.
            device: where the mask is made; the generator's device, or torch's default, if None.

        Raises:
            ValueError: a size is not positive, or `mask_ratio` is outside `[0, 1)`.
        """
        gh, gw = _check_grid(grid)
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, got {batch_size}")
        if device is None and generator is not None:
            device = generator.device
        noise = torch.rand(batch_size, gh * gw, generator=generator, device=device)
        return cls.from_noise(noise, grid, mask_ratio)

    @classmethod
    def from_noise(cls, noise: Tensor, grid: tuple[int, int], mask_ratio: float) -> BlockMask:
        """Keeps the blocks with the smallest noise: `argsort(noise)[:, : int(L * (1 - ratio))]`.

        Args:
            noise: floating `[B, L]` with `L = gh * gw`, in raster order.
            grid: `(gh, gw)` blocks.
            mask_ratio: share of hidden blocks, in `[0, 1)`.

        Raises:
            TypeError: `noise` is not a floating tensor.
            ValueError: `noise` is not `[B, gh * gw]`, or `mask_ratio` is outside `[0, 1)`.
        """
        gh, gw = _check_grid(grid)
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            found = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise must be a floating tensor, got {found}")
        if noise.dim() != 2 or noise.shape[1] != gh * gw:
            raise ValueError(
                f"noise must be [B, {gh * gw}] for a grid of {gh} x {gw}, got {list(noise.shape)}"
            )
        if not 0.0 <= mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
        batch_size, length = noise.shape
        keep = int(length * (1 - mask_ratio))
        ids_keep = noise.argsort(dim=1, stable=True)[:, :keep]
        visible = torch.zeros(batch_size, length, dtype=torch.bool, device=noise.device)
        visible = visible.scatter(1, ids_keep, True)
        first = torch.arange(batch_size, device=noise.device).unsqueeze(1) * length
        block_index = (ids_keep.sort(dim=1).values + first).flatten()
        return cls(visible.view(batch_size, gh, gw), block_index, keep)

    @classmethod
    def from_visible(cls, visible: Tensor) -> BlockMask:
        """A mask of one's own; the number of visible blocks may differ between images.

        Reads the mask on the host once (it has to know how many blocks are visible).

        Args:
            visible: bool `[B, gh, gw]`, True where a block is kept.

        Raises:
            TypeError: `visible` is not a bool tensor.
            ValueError: `visible` is not of rank 3, or its grid is empty.
        """
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            found = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise TypeError(f"visible must be a bool tensor (True: kept), got {found}")
        if visible.dim() != 3:
            raise ValueError(f"visible must be [B, gh, gw], got {list(visible.shape)}")
        _check_grid((visible.shape[1], visible.shape[2]))
        visible = visible.detach().clone()
        block_index = visible.flatten().nonzero().squeeze(1)
        counts = set(visible.flatten(1).sum(1).tolist())
        return cls(visible, block_index, counts.pop() if len(counts) == 1 else None)

    @classmethod
    def full(
        cls, batch_size: int, grid: tuple[int, int], device: torch.device | str | None = None
    ) -> BlockMask:
        """Every block visible: packed features of whole images.

        Raises:
            ValueError: a size is not positive.
        """
        gh, gw = _check_grid(grid)
        visible = torch.ones(batch_size, gh, gw, dtype=torch.bool, device=device)
        return cls(visible, torch.arange(batch_size * gh * gw, device=device), gh * gw)

    # -- facts ------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """`(gh, gw)`: blocks in a column and in a row of the grid."""
        return self.visible.shape[1], self.visible.shape[2]

    @property
    def batch_size(self) -> int:
        """Number of images, `B`."""
        return self.visible.shape[0]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the whole batch, `B * gh * gw`."""
        return self.visible.numel()

    @property
    def num_visible(self) -> int:
        """Number of visible blocks of the whole batch, `T`."""
        return self.block_index.shape[0]

    @property
    def density(self) -> float:
        """Visible share of all blocks, in `[0, 1]`."""
        return self.num_visible / max(self.num_blocks, 1)

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors are."""
        return self.visible.device

    def neighbours(self, radius: int = 1) -> Tensor:
        """For each visible block, the packed rows of the blocks around it.

        Args:
            radius: how many blocks to look in each direction, at least 0.

        Returns:
            int32 `[T, (2 * radius + 1) ** 2]` in raster order; -1 where a neighbour is hidden or
            outside the grid. The middle column is the block itself.

        Raises:
            ValueError: `radius` is negative.
        """
        if radius < 0:
            raise ValueError(f"radius must not be negative, got {radius}")
        if radius == 1:
            return self._neighbours
        return torch.ops.convmae.neighbour_table(self.visible, self.block_index, radius)

    def to_dense(self, block_size: int) -> Tensor:
        """The mask of a feature map: bool `[B, 1, gh * block_size, gw * block_size]`."""
        dense = self.visible.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
        return dense.unsqueeze(1)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        leaves, context = _flatten(self)
        return _unflatten([leaf.to(device) for leaf in leaves], context)

    def __repr__(self) -> str:
        gh, gw = self.grid
        return (
            f"BlockMask(batch_size={self.batch_size}, grid=({gh}, {gw}), "
            f"num_visible={self.num_visible}, density={self.density:.3f}, device={self.device})"
        )

    def __str__(self) -> str:
        """`repr`, and the first images drawn: `#` visible, `.` hidden."""
        drawn = self.visible[: max(1, 100 // (self.grid[1] + 2))].tolist()
        rows = zip(*(["".join("#" if v else "." for v in row) for row in im] for im in drawn))
        return "\n".join([repr(self), *("  ".join(row) for row in rows)])


def _flatten(mask: BlockMask) -> tuple[list[Tensor], int | None]:
    return [mask.visible, mask.block_index, mask._neighbours], mask.visible_per_image


def _unflatten(leaves, context: int | None) -> BlockMask:
    mask = object.__new__(BlockMask)
    mask.visible, mask.block_index, mask._neighbours = leaves
    mask.visible_per_image = context
    return mask


pytree.register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    serialized_type_name="convmae_kernels.BlockMask",
    flatten_with_keys_fn=lambda mask: (
        [
            (pytree.GetAttrKey(name), leaf)
            for name, leaf in zip(("visible", "block_index", "_neighbours"), _flatten(mask)[0])
        ],
        mask.visible_per_image,
    ),
)


def _check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    try:
        gh, gw = grid
    except (TypeError, ValueError):
        raise TypeError(f"grid must be (gh, gw), got {grid!r}") from None
    if gh < 1 or gw < 1:
        raise ValueError(f"grid must have at least one block in each direction, got {gh} x {gw}")
    return gh, gw


# -- Z-order: the order of the positions of a block in packed features ----------------------------


def block_side(positions: int) -> int:
    """The side `s` of a block of `s * s` positions.

    Raises:
        ValueError: `positions` is not the square of one of `BLOCK_SIZES`.
    """
    for side in BLOCK_SIZES:
        if side * side == positions:
            return side
    raise ValueError(
        f"packed features are [T, s*s, C] with s one of {BLOCK_SIZES}, got s*s = {positions}"
    )


def to_zorder(x: Tensor) -> Tensor:
    """`[..., s, s] -> [..., s*s]`: rows and columns of a block to its Z-order (`s` a power of two).

    The bits of row and column alternate, the row's first, so that every 2 x 2, 4 x 4, ... square is
    contiguous: `[[0, 1], [2, 3]]` is the order within each 2 x 2 square, and of the squares.
    A strided convolution with kernel = stride is then a reshape and a matrix product.
    """
    lead, side = x.shape[:-2], x.shape[-1]
    bits = side.bit_length() - 1
    x = x.reshape(*lead, *(2,) * (2 * bits))
    first = len(lead)
    order = [first + axis * bits + bit for bit in range(bits) for axis in (0, 1)]
    return x.permute(*range(first), *order).reshape(*lead, side * side)


def from_zorder(x: Tensor) -> Tensor:
    """`[..., s*s] -> [..., s, s]`: the inverse of `to_zorder`."""
    lead, side = x.shape[:-1], math.isqrt(x.shape[-1])
    bits = side.bit_length() - 1
    x = x.reshape(*lead, *(2,) * (2 * bits))
    first = len(lead)
    order = [first + 2 * bit + axis for axis in (0, 1) for bit in range(bits)]
    return x.permute(*range(first), *order).reshape(*lead, side, side)


def rows_to_zorder(x: Tensor) -> Tensor:
    """`[T, s, s, ...] -> [T, s*s, ...]`: `to_zorder` of axes 1 and 2, in one copy."""
    bits = x.shape[1].bit_length() - 1
    split = x.reshape(x.shape[0], *(2,) * (2 * bits), *x.shape[3:])
    order = [1 + axis * bits + bit for bit in range(bits) for axis in (0, 1)]
    rest = range(1 + 2 * bits, split.dim())
    return split.permute(0, *order, *rest).reshape(x.shape[0], x.shape[1] ** 2, *x.shape[3:])


def rows_from_zorder(x: Tensor) -> Tensor:
    """`[T, s*s, ...] -> [T, s, s, ...]`: the inverse of `rows_to_zorder`."""
    side = math.isqrt(x.shape[1])
    bits = side.bit_length() - 1
    split = x.reshape(x.shape[0], *(2,) * (2 * bits), *x.shape[2:])
    order = [1 + 2 * bit + axis for axis in (0, 1) for bit in range(bits)]
    rest = range(1 + 2 * bits, split.dim())
    return split.permute(0, *order, *rest).reshape(x.shape[0], side, side, *x.shape[2:])
