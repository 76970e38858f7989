"""`MaskedDense`: the dense twin of `Packed`, which computes hidden positions and masks them."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.ops import gather_visible, scatter_visible
from convmae_kernels.ops.support.arithmetic import multiply
from convmae_kernels.packed.axes import NCHW, order_of
from convmae_kernels.packed.map_like import ELEMENTWISE, FACTS, LIKE, OPERATORS, MapLike, handles

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.block_mask import BlockMask

RANDOM = (
    "alpha_dropout bernoulli dropout rand_like randn_like rrelu alpha_dropout_ bernoulli_ dropout_ "
    "rrelu_"
)
# Nothing that is finite makes them or their gradients infinite, so hidden values may be anything.
SMOOTH = (
    "abs add sub mul neg relu relu6 gelu silu mish sigmoid tanh hardswish hardsigmoid hardtanh "
    "leaky_relu elu celu selu clamp clamp_min clamp_max contiguous clone detach float double half "
    "bfloat16 square lerp addcmul masked_fill where eq ne lt le gt ge softplus softsign"
)
HARMLESS = 0.5  # in place of hidden values, where a function is singular


class MaskedDense(MapLike):
    """A dense map whose hidden positions count as zero, or not at all, whenever they are looked at.

    It computes what `Packed` computes, and hidden positions besides: the oracle of
    `check_equivalence`, and what skipping is compared with in the benchmarks. Plain PyTorch.
    """

    handlers: ClassVar[dict[Callable | str, Callable]] = {}

    def __init__(self, values: Tensor, mask: BlockMask, axes: str = NCHW) -> None:
        self.values = values
        self.mask = mask
        self.axes = axes
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
    def is_cuda(self) -> bool:
        """Whether the map is on a CUDA GPU."""
        return self.values.is_cuda

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the map."""
        return self.values.requires_grad

    def is_floating_point(self) -> bool:
        """Whether its values are."""
        return self.values.is_floating_point()

    def like(self, values: Tensor, axes: str | None = None) -> MaskedDense:
        """Another map of the same mask, with the same axes or others."""
        other = MaskedDense(values, self.mask, axes or self.axes)
        other._visible = self._visible
        return other

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        (gh, gw), shape = self.mask.grid, self.values.shape
        if "N" in self.axes:
            side = math.isqrt(shape[self.axes.index("N")] // (gh * gw))
        else:
            side = shape[self.axes.index("H")] // gh
        return gh * side, gw * side

    def nchw(self) -> Tensor:
        """`[B, C, H, W]`, all channels in one dimension."""
        if self.axes == NCHW:
            return self.values
        positions = "N" if "N" in self.axes else "HW"
        channels = self.axes.count("C")
        x = self.values.permute(order_of(self.axes, "B" + "C" * channels + positions))
        x = x.unflatten(-1, self.positions) if positions == "N" else x
        return x.flatten(1, channels) if channels else x.unsqueeze(1)

    def arranged(self, nchw: Tensor) -> Tensor:
        """The inverse of `nchw`, for values of the same channels."""
        if self.axes == NCHW:
            return nchw
        channels = [size for size, axis in zip(self.shape, self.axes) if axis == "C"]
        x = nchw.unflatten(1, channels) if channels else nchw.squeeze(1)
        x = x.flatten(-2) if "N" in self.axes else x
        letters = "B" + "C" * len(channels) + ("N" if "N" in self.axes else "HW")
        return x.permute(order_of(letters, self.axes))

    def visible(self) -> Tensor:
        """The mask of this map, with its dimensions, channels of size 1: bool `[B, 1, H, W]`."""
        side = self.positions[0] // self.mask.grid[0]
        if side not in self._visible:
            self._visible[side] = self.mask.to_dense(side)
        mask = self._visible[side]
        if self.axes == NCHW:
            return mask
        mask = mask[:, 0].flatten(1) if "N" in self.axes else mask[:, 0]
        mask = mask.permute(
            order_of("BN" if "N" in self.axes else "BHW", self.axes.replace("C", ""))
        )
        return mask[tuple(None if axis == "C" else slice(None) for axis in self.axes)]

    def masked(self, hidden: float = 0.0) -> Tensor:
        """The map with `hidden` at hidden positions."""
        filled = torch.where(self.visible(), self.values, hidden)
        return filled if self.dtype.is_floating_point else filled.to(self.dtype)

    def cleared(self) -> MaskedDense:
        """Zero at hidden positions, where a NaN or an infinity would spoil the gradients."""
        return self.like(self.masked())


_handles = partial(handles, MaskedDense.handlers)


def plain(value: Any, hidden: float | None = None) -> Any:
    """The values of a map, with `hidden` in place of what is hidden; anything else as it is."""
    if not isinstance(value, MaskedDense):
        return value
    if hidden is None or not value.dtype.is_floating_point:
        return value.values
    return value.masked(hidden)


def _positionwise(func: Callable, *args: Any, **kwargs: Any) -> MaskedDense:
    """Of functions that do not mix positions, and are smooth."""
    first = next(x for x in [*args, *kwargs.values()] if isinstance(x, MaskedDense))
    options = {k: plain(x) for k, x in kwargs.items()}
    return first.like(func(*map(plain, args), **options))


def _singular(func: Callable, *args: Any, **kwargs: Any) -> MaskedDense:
    """Of functions that have singularities, where hidden values must not come to lie."""
    first = next(x for x in [*args, *kwargs.values()] if isinstance(x, MaskedDense))
    options = {k: plain(x, HARMLESS) for k, x in kwargs.items()}
    name = func.__name__
    in_place = (name.endswith("_") and not name.endswith("__")) or func in _IN_PLACE_OPERATORS
    target = args[0].values if in_place or kwargs.get("inplace") else None
    arguments = [plain(x, HARMLESS) for x in args]
    y = first.like(func(*arguments, **options))
    y = y.cleared() if y.dtype.is_floating_point else y
    if target is None:
        return y
    return first.like(target.copy_(y.values))


_IN_PLACE_OPERATORS = {
    getattr(Tensor, f"__{name}__")
    for name in OPERATORS.split()
    if name[0] == "i" and name != "invert" and hasattr(Tensor, f"__{name}__")
}
for _space in (torch, Tensor, F, torch._C._nn, torch.special):
    for _name in ELEMENTWISE.split():
        for _variant in (_name, _name + "_"):
            if callable(getattr(_space, _variant, None)):
                _kind = _positionwise if _name in SMOOTH.split() else _singular
                MaskedDense.handlers[getattr(_space, _variant)] = _kind
for _name in OPERATORS.split():
    if hasattr(Tensor, f"__{_name}__"):
        _kind = _positionwise if _name.lstrip("ri") in SMOOTH.split() else _singular
        _function = getattr(Tensor, f"__{_name}__")
        _handles(_function, _function.__name__)(_kind)
_handles(F.layer_norm, torch.layer_norm)(_positionwise)
_handles(F.rms_norm, torch.rms_norm)(_singular)
_handles(*(getattr(torch, name) for name in LIKE.split()))(_positionwise)


@_handles(F.linear, torch._C._nn.linear)
def _linear(func, input, weight, bias=None):
    return input.like(multiply(F.linear, input.values, weight, bias))


@_handles(Tensor.to, Tensor.type, Tensor.type_as)
def _cast(func, input, *args, **kwargs):
    others = [plain(x) for x in args]
    if not isinstance(input, MaskedDense):
        return func(input, *others, **kwargs)
    values = func(input.values, *others, **kwargs)
    return input.like(values) if isinstance(values, Tensor) else values


@_handles(*(getattr(x, n) for n in RANDOM.split() for x in (torch, Tensor, F) if hasattr(x, n)))
def _random(func, input, *args, **kwargs):
    """Draws numbers for visible positions only, those that packed features draw."""
    packed = gather_visible(input.nchw(), input.mask)
    values = input.arranged(scatter_visible(func(packed, *args, **kwargs), input.mask).clone())
    if kwargs.get("inplace") or func.__name__.endswith("_"):
        values = input.values.copy_(values)
    return input.like(values)


@_handles(F.batch_norm)
def _batch_norm(func, input, *args, **kwargs):
    visible = input.visible()[:, 0]
    rows = input.values.movedim(1, -1)  # [B, H, W, C] or [B, N, C]
    y = torch.zeros_like(rows)
    y[visible] = func(rows[visible], *args, **kwargs)
    return input.like(y.movedim(-1, 1))


@_handles(F.group_norm, torch.group_norm)
def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5, *_):
    visible = input.visible().unsqueeze(1)
    x = input.values.unflatten(1, (num_groups, -1))  # [B, groups, C / groups, H, W]
    dims = tuple(range(2, x.dim()))
    number = visible.sum(dims, keepdim=True) * x.shape[2]
    mean = torch.where(visible, x, 0).sum(dims, keepdim=True) / number
    squares = torch.where(visible, (x - mean).square(), 0).sum(dims, keepdim=True)
    y = ((x - mean) / (squares / number + eps).sqrt()).flatten(1, 2)
    channels = (-1, *(1,) * (y.dim() - 2))
    y = y if weight is None else y * weight.view(channels)
    return input.like(y if bias is None else y + bias.view(channels))


