"""`Packed` in convolutions, norms, pooling, layout and random numbers, against dense maps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convmae_kernels as ck
from convmae_kernels import Packed
from convmae_kernels.testing import random_tensor
from tests.support.packed_maps import (
    INF,
    VISIBLE,
    B,
    C,
    H,
    W,
    as_rows,
    assert_same,
    both_layouts,
    hide,
    make_map,
    pack,
    values_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

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
    layers = pytest.importorskip("timm.layers")
    images = make_map()
    module = nn.LayerNorm(C, elementwise_affine=affine).double()
    assert_same(module(pack(hide(images), True)), module(images.permute(0, 2, 3, 1)), True)
    per_position = layers.LayerNorm2d(C, affine=affine).double()
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
    grn = pytest.importorskip("timm.layers.grn")
    for last in (False, True):
        module, images = grn.GlobalResponseNorm(C, channels_last=last).double(), make_map()
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
    """The mean of what is visible, and of the zeros of the padding where they count."""
    module = nn.AvgPool2d(kernel, stride, padding, count_include_pad=include)
    images = make_map()
    seen = F.pad(VISIBLE.double(), [padding] * 4, value=float(include))
    expected = nn.AvgPool2d(kernel, stride, padding)(hide(images, 0))
    expected = expected / F.avg_pool2d(seen, kernel, stride)
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
    "amax": (lambda x, *a, **k: x.amax(*a, **k), lambda v: v.amax(1), 0.0),
    "torch.amax": (torch.amax, lambda v: v.amax(1), 0.0),
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
        without = function(x, dim)
        assert (without.axes, without.shape) == ("BHW", (B, H, W))
        assert_same(without.unsqueeze(-1 if last else 1), expected, last)


def test_reductions_over_everything():
    images = make_map()
    x, rows = pack(hide(images)), as_rows(images)
    for name in ("mean", "sum", "amax", "norm"):
        for found in (getattr(x, name)(), getattr(torch, name)(x)):
            torch.testing.assert_close(found, getattr(rows, name)())
    nothing = Packed(x.features[:0], ck.BlockMask.from_visible(torch.zeros(2, 3, 4).bool()))
    for name in ("mean", "sum", "amax", "norm"):
        assert getattr(nothing, name)().item() == 0
    assert x.float().mean((2, 3), dtype=torch.float64).dtype == torch.float64
    assert x.half().mean((2, 3)).dtype == torch.float16


@pytest.mark.parametrize("size", [1, (1, 1)])
def test_adaptive_pooling_to_one(size):
    images = make_map()
    mean = per_image(images, lambda v: v.mean(1), 0.0)[:, :, None, None]
    most = per_image(images, lambda v: v.amax(1), 0.0)[:, :, None, None]
    x = pack(hide(images))
    for found in (nn.AdaptiveAvgPool2d(size)(x), F.adaptive_avg_pool2d(x, size)):
        torch.testing.assert_close(found, mean)
    for found in (nn.AdaptiveMaxPool2d(size)(x), F.adaptive_max_pool2d(x, size)):
        torch.testing.assert_close(found, most)


@pytest.mark.parametrize("maximum", [False, True])
def test_squeeze_excite(maximum):
    layers = pytest.importorskip("timm.layers")
    module = layers.SEModule(C, rd_channels=3, add_maxpool=maximum).double()
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
        turned = x.permute(*order)
        assert torch.equal(turned.dense(), x.dense().permute(order))
        with pytest.raises(ValueError, match="it needs"):
            F.conv2d(turned, torch.zeros(1, C, 1, 1).double())
    with pytest.raises(ValueError, match="is no order of the dimensions"):
        x.permute(0, 1, 2)


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
    ("package", "name", "arguments"),
    [
        ("timm.layers", "drop_path", (0.4, True)),
        ("timm.layers", "drop_path", (0.4, True, False)),
        ("torchvision.ops", "stochastic_depth", (0.4, "row", True)),
        ("torchvision.ops", "stochastic_depth", (0.4, "batch", True)),
    ],
    ids=["timm", "timm, unscaled", "row", "batch"],
)
def test_stochastic_depth_drops_the_images_that_it_drops_densely(package, name, arguments, last):
    drop = getattr(pytest.importorskip(package), name)
    images = make_map()
    dense = images.permute(0, 2, 3, 1) if last else images
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found = drop(pack(images, last), *arguments)
        torch.manual_seed(seed)
        assert_same(found, drop(dense, *arguments), last, exact=True)
        seen |= {bool((f == 0).all()) for f in found.features}
    assert seen == {True, False}
