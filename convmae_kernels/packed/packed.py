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
from convmae_kernels.packed.map_like import MapLike
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FrameType

    from convmae_kernels.block_mask import BlockMask

HANDLERS: dict[Callable, Callable] = {}  # of Packed: function -> handler(function, *arguments)


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

    Attributes:
        features: packed features `[T, s*s, C]`, a tensor like any other.
        mask: the mask.

    Raises:
        TypeError, ValueError: `features` is not packed with this mask.
    """

    handlers: ClassVar[dict[Callable, Callable]] = HANDLERS
    features: Tensor
    mask: BlockMask

    def __init__(self, features: Tensor, mask: BlockMask, channels_last: bool = False) -> None:
        is_bool = isinstance(features, Tensor) and features.dtype == torch.bool  # of comparisons
        check_packed("features", features.half() if is_bool else features, mask)
        self.features = features
        self.mask = mask
        self._channels_last = channels_last

    @classmethod
    def gather(cls, images: Tensor, mask: BlockMask) -> Packed:
        """The visible blocks of `[B, C, H, W]`; see `gather_visible`."""
        return cls(ops.gather_visible(images, mask), mask)

    def dense(self, fill: float = 0.0) -> Tensor:
        """The dense map `[B, C, H, W]`, channels-last, with `fill` at hidden positions.

        After `permute(0, 2, 3, 1)` it is `[B, H, W, C]`, contiguous.
        """
        dense = ops.scatter_visible(self.features, self.mask, fill=fill)
        return dense.permute(0, 2, 3, 1) if self._channels_last else dense

    def like(self, features: Tensor) -> Packed:
        """Other features of the same mask and layout."""
        return Packed(features, self.mask, self._channels_last)

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
        side, (gh, gw) = block_side(self.features.shape[1]), self.mask.grid
        height, width, channels = gh * side, gw * side, self.features.shape[2]
        last = (height, width, channels) if self._channels_last else (channels, height, width)
        return torch.Size((self.mask.batch_size, *last))

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

    def __reduce__(self) -> tuple[type, tuple[Tensor, BlockMask, bool]]:
        return Packed, (self.features, self.mask, self._channels_last)

    def __repr__(self) -> str:
        return f"Packed(shape={tuple(self.shape)}, dtype={self.dtype}, mask={self.mask!r})"


def _unflatten(leaves: Iterable[Any], channels_last: bool) -> Packed:
    packed = object.__new__(Packed)  # leaves may be anything: nothing is checked
    packed.features, packed.mask = leaves
    packed._channels_last = channels_last
    return packed


torch.serialization.add_safe_globals([Packed])
pytree.register_pytree_node(
    Packed,
    lambda packed: ([packed.features, packed.mask], packed._channels_last),
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
        same = other._channels_last == packed[0]._channels_last
        if not same or other.features.shape[1] != packed[0].features.shape[1]:
            raise ValueError(
                f"two Packed of one operation have shapes {tuple(packed[0].shape)} and "
                f"{tuple(other.shape)}"
            )
    return packed[0]


def broadcast(value: Any, to: Packed) -> Any:
    """An operand in a form that broadcasts with the features `[T, s*s, C]` of `to`."""
    if isinstance(value, Packed):
        return value.features
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.dim() > 4:
        raise ValueError(f"{list(value.shape)} does not broadcast with {tuple(to.shape)}")
    shaped = value.reshape(*(1,) * (4 - value.dim()), *value.shape)
    if to._channels_last:
        shaped = shaped.permute(0, 3, 1, 2)
    batch, channels, height, width = Packed(to.features, to.mask).shape
    fits = shaped.shape[0] in (1, batch) and (shaped.shape[1] in (1, channels) or channels == 1)
    if fits and shaped.shape[2:] == (1, 1):
        rows = shaped.flatten(1).unsqueeze(1)  # [B or 1, 1, C or 1]
        return rows if len(rows) == 1 else pooling.spread_to_blocks(rows, to.mask)
    if fits and shaped.shape[2:] == (height, width):
        return ops.gather_visible(shaped.expand(batch, -1, -1, -1), to.mask)
    raise ValueError(f"{list(value.shape)} does not broadcast with {tuple(to.shape)}")
