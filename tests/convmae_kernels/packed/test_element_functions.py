"""Every element-wise function of PyTorch that packed features have, against dense maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.packed import HANDLERS, MaskedDense
from convmae_kernels.packed.map_like import ELEMENTWISE, LIKE, OPERATORS
from convmae_kernels.packed.masked_dense import RANDOM
from tests.support.packed_maps import B, C, H, W, check_like_dense, make_map, pack

SPACES = {"torch": torch, "Tensor": Tensor, "F": F, "_nn": torch._C._nn, "special": torch.special}
BINARY = (
    "add arctan2 atan2 copysign div divide eq float_power floor_divide fmax fmin fmod gammainc "
    "gammaincc ge greater greater_equal gt heaviside hypot igamma igammac isclose ldexp le less "
    "less_equal logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul "
    "multiply ne nextafter not_equal pow remainder rsub sub subtract true_divide xlog1py xlogy zeta"
)
INTEGERS = "bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift"
POLYNOMIALS = (
    *(f"chebyshev_polynomial_{x}" for x in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he"),
    *("laguerre_polynomial_l", "legendre_polynomial_p"),
)
CONSTANT = torch.tensor(0.3, dtype=torch.float64)
ARGUMENTS = {  # behind the map, or in place of the map alone
    **dict.fromkeys(BINARY.split(), lambda x: (x, 1.25 - x)),
    **dict.fromkeys(INTEGERS.split(), lambda x: ((8 * x).long(), (4 * x).long())),
    "bitwise_not": lambda x: ((8 * x).long(),),
    **dict.fromkeys(POLYNOMIALS, lambda x: (x.detach(), torch.tensor(2.0).double())),
    **dict.fromkeys(("acosh", "arccosh"), lambda x: (x + 1.5,)),
    **dict.fromkeys(("addcdiv", "addcmul"), lambda x: (x, x + 1, x + 2)),
    **dict.fromkeys(("clamp", "clip", "hardtanh"), lambda x: (x, 0.2, 0.7)),
    "clamp_max": lambda x: (x, 0.5),
    "clamp_min": lambda x: (x, 0.5),
    "copy": lambda x: (x, x + 1),
    **dict.fromkeys(("fill", "fill_"), lambda x: (x, 2.0)),
    "lerp": lambda x: (x, x + 1, 0.3),
    "masked_fill": lambda x: (x, x > 0.5, 2.0),
    **dict.fromkeys(("multigammaln", "mvlgamma"), lambda x: (x + 2, 2)),
    "threshold": lambda x: (x, 0.5, 0.1),
    "where": lambda x: (x > 0.5, x, 1 - x),
    "zeta": lambda x: (x + 1.5, x + 1),
    **dict.fromkeys(("fix", "trunc", "ceil", "floor", "round", "frac"), lambda x: (3 * x + 0.1,)),
    "dropout": lambda x: (x, 0.0, True),
    "alpha_dropout": lambda x: (x, 0.5, False),
    "rrelu": lambda x: (x - 0.5,),
    "bernoulli": lambda x: ((x > 0.5).double(),),
    "nan_to_num": lambda x: (torch.log(x.detach() - 0.5), 0.1),
}
NO_GRADIENT = {  # of one of their operands, of themselves, or in place
    *("acosh_", "arccosh_", "arcsinh_", "arctanh_", "asinh_", "atanh_", "floor_divide"),
    *("gammainc", "gammaincc", "igamma", "igammac", "nextafter", "zeta", "heaviside", "bernoulli"),
    *(n for n in ELEMENTWISE.split() if "bessel" in n or n in ("airy_ai", "bernoulli")),
}


def call(space, name):
    """A function of a map in (0, 1), as a call of the function `name` of a part of PyTorch."""
    plain_name = name.rstrip("_")

    def of(x):
        x = torch.sigmoid(x)
        x = x.detach() if {name, plain_name} & NO_GRADIENT else x
        arguments = ARGUMENTS.get(plain_name, lambda x: (x,))(x)
        if plain_name in ("polygamma", "where") and space == "Tensor":
            arguments = (*arguments[1::-1], *arguments[2:]) if plain_name == "where" else arguments
        if plain_name == "polygamma":
            arguments = (arguments[0], 1) if space == "Tensor" else (1, arguments[0])
        if name.endswith("_"):
            arguments = (arguments[0].clone(), *arguments[1:])
        method = space == "Tensor"
        first = arguments[0]
        y = (
            getattr(first, name)(*arguments[1:])
            if method
            else getattr(SPACES[space], name)(*arguments)
        )
        return y.real if isinstance(y, Tensor) and y.is_complex() else y

    return of


FOUND = [
    (space, variant)
    for name in ELEMENTWISE.split()
    for variant in (name, name + "_")
    for space in SPACES
    if callable(getattr(SPACES[space], variant, None)) and variant not in ("bernoulli_",)
]


def test_every_element_wise_function():
    """In one test: there are some 600 of them. Methods are of `[B, H, W, C]`."""
    assert len(FOUND) > 500
    wrong = {}
    for space, name in FOUND:
        try:
            check_like_dense(call(space, name), last=space == "Tensor")
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            wrong[f"{space}.{name}"] = f"{type(error).__name__}: {error}"[:120].splitlines()
    assert not wrong


def test_every_operator():
    wrong = {}
    for name in OPERATORS.split():
        if not hasattr(Tensor, f"__{name}__"):
            continue

        def function(x, name=name):
            x = torch.sigmoid(x) + 0.1
            if "floordiv" in name or name == "rmod":  # which have no gradients
                x = x.detach()
            if name.lstrip("ri") in ("and", "or", "xor", "nvert", ""):
                x = (8 * x).long()
            other = () if name in ("neg", "abs", "invert") else (x + 1,)
            if name in ("rand", "ror", "rxor", "rpow", "rmod", "rfloordiv"):
                other = (3,)
            return getattr(x.clone(), f"__{name}__")(*other)

        try:
            check_like_dense(function)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:120].splitlines()
    assert not wrong


def test_new_values_like_a_map():
    x = pack(make_map())
    assert {getattr(torch, name) for name in LIKE.split()} < set(HANDLERS)
    assert torch.equal(torch.ones_like(x).features, torch.ones_like(x.features))
    assert torch.zeros_like(x, dtype=torch.float32).dtype == torch.float32
    assert float(torch.full_like(x, 3.0).sum()) == 3.0 * x.features.numel()
    assert torch.rand_like(x).shape == torch.randn_like(x).shape == (B, C, H, W)


def test_random_functions_draw_for_visible_positions():
    """Packed features and their dense twin draw the same numbers."""
    images = make_map()
    for function in (
        lambda x: torch.rand_like(x) + x,
        lambda x: torch.randn_like(x) * x,
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.rrelu(x, training=True),
        lambda x: torch.bernoulli(torch.sigmoid(x)),
    ):
        torch.manual_seed(0)
        x = function(pack(images))
        torch.manual_seed(0)
        twin = function(MaskedDense(images, x.mask))
        assert torch.equal(twin.masked(), x.dense())
    assert {name.rstrip("_") for name in RANDOM.split()} < {*ELEMENTWISE.split(), *LIKE.split()}


def test_facts():
    x = pack(make_map())
    assert torch.is_floating_point(x)
    assert not torch.is_complex(x)
    assert x.element_size() == 8
    assert not (x > 0).is_floating_point()
    assert bool(torch.isfinite(x).all())
    assert not bool(torch.any(x > 1e9))
