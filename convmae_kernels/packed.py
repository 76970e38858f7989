"""`Packed`: features of visible blocks that flow through ordinary modules like an NCHW tensor."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmae_kernels import ops
from convmae_kernels.ops import pooling
from convmae_kernels.ops.checks import check_packed
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from convmae_kernels.block_mask import BlockMask

# Names of functions and methods, with and without a trailing underscore; operators without theirs.
ELEMENTWISE = (
    "abs absolute add addcdiv addcmul bernoulli bfloat16 celu clamp clamp_max clamp_min clip "
    "clone contiguous cos detach div divide double dropout elu eq erf exp expm1 fill float "
    "float_power ge gelu gt half hardshrink hardsigmoid hardswish hardtanh isfinite isinf "
    "isnan le leaky_relu lerp log log1p log_sigmoid logsigmoid lt masked_fill maximum minimum "
    "mish mul multiply nan_to_num ne neg negative pow reciprocal relu relu6 round rsqrt rsub "
    "selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tanh "
    "tanhshrink threshold true_divide where"
)
OPERATORS = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow neg abs eq "
    "ne lt le gt ge"
)
ABSENT_OPERATORS = (  # of tensors: there to say so
    "getitem setitem bool matmul rmatmul floordiv rfloordiv mod rmod and or xor invert"
)

HANDLERS: dict[Callable, Callable] = {}  # of Packed: function -> handler(function, *arguments)


def handles(table: dict[Callable, Callable], *functions: Callable) -> Callable:
    """Decorates a handler of `functions`, and enters it into their table."""

    def add(handler: Callable) -> Callable:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return add


class MapLike:
    """What functions and modules take for a map `[B, C, H, W]`, by torch's override protocol.

    A subclass has a `shape` and a table of `handlers`; a call of anything else is an error that
    names the operation and the module.
    """

    handlers: ClassVar[dict[Callable, Callable]]

    @property
    def shape(self) -> torch.Size:
        """Of the dense map."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        handler = cls.handlers.get(func)
        if handler is None:
            raise NotImplementedError(_named(func, "packed features do not have it"))
        try:
            return handler(func, *args, **(kwargs or {}))
        except (NotImplementedError, TypeError, ValueError) as error:
            if type(error) not in (NotImplementedError, TypeError, ValueError):
                raise
            raise type(error)(_named(func, str(error))) from error

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None)
        if name.startswith("_") or not callable(method):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return functools.partial(_call_method, self, method)

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def dim(self) -> int:
        """4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """Of the dense map."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Of the dense map."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    __hash__ = object.__hash__


def _call_method(self: MapLike, method: Callable, *args: Any, **kwargs: Any) -> Any:
    return type(self).__torch_function__(method, (type(self),), (self, *args), kwargs)


def _operator(method: Callable) -> Callable:
    def operator(self: MapLike, *others: Any) -> Any:
        return _call_method(self, method, *others)

    return operator


for _name in f"{OPERATORS} {ABSENT_OPERATORS}".split():
    setattr(MapLike, f"__{_name}__", _operator(getattr(Tensor, f"__{_name}__")))


def _named(func: Callable, why: str) -> str:
    """The message for an operation that packed features do not have, or not with such arguments.

    It names the operation and the module that asks for it.
    """
    where = ""
    for frame in inspect.stack()[2:]:
        owner = frame.frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            where = f" in {type(owner).__name__}.{frame.function}"
            break
    name = getattr(func, "__name__", str(func))
    return f"{name}{where}: {why}; packed.dense() gives the dense map, packed.features the values"


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

    def __repr__(self) -> str:
        return f"Packed(shape={tuple(self.shape)}, dtype={self.dtype}, mask={self.mask!r})"


def _unflatten(leaves: Iterable[Any], channels_last: bool) -> Packed:
    packed = object.__new__(Packed)  # leaves may be anything: nothing is checked
    packed.features, packed.mask = leaves
    packed._channels_last = channels_last
    return packed


pytree.register_pytree_node(
    Packed,
    lambda packed: ([packed.features, packed.mask], packed._channels_last),
    _unflatten,
    serialized_type_name="convmae_kernels.Packed",
)


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
        return rows if len(rows) == 1 else pooling.of_images(rows, to.mask)
    if fits and shaped.shape[2:] == (height, width):
        return ops.gather_visible(shaped.expand(batch, -1, -1, -1), to.mask)
    raise ValueError(f"{list(value.shape)} does not broadcast with {tuple(to.shape)}")
