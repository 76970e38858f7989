"""Which blocks of a batch of images are visible, and the packed layout that follows from it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

from convmae_kernels.recording import is_exported, is_onnx, is_recorded, leaves_pytorch


class BlockMask:
    """Which blocks of a `[gh, gw]` grid are visible, for each image of a batch.

    One mask serves every resolution of a network: a block is `s x s` positions of a feature map of
    `gh * s` by `gw * s`, for any block side `s`. Packed features `[T, s*s, C]` hold the `T` visible
    blocks of the whole batch, image after image and in raster order within an image; the `s*s`
    positions of a block are in Z-order (see `to_zorder`).

    Make one with `random`, `from_noise`, `from_ids`, `from_visible` or `full`. A mask is immutable,
    is a pytree (its tensors are the leaves), and `print(mask)` draws it. `torch.save` and
    `torch.load` take it, `weights_only` or not; a `DataLoader` joins the masks of samples.

    A mask from these constructors knows, on the host, the least and the largest number of visible
    blocks of an image, so that nothing has to wait for a GPU to ask. They are part of the structure
    of the pytree: an exported program serves masks of the same two numbers. A mask from
    `BlockMask(visible, block_index)` does not know them, asks the GPU when it has to, and a program
    that was exported with such a mask serves all masks made like it.

    Attributes:
        visible: bool `[B, gh, gw]`, True where a block is kept. (MAE's `mask` is the opposite.)
        block_index: int64 `[T]`, the flat index of each visible block into `[B * gh * gw]`.
        visible_per_image: the number of visible blocks of every image where all images have the
            same number and it is known, else None.
    """

    visible: Tensor
    block_index: Tensor
    visible_per_image: int | None
    _extremes: tuple[int, int] | None  # the least and the largest number of an image, if known
    _asked: tuple[int, int] | None  # the same of a mask that did not know, once it had to
    _neighbours: Tensor

    def __init__(
        self,
        visible: Tensor,
        block_index: Tensor,
        visible_per_image: int | None = None,
        extremes: tuple[int, int] | None = None,
    ) -> None:
        self.visible = visible
        self.block_index = block_index
        self.visible_per_image = visible_per_image
        self._extremes = extremes
        self._asked = None
        if visible_per_image is not None:
            self._extremes = visible_per_image, visible_per_image
        self._neighbours = self._table(1)

    # -- constructors -----------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        batch_size: int,
        grid: tuple[int, int],
        mask_ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        rounding: Literal["floor", "round"] = "floor",
    ) -> BlockMask:
        """Hides a random share `mask_ratio` of the blocks, the same number in every image.

        Args:
            batch_size: number of images, `B`.
            grid: `(gh, gw)` blocks.
            mask_ratio: share of hidden blocks, in `[0, 1)`; `int(L * (1 - mask_ratio))` of the
                `L = gh * gw` blocks stay visible, as in MAE.
            generator: source of the random noise; the default generator if None.
            device: where the mask is made; the generator's device, or torch's default, if None.
            rounding: as in `from_noise`.

        Raises:
            ValueError: a size is not positive, `mask_ratio` is outside `[0, 1)`, or there is no
                such rounding.
        """
        gh, gw = _check_grid(grid)
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, got {batch_size}")
        if device is None and generator is not None:
            device = generator.device
        noise = torch.rand(batch_size, gh * gw, generator=generator, device=device)
        return cls.from_noise(noise, grid, mask_ratio, rounding)

    @classmethod
    def from_noise(
        cls,
        noise: Tensor,
        grid: tuple[int, int],
        mask_ratio: float,
        rounding: Literal["floor", "round"] = "floor",
    ) -> BlockMask:
        """Keeps the blocks with the smallest noise: `argsort(noise)[:, : int(L * (1 - ratio))]`.

        Args:
            noise: floating `[B, L]` with `L = gh * gw`, in raster order.
            grid: `(gh, gw)` blocks.
            mask_ratio: share of hidden blocks, in `[0, 1)`.
            rounding: how `L * (1 - mask_ratio)` becomes a whole number: "floor" is `int`, as in
                MAE and ConvNeXt V2; "round" is `round`, half to even, as in SparK. Of 49 blocks and
                a ratio of 0.6, 19 or 20 stay visible.

        Raises:
            TypeError: `noise` is not a floating tensor.
            ValueError: `noise` is not `[B, gh * gw]`, `mask_ratio` is outside `[0, 1)`, or there is
                no such rounding.
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
        if rounding not in ("floor", "round"):
            raise ValueError(f'rounding must be "floor" or "round", got {rounding!r}')
        share = noise.shape[1] * (1 - mask_ratio)
        keep = round(share) if rounding == "round" else int(share)
        return cls._of_ids(_smallest(noise, keep), (gh, gw))

    @classmethod
    def from_ids(cls, ids: Tensor, grid: tuple[int, int], *, check: bool = True) -> BlockMask:
        """Shows the blocks `ids[b]` in image `b`: MAE's `ids_keep`, in any order.

        Args:
            ids: integers `[B, K]` in `[0, gh * gw)`, places in raster order; all different within
                an image.
            grid: `(gh, gw)` blocks.
            check: whether to check the values, for which the host waits for a GPU. Pass False where
                they cannot be wrong, as parts of an `argsort` cannot. Compiled and exported code
                never checks.

        Raises:
            TypeError: `ids` is not a tensor of integers.
            ValueError: `ids` is not of rank 2, or an id is outside the grid or is there twice.
        """
        gh, gw = _check_grid(grid)
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor of integers, got {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be a tensor of integers, got {ids.dtype}")
        if ids.dim() != 2 or ids.shape[1] > gh * gw:
            raise ValueError(
                f"ids must be [B, K] with K at most {gh * gw} for a grid of {gh} x {gw}, got "
                f"{list(ids.shape)}"
            )
        ids = ids.long()
        if check and not is_recorded():
            _check_ids(ids, gh * gw)
        return cls._of_ids(ids, (gh, gw))

    @classmethod
    def _of_ids(cls, ids: Tensor, grid: tuple[int, int]) -> BlockMask:
        """`from_ids` of int64 values that are known to be right."""
        (batch_size, keep), length = ids.shape, grid[0] * grid[1]
        visible = torch.zeros(batch_size, length, dtype=torch.bool, device=ids.device)
        visible = visible.scatter(1, ids, 1)  # 1: `torch.jit.trace` has no scatter of a bool
        first = torch.arange(batch_size, device=ids.device).unsqueeze(1) * length
        block_index = (ids.sort(dim=1).values + first).flatten()
        return cls(visible.view(batch_size, *grid), block_index, keep)

    @classmethod
    def from_visible(cls, visible: Tensor) -> BlockMask:
        """A mask of one's own; the number of visible blocks may differ between images.

        The host waits for a GPU once, as it has to know how many blocks are visible. A program that
        is compiled or exported serves any mask: there the mask knows no numbers, like one from
        `BlockMask(visible, block_index)`.

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
        if is_recorded():  # a program for any mask, whose numbers nobody knows yet
            return cls(visible, visible.flatten().nonzero().squeeze(1))
        counts = visible.flatten(1).sum(1).tolist()
        # Block t is the first one up to which t + 1 are visible: `nonzero`, without its waiting.
        order = torch.arange(1, sum(counts) + 1, device=visible.device)
        block_index = torch.searchsorted(visible.flatten().cumsum(0), order)
        least, most = min(counts, default=0), max(counts, default=0)
        equal = least if counts and least == most else None
        return cls(visible, block_index, equal, (least, most))

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
    def hides_nothing(self) -> bool:
        """Whether it is known on the host that every block is visible."""
        gh, gw = self.grid
        return self.visible_per_image is not None and self.visible_per_image == gh * gw

    @property
    def knows_numbers(self) -> bool:
        """Whether the numbers of visible blocks of the images are known on the host."""
        return self._extremes is not None

    @property
    def min_per_image(self) -> int:
        """The least number of visible blocks of an image; 0 without images."""
        return self._known_extremes()[0]

    @property
    def max_per_image(self) -> int:
        """The largest number of visible blocks of an image; 0 without images."""
        return self._known_extremes()[1]

    @property
    def image_index(self) -> Tensor:
        """The image of each visible block: int64 `[T]`, ascending."""
        gh, gw = self.grid
        return self.block_index // (gh * gw)

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
        return self._table(radius)

    def _table(self, radius: int) -> Tensor:
        if self.wants_plain_ops():
            import convmae_kernels.ops.reference as reference

            return reference.neighbour_table(self.visible, self.block_index, radius)
        return torch.ops.convmae.neighbour_table(self.visible, self.block_index, radius)

    def wants_plain_ops(self) -> bool:
        """Whether a program is recorded here that should be made of PyTorch's own ops.

        One that leaves PyTorch, and an exported one in which it is certain that nothing is hidden.
        """
        return leaves_pytorch() or (self.hides_nothing and is_exported())

    def _known_extremes(self) -> tuple[int, int]:
        """The least and the largest number of an image; asks the device where they are unknown."""
        if self._extremes is not None:
            return self._extremes
        if self.batch_size == 0:
            return 0, 0
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record a mask whose numbers of visible blocks are unknown, "
                "such as one from BlockMask.from_visible; expected torch.export.export, or a mask "
                "from from_noise, from_ids or full"
            )
        if self._asked is None:
            counts = self.visible.flatten(1).sum(1)
            least, most = torch.stack([counts.min(), counts.max()]).tolist()
            self._asked = least, most
        return self._asked

    def to_dense(self, block_size: int) -> Tensor:
        """The mask of a feature map: bool `[B, 1, gh * block_size, gw * block_size]`."""
        dense = self.visible.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
        return dense.unsqueeze(1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BlockMask:
        """The same mask on another device."""
        leaves, context = _flatten(self)
        return _unflatten([leaf.to(device, non_blocking=non_blocking) for leaf in leaves], context)

    def pin_memory(self) -> BlockMask:
        """The same mask in page-locked memory; `DataLoader(pin_memory=True)` asks for it."""
        leaves, context = _flatten(self)
        return _unflatten([leaf.pin_memory() for leaf in leaves], context)

    def __reduce__(self) -> tuple[Callable, tuple[Tensor]]:
        """What is pickled is `visible`; all the rest follows from it, so that no file can lie."""
        return _from_visible, (self.visible,)

    def __copy__(self) -> BlockMask:
        return _unflatten(*_flatten(self))

    def __deepcopy__(self, memo: dict[int, object]) -> BlockMask:
        leaves, context = _flatten(self)
        return _unflatten(copy.deepcopy(leaves, memo), context)

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


def _smallest(noise: Tensor, keep: int) -> Tensor:
    """`noise.argsort(dim=1, stable=True)[:, :keep]`; ONNX has no stable sort, but its TopK is."""
    if is_onnx():
        return noise.topk(keep, dim=1, largest=False, sorted=True).indices
    return noise.argsort(dim=1, stable=True)[:, :keep]


_LEAVES = ("visible", "block_index", "_neighbours")
_Known = tuple[int | None, tuple[int, int] | None]  # what the host knows of the numbers of an image


def _flatten(mask: BlockMask) -> tuple[list[Tensor], _Known]:
    leaves = [mask.visible, mask.block_index, mask._neighbours]
    return leaves, (mask.visible_per_image, mask._extremes)


def _flatten_with_keys(mask: BlockMask):
    leaves, known = _flatten(mask)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves)], known


def _unflatten(leaves, known: _Known) -> BlockMask:
    mask = object.__new__(BlockMask)
    mask.visible, mask.block_index, mask._neighbours = leaves
    mask.visible_per_image, mask._extremes = known
    mask._asked = None
    return mask


def _from_dumped(dumped: list) -> _Known:
    """What the host knows, from JSON, which has no tuples."""
    return dumped[0], None if dumped[1] is None else (dumped[1][0], dumped[1][1])


pytree.register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    serialized_type_name="convmae_kernels.BlockMask",
    to_dumpable_context=list,
    from_dumpable_context=_from_dumped,
    flatten_with_keys_fn=_flatten_with_keys,
)


# -- files and batches ----------------------------------------------------------------------------


def _from_visible(visible: Tensor) -> BlockMask:
    return BlockMask.from_visible(visible)  # a method cannot be loaded with weights_only


torch.serialization.add_safe_globals([_from_visible])


def _collate(masks: Sequence[BlockMask], **_: object) -> BlockMask:
    """The masks of samples, one behind the other, as the mask of a batch."""
    if len({mask.grid for mask in masks}) > 1:
        grids = ", ".join(sorted({f"{mask.grid[0]} x {mask.grid[1]}" for mask in masks}))
        raise ValueError(f"masks of a batch must have the same grid of blocks, got {grids}")
    return BlockMask.from_visible(torch.cat([mask.visible for mask in masks]))


default_collate_fn_map[BlockMask] = _collate


# -- checks ---------------------------------------------------------------------------------------


def _check_ids(ids: Tensor, length: int) -> None:
    if ids.numel() == 0:
        return
    twice = (ids.sort(dim=1).values.diff(dim=1) == 0).any()
    lowest, highest, repeats = torch.stack([ids.min(), ids.max(), twice]).tolist()
    if lowest < 0 or highest >= length:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"ids must be in [0, {length}), the blocks of the grid, got {wrong}")
    if repeats:
        raise ValueError("ids must be different from each other within an image, got one twice")


def _check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    try:
        gh, gw = grid
    except (TypeError, ValueError):
        raise TypeError(f"grid must be (gh, gw), got {grid!r}") from None
    if gh < 1 or gw < 1:
        raise ValueError(f"grid must have at least one block in each direction, got {gh} x {gw}")
    return gh, gw
