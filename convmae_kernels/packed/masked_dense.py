"""`MaskedDense`: the dense twin of `Packed`, which computes hidden positions and masks them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.ops import gather_visible, scatter_visible
from convmae_kernels.ops.support.arithmetic import multiply
from convmae_kernels.packed.map_like import ELEMENTWISE, OPERATORS, MapLike, handles

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.block_mask import BlockMask

RANDOM = ("bernoulli", "bernoulli_", "dropout", "dropout_")


class MaskedDense(MapLike):
    """A dense map whose hidden positions count as zero, or not at all, whenever they are looked at.

    It computes what `Packed` computes, and hidden positions besides: the oracle of
    `check_equivalence`, and what skipping is compared with in the benchmarks. Plain PyTorch.
    """

    handlers: ClassVar[dict[Callable, Callable]] = {}

    def __init__(self, values: Tensor, mask: BlockMask, channels_last: bool = False) -> None:
        self.values = values
        self.mask = mask
        self._channels_last = channels_last
        self._visible: dict[int, Tensor] = {}

    @property
    def shape(self) -> torch.Size:
        """Of the map."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the map."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the map."""
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the map."""
        return self.values.requires_grad

    def like(self, values: Tensor, channels_last: bool | None = None) -> MaskedDense:
        """Another map of the same mask."""
        layout = self._channels_last if channels_last is None else channels_last
        other = MaskedDense(values, self.mask, layout)
        other._visible = self._visible
        return other

    def nchw(self) -> Tensor:
        """`[B, C, H, W]`."""
        return self.values.permute(0, 3, 1, 2) if self._channels_last else self.values

    def visible(self) -> Tensor:
        """The mask of this map: bool `[B, 1, H, W]`, or `[B, H, W, 1]`."""
        side = self.nchw().shape[2] // self.mask.grid[0]
        if side not in self._visible:
            self._visible[side] = self.mask.to_dense(side)
        mask = self._visible[side]
        return mask.permute(0, 2, 3, 1) if self._channels_last else mask

    def masked(self, hidden: float = 0.0) -> Tensor:
        """The map with `hidden` at hidden positions."""
        return torch.where(self.visible(), self.values, hidden)

    def cleared(self) -> MaskedDense:
        """Zero at hidden positions, where a NaN or an infinity would spoil the gradients."""
        return self.like(self.masked())

    @property
    def positions(self) -> tuple[int, int]:
        """The axes of rows and columns."""
        return (1, 2) if self._channels_last else (2, 3)


_handles = partial(handles, MaskedDense.handlers)


def _positionwise(func: Callable, *args: Any, **kwargs: Any) -> MaskedDense:
    """Of functions that do not mix positions."""
    first = next(x for x in [*args, *kwargs.values()] if isinstance(x, MaskedDense))
    plain = [x.values if isinstance(x, MaskedDense) else x for x in args]
    options = {k: x.values if isinstance(x, MaskedDense) else x for k, x in kwargs.items()}
    return first.like(func(*plain, **options))


for _space in (torch, Tensor, F, torch._C._nn):
    for _name in ELEMENTWISE.split():
        for _variant in (_name, _name + "_"):
            if callable(getattr(_space, _variant, None)):
                MaskedDense.handlers[getattr(_space, _variant)] = _positionwise
for _name in OPERATORS.split():
    MaskedDense.handlers[getattr(Tensor, f"__{_name}__")] = _positionwise
_handles(F.layer_norm, torch.layer_norm)(_positionwise)


@_handles(F.linear, torch._C._nn.linear)
def _linear(func, input, weight, bias=None):
    return input.like(multiply(F.linear, input.values, weight, bias))


@_handles(Tensor.to, Tensor.type, Tensor.type_as)
def _cast(func, input, *args, **kwargs):
    plain = [x.values if isinstance(x, MaskedDense) else x for x in args]
    if not isinstance(input, MaskedDense):
        return func(input, *plain, **kwargs)
    values = func(input.values, *plain, **kwargs)
    return input.like(values) if isinstance(values, Tensor) else values


