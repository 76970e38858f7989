"""`MapLike`: what a class needs to be taken for a map `[B, C, H, W]` by PyTorch's functions."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    absent: ClassVar[str] = "packed features do not have it"

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
            raise _named(NotImplementedError, func, cls.absent)
        try:
            return handler(func, *args, **(kwargs or {}))
        except (NotImplementedError, TypeError, ValueError) as error:
            if type(error) not in (NotImplementedError, TypeError, ValueError):
                raise
            raise _named(type(error), func, str(error)) from error

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


@dataclass(frozen=True)
class Refusal:
    """Why an operation is not there: `str` names it, the module that asks for it and the reason."""

    operation: str
    where: str  # " in Conv2d._conv_forward", or nothing
    path: str  # of the module in its network, "layer3.0.conv2", or nothing
    why: str

    def __str__(self) -> str:
        path = f" (module {self.path})" if self.path else ""
        return f"{self.operation}{self.where}: {self.why}{path}"


def _named(kind: type[Exception], func: Callable, why: str) -> Exception:
    """The error of an operation that packed features do not have, or not with such arguments."""
    where = path = ""
    modules: list[nn.Module] = []  # the innermost first
    for frame in inspect.stack(0)[2:]:
        owner = frame.frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            if not modules:
                where = f" in {type(owner).__name__}.{frame.function}"
            modules.append(owner)
    for root in reversed(modules):  # the outermost may hold a copy of what runs
        found = [name for name, module in root.named_modules() if module is modules[0]]
        if found and type(root).__name__ != "SparseModel":
            path = found[0]
            break
    refusal = Refusal(getattr(func, "__name__", str(func)), where, path, why)
    error = kind(f"{refusal}; packed.dense() gives the dense map, packed.features the values")
    error.refusal = refusal  # type: ignore[attr-defined]
    return error
