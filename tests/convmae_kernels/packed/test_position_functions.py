"""Functions that look at several positions: `Packed`, its dense twin and PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convmae_kernels as ck
from convmae_kernels.ops.support.dispatch import why_not
from convmae_kernels.packed import MaskedDense, Packed
from convmae_kernels.testing import random_tensor
from tests.support.packed_maps import MASK, B, C, H, W, pack

pytestmark = pytest.mark.usefixtures("poisoned_empty")
FULL = ck.BlockMask.full(B, MASK.grid)
LOWEST = float("-inf")


def weight(*shape):
    return random_tensor(shape, torch.float64)


def check(function, mask=MASK, side=4):
    """Values and gradients are those of the twin; with nothing hidden, those of PyTorch."""
    images = random_tensor((B, C, mask.grid[0] * side, mask.grid[1] * side), torch.float64)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    found = function(Packed.gather(inputs[0], mask))
    twin = function(MaskedDense(inputs[1], mask).cleared())
    if not isinstance(found, torch.Tensor):
        assert found.shape == twin.shape
        found, twin = found.features, ck.gather_visible(twin.values, mask)
    torch.testing.assert_close(found, twin)
    direction = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    grads = [
        torch.autograd.grad((y * direction).sum(), x)[0] for y, x in zip((found, twin), inputs)
    ]
    torch.testing.assert_close(*grads)
    whole = function(Packed.gather(images, FULL))
    whole = whole if isinstance(whole, torch.Tensor) else whole.dense()
    torch.testing.assert_close(whole, function(images))


# -- padding ------------------------------------------------------------------------------------

BORDERS = {
    "zeros": {},
    "twos": {"value": 2.0},
    "reflect": {"mode": "reflect"},
    "replicate": {"mode": "replicate"},
}
PADDED_CONVOLUTIONS = [  # pad of left, right, top, bottom; kernel, stride, dilation
    ((0, 1, 0, 1), 3, 2, 1),
    ((1, 0, 1, 0), 3, 2, 1),
    ((1, 1, 1, 1), 3, 2, 1),
    ((1, 2, 0, 3), 4, 1, 1),
    ((2, 1, 1, 2), 5, 2, 1),
    ((2, 2, 2, 2), 3, 1, 2),
    ((0, 0, 0, 0), 2, 2, 1),
]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("pad", "kernel", "stride", "dilation"), PADDED_CONVOLUTIONS)
def test_padding_before_a_convolution(border, pad, kernel, stride, dilation):
    dense, depthwise = weight(4, C, kernel, kernel), weight(C, 1, kernel, kernel)
    for side in (2, 4):
        if side == 2 and border == "reflect":
            continue
        for parameters, groups in ((dense, 1), (depthwise, C)):
            check(
                lambda x, parameters=parameters, groups=groups: F.conv2d(
                    F.pad(x, pad, **BORDERS[border]), parameters, None, stride, 0, dilation, groups
                ),
                side=side,
            )


def test_reflection_of_blocks_of_one_position():
    parameters = weight(4, C, 3, 3)
    check(lambda x: F.conv2d(F.pad(x, (1,) * 4, "reflect"), parameters), side=1)


@pytest.mark.parametrize("border", [*BORDERS, "lowest"])
@pytest.mark.parametrize("own", [0, 1])
def test_padding_before_a_pooling(border, own):
    options = BORDERS.get(border, {"value": LOWEST})
    pad = (0, 1 - own, 1 - own, 0)
    check(lambda x: F.max_pool2d(F.pad(x, pad, **options), 3, 2, own))
    if border == "lowest":
        return
    for include in (True, False):
        check(
            lambda x, include=include: F.avg_pool2d(
                F.pad(x, pad, **options), 3, 2, own, count_include_pad=include
            )
        )


def test_layers_that_pad():
    layers = pytest.importorskip("timm.layers")
    pools = pytest.importorskip("timm.layers.pool2d_same")
    torch.manual_seed(0)
    for module in (
        layers.Conv2dSame(C, 4, 3, stride=2),
        layers.Conv2dSame(C, C, 5, stride=2, groups=C),
        pools.MaxPool2dSame(3, 2),
        pools.AvgPool2dSame(3, 2),
        layers.BlurPool2d(C),
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(C, 4, 3, 2)),
        nn.Sequential(nn.ConstantPad2d((1, 0, 1, 0), 3.0), nn.MaxPool2d(3, 2)),
        nn.Sequential(nn.ZeroPad2d((-1, 1, -1, 1)), nn.AvgPool2d(1, 2, count_include_pad=False)),
        nn.Sequential(nn.ZeroPad2d((-1, 1, -1, 1)), nn.Conv2d(C, 4, 3, padding=1)),
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(C, 4, 3)),
        nn.Conv2d(C, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(C, 4, 5, 2, padding=2, padding_mode="replicate"),
        nn.Conv2d(C, 4, (2, 4), padding="same"),
    ):
        check(module.double())


def test_padding_of_channels():
    check(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5) * 2)


def test_a_padded_map_is_only_convolved_or_pooled():
    padded = F.pad(pack(random_tensor((B, C, H, W), torch.float64)), (0, 1, 2, 3))
    assert padded.shape == (B, C, H + 5, W + 1)
    assert padded.size()[-2:] == (H + 5, W + 1)
    for function in (F.relu, lambda x: x + 1, lambda x: x.mean((2, 3)), lambda x: x[:, :2]):
        with pytest.raises(NotImplementedError, match="a padded map is not on the grid of blocks"):
            function(padded)
    with pytest.raises(ValueError, match="padding must keep the grid of blocks"):
        F.conv2d(padded, weight(2, C, 3, 3))


# -- transposed convolutions --------------------------------------------------------------------

TRANSPOSED = [  # kernel, stride, padding, output_padding, groups, dilation
    (4, 2, 1, 0, 1, 1),
    (3, 2, 1, 1, 1, 1),
    (3, 2, 1, 1, 2, 1),
    (2, 2, 0, 0, 3, 1),
    (3, 1, 1, 0, 1, 1),
    (8, 4, 2, 0, 1, 1),
    (3, 4, 0, 1, 1, 1),
    (3, 2, 2, 1, 1, 2),
    (2, 2, 1, 0, 1, 3),
    ((4, 2), 2, (1, 0), 0, 1, 1),
]


@pytest.mark.parametrize("options", TRANSPOSED)
def test_transposed_convolutions(options):
    kernel, *rest = options
    module = nn.ConvTranspose2d(C, 6, kernel, *rest[:3], rest[3], True, rest[4]).double()
    for side in (1, 4):
        check(module, side=side)


def test_transposed_convolutions_are_differentiable_twice():
    mask = ck.BlockMask.from_visible(torch.tensor([[[True, False, True]]]))
    x, kernel = weight(2, 4, 2).requires_grad_(), weight(2, 2, 4, 4).requires_grad_()
    inputs = (x, kernel, weight(2).requires_grad_())

    def function(x, kernel, bias):
        return ck.masked_conv_transpose2d(x, kernel, bias, mask, 2, 1)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# -- pooling, resampling ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [(3, 2, 0, True), (3, 2, 1, False), (2, 2, 0, True), (5, 4, 1, False), (3, 1, 1, False)],
)
def test_pooling(kernel, stride, padding, ceil):
    check(lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil))
    for include in (True, False):
        for divisor in (None, 7):
            options = kernel, stride, padding, ceil, include, divisor
            check(lambda x, options=options: F.avg_pool2d(x, *options))


@pytest.mark.parametrize("size", [1, (3, 4), (6, 8), (12, 16), (None, 16)])
def test_adaptive_pooling(size):
    check(nn.AdaptiveAvgPool2d(size))
    check(nn.AdaptiveMaxPool2d(size))


MODES = [
    {"mode": "nearest"},
    {"mode": "nearest-exact"},
    {"mode": "area"},
    {"mode": "bilinear"},
    {"mode": "bilinear", "align_corners": True},
    {"mode": "bilinear", "antialias": True},
    {"mode": "bicubic"},
    {"mode": "bicubic", "antialias": True},
]


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("factor", [0.25, 0.5, 2, 4])
def test_interpolate(factor, options):
    check(lambda x: F.interpolate(x, scale_factor=factor, **options))


def test_hidden_neighbours_do_not_count():
    """The mean of the visible neighbours that bilinear interpolation weights, by hand."""
    mask = ck.BlockMask.from_visible(torch.tensor([[[True, False, True]]]))
    images = torch.tensor([1.0, 100.0, 3.0], dtype=torch.float64).view(1, 1, 1, 3)
    found = F.interpolate(Packed.gather(images, mask), scale_factor=2, mode="bilinear")
    assert found.features.flatten().tolist() == [1.0] * 4 + [3.0] * 4


# -- rehearsal ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(C, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.layer = nn.Sequential(nn.ReLU(), last)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.layer(self.stem(x))


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (
            nn.Conv2d(4, 4, 3, 2, 1),
            ValueError,
            r"conv2d in .*: stride must .* 1 here, got \(2, 2\)",
        ),
        (nn.Conv2d(4, 4, 3), ValueError, "conv2d in .*: padding must keep the grid of blocks"),
        (nn.Unfold(3), NotImplementedError, "unfold in .*: its columns are positions of a dense"),
        (nn.MaxPool2d(3, 3), ValueError, "max_pool2d in .*: stride must be a power of two"),
    ],
)
def test_refused_before_anything_is_computed(last, error, message):
    model = Net(last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, random = torch.randn(B, C, H, W), torch.get_rng_state()
    with pytest.raises(error, match=rf"^{message}.*\(module layer.1\); found before anything was"):
        ck.sparsify(model)(images, MASK)
    assert model.runs == 0
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_rehearsal_leaves_everything_as_it_was():
    model = Net(nn.Conv2d(4, 4, 3, padding=1))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    sparse, images, random = ck.sparsify(model), torch.randn(B, C, H, W), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        sparse.check(images, MASK)
    assert model.runs == 0
    assert not calls
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sparse(images, MASK)
    assert model.runs == len(calls) == 1


def test_what_cannot_be_rehearsed_runs():
    class Asks(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 1e9 else x

    images = torch.randn(B, C, H, W)
    assert torch.equal(ck.sparsify(Asks())(images, MASK).features, pack(images).features)


# -- FLOPs --------------------------------------------------------------------------------------

CONVOLVED = [  # module, taps that every output position multiplies, outputs for each input
    (nn.Conv2d(C, 8, 3, padding=1), 9 * C * 8, 1),
    (nn.Conv2d(C, 8, 3, 2, padding=1), 9 * C * 8, 1 / 4),
    (nn.Conv2d(C, 9, 3, padding=1, groups=3), 9 * (C // 3) * 9, 1),
    (nn.Conv2d(C, 8, 1), C * 8, 1),
    (nn.Conv2d(C, 8, 2, 2), 4 * C * 8, 1 / 4),
    (nn.Conv2d(C, C, 3, padding=1, groups=C), 9 * C, 1),
    (nn.ConvTranspose2d(C, 8, 2, 2), C * 8, 4),
    (nn.ConvTranspose2d(C, 8, 4, 2, 1), 4 * C * 8, 4),
    (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(C, 8, 3, 2)), 9 * C * 8, 1 / 4),
    (nn.Conv2d(C, 8, 3, padding=1, padding_mode="reflect"), 9 * C * 8, 1),
]


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize(("module", "taps", "outputs"), CONVOLVED)
def test_flops_by_hand(module, taps, outputs, side):
    features = torch.randn(MASK.num_visible, side * side, C, requires_grad=True)
    expected = 2 * taps * outputs * MASK.num_visible * side * side
    with FlopCounterMode(display=False) as forward:
        y = module(Packed(features, MASK))
    with FlopCounterMode(display=False) as backward:
        y.features.sum().backward()
    assert forward.get_total_flops() == expected
    # of the input and of the weight; without kernels for groups PyTorch's formula forgets them
    in_groups = getattr(module, "groups", 1) == 3
    times = 4 if in_groups and why_not("cpu", features) is not None else 2
    assert backward.get_total_flops() == times * expected