@_handles(*(getattr(x, n) for n in RANDOM for x in (torch, Tensor, F) if hasattr(x, n)))
def _random(func, input, *args, **kwargs):
    """Draws numbers for visible positions only, those that packed features draw."""
    packed = gather_visible(input.nchw(), input.mask)
    values = scatter_visible(func(packed, *args, **kwargs), input.mask).clone()
    values = values.permute(0, 2, 3, 1) if input._channels_last else values
    if kwargs.get("inplace") or func.__name__.endswith("_"):
        values = input.values.copy_(values)
    return input.like(values)


@_handles(F.batch_norm)
def _batch_norm(func, input, *args, **kwargs):
    visible = input.visible()[:, 0]
    rows = input.values.permute(0, 2, 3, 1)
    y = torch.zeros_like(rows)
    y[visible] = func(rows[visible], *args, **kwargs)
    return input.like(y.permute(0, 3, 1, 2))


@_handles(F.group_norm, torch.group_norm)
def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5, *_):
    visible = input.visible().unsqueeze(1)
    x = input.values.unflatten(1, (num_groups, -1))  # [B, groups, C / groups, H, W]
    number = visible.sum((2, 3, 4), keepdim=True) * x.shape[2]
    mean = torch.where(visible, x, 0).sum((2, 3, 4), keepdim=True) / number
    squares = torch.where(visible, (x - mean).square(), 0).sum((2, 3, 4), keepdim=True)
    y = ((x - mean) / (squares / number + eps).sqrt()).flatten(1, 2)
    y = y if weight is None else y * weight[:, None, None]
    return input.like(y if bias is None else y + bias[:, None, None])


@_handles(torch.mean, Tensor.mean)
def _mean(func, input, dim=None, keepdim=False, *, dtype=None):
    input = input if dtype is None else input.to(dtype)
    if dim is not None and not _over_positions(input, dim):
        return input.like(input.values.mean(dim, keepdim))
    dim = tuple(range(4)) if dim is None else tuple(dim)
    number = input.visible().expand_as(input.values).sum(dim, keepdim)
    return input.masked().sum(dim, keepdim) / number.clamp_min(1)


@_handles(torch.sum, Tensor.sum)
def _sum(func, input, dim=None, keepdim=False, *, dtype=None):
    input = input if dtype is None else input.to(dtype)
    if dim is not None and not _over_positions(input, dim):
        return input.like(input.values.sum(dim, keepdim))
    return input.masked().sum(dim, keepdim)


@_handles(torch.amax, Tensor.amax)
def _amax(func, input, dim=None, keepdim=False):
    if dim is not None and not _over_positions(input, dim):
        return input.like(input.values.amax(dim, keepdim))
    dim = tuple(range(4)) if dim is None else tuple(dim)
    seen = input.visible().to(input.dtype).amax(dim, keepdim)
    return highest(input.masked(float("-inf")).amax(dim, keepdim), seen)


def highest(maximum: Tensor, seen: Tensor) -> Tensor:
    """A maximum of visible positions, 0 where none was `seen`."""
    return torch.where(seen > 0, maximum, 0)


@_handles(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def _norm(func, input, *args, **kwargs):
    dim = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
    if dim is not None and not _over_positions(input, dim):
        return input.like(func(input.values, *args, **kwargs))
    return func(input.masked(), *args, **kwargs)


def _over_positions(x: MaskedDense, dim: Any) -> bool:
    return not isinstance(dim, int) and {d % 4 for d in dim} == {*x.positions}


@_handles(torch.permute, Tensor.permute)
def _permute(func, input, *dims, **named):
    dims = (*dims, *named.values())
    order = [d % 4 for d in (dims[0] if len(dims) == 1 else dims)]
    turned = order != [0, 1, 2, 3]
    return input.like(input.values.permute(order), input._channels_last ^ turned)


@_handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func, tensors, dim=0):
    return tensors[0].like(torch.cat([x.values for x in tensors], dim))


@_handles(torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.tensor_split)
def _chunk(func, input, *args, **kwargs):
    return tuple(input.like(part) for part in func(input.values, *args, **kwargs))


for _name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
    _handles(getattr(Tensor, _name))(lambda func, input, *a, **k: func(input.values, *a, **k))
