"""`Packed` in functions, methods and operators that work element by element, against dense maps."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import convmae_kernels as ck
from convmae_kernels import Packed
from convmae_kernels.testing import make_mask, random_tensor
from tests.support.packed_maps import (
    MASK,
    B,
    C,
    H,
    W,
    assert_same,
    both_layouts,
    hide,
    make_map,
    pack,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# -- facts --------------------------------------------------------------------------------------


@both_layouts
def test_looks_like_a_map(last):
    images = make_map(dtype=torch.float32).requires_grad_()
    x = pack(images, last)
    shape = (B, H, W, C) if last else (B, C, H, W)
    assert x.shape == torch.Size(shape)
    assert isinstance(x.shape, torch.Size)
    assert x.size() == x.shape
    assert [x.size(d) for d in (0, 1, -1)] == [shape[0], shape[1], shape[-1]]
    assert x.dim() == x.ndim == 4
    assert len(x) == B
    assert x.numel() == images.numel()
    assert (x.dtype, x.device, x.is_cuda) == (torch.float32, images.device, False)
    assert x.is_floating_point()
    assert x.requires_grad
    assert not x.detach().requires_grad
    assert x.double().dtype == x.to(torch.float64).dtype == x.type(torch.float64).dtype
    assert x.type() == "torch.FloatTensor"
    assert not hasattr(x, "no_such_thing")
    assert not hasattr(x, "T")
    assert repr(x) == f"Packed(shape={shape}, dtype=torch.float32, mask={MASK!r})"


def test_dense_and_back():
    images = make_map()
    x = pack(images)
    assert torch.equal(x.features, ck.gather_visible(images, MASK))
    assert torch.equal(x.dense(), hide(images, 0))
    assert torch.equal(x.dense(fill=7.0), hide(images, 7))
    assert torch.equal(pack(images, last=True).dense(7.0), hide(images, 7).permute(0, 2, 3, 1))
    assert pack(images, last=True).dense().is_contiguous()
    assert torch.equal(x.like(x.features + 1).features, x.features + 1)


def test_rejects_what_is_not_packed():
    with pytest.raises(ValueError, match="features has 3 blocks, but the mask has 21 visible"):
        Packed(torch.zeros(3, 16, 6), MASK)
    with pytest.raises(TypeError, match="mask must be a BlockMask"):
        Packed(torch.zeros(3, 16, 6), None)
    with pytest.raises(TypeError, match="features must be float32"):
        Packed(torch.zeros(MASK.num_visible, 16, 6, dtype=torch.long), MASK)


@both_layouts
def test_new_tensors_are_plain(last):
    x = pack(make_map(dtype=torch.float32), last)
    for y in (x.new_zeros(2, 3), x.new_ones((2, 3)), x.new_full((2, 3), 5.0), x.new_empty(2, 3)):
        assert type(y) is torch.Tensor
        assert (y.dtype, y.shape) == (torch.float32, (2, 3))
    assert x.new_tensor([1, 2]).dtype == torch.float32


@both_layouts
def test_pytree_and_copies(last):
    x = pack(make_map(), last)
    leaves, spec = pytree.tree_flatten({"x": x})
    assert leaves[0] is x.features
    assert len(leaves) == 4
    doubled = pytree.tree_map(lambda leaf: leaf * 2 if leaf.is_floating_point() else leaf, [x])[0]
    assert torch.equal(doubled.features, x.features * 2)
    again = pytree.tree_unflatten(leaves, spec)["x"]
    copies = [again, copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))]
    for other in copies:
        assert other.shape == x.shape
        assert torch.equal(other.dense(), x.dense())
        assert torch.equal((other + x).features, 2 * x.features)


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_and_loaded(tmp_path, weights_only):
    x = pack(make_map().float(), last=True)
    torch.save([x], tmp_path / "x.pt")
    (found,) = torch.load(tmp_path / "x.pt", weights_only=weights_only)
    assert torch.equal(found.dense(), x.dense())
    assert found.shape == x.shape


def test_checkpointing():
    """Gradients are those without it, or it is refused: never lost."""
    x = random_tensor((MASK.num_visible, 16, C)).requires_grad_()
    module = torch.nn.Sequential(torch.nn.Conv2d(C, C, 3, padding=1), torch.nn.ReLU())
    packed = Packed(x, MASK)
    module(packed).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpoint(module, Packed(x, MASK), use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)
    with pytest.raises(RuntimeError, match="re-entrant checkpointing loses .*use_reentrant=False"):
        checkpoint(module, Packed(x, MASK), use_reentrant=True)
    with torch.no_grad():
        assert not module(Packed(x, MASK)).requires_grad


def test_is_not_a_tensor_and_hashes_by_identity():
    x = pack(make_map())
    assert not isinstance(x, torch.Tensor)
    assert len({x, x, x.clone()}) == 2


# -- element by element -------------------------------------------------------------------------

UNARY = {
    "relu": torch.relu,
    "F.relu": F.relu,
    "x.relu": lambda x: x.relu(),
    "abs": torch.abs,
    "-x": lambda x: -x,
    "abs(x)": abs,
    "exp": torch.exp,
    "x.exp": lambda x: x.exp(),
    "sigmoid": torch.sigmoid,
    "x.sigmoid": lambda x: x.sigmoid(),
    "tanh": torch.tanh,
    "F.gelu": F.gelu,
    "F.gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "F.silu": F.silu,
    "F.mish": F.mish,
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "F.hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "F.relu6": F.relu6,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "F.elu": F.elu,
    "F.selu": F.selu,
    "F.celu": F.celu,
    "F.softplus": F.softplus,
    "F.softsign": F.softsign,
    "F.logsigmoid": F.logsigmoid,
    "F.threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "F.hardshrink": F.hardshrink,
    "F.tanhshrink": F.tanhshrink,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp min": lambda x: torch.clamp(x, min=0.1),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "log": lambda x: torch.log(x.square() + 1),
    "erf": torch.erf,
    "sin": torch.sin,
    "x.float": lambda x: x.float(),
    "x.half": lambda x: x.half(),
    "x.bfloat16": lambda x: x.bfloat16(),
    "x.to": lambda x: x.to(torch.float32),
    "x.to(weight)": lambda x: x.to(torch.zeros(3, 5, dtype=torch.float32)),
    "x.type_as(weight)": lambda x: x.type_as(torch.zeros(3, 5, dtype=torch.float32)),
    "contiguous": lambda x: x.contiguous(),
    "contiguous, format": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to, format": lambda x: x.to(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(memory_format=torch.preserve_format),
    "detach": lambda x: x.detach(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 3.0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where not": lambda x: x.where(x <= 0, 2.0),
    "nan_to_num": lambda x: torch.nan_to_num(x),
    "x > 0": lambda x: x > 0,
    "x == x": lambda x: x == x,
    "x != 1": lambda x: x != 1,
    "0 < x": lambda x: 0 < x,  # noqa: SIM300
    "isfinite": torch.isfinite,
    "threshold": lambda x: x * (x.ge(0.3)),
    "x ** 2": lambda x: x**2,
    "2 ** x": lambda x: 2**x,
    "x / 3": lambda x: x / 3,
    "1 - x": lambda x: 1 - x,
    "3 / x": lambda x: 3 / x,
    "0.5 * x": lambda x: 0.5 * x,
    "1 + x - 2": lambda x: 1 + x - 2,
    "rsub": lambda x: torch.rsub(x, 1.5, alpha=2),
}


@both_layouts
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_map(name, last):
    images = make_map()
    x = pack(hide(images), last)
    dense = images.permute(0, 2, 3, 1) if last else images
    if "format" in name and last:
        dense = dense.contiguous()
    assert_same(UNARY[name](x), UNARY[name](dense), last)


BINARY = {
    "add": torch.add,
    "add, alpha": lambda x, y: torch.add(x, y, alpha=0.3),
    "x.add": lambda x, y: x.add(y),
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "x - y": lambda x, y: x - y,
    "y - x": lambda x, y: y - x,
    "x.sub": lambda x, y: x.sub(y),
    "sub": lambda x, y: torch.sub(y, x),
    "x * y": lambda x, y: x * y,
    "y * x": lambda x, y: y * x,
    "x.mul": lambda x, y: x.mul(y),
    "y.mul": lambda x, y: y.mul(x),
    "x / y": lambda x, y: x / y,
    "y / x": lambda x, y: y / x,
    "div": torch.div,
    "pow": lambda x, y: torch.pow(x.abs(), y),
    "maximum": torch.maximum,
    "minimum": lambda x, y: torch.minimum(y, x),
    "lerp": lambda x, y: torch.lerp(x, y * x, 0.3),
    "x > y": lambda x, y: x > y,
    "y > x": lambda x, y: y > x,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "addcmul": lambda x, y: torch.addcmul(y, y, x),
    "addcmul, middle": lambda x, y: torch.addcmul(y, x, y, value=0.5),
    "addcmul, first": lambda x, y: torch.addcmul(x, y, y),
    "y.addcmul": lambda x, y: y.addcmul(x, x),
    "addcdiv": lambda x, y: torch.addcdiv(y, x, y),
    "x += y": lambda x, y: x.clone().__iadd__(y),
    "x.add_": lambda x, y: x.clone().add_(y),
    "x.mul_": lambda x, y: x.clone().mul_(y),
    "x.sub_": lambda x, y: x.clone().sub_(other=y),
}
OPERANDS = {  # in NCHW
    "0-dim": (),
    "[C, 1, 1]": (C, 1, 1),
    "[1, C, 1, 1]": (1, C, 1, 1),
    "[B, C, 1, 1]": (B, C, 1, 1),
    "[B, 1, 1, 1]": (B, 1, 1, 1),
    "[1, 1, 1]": (1, 1, 1),
    "[B, C, H, W]": (B, C, H, W),
    "[B, 1, H, W]": (B, 1, H, W),
    "[C, H, W]": (C, H, W),
    "[H, W]": (H, W),
}


@both_layouts
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_maps(name, last):
    function = BINARY[name]
    images, other = make_map(), make_map()
    dense, dense_other = ((t.permute(0, 2, 3, 1) if last else t) for t in (images, other))
    x = pack(hide(images), last)
    assert_same(function(x, pack(hide(other), last)), function(dense, dense_other), last)
    for shape in OPERANDS.values():
        y = torch.rand(shape, dtype=torch.float64) + 0.5
        if last:
            y = y.reshape(*(1,) * (4 - y.dim()), *shape).permute(0, 2, 3, 1) if shape else y
        assert_same(function(x, y), function(dense, y), last)


@pytest.mark.parametrize("equal", [False, True])
def test_per_image_operands(equal):
    """Where all images have as many visible blocks they are repeated, else they are looked up."""
    mask = make_mask("equal" if equal else "ragged")
    images = random_tensor((mask.batch_size, C, H, W), torch.float64)
    scale = random_tensor((mask.batch_size, C, 1, 1), torch.float64)
    found = pack(images, mask=mask) * scale
    assert torch.equal(found.features, ck.gather_visible(images * scale, mask))


def test_trailing_dimensions_of_channels_last():
    images, bias = make_map(), random_tensor((C,), torch.float64)
    dense = images.permute(0, 2, 3, 1)
    assert_same(pack(images, True) + bias, dense + bias, True)
    assert_same(bias - pack(images, True), bias - dense, True)
    with pytest.raises(ValueError, match=r"\[6\] does not broadcast with \(4, 6, 12, 16\)"):
        pack(images) + bias


def test_types_are_promoted_as_those_of_maps():
    x, images = pack(make_map(dtype=torch.float32)), make_map(dtype=torch.float32)
    double = torch.ones(C, 1, 1, dtype=torch.float64)
    assert (x + double).dtype == (images + double).dtype == torch.float64
    assert (x + double[0, 0, 0]).dtype == (images + double[0, 0, 0]).dtype == torch.float32


@both_layouts
def test_one_channel_against_many(last):
    """A spatial attention: one channel broadcasts."""
    images, gate = make_map(), make_map(1)
    dense, dense_gate = ((t.permute(0, 2, 3, 1) if last else t) for t in (images, gate))
    x, g = pack(hide(images), last), pack(hide(gate), last)
    assert_same(x * g, dense * dense_gate, last)
    assert_same(g * x, dense * dense_gate, last)
    scale = torch.arange(1.0, C + 1, dtype=torch.float64)
    scale = scale if last else scale[:, None, None]
    assert_same(g * scale, dense_gate * scale, last)
    assert_same(torch.addcmul(g, scale, x), torch.addcmul(dense_gate, scale, dense), last)


def test_in_place_changes_the_features():
    images = make_map()
    x = pack(images)
    alias = x
    x += 1
    F.relu(x, inplace=True)
    x.mul_(torch.full((C, 1, 1), 2.0, dtype=torch.float64))
    nn.SiLU(inplace=True)(x)
    x -= pack(images)
    expected = F.silu(2 * F.relu(images + 1)) - images
    assert_same(alias, expected, exact=True)
    assert_same(x, expected, exact=True)


def test_is_not_written_into_tensors():
    x = pack(make_map())
    dense = torch.zeros(B, C, H, W, dtype=torch.float64)
    with pytest.raises(ValueError, match="add_: packed features cannot be written into a tensor"):
        dense.add_(x)
    with pytest.raises(ValueError, match="mul_: packed features cannot be written into a tensor"):
        dense *= x
    assert not dense.any()


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()),
    *(nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.LeakyReLU(0.2), nn.ELU(), nn.CELU()),
    *(nn.SELU(), nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softsign()),
    *(nn.LogSigmoid(), nn.Threshold(0.1, 0.3), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink()),
    *(nn.Identity(), nn.Dropout(0.5).eval(), nn.SiLU(inplace=True), nn.LeakyReLU(inplace=True)),
]


@pytest.mark.parametrize("module", ACTIVATIONS, ids=lambda m: str(m).lower())
def test_activation_modules(module):
    images = make_map()
    assert_same(module(pack(hide(images))), module(images.clone()))
