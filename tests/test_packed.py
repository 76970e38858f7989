"""`Packed` in functions, methods, operators and unmodified modules, against dense maps."""

import copy
import pickle
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SEModule
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.utils import _pytree as pytree
from torchvision.ops import stochastic_depth

import convmae_kernels as ck
from convmae_kernels import Packed
from convmae_kernels.testing import make_mask, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NAN, INF = float("nan"), float("inf")
B, C, H, W, SIDE = 4, 6, 12, 16, 4  # of the maps of the mask "ragged", whose second image is hidden
MASK = make_mask("ragged")
VISIBLE = MASK.to_dense(SIDE)
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])


def make_map(channels=C, dtype=torch.float64):
    return random_tensor((B, channels, H, W), dtype)


def hide(images, value=NAN):
    """The images with `value` in hidden positions."""
    return torch.where(VISIBLE, images, value)


def pack(images, last=False, mask=MASK):
    packed = Packed.gather(images, mask)
    return packed.permute(0, 2, 3, 1) if last else packed


def as_rows(dense, last=False):
    """The visible values of a dense map, as packed features."""
    return ck.gather_visible(dense.permute(0, 3, 1, 2) if last else dense, MASK)


def assert_same(packed, dense, last=False, exact=False):
    """A `Packed` has the shape, the dtype and, at visible positions, the values of a dense map."""
    assert isinstance(packed, Packed)
    assert packed.shape == dense.shape
    assert packed.dtype == dense.dtype
    if dense.dtype == torch.bool:
        packed, dense, exact = packed.float(), dense.float(), True
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(packed.features, as_rows(dense, last), equal_nan=True, **tolerance)


def values_of(images, index):
    """`[C, n]`: the visible values of one image."""
    return images[index][:, VISIBLE[index, 0]]


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


# -- convolutions, linear layers ----------------------------------------------------------------

