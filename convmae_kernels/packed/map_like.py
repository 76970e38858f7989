"""`MapLike`: what a class needs to be taken for a map `[B, C, H, W]` by PyTorch's functions."""

from __future__ import annotations

import functools
import inspect
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Names of functions and methods, with and without a trailing underscore; operators without theirs.
ELEMENTWISE = (
    "abs absolute acos acosh add addcdiv addcmul airy_ai alpha_dropout angle arccos arccosh "
    "arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh bernoulli bessel_j0 "
    "bessel_j1 bessel_y0 bessel_y1 bfloat16 bitwise_and bitwise_left_shift bitwise_not bitwise_or "
    "bitwise_right_shift bitwise_xor bool ceil celu chebyshev_polynomial_t chebyshev_polynomial_u "
    "chebyshev_polynomial_v chebyshev_polynomial_w clamp clamp_max clamp_min clip clone conj "
    "conj_physical contiguous copy copysign cos cosh deg2rad detach digamma div divide double "
    "dropout elu entr eq erf erfc erfcx erfinv exp exp2 expit expm1 fill fix float float_power "
    "floor floor_divide fmax fmin fmod frac gammainc gammaincc gammaln ge gelu greater "
    "greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside "
    "hermite_polynomial_h hermite_polynomial_he hypot i0 i0e i1 i1e igamma igammac int isclose "
    "isfinite isinf isnan isneginf isposinf isreal laguerre_polynomial_l ldexp le leaky_relu "
    "legendre_polynomial_p lerp less less_equal lgamma log log10 log1p log2 log_ndtr log_sigmoid "
    "logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid long lt "
    "masked_fill maximum minimum mish modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 "
    "modified_bessel_k1 mul multigammaln multiply mvlgamma nan_to_num ndtr ndtri ne neg negative "
    "nextafter not_equal polygamma positive pow psi rad2deg real reciprocal relu relu6 remainder "
    "round rrelu rsqrt rsub scaled_modified_bessel_k0 scaled_modified_bessel_k1 selu sgn sigmoid "
    "sign signbit silu sin sinc sinh softplus softshrink softsign spherical_bessel_j0 sqrt square "
    "sub subtract tan tanh tanhshrink threshold true_divide trunc where xlog1py xlogy zero zeta"
)
FACTS = (
    "get_device is_complex is_conj is_floating_point is_inference is_signed element_size new_empty "
    "new_full new_ones new_tensor new_zeros"
)
LIKE = "empty_like full_like ones_like rand_like randn_like zeros_like"  # new values for a map
OPERATORS = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow neg abs eq "
    "ne lt le gt ge floordiv rfloordiv ifloordiv mod rmod imod and rand iand or ror ior xor rxor "
    "ixor invert"
)
OTHER_OPERATORS = "getitem setitem matmul"
ABSENT_OPERATORS = "bool rmatmul"  # of tensors: there to say so
ATTENTION = "attention looks at all positions of an image or of a window of the dense map"
MIXES = "it mixes positions or images in a way that a grid of blocks cannot express"
REFUSALS = (  # why functions are refused, for the commonest ones
    (
        "scaled_dot_product_attention multi_head_attention_forward unfold fold baddbmm __rmatmul__ "
        "einsum tensordot mm",
        ATTENTION,
    ),
    ("grid_sample affine_grid gather scatter masked_select nonzero take_along_dim", MIXES),
    ("rot90 fliplr flipud diagonal tril triu median kthvalue quantile", MIXES),
    ("conv1d conv3d conv_transpose1d conv_transpose3d", "convolutions are of [B, C, H, W]"),
)


class Extreme(NamedTuple):
    """What `max(dim)`, `sort` and `topk` return: two maps."""

    values: Any
    indices: Any


def read_variance(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, float, bool]:
    """`dim`, `correction` and `keepdim` of `var(unbiased)`, `var(dim, unbiased, keepdim)`, ..."""
    options = dict(kwargs)
    values = list(args)
    dim = options.pop("dim", None)
    if values and not isinstance(values[0], bool):
        dim = values.pop(0)
    unbiased = values.pop(0) if values else options.pop("unbiased", True)
    keepdim = values.pop(0) if values else options.pop("keepdim", False)
    correction = options.pop("correction", None)
    return dim, float(unbiased) if correction is None else float(correction), keepdim


def handles(table: dict[Callable | str, Callable], *functions: Callable | str) -> Callable:
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

    handlers: ClassVar[dict[Callable | str, Callable]]
    absent: ClassVar[str] = "packed features do not have it"
    axes: str  # one letter for each dimension; see `convmae_kernels.packed.axes`

    @property
    def shape(self) -> torch.Size:
        """Of the dense map."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: object, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        # Operators by name: `torch.compile` does not find those that are written in Python.
        handler = cls.handlers.get(getattr(func, "__name__", "")) or cls.handlers.get(func)
        if handler is None:
            raise _named(NotImplementedError, func, _refusal(cls, func))
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
        """4, of a map `[B, C, H, W]`."""
        return len(self.axes)

    def dim(self) -> int:
        """4, of a map `[B, C, H, W]`."""
        return len(self.axes)

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


for _name in f"{OPERATORS} {OTHER_OPERATORS} {ABSENT_OPERATORS}".split():
    if hasattr(Tensor, f"__{_name}__"):
        setattr(MapLike, f"__{_name}__", _operator(getattr(Tensor, f"__{_name}__")))


def _refusal(cls: type[MapLike], func: Callable) -> str:
    """Why there is no handler."""
    name = getattr(func, "__name__", "")
    reasons = [why for names, why in REFUSALS if name in names.split()]
    return ": ".join([cls.absent, *reasons])


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


def run_named(model: nn.Module, *args: Any) -> Any:
    """`model(*args)`, whose own errors without a message get one.

    Raises:
        NotImplementedError: an assertion, or another error without a message, of a module of the
            model; names the module and the line.
    """
    try:
        return model(*args)
    except Exception as error:
        if str(error).strip():
            raise
        where = type(model).__name__
        line: Any = "?"
        for frame in traceback.walk_tb(error.__traceback__):
            owner = frame[0].f_locals.get("self")
            if isinstance(owner, nn.Module):
                name = frame[0].f_code.co_name
                where = f"{type(owner).__name__}.{name}"
                summary = traceback.FrameSummary(frame[0].f_code.co_filename, frame[1], name)
                line = summary.line or f"line {frame[1]}"
        raise NotImplementedError(
            f"{where}: {type(error).__name__} at `{line}`: the module asks for something that "
            "this map, or packed features, do not have, such as the windows of a dense map of "
            "another size"
        ) from error