@_handles(F.instance_norm, torch.instance_norm)
def _instance_norm(func, input, running_mean=None, running_var=None, weight=None, bias=None,
                   use_input_stats=True, momentum=0.1, eps=1e-5, *_):  # fmt: skip
    """Image by image, the visible positions of each in a row."""
    visible = input.visible()[:, 0]
    rows = input.values.movedim(1, -1)
    y, means, variances = torch.zeros_like(rows), [], []
    for image in range(len(rows)):
        if not bool(visible[image].any()):
            continue
        x = rows[image][visible[image]].T[None]  # [1, C, n]
        mean, variance = running_mean, running_var
        if use_input_stats:
            mean, variance = x.mean((0, 2)), x.var((0, 2), correction=0)
            means.append(mean.detach())
            variances.append(x.detach().var((0, 2), correction=min(1, x.shape[2] - 1)))
        x = (x[0].T - mean) / (variance + eps).sqrt()
        x = x if weight is None else x * weight
        y[image][visible[image]] = x if bias is None else x + bias
    if means and running_mean is not None:
        running_mean.lerp_(torch.stack(means).mean(0), momentum)
        running_var.lerp_(torch.stack(variances).mean(0), momentum)
    return input.like(y.movedim(-1, 1))


def highest(maximum: Tensor, seen: Tensor) -> Tensor:
    """A maximum of visible positions, 0 where none was `seen`."""
    return torch.where(seen > 0, maximum, 0)


for _name in FACTS.split():
    for _space in (torch, Tensor):
        if hasattr(_space, _name):
            _handles(getattr(_space, _name))(lambda func, x, *a, **k: func(x.values, *a, **k))