CONVOLUTIONS = {
    "3 x 3": nn.Conv2d(C, 4, 3, padding=1),
    "same": nn.Conv2d(C, 4, 3, padding="same", bias=False),
    "1 x 1": nn.Conv2d(C, 8, 1),
    "pointwise stride": nn.Conv2d(C, 8, 1, stride=2),
    "patches": nn.Conv2d(C, 8, 4, stride=4),
    "patches, valid": nn.Conv2d(C, 8, 2, stride=2, padding="valid"),
    "stride": nn.Conv2d(C, 5, 3, stride=2, padding=1),
    "stem": nn.Conv2d(C, 5, 7, stride=2, padding=3),
    "groups": nn.Conv2d(C, 9, 3, padding=1, groups=3),
    "depthwise": nn.Conv2d(C, C, 7, padding=3, groups=C),
    "depthwise stride": nn.Conv2d(C, C, 5, stride=2, padding=2, groups=C),
    "dilation": nn.Conv2d(C, 4, 3, padding=2, dilation=2),
    "rectangle": nn.Conv2d(C, 4, (1, 5), padding=(0, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    module = copy.deepcopy(CONVOLUTIONS[name]).double()
    images = make_map()
    assert_same(module(pack(hide(images))), module(hide(images, 0)))


def test_convolutions_called_as_functions():
    images, weight = make_map(), random_tensor((3, C, 3, 3), torch.float64)
    expected = F.conv2d(hide(images, 0), weight, None, [1], [1])
    assert_same(F.conv2d(pack(images), weight, None, [1], [1]), expected)
    assert_same(torch.conv2d(pack(images), weight, padding=(1, 1)), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_transposed_convolutions(stride, bias):
    module = nn.ConvTranspose2d(C, 5, stride, stride, bias=bias).double()
    images = make_map()
    assert_same(module(pack(hide(images))), module(images))
    assert_same(
        F.conv_transpose2d(pack(images), module.weight, None, [stride]),
        (module(images) - (module.bias[:, None, None] if bias else 0)),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    module, images = nn.Linear(C, 5, bias=bias).double(), make_map()
    assert_same(module(pack(hide(images), True)), module(images.permute(0, 2, 3, 1)), True)


# -- norms --------------------------------------------------------------------------------------


def batch_norm(module, images):
    rows = images.permute(0, 2, 3, 1)
    y = torch.zeros_like(rows)
    y[VISIBLE[:, 0]] = nn.BatchNorm1d.forward(module, rows[VISIBLE[:, 0]])
    return y.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training, options):
    norm, images = nn.BatchNorm2d(C, **options).double().train(training), make_map()
    plain = nn.BatchNorm1d(C, **options).double().train(training)
    for module in (norm, plain):
        for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
            if tensor is not None:
                with torch.no_grad():
                    tensor.copy_(torch.linspace(0.5, 2, C))
    for _ in range(2):
        assert_same(norm(pack(hide(images))), batch_norm(plain, images))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine):
    images = make_map()
    module = nn.LayerNorm(C, elementwise_affine=affine).double()
    assert_same(module(pack(hide(images), True)), module(images.permute(0, 2, 3, 1)), True)
    per_position = LayerNorm2d(C, affine=affine).double()
    assert_same(per_position(pack(hide(images))), per_position(images))


@pytest.mark.parametrize("groups", [1, 2, C])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(groups, affine):
    module, images = nn.GroupNorm(groups, C, affine=affine).double(), 3 * make_map() + 1
    if affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    expected = torch.zeros_like(images)
    for i in (0, 2, 3):
        expected[i][:, VISIBLE[i, 0]] = module(values_of(images, i)[None])[0]
    assert_same(module(pack(hide(images))), expected)


def test_global_response_norm():
    for last in (False, True):
        module, images = GlobalResponseNorm(C, channels_last=last).double(), make_map()
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        dense = hide(images, 0).permute(0, 2, 3, 1) if last else hide(images, 0)
        assert_same(module(pack(hide(images), last)), module(dense), last)


# -- pooling and reductions ---------------------------------------------------------------------

POOLS = [(2, 2, 0), (3, 2, 1), (4, 4, 0), (3, 1, 1), (5, 1, 2), (2, None, 0)]


@pytest.mark.parametrize("kernel, stride, padding", POOLS)
def test_max_pool(kernel, stride, padding):
    module, images = nn.MaxPool2d(kernel, stride, padding), make_map()
    assert_same(module(pack(hide(images))), module(hide(images, -INF)), exact=True)
    assert_same(F.max_pool2d(pack(images), kernel, stride, padding), module(hide(images, -INF)))


def test_max_pool_with_dilation():
    images = make_map()
    shifted = F.pad(hide(images, -INF), (2, 2, 2, 2), value=-INF)
    expected = F.max_pool2d(shifted, 3, 1, 0, dilation=2)
    assert_same(F.max_pool2d(pack(hide(images)), 3, 1, 2, dilation=2), expected, exact=True)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("kernel, stride, padding", POOLS)
def test_avg_pool(kernel, stride, padding, include):
    """The mean of what is visible, whatever `count_include_pad` says of the border."""
    module = nn.AvgPool2d(kernel, stride, padding, count_include_pad=include)
    images = make_map()
    plain = nn.AvgPool2d(kernel, stride, padding)
    expected = plain(hide(images, 0)) / plain(VISIBLE.double())
    assert_same(module(pack(hide(images))), expected)


@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_ceil_mode_that_changes_nothing(pool):
    images = make_map()
    same = pool(2, 2, ceil_mode=True)(pack(images))
    assert torch.equal(same.features, pool(2, 2)(pack(images)).features)


def per_image(images, function, empty):
    """`[B, C]`: a function of the visible values `[C, n]` of each image."""
    rows = [values_of(images, i) for i in range(B)]
    return torch.stack([function(v) if v.shape[1] else v.new_full((C,), empty) for v in rows])


REDUCTIONS = {
    "mean": (lambda x, *a, **k: x.mean(*a, **k), lambda v: v.mean(1), 0.0),
    "torch.mean": (torch.mean, lambda v: v.mean(1), 0.0),
    "sum": (lambda x, *a, **k: x.sum(*a, **k), lambda v: v.sum(1), 0.0),
    "torch.sum": (torch.sum, lambda v: v.sum(1), 0.0),
    "amax": (lambda x, *a, **k: x.amax(*a, **k), lambda v: v.amax(1), -INF),
    "torch.amax": (torch.amax, lambda v: v.amax(1), -INF),
    "norm": (lambda x, *a, **k: x.norm(2, *a, **k), lambda v: v.square().sum(1).sqrt(), 0.0),
    "norm, p": (lambda x, d, **k: x.norm(p=2, dim=d, **k), lambda v: v.square().sum(1).sqrt(), 0.0),
    "torch.norm": (lambda x, d, **k: torch.norm(x, dim=d, **k), lambda v: v.norm(2, 1), 0.0),
    "vector_norm": (
        lambda x, d, **k: torch.linalg.vector_norm(x, dim=d, **k),
        lambda v: v.norm(2, 1),
        0.0,
    ),
}


@both_layouts
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_over_positions(name, last):
    function, plain, empty = REDUCTIONS[name]
    images = make_map()
    x, expected = pack(hide(images), last), per_image(images, plain, empty)
    kept = expected[:, None, None] if last else expected[:, :, None, None]
    for dim in ((1, 2), (-3, -2)) if last else ((2, 3), (-2, -1), [3, 2]):
        found = function(x, dim)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(function(x, dim, keepdim=True), kept)


@both_layouts
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_over_channels(name, last):
    function = REDUCTIONS[name][0]
    images = make_map()
    dense = images.permute(0, 2, 3, 1) if last else images
    x = pack(hide(images), last)
    for dim in (3, -1, (3,)) if last else (1, -3, (1,)):
        expected = function(dense, dim, keepdim=True)
        assert_same(function(x, dim, keepdim=True), expected, last)
        with pytest.raises(NotImplementedError, match="channels with keepdim=True, not dim="):
            function(x, dim)


def test_reductions_over_everything():
    images = make_map()
    x, rows = pack(hide(images)), as_rows(images)
    for name in ("mean", "sum", "amax", "norm"):
        for found in (getattr(x, name)(), getattr(torch, name)(x)):
            torch.testing.assert_close(found, getattr(rows, name)())
    assert x.float().mean((2, 3), dtype=torch.float64).dtype == torch.float64
    assert x.half().mean((2, 3)).dtype == torch.float16


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_adaptive_pooling_to_one(size):
    images = make_map()
    mean = per_image(images, lambda v: v.mean(1), 0.0)[:, :, None, None]
    most = per_image(images, lambda v: v.amax(1), -INF)[:, :, None, None]
    x = pack(hide(images))
    for found in (nn.AdaptiveAvgPool2d(size)(x), F.adaptive_avg_pool2d(x, size)):
        torch.testing.assert_close(found, mean)
    for found in (nn.AdaptiveMaxPool2d(size)(x), F.adaptive_max_pool2d(x, size)):
        torch.testing.assert_close(found, most)


@pytest.mark.parametrize("maximum", [False, True])
def test_squeeze_excite(maximum):
    module = SEModule(C, rd_channels=3, add_maxpool=maximum).double()
    images = make_map()
    found = module(pack(hide(images)))
    expected = torch.zeros_like(images)
    for i in (0, 2, 3):  # a map of one row has the same means and maxima
        expected[i][:, VISIBLE[i, 0]] = module(values_of(images, i)[None, :, None])[0, :, 0]
    assert_same(found, expected)


# -- channels, layout, resolution ---------------------------------------------------------------


DIVISIONS = [
    lambda t, dim: t.chunk(2, dim),
    lambda t, dim: torch.chunk(t, 4, dim=dim),
    lambda t, dim: torch.chunk(t, chunks=3, dim=dim),
    lambda t, dim: t.split(4, dim),
    lambda t, dim: t.split(split_size=2, dim=dim),
    lambda t, dim: torch.split(t, [1, 2, 3], dim=dim),
    lambda t, dim: torch.split(t, split_size_or_sections=[1, 2, 3], dim=dim),
    lambda t, dim: torch.tensor_split(t, (1, 4), dim),
]


@both_layouts
def test_cat_chunk_split(last):
    a, b = make_map(), make_map(2)
    dense = [t.permute(0, 2, 3, 1) if last else t for t in (a, b)]
    x, y = pack(hide(a), last), pack(hide(b), last)
    for dim in (3, -1) if last else (1, -3):
        for cat in (torch.cat, torch.concat, torch.concatenate):
            assert_same(cat([x, y, x], dim=dim), cat([dense[0], dense[1], dense[0]], dim), last)
        for divide in DIVISIONS:
            found, expected = divide(x, dim), divide(dense[0], dim)
            assert type(found) is tuple
            assert len(found) == len(expected) > 1
            for part, plain in zip(found, expected):
                assert_same(part, plain, last, exact=True)


def test_permute():
    images = make_map()
    x = pack(images)
    for last in (
        x.permute(0, 2, 3, 1),
        torch.permute(x, (0, -2, -1, 1)),
        x.permute([0, 2, 3, 1]),
        torch.permute(x, dims=(0, 2, 3, 1)),
    ):
        assert_same(last, images.permute(0, 2, 3, 1), True, exact=True)
        assert last.features is x.features
        assert_same(last.permute(0, 1, 2, 3), images.permute(0, 2, 3, 1), True, exact=True)
        for back in (last.permute(0, 3, 1, 2), torch.permute(last, (0, -1, 1, 2))):
            assert_same(back, images, exact=True)
    assert_same(x.permute(0, 1, 2, 3), images, exact=True)
    for order in ((0, 3, 1, 2), (0, 1, 3, 2), (1, 0, 2, 3)):
        with pytest.raises(NotImplementedError, match="permute: only "):
            x.permute(*order)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_interpolate(times):
    images = make_map()
    expected = F.interpolate(images, scale_factor=times)
    x = pack(hide(images))
    for y in (
        F.interpolate(x, scale_factor=times),
        F.interpolate(x, scale_factor=(float(times), times), mode="nearest"),
        F.interpolate(x, size=(H * times, W * times)),
        nn.Upsample(scale_factor=times)(x),
        nn.Upsample(size=(H * times, W * times))(x),
    ):
        assert_same(y, expected, exact=True)


# -- random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout(inplace):
    x = pack(torch.ones(B, C, H, W))
    y = nn.Dropout(0.25, inplace=inplace)(x)
    assert y.features.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert 0.15 < float((y.features == 0).float().mean()) < 0.35
    assert (x.features is y.features) == inplace
    assert bool((x.features == 1).all()) != inplace


@both_layouts
@pytest.mark.parametrize(
    "drop",
    [
        DropPath(0.4).train(),
        DropPath(0.4, scale_by_keep=False).train(),
        lambda x: stochastic_depth(x, 0.4, "row", True),
        lambda x: stochastic_depth(x, 0.4, "batch", True),
    ],
    ids=["timm", "timm, unscaled", "row", "batch"],
)
def test_stochastic_depth_drops_the_images_that_it_drops_densely(drop, last):
    images = make_map()
    dense = images.permute(0, 2, 3, 1) if last else images
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found = drop(pack(images, last))
        torch.manual_seed(seed)
        assert_same(found, drop(dense), last, exact=True)
        seen |= {bool((f == 0).all()) for f in found.features}
    assert seen == {True, False}


# -- gradients, autocast, hidden values, concurrency --------------------------------------------


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(C, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.ln = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.se = SEModule(8, rd_channels=4)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        y = self.fc(self.ln(self.dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = x + self.gamma * self.se(F.gelu(y))
        return x, self.head(F.max_pool2d(x, 3, 2, 1).mean((2, 3)))


def run_net(net, x):
    net.zero_grad()
    y, logits = net(x)
    (y.features.square().sum() + logits.square().sum()).backward()
    return [y.features.detach(), logits.detach(), *(p.grad.clone() for p in net.parameters())]


def test_gradients():
    net = Net().double().eval()  # a network that is dense but for what follows it and for its mean
    mask = ck.BlockMask.full(2, (2, 2))
    images = random_tensor((2, C, 8, 8), torch.float64).requires_grad_()
    found = [*run_net(net, Packed.gather(images, mask)), images.grad.clone()]
    images.grad = None
    net.zero_grad()
    y, logits = net(images)
    (y.square().sum() + logits.square().sum()).backward()
    rows = ck.gather_visible(y.detach(), mask)
    expected = [rows, logits.detach(), *(p.grad for p in net.parameters()), images.grad]
    torch.testing.assert_close(found, expected)


def test_gradients_by_differences():
    mask = ck.BlockMask.from_visible(torch.tensor([[[True, False]], [[False, True]]]))
    net = Net().double()
    images = random_tensor((2, C, 4, 8), torch.float64).requires_grad_()

    def function(images, weight, gamma):
        values = {"dw.weight": weight, "gamma": gamma}
        y, logits = torch.func.functional_call(net, values, (Packed.gather(images, mask),))
        return y.features, logits

    assert torch.autograd.gradcheck(
        function, (images, net.dw.weight, net.gamma), nondet_tol=0, fast_mode=True
    )


def test_autocast():
    net, images = Net().eval(), random_tensor((B, C, H, W))
    exact = run_net(copy.deepcopy(net).double(), pack(images.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.stem(pack(images)).dtype == torch.bfloat16
        assert net.dw(net.stem(pack(images))).dtype == torch.bfloat16
        assert net.fc(net.stem(pack(images)).permute(0, 2, 3, 1)).dtype == torch.bfloat16
        found = run_net(copy.deepcopy(net), pack(images))
    for a, b in zip(found, exact):
        assert (a.double() - b).abs().max() <= 0.1 * b.abs().max() + 1e-6
        assert not torch.equal(a.double(), b)


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_hidden_pixels_change_no_bit(value):
    net, images = Net(), make_map(dtype=torch.float32)
    plain = run_net(copy.deepcopy(net), pack(hide(images, 0)))
    other = run_net(copy.deepcopy(net), pack(hide(images, value)))
    assert all(map(torch.equal, plain, other))
    assert all(t.isfinite().all() for t in plain)


def test_gradients_of_hidden_pixels_are_zero():
    images = hide(make_map()).requires_grad_()
    net = Net().double()
    net.bn.eval()
    y, _ = net(pack(images))
    y.features.sum().backward()
    assert not images.grad[~VISIBLE.expand_as(images)].any()
    assert images.grad[VISIBLE.expand_as(images)].any()


def jobs(net):
    generator = torch.Generator().manual_seed(1)
    masks = [MASK, ck.BlockMask.random(B, (3, 4), 0.6, generator), ck.BlockMask.full(B, (3, 4))]
    return [(copy.deepcopy(net), pack(make_map(dtype=torch.float32), mask=m)) for m in masks]


def test_masks_in_turn_do_not_interfere():
    alone = [run_net(*job) for job in jobs(Net().eval())]
    torch.manual_seed(0)
    work = jobs(Net().eval())
    steps = [[job[0].stem(job[1])] for job in work]
    for function in (F.relu, lambda x: x * x.mean((2, 3), keepdim=True), lambda x: x + 1):
        for step in steps:
            step.append(function(step[-1]))
    for step, (net, x) in zip(steps, work):
        y = F.relu(net.stem(x))
        y = y * y.mean((2, 3), keepdim=True) + 1
        assert torch.equal(step[-1].features, y.features)
        assert step[-1].mask is x.mask
    assert all(all(map(torch.equal, run_net(*job), a)) for job, a in zip(work, alone))


def test_threads_do_not_interfere():
    net = Net().eval()
    work = jobs(net)
    alone = [run_net(*job) for job in work]
    found = [[] for _ in work]
    start = threading.Barrier(len(work))

    def run(index):
        start.wait()
        for _ in range(10):
            found[index].append(run_net(*work[index]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, alone):
        assert len(results) == 10
        for result in results:
            assert all(map(torch.equal, result, expected))


WRITABLE = {
    "gather": nn.Identity(),
    "product": nn.Conv2d(C, 4, 3, padding=1),
    "windows": nn.Conv2d(C, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(C, C, 3, padding=1, groups=C),
    "pointwise": nn.Conv2d(C, 4, 1),
    "patches": nn.Conv2d(C, 4, 2, 2),
    "transposed": nn.ConvTranspose2d(C, 4, 2, 2),
    "max": nn.MaxPool2d(2),
    "avg": nn.AvgPool2d(2),
    "batch norm": nn.BatchNorm2d(C),
    "group norm": nn.GroupNorm(2, C),
    "upsample": nn.Upsample(scale_factor=2),
}


@pytest.mark.parametrize("name", WRITABLE)
def test_results_may_be_written_into(name):
    """An activation in place after a layer, as VGG has it; autograd refuses some views."""
    results, images = [], make_map()
    for inplace in (False, True):
        layer = copy.deepcopy(WRITABLE[name]).double()
        images = images.detach().requires_grad_()
        y = nn.LeakyReLU(0.1, inplace=inplace)(layer(pack(images)))
        y.features.square().sum().backward()
        results.append([y.features, images.grad, *(p.grad for p in layer.parameters())])
    assert all(map(torch.equal, *results))


# -- errors -------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A module that does something with its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


UNSUPPORTED = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(B, -1),
    "reshape": lambda x: torch.reshape(x, (B, -1)),
    "transpose": lambda x: x.transpose(1, 2),
    "__getitem__": lambda x: x[:, :2],
    "__setitem__": lambda x: x.__setitem__(0, 1.0),
    "__matmul__": lambda x: x @ torch.eye(W, dtype=torch.float64),
    "__floordiv__": lambda x: x // 2,
    "__bool__": lambda x: 1 if x > 0 else 2,
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "softmax": lambda x: x.softmax(1),
    "roll": lambda x: torch.roll(x, 1, 2),
    "unfold": lambda x: F.unfold(x, 3),
    "instance_norm": lambda x: F.instance_norm(x),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "prelu": nn.PReLU(C).double(),
    "stack": lambda x: torch.stack([x, x]),
    "matmul": lambda x: torch.matmul(x, x),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "is_contiguous": lambda x: x.is_contiguous(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations_are_named(name):
    function = UNSUPPORTED[name]
    where = "PReLU.forward" if isinstance(function, nn.Module) else "Calls.forward"
    why = {"interpolate": "only mode"}.get(name, "packed features do not have it")
    with pytest.raises(NotImplementedError, match=f"^{name} in {where}: {why}.*packed.dense()"):
        nn.Sequential(nn.Identity(), Calls(function))(pack(make_map()))
    if not isinstance(function, nn.Module):
        with pytest.raises(NotImplementedError, match=f"^{name}: "):
            function(pack(make_map()))


def rejects(error, message, module, *arguments):
    with pytest.raises(error, match=re.escape(message)):
        (module.double() if isinstance(module, nn.Module) else module)(*arguments)


def test_modules_that_are_not_supported_are_named():
    x, last = pack(make_map()), pack(make_map(), True)
    only = NotImplementedError
    rejects(
        only,
        "conv_transpose2d in ConvTranspose2d.forward: only a kernel as large as its",
        nn.ConvTranspose2d(C, 4, 4, 2, padding=1),
        x,
    )
    rejects(
        ValueError,
        "conv_transpose2d in ConvTranspose2d.forward: weight must be",
        nn.ConvTranspose2d(C, 4, 3, 2),
        x,
    )
    rejects(
        ValueError,
        "conv2d in Conv2d._conv_forward: padding must keep the grid of blocks",
        nn.Conv2d(C, 4, 3),
        x,
    )
    rejects(
        ValueError,
        "conv2d in Conv2d._conv_forward: stride must be a power of two",
        nn.Conv2d(C, 4, 8, 8),
        x,
    )
    rejects(
        ValueError,
        "conv2d in Conv2d._conv_forward: x has 6 channels, but weight",
        nn.Conv2d(C + 1, 4, 3, padding=1),
        x,
    )
    rejects(
        only,
        "pad in Conv2d._conv_forward: packed features do not have it",
        nn.Conv2d(C, 4, 3, padding=1, padding_mode="reflect"),
        x,
    )
    rejects(
        ValueError,
        "conv2d in Conv2d._conv_forward: it needs [B, C, H, W], got (4, 12, 16, 6)",
        nn.Conv2d(C, 4, 3, padding=1),
        last,
    )
    rejects(
        ValueError,
        "linear in Linear.forward: it needs [B, H, W, C], got (4, 6, 12, 16)",
        nn.Linear(C, 4),
        x,
    )
    rejects(
        ValueError,
        "layer_norm in LayerNorm.forward: it needs [B, H, W, C] and a norm over C",
        nn.LayerNorm(C),
        x,
    )
    rejects(
        ValueError,
        "layer_norm in LayerNorm.forward: it needs [B, H, W, C] and a norm over C",
        nn.LayerNorm((W, C)),
        last,
    )
    rejects(
        ValueError,
        "batch_norm in BatchNorm2d.forward: it needs [B, C, H, W]",
        nn.BatchNorm2d(C),
        last,
    )
    rejects(
        ValueError,
        "group_norm in GroupNorm.forward: it needs [B, C, H, W]",
        nn.GroupNorm(2, C),
        last,
    )
    rejects(
        ValueError, "max_pool2d in MaxPool2d.forward: it needs [B, C, H, W]", nn.MaxPool2d(2), last
    )
    rejects(
        ValueError,
        "max_pool2d in MaxPool2d.forward: ceil_mode=True would make a larger map",
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        x,
    )
    rejects(
        ValueError,
        "avg_pool2d in AvgPool2d.forward: ceil_mode=True would make a larger map",
        nn.AvgPool2d(3, 2, ceil_mode=True),
        x,
    )
    rejects(
        only,
        "in MaxPool2d.forward: packed features do not have it",
        nn.MaxPool2d(2, return_indices=True),
        x,
    )
    rejects(
        only,
        "avg_pool2d in AvgPool2d.forward: the divisor is the number of visible positions",
        nn.AvgPool2d(2, divisor_override=3),
        x,
    )
    rejects(
        only,
        "adaptive_avg_pool2d in AdaptiveAvgPool2d.forward: only an output of 1 x 1",
        nn.AdaptiveAvgPool2d(7),
        x,
    )
    rejects(
        only,
        "in AdaptiveMaxPool2d.forward: only an output of 1 x 1",
        nn.AdaptiveMaxPool2d((7, 1)),
        x,
    )
    rejects(
        only,
        'interpolate in Upsample.forward: only mode="nearest" by a power of two',
        nn.Upsample(scale_factor=2, mode="bilinear"),
        x,
    )
    for options in (
        {"scale_factor": 3},
        {"scale_factor": 0.5},
        {"size": (2 * H, W)},
        {"scale_factor": (2, 4)},
    ):
        rejects(only, "interpolate in Upsample.forward: only mode", nn.Upsample(**options), x)
    rejects(
        ValueError,
        "interpolate in Upsample.forward: packed features are [T, s*s, C] with s",
        nn.Upsample(scale_factor=16),
        x,
    )
    rejects(only, "flatten in Flatten.forward", nn.Flatten(), x)


def test_operands_that_do_not_fit_are_named():
    x = pack(make_map())
    other = pack(make_map(), mask=ck.BlockMask.full(B, (3, 4)))
    last, small = pack(make_map(), True), F.max_pool2d(x, 2)

    def with_x(function):
        return Calls(lambda y: function(x, y))

    for y, why in (
        (other, "two Packed of one operation have different masks"),
        (last, "two Packed of one operation have shapes (4, 6, 12, 16) and (4, 12, 16, 6)"),
        (small, "two Packed of one operation have shapes (4, 6, 12, 16) and (4, 6, 6, 8)"),
    ):
        rejects(ValueError, f"add in Calls.forward: {why}", with_x(torch.add), y)
        rejects(ValueError, f"__mul__ in Calls.forward: {why}", with_x(lambda a, b: a * b), y)
        rejects(
            ValueError, f"cat in Calls.forward: {why}", with_x(lambda a, b: torch.cat([a, b], 1)), y
        )
    for shape in (
        (C,),
        (C + 1, 1, 1),
        (B, C, H),
        (2, 1, 1, 1),
        (H + 1, W),
        (1, B, C, 1, 1),
        (B, C, H, 1),
        (B, C, 1, W),
    ):
        why = f"{list(shape)} does not broadcast with (4, 6, 12, 16)"
        plain = torch.zeros(shape, dtype=torch.float64)
        rejects(ValueError, f"mul in Calls.forward: {why}", with_x(torch.mul), plain)
        rejects(ValueError, f"add in Calls.forward: {why}", with_x(lambda a, b: b + a), plain)
    rejects(
        ValueError,
        "cat in Calls.forward: all tensors must be Packed",
        with_x(lambda a, b: torch.cat([a, b], 1)),
        make_map(),
    )
    rejects(
        NotImplementedError,
        "cat in Calls.forward: only along channels, got dim=2",
        with_x(lambda a, b: torch.cat([a, b], 2)),
        x,
    )
    rejects(
        NotImplementedError,
        "chunk in Calls.forward: only along channels, got dim=0",
        with_x(lambda a, b: b.chunk(2)),
        x,
    )
    rejects(
        NotImplementedError,
        "mean in Calls.forward: it reduces positions, or channels",
        with_x(lambda a, b: b.mean(2)),
        x,
    )
    rejects(
        NotImplementedError,
        "norm in Calls.forward: only p=2 is supported, got p=1",
        with_x(lambda a, b: b.norm(1, (2, 3))),
        x,
    )


def test_equal_masks_need_not_be_the_same_object():
    a, b = make_map(), make_map()
    x, y = pack(a, mask=make_mask("ragged")), pack(b, mask=make_mask("ragged"))
    assert x.mask is not y.mask
    assert_same(x + y, a + b)
    assert_same(torch.cat([x, y], 1), torch.cat([a, b], 1))


def test_the_innermost_module_is_named():
    class Inner(nn.Module):
        def helper(self, x):
            return F.pad(x, (1, 1))

        def forward(self, x):
            return self.helper(x)

    with pytest.raises(NotImplementedError, match=r"^pad in Inner\.helper: "):
        nn.Sequential(nn.Sequential(Inner()), nn.ReLU())(pack(make_map()))
