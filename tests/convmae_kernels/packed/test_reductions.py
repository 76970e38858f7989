"""Reductions of `Packed` over positions, images and channels, against the values themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convmae_kernels as ck
from convmae_kernels import Packed, check_equivalence
from convmae_kernels.packed import MaskedDense
from tests.support.packed_maps import (
    MASK,
    VISIBLE,
    B,
    C,
    as_rows,
    both_layouts,
    hide,
    make_map,
    pack,
    values_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

REDUCTIONS = {  # of a map and its dimensions; the same of a tensor, where 0 is what nothing gives
    "mean": lambda x, d, **k: x.mean(d, **k),
    "sum": lambda x, d, **k: torch.sum(x, d, **k),
    "amax": lambda x, d, **k: torch.amax(x, d, **k),
    "amin": lambda x, d, **k: x.amin(d, **k),
    "var": lambda x, d, **k: x.var(d, **k),
    "var, biased": lambda x, d, **k: torch.var(x, d, False, **k),
    "var, correction": lambda x, d, **k: torch.var(x, dim=d, correction=3, **k),
    "std": lambda x, d, **k: x.std(d, **k),
    "std, biased": lambda x, d, **k: torch.std(x, dim=d, unbiased=False, **k),
    "var_mean": lambda x, d, **k: torch.stack(torch.var_mean(x, d, **k)),
    "std_mean": lambda x, d, **k: torch.stack(torch.std_mean(x, d, correction=0, **k)),
    "logsumexp": lambda x, d, **k: x.logsumexp(d, **k),
    "special.logsumexp": lambda x, d, **k: torch.special.logsumexp(x, d, **k),
    "norm": lambda x, d, **k: x.norm(dim=d, **k),
    "norm 1": lambda x, d, **k: torch.norm(x, 1, d, **k),
    "norm 3": lambda x, d, **k: torch.linalg.vector_norm(x, 3, d, **k),
    "norm inf": lambda x, d, **k: torch.linalg.vector_norm(x, float("inf"), d, **k),
}
both_keep = pytest.mark.parametrize("keepdim", [False, True])


def run(function, make, images):
    """A function's result and the gradient that it gives the images."""
    images = images.clone().requires_grad_()
    y = function(make(images))
    (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return y.detach(), torch.where(VISIBLE, images.grad, 0)


def same(function, expected):
    """Packed features, the dense twin, and what is expected of the values, with gradients."""
    images = make_map()
    packed = run(function, lambda x: pack(hide(x)), images)
    twin = run(function, lambda x: MaskedDense(x, MASK).cleared(), images)
    wanted = run(expected, lambda x: x, images)
    for found in (packed, twin):
        assert type(found[0]) is torch.Tensor
        torch.testing.assert_close(found, wanted)


def image_by_image(function, images):
    """A function of the visible values `[C, n]` of each image, 0 where there are none."""
    results = [function(values_of(images, i)) for i in (0, 2, 3)]
    results.insert(1, torch.zeros_like(results[0]))
    return torch.stack(results, 1 if results[0].shape[:1] == (2,) else 0)


@both_keep
@both_layouts
@pytest.mark.parametrize("name", REDUCTIONS)
def test_over_the_positions_of_each_image(name, last, keepdim):
    function = REDUCTIONS[name]

    def reduced(x):
        x = x.permute(0, 2, 3, 1) if last else x
        return function(x, (1, 2) if last else (-2, -1), keepdim=keepdim)

    def expected(images):
        y = image_by_image(lambda v: function(v, 1), images)
        if not keepdim:
            return y
        return y.unsqueeze(-2).unsqueeze(-2) if last else y.unsqueeze(-1).unsqueeze(-1)

    same(reduced, expected)


@both_keep
@pytest.mark.parametrize("name", REDUCTIONS)
def test_of_tokens(name, keepdim):
    function = REDUCTIONS[name]

    def expected(images):
        y = image_by_image(lambda v: function(v, 1), images)
        return y.unsqueeze(-1) if keepdim else y

    same(lambda x: function(x.flatten(2), -1, keepdim=keepdim), expected)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_over_positions_and_channels(name):
    function = REDUCTIONS[name]
    same(
        lambda x: function(x, (1, 2, 3)),
        lambda x: image_by_image(lambda v: function(v.flatten()[None], 1), x)[..., 0],
    )
    same(
        lambda x: function(x.view(B, 3, 2, 12, 16), (2, 3, 4), keepdim=True),
        lambda x: image_by_image(lambda v: function(v.view(3, -1), 1), x)[..., None, None, None],
    )


@both_keep
@pytest.mark.parametrize("name", REDUCTIONS)
def test_over_images_and_positions(name, keepdim):
    """As a BatchNorm of one's own does."""
    function = REDUCTIONS[name]

    def expected(images):
        y = function(images.movedim(1, 0)[:, VISIBLE[:, 0]], 1)
        return y[..., None, :, None, None] if keepdim else y

    same(lambda x: function(x, (0, 2, 3), keepdim=keepdim), expected)


@pytest.mark.parametrize(
    "name", ["mean", "sum", "amax", "amin", "std", "var", "norm", "max", "min"]
)
def test_over_everything(name):
    images = make_map()
    found, rows = getattr(pack(hide(images)), name)(), as_rows(images)
    torch.testing.assert_close(found, getattr(rows, name)())
    torch.testing.assert_close(getattr(MaskedDense(images, MASK), name)(), found)


def test_of_no_image():
    """Without visible blocks there is nothing, and it is 0."""
    mask = ck.BlockMask.from_visible(torch.zeros(2, 3, 4).bool())
    x = Packed(torch.zeros(0, 16, C), mask)
    for name, function in REDUCTIONS.items():
        y = function(x, (2, 3))
        assert y.shape[-2:] == (2, C), name
        assert not y.any()


@pytest.mark.parametrize("log", [False, True])
def test_softmax_over_positions(log):
    function = F.log_softmax if log else F.softmax

    def expected(images):
        y = torch.zeros_like(images)
        for i in (0, 2, 3):
            rows = function(values_of(images, i), 1)
            y[i] = y[i].masked_scatter(VISIBLE[i].expand_as(y[i]), rows)
        return y

    def of_map(x):
        y = function(x.flatten(2), dim=-1).view(x.shape)
        return y.dense() if isinstance(y, Packed) else y.masked()

    same(of_map, expected)


class Norms(nn.Module):
    """Norms of one's own: of images, positions, channels; ill-placed statistics would show."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.weight = nn.Parameter(torch.rand(C, 1, 1) + 0.5)

    def forward(self, x):
        x = self.conv(x)
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-3).sqrt() * self.weight
        x = x / x.std((1, 2, 3), keepdim=True).clamp_min(1e-3)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-3)
        x = F.normalize(x.flatten(2), dim=-1).view(x.shape)
        return x + x.amin((2, 3), keepdim=True) * x.logsumexp((2, 3), keepdim=True)


def test_norms_of_ones_own():
    found = check_equivalence(Norms(), make_map(), MASK)
    assert 0 < found.outputs < 1e-12
    assert 0 < found.gradients < 1e-10


# -- instance normalisation -----------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "affine": {"affine": True},
    "running": {"affine": True, "track_running_stats": True},
    "momentum": {"track_running_stats": True, "momentum": 0.4},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_instance_norm(name, training):
    """As PyTorch's, of the visible values of each image in a row."""
    norm = nn.InstanceNorm2d(C, **OPTIONS[name]).double().train(training)
    plain = nn.InstanceNorm1d(C, **OPTIONS[name]).double().train(training)
    for module in (norm, plain):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim():
                with torch.no_grad():
                    tensor.copy_(torch.linspace(0.5, 2, C))
    images = 3 * make_map() + 1
    momentum, means, variances = plain.momentum, [], []
    before = {key: buffer.clone() for key, buffer in plain.named_buffers()}
    found = norm(pack(hide(images)))
    for i in (0, 2, 3):
        expected = plain(values_of(images, i)[None])[0]
        torch.testing.assert_close(found.dense()[i][:, VISIBLE[i, 0]], expected)
        means.append(values_of(images, i).mean(1))
        variances.append(values_of(images, i).var(1))
    if plain.track_running_stats and training:
        for key, values in (("running_mean", means), ("running_var", variances)):
            moved = before[key].lerp(torch.stack(values).mean(0), momentum)
            torch.testing.assert_close(norm.get_buffer(key), moved)
    elif plain.track_running_stats:
        assert torch.equal(norm.running_mean, before["running_mean"])


def test_instance_norm_of_single_values():
    full = ck.BlockMask.from_ids(torch.tensor([[0], [1]]), (1, 2))
    x = Packed(torch.ones(2, 1, C), full)
    with pytest.raises(ValueError, match="more than 1 visible position in an image, got 1"):
        nn.InstanceNorm2d(C)(x)
    assert nn.InstanceNorm2d(C, track_running_stats=True).eval()(x).shape == (2, C, 1, 2)


# -- U-Nets ---------------------------------------------------------------------------------------


class Stage(nn.Sequential):
    """Two times convolution, InstanceNorm, LeakyReLU, the first with a stride, as in nnU-Net."""

    def __init__(self, before, after, stride):
        layers = []
        for i in range(2):
            layers += [
                nn.Conv2d(after if i else before, after, 3, 1 if i else stride, 1),
                nn.Dropout2d(0.1),
                nn.InstanceNorm2d(after, affine=True),
                nn.LeakyReLU(0.01, inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """A U-Net with deep supervision: a list of maps, finest first."""

    def __init__(self, widths=(4, 6, 8)):
        super().__init__()
        self.encoder = nn.ModuleList(
            Stage(before, after, 1 if i == 0 else 2)
            for i, (before, after) in enumerate(zip((2, *widths), widths))
        )
        pairs = list(zip(widths[1:], widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, high, 2, 2) for deep, high in pairs)
        self.decoder = nn.ModuleList(Stage(2 * high, high, 1) for _, high in pairs)
        self.heads = nn.ModuleList(nn.Conv2d(high, 3, 1) for _, high in pairs)

    def forward(self, x):
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        for up, stage, head, skip in zip(self.up, self.decoder, self.heads, skips[-2::-1]):
            x = stage(torch.cat((up(x), skip), dim=1))
            outputs.append(head(x))
        return outputs[::-1]


@pytest.mark.parametrize("training", [True, False])
def test_a_unet(training):
    torch.manual_seed(0)
    model = UNet().train(training)
    found = check_equivalence(model, make_map(2), MASK)
    assert 0 < found.outputs < 1e-12
    assert 0 < found.gradients < 1e-10
    outputs = ck.sparsify(model.double())(make_map(2), MASK)
    assert [tuple(y.shape) for y in outputs] == [(B, 3, 12, 16), (B, 3, 6, 8)]
