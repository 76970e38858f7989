"""`Packed`: features of visible blocks that flow through ordinary modules like an NCHW tensor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from convmae_kernels import ops
from convmae_kernels.functional import pooling
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.packed.axes import NCHW, NHWC, order_of
from convmae_kernels.packed.map_like import MapLike
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FrameType

    from convmae_kernels.block_mask import BlockMask

HANDLERS: dict[Callable | str, Callable] = {}  # function or its name -> handler


class Packed(MapLike):
    """Packed features and their mask: what a network of visible blocks hands from layer to layer.

    To modules and functions it looks like a dense map `[B, C, H, W]`, hidden positions of which
    nobody can see: convolutions, pooling, norms, element-wise functions and sums over positions
    work on the visible ones. Whatever else is asked of it raises an error that names the operation
    and the module. There is no state beside it: any number of them may be in use at a time.

    Args:
        features: packed features `[T, s*s, C]`.
        mask: the mask that they were packed with.
        channels_last: whether it looks like `[B, H, W, C]`, as after `permute(0, 2, 3, 1)`.
        axes: one letter for each dimension of the map that it looks like, in place of
            `channels_last`: `"BCHW"`, `"BHWC"`, and for a view of channels in groups `"BCCHW"`,
            of features `[T, s*s, g, C // g]`. `N` are rows and columns in one: tokens are `"BNC"`.

    Attributes:
        features: packed features `[T, s*s, C]`, a tensor like any other; `[T, s*s, *channels]`
            where there is not just one dimension of channels.
        mask: the mask.
        axes: as above.

    Raises:
        TypeError, ValueError: `features` is not packed with this mask.
    """

    handlers: ClassVar[dict[Callable | str, Callable]] = HANDLERS
    features: Tensor
    mask: BlockMask
    axes: str

    def __init__(
        self,
        features: Tensor,
        mask: BlockMask,
        channels_last: bool = False,
        axes: str | None = None,
    ) -> None:
        self.axes = axes or (NHWC if channels_last else NCHW)
        _check_features(features, mask, self.axes)
        self.features = features
        self.mask = mask

    @classmethod
    def gather(cls, images: Tensor, mask: BlockMask) -> Packed:
        """The visible blocks of `[B, C, H, W]`; see `gather_visible`."""
        return cls(ops.gather_visible(images, mask), mask)

    def dense(self, fill: float = 0.0) -> Tensor:
        """The dense map `[B, C, H, W]`, channels-last, with `fill` at hidden positions.

        After `permute(0, 2, 3, 1)` it is `[B, H, W, C]`, contiguous.
        """
        return self._arranged(ops.scatter_visible(self.rows(), self.mask, fill=fill))

    def _arranged(self, dense: Tensor) -> Tensor:
        """`[B, channels, H, W]`, channels in one dimension, to the axes."""
        dense = dense.unflatten(1, self.channels) if self.channels else dense.squeeze(1)
        if "N" in self.axes:
            dense = dense.flatten(-2)
        letters = "B" + "C" * len(self.channels) + ("N" if "N" in self.axes else "HW")
        return dense.permute(order_of(letters, self.axes))

    def like(self, features: Tensor, axes: str | None = None) -> Packed:
        """Other features of the same mask, with the same axes or others."""
        if features.is_floating_point():
            return Packed(features, self.mask, axes=axes or self.axes)
        block_side(features.shape[1])
        return _unflatten((features, self.mask), axes or self.axes)  # of a comparison, indices

    def rows(self) -> Tensor:
        """`[T, s*s, C]`: the features with all channels in one dimension."""
        if self.features.dim() == 3:
            return self.features
        return self.features.reshape(*self.features.shape[:2], self.channels.numel())

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            _check_checkpointing(args)
        return super().__torch_function__(func, types, args, kwargs)

    # -- facts ------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Of the dense map."""
        height, width = self.positions
        sizes = {"B": self.mask.batch_size, "H": height, "W": width, "N": height * width}
        channels = iter(self.channels)
        return torch.Size([next(channels) if x == "C" else sizes[x] for x in self.axes])

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of the dense map."""
        side, (gh, gw) = block_side(self.features.shape[1]), self.mask.grid
        return gh * side, gw * side

    @property
    def channels(self) -> torch.Size:
        """The dimensions of channels."""
        return self.features.shape[2:]

    @property
    def _channels_last(self) -> bool:
        return self.axes == NHWC

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Of the features."""
        return self.features.device

    @property
    def is_cuda(self) -> bool:
        """Whether the features are on a CUDA GPU."""
        return self.features.is_cuda

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the features."""
        return self.features.requires_grad

    def is_floating_point(self) -> bool:
        """True."""
        return self.features.is_floating_point()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        plain = self.axes in (NCHW, NHWC)
        others = () if plain else (self.axes,)
        return Packed, (self.features, self.mask, self._channels_last, *others)

    def __repr__(self) -> str:
        return f"Packed(shape={tuple(self.shape)}, dtype={self.dtype}, mask={self.mask!r})"


def _check_features(features: Tensor, mask: BlockMask, axes: str) -> None:
    """The features are packed with the mask, and fit the axes."""
    rows = features
    if isinstance(features, Tensor):
        if features.dtype == torch.bool:  # of comparisons
            rows = rows.half()
        if (number := axes.count("C")) != 1:
            if features.dim() != 2 + number:
                raise ValueError(
                    f"features must have {2 + number} dimensions for axes {axes}, two and one for "
                    f"each C, got {list(features.shape)}"
                )
            rows = rows.flatten(2) if number else rows.unsqueeze(2)
    check_packed("features", rows, mask)


def _unflatten(leaves: Iterable[Any], axes: str) -> Packed:
    packed = object.__new__(Packed)  # leaves may be anything: nothing is checked
    packed.features, packed.mask = leaves
    packed.axes = axes
    return packed


torch.serialization.add_safe_globals([Packed])
pytree.register_pytree_node(
    Packed,
    lambda packed: ([packed.features, packed.mask], packed.axes),
    _unflatten,
    serialized_type_name="convmae_kernels.Packed",
)


def _check_checkpointing(operands: Sequence[Any]) -> None:
    """Re-entrant checkpointing hands gradients to tensors alone, and loses those of a `Packed`.

    Raises:
        RuntimeError: it computes on one of the operands, of which gradients are wanted.
    """
    if not any(isinstance(x, Packed) and x.requires_grad for x in operands):
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise RuntimeError(
                "re-entrant checkpointing loses the gradients of packed features; expected "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back


# -- operands -------------------------------------------------------------------------------------


def first_packed(operands: Sequence[Any]) -> Packed:
    """The first `Packed` among operands, checked to fit the others."""
    packed = [x for x in operands if isinstance(x, Packed)]
    for other in packed[1:]:
        if other.mask.visible is not packed[0].mask.visible and not (
            other.mask.visible.shape == packed[0].mask.visible.shape
            and torch.equal(other.mask.visible, packed[0].mask.visible)
        ):
            raise ValueError("two Packed of one operation have different masks")
        same = other.axes == packed[0].axes
        if not same or other.features.shape[1] != packed[0].features.shape[1]:
            raise ValueError(
                f"two Packed of one operation have shapes {tuple(packed[0].shape)} and "
                f"{tuple(other.shape)}"
            )
    return packed[0]


def broadcast(value: Any, to: Packed) -> Any:
    """An operand in a form that broadcasts with the features `[T, s*s, *channels]` of `to`."""
    if isinstance(value, Packed):
        return value.features
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    refusal = f"{list(value.shape)} does not broadcast with {tuple(to.shape)}"
    if value.dim() > to.ndim:
        raise ValueError(refusal)
    shaped = value.reshape(*(1,) * (to.ndim - value.dim()), *value.shape)
    positions = "N" if "N" in to.axes else "HW"
    ordered = "B" + "C" * len(to.channels) + positions
    shaped = shaped.permute(order_of(to.axes, ordered))
    sizes = shaped.shape[1 : 1 + len(to.channels)]
    fits = shaped.shape[0] in (1, to.mask.batch_size) and all(
        a == b or 1 in (a, b) for a, b in zip(sizes, to.channels)
    )
    found = tuple(shaped.shape[-len(positions) :])
    if fits and set(found) == {1}:
        rows = shaped.reshape(shaped.shape[0], 1, *sizes)
        return rows if len(rows) == 1 else pooling.spread_to_blocks(rows, to.mask)
    height, width = to.positions
    if fits and found == ((height * width,) if positions == "N" else (height, width)):
        images = shaped.reshape(shaped.shape[0], sizes.numel(), height, width)
        rows = _gather_any(images, to.mask)
        return rows.reshape(*rows.shape[:2], *sizes)
    raise ValueError(refusal)


def _gather_any(images: Tensor, mask: BlockMask) -> Tensor:
    """`gather_visible` of images of any dtype, or of one image for all."""
    images = images.expand(mask.batch_size, -1, -1, -1)
    if images.is_floating_point():
        return ops.gather_visible(images, mask)
    return ops.gather_visible(images.double(), mask).to(images.dtype)
