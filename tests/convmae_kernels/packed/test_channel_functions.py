"""Views, indices and parts of channels, and functions along them, against dense maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convmae_kernels as ck
from convmae_kernels import Packed, check_equivalence
from convmae_kernels.testing import random_tensor
from tests.support.packed_maps import (
    MASK,
    SIDE,
    VISIBLE,
    B,
    C,
    H,
    W,
    both_layouts,
    check_like_dense,
    hide,
    make_map,
    pack,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CHANNELS = {  # of x and its dimension of channels
    "first": lambda x, c: x.narrow(c, 0, 2),
    "narrow": lambda x, c: torch.narrow(x, dim=c, start=1, length=3),
    "select": lambda x, c: x.select(c, -2),
    "torch.select": lambda x, c: torch.select(x, c, 1),
    "index_select": lambda x, c: x.index_select(c, torch.tensor([4, 0, 0])),
    "index_select, names": lambda x, c: torch.index_select(x, dim=c, index=torch.tensor([5])),
    "roll": lambda x, c: x.roll(2, c),
    "roll, names": lambda x, c: torch.roll(x, shifts=(1,), dims=(c,)),
    "flip": lambda x, c: x.flip(c),
    "torch.flip": lambda x, c: torch.flip(x, (c,)),
    "repeat": lambda x, c: x.repeat(*(2 if d == c else 1 for d in range(4))),
    "tile": lambda x, c: torch.tile(x, tuple(2 if d == c else 1 for d in range(4))),
    "repeat_interleave": lambda x, c: x.repeat_interleave(2, c),
    "repeat_interleave, names": lambda x, c: torch.repeat_interleave(x, 3, dim=c),
    "chunk": lambda x, c: x.chunk(3, c),
    "split": lambda x, c: x.split([1, 5], c),
    "split_with_sizes": lambda x, c: x.split_with_sizes([1, 5], c),
    "tensor_split": lambda x, c: torch.tensor_split(x, 4, dim=c),
    "x.tensor_split": lambda x, c: x.tensor_split((1, 4), dim=c),
    "unbind": lambda x, c: x.unbind(c),
    "torch.unbind": lambda x, c: torch.unbind(x, dim=c)[2] * 3,
    "cat": lambda x, c: torch.cat([x, x.square(), x], c),
    "cat, axis": lambda x, c: torch.concat([x, x], axis=c),
    "stack": lambda x, c: torch.stack([x, x.exp()], c),
    "stack, end": lambda x, c: torch.stack([x, x.exp(), 2 * x], -1),
    "stack, sum": lambda x, c: torch.stack([x, x.exp()], c).sum(c),
    "stack, end, weights": lambda x, c: (
        torch.stack([x, x.sin()], dim=-1) * torch.tensor([0.3, 0.7]).double()
    ).sum(-1),
    "expand": lambda x, c: x.sum(c, keepdim=True).expand(*(5 if d == c else -1 for d in range(4))),
    "expand_as": lambda x, c: x.amax(c, keepdim=True).expand_as(x) * x,
    "broadcast_to": lambda x, c: torch.broadcast_to(x.mean(c, keepdim=True), x.shape),
    "softmax": lambda x, c: x.softmax(c),
    "F.softmax": lambda x, c: F.softmax(x, dim=c),
    "softmax, dtype": lambda x, c: torch.softmax(x, c, dtype=torch.float32),
    "log_softmax": lambda x, c: F.log_softmax(x, dim=c),
    "special.softmax": lambda x, c: torch.special.softmax(x, c),
    "softmin": lambda x, c: F.softmin(x, dim=c),
    "cumsum": lambda x, c: x.cumsum(c),
    "cumprod": lambda x, c: torch.cumprod(x, dim=c),
    "sort": lambda x, c: list(x.sort(c, descending=True)),
    "sort, names": lambda x, c: torch.sort(x, dim=c).values,
    "topk": lambda x, c: list(x.topk(2, c)),
    "topk, names": lambda x, c: torch.topk(x, 3, dim=c, largest=False)[0],
    "argsort": lambda x, c: x.argsort(c),
    "max": lambda x, c: list(x.max(c)),
    "max, keepdim": lambda x, c: torch.max(x, dim=c, keepdim=True)[0],
    "min": lambda x, c: x.min(c, keepdim=True).values,
    "argmax": lambda x, c: x.argmax(c),
    "argmin": lambda x, c: torch.argmin(x, dim=c, keepdim=True),
    "glu": lambda x, c: F.glu(x, c),
    "GLU": lambda x, c: nn.GLU(c)(x),
    "normalize": lambda x, c: F.normalize(x, dim=c),
    "normalize, p": lambda x, c: F.normalize(x, p=1, dim=c),
    "cosine_similarity": lambda x, c: F.cosine_similarity(x, x.exp(), dim=c),
    "sum": lambda x, c: x.sum(c),
    "mean": lambda x, c: x.mean(dim=c),
    "amax": lambda x, c: torch.amax(x, (c,)),
    "amin": lambda x, c: x.amin(c, keepdim=True),
    "prod": lambda x, c: x.prod(c),
    "var": lambda x, c: x.var(c),
    "var, biased": lambda x, c: torch.var(x, c, False),
    "var, correction": lambda x, c: x.var(dim=c, correction=2, keepdim=True),
    "std": lambda x, c: x.std(c, keepdim=True),
    "var_mean": lambda x, c: list(torch.var_mean(x, dim=c, unbiased=False, keepdim=True)),
    "std_mean": lambda x, c: list(torch.std_mean(x, c)),
    "logsumexp": lambda x, c: x.logsumexp(c),
    "norm": lambda x, c: x.norm(dim=c),
    "norm 3": lambda x, c: torch.linalg.vector_norm(x, 3, c),
    "any": lambda x, c: (x > 0.9).any(c),
    "all": lambda x, c: torch.all(x > 0.1, dim=c),
    "view of groups": lambda x, c: x.unflatten(c, (2, 3)),
    "flatten of groups": lambda x, c: x.unflatten(c, (3, 2)).exp().flatten(c, c + 1),
    "movedim": lambda x, c: x.movedim(c, -1),
    "moveaxis": lambda x, c: torch.moveaxis(x, (c, 0), (0, 1)),
    "transpose": lambda x, c: x.transpose(1, 2) * 2,
    "swapaxes": lambda x, c: torch.swapaxes(x, 1, -1),
    "squeeze": lambda x, c: x.sum(c, keepdim=True).squeeze(c),
    "unsqueeze": lambda x, c: x.unsqueeze(c).unsqueeze(-1),
    "tokens": lambda x, c: x.flatten(2) if c == 1 else x.flatten(1, 2),
    "local_response_norm": lambda x, c: F.local_response_norm(
        x if c == 1 else x.permute(0, 3, 1, 2), 3, 0.1
    ),
}


@both_layouts
@pytest.mark.parametrize("name", CHANNELS)
def test_functions_of_channels(name, last):
    check_like_dense(lambda x: CHANNELS[name](x, 3 if last else 1), last)


INDICES = {
    "slice": (slice(None), slice(1, 4)),
    "step": (slice(None), slice(None, None, 2)),
    "step, start": (slice(None), slice(1, None, 3), ...),
    "number": (slice(None), 2),
    "number, end": (..., -1, slice(None), slice(None)),
    "bool": (slice(None), torch.tensor([True, False, True, False, False, True])),
    "list": (slice(None), [3, 0, 3]),
    "tensor": (slice(None), torch.tensor([1, 0])),
    "new": (slice(None), None, slice(0, 2)),
    "new, end": (..., None),
    "all": (...,),
    "positions": (slice(None), slice(0, 2), slice(None), slice(0, None)),
    "even": (..., slice(None, None, 2), slice(None, None, 2)),
    "odd": (..., slice(1, None, 2), slice(None, None, 2)),
    "ends past the axis": (..., slice(-99, 99), slice(-2 * SIDE * 8, 1000, None)),
    "ends from its end": (..., slice(-H + 1, None, 2), slice(-W, W, 2)),
    "every fourth": (slice(None), slice(2, None), slice(3, None, 4), slice(2, None, 4)),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices(name):
    index = INDICES[name]
    check_like_dense(lambda x: x[index], exact=True)
    check_like_dense(lambda x: x.permute(0, 3, 1, 2)[index] * 2.0, last=True)


@pytest.mark.parametrize("name", [n for n, i in INDICES.items() if None not in i])
def test_assignments(name):
    index = INDICES[name]

    def assigned(value):
        def function(x):
            y = x.clone()
            y[index] = value(x)
            return y

        return function

    check_like_dense(assigned(lambda x: -1.5), exact=True)
    check_like_dense(assigned(lambda x: x[index] * 2), exact=True)
    check_like_dense(assigned(lambda x: torch.full((1,), 3.0, dtype=torch.float64)), exact=True)


@pytest.mark.parametrize("part", [slice(0.5, None), slice(None, 7.5), slice(None, None, 1.0)])
def test_ends_of_positions_are_integers(part):
    with pytest.raises(TypeError, match="integer"):
        pack(make_map())[:, :, part]
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        pack(make_map())[:, :, ::0]


def test_assignments_write_into_the_features():
    x = pack(make_map())
    part = x[:, 1:3]
    part += 1
    assert torch.equal(part.features, x.features[..., 1:3])
    x[x < 1] = 0.0
    assert bool(((x.features >= 1) | (x.features == 0)).all())
    assert bool((x.features[..., 0] == 0).any())
    with pytest.raises(ValueError, match="packed features cannot be written into a tensor"):
        make_map()[:, :2] = x[:, :2]


REFUSED = {
    "an image": (lambda x: x[0], "it chooses among images"),
    "images": (lambda x: x[1:3], "it chooses among images"),
    "rows": (lambda x: x[:, :, 1:], "it chooses among rows"),
    "a column": (lambda x: x[..., 0], "it chooses among columns"),
    "backwards": (lambda x: x.flip(2), "only along channels, got dim=2, the rows"),
    "other steps": (lambda x: x[:, :, ::2], "only the same step of rows and columns"),
    "a step of 3": (lambda x: x[..., ::3, ::3], "only the same step of rows and columns"),
    "too large a step": (lambda x: x[..., ::8, ::8], "a step of 8 does not divide the blocks"),
    "values": (lambda x: x[x > 0], "the number of values that it chooses differs"),
    "two lists": (lambda x: x[:, None, [0]][:, [0], [0]], "only one list or tensor"),
    "positions and channels": (lambda x: x.flatten(1), "mixes channels, positions or images"),
    "images and channels": (lambda x: x.view(B * 2, 3, H, W), "mixes channels, positions"),
    "a split of rows": (lambda x: x.view(B, C, 2, H // 2, W), "must be split by the same factor"),
    "a large split": (lambda x: x.view(B, C, 2, 6, 4, 4), "by the same factor"),
    "transposed tokens": (lambda x: x.transpose(2, 3).flatten(2), "mixes channels, positions"),
    "rows alone": (lambda x: x.mean(2), "it reduces channels, or all positions of an image"),
    "batch alone": (lambda x: x.mean(0), "it reduces channels, or all positions of an image"),
    "expanded rows": (lambda x: x.expand(B, C, H, 2 * W), "only channels expand"),
    "repeated images": (lambda x: x.repeat(2, 1, 1, 1), "only channels are repeated"),
    "softmax of columns": (lambda x: x.softmax(-1), "only along channels, got dim=-1"),
    "argmax of all": (lambda x: x.argmax(), "positions have no indices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_grid_of_blocks_cannot_express_is_refused(name):
    function, why = REFUSED[name]

    class Calls(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(NotImplementedError, match=f"in Calls.forward: .*{why}"):
        Calls()(pack(make_map()))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.view(B, 4, H, W), r"\(4, 6, 12, 16\) cannot be viewed as \(4, 4, 12, 16\)"),
        (lambda x: x.unsqueeze(6), "dim=6 of a map of 4 dimensions"),
        (lambda x: x.mean(7), "dim=7 of a map of 4 dimensions"),
        (lambda x: x[:, 0, 0, 0, 0], "an index of 5 entries into 4 dimensions"),
        (lambda x: F.channel_shuffle(x, 4), "groups=4 must divide the 6 channels"),
        (lambda x: F.pixel_shuffle(x, 2), "4 must divide the 6 channels"),
        (lambda x: F.prelu(x.permute(0, 2, 3, 1), torch.ones(C).double()), "it needs .B, C, "),
        (lambda x: x.unflatten(1, (2, 3)) + x, "two Packed of one operation have shapes"),
        (lambda x: F.dropout2d(x.permute(0, 2, 3, 1)), "it needs .B, C, H, W. or .B, C, N."),
    ],
)
def test_wrong_arguments_are_named(function, why):
    with pytest.raises(ValueError, match=why):
        function(pack(make_map()))


# -- positions that become channels, and back -----------------------------------------------------


def space_to_depth(x, k, order):
    b, c, h, w = x.shape
    y = x.view(b, c, h // k, k, w // k, k).permute(order).contiguous()
    return y.view(b, c * k * k, h // k, w // k)


SHUFFLES = {
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "PixelUnshuffle(4)": nn.PixelUnshuffle(4),
    "PixelShuffle": nn.Sequential(nn.PixelUnshuffle(4), nn.PixelShuffle(2)),
    "ChannelShuffle": nn.ChannelShuffle(3),
    "space to depth": lambda x: space_to_depth(x, 2, (0, 3, 5, 1, 2, 4)),
    "space to depth, 4": lambda x: space_to_depth(x, 4, (0, 1, 5, 3, 2, 4)),
    "depth to space": lambda x: (
        x.repeat(1, 2, 1, 1)
        .view(B, 3, 2, 2, H, W)
        .permute(0, 1, 4, 2, 5, 3)
        .reshape(B, 3, 2 * H, 2 * W)
    ),
    "windows": lambda x: x.view(B, C, H // 2, 2, W // 2, 2).amax((3, 5)),
    "focus": lambda x: torch.cat(
        [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
    ),
    "shuffle": lambda x: x.view(B, 2, C // 2, H, W).transpose(1, 2).contiguous().view(B, C, H, W),
    "shuffle, reshaped": lambda x: x.reshape(B, 3, 2, H, W).permute(0, 2, 1, 3, 4).flatten(1, 2),
    "one channel": lambda x: x.permute(0, 2, 3, 1)[..., :1].reshape(B, H, W),
    "one channel, back": lambda x: x[:, 0].view(B, H, W, 1).flatten(2).unsqueeze(1),
    "one channel of tokens": lambda x: x[:, :1].flatten(1).view(B, 1, H, 1, W),
    "there and back": lambda x: x.flatten(2).transpose(1, 2).view(B, H, W, C).permute(0, 3, 1, 2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2) @ torch.ones(C, 5).double().cumsum(0),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles(name):
    check_like_dense(SHUFFLES[name], exact=name != "tokens")


# -- attention over channels, and sums over positions ---------------------------------------------


class SplitAttention(nn.Module):
    """As in ResNeSt: a softmax over groups of channels, of statistics of the whole map."""

    def forward(self, x):
        b, c, h, w = x.shape
        groups = x.view(b, 2, c // 2, h, w)
        gap = groups.sum(1).mean((2, 3), keepdim=True)
        weights = torch.stack([gap, gap.sin()], 1).softmax(1)
        return (groups * weights.view(b, 2, c // 2, 1, 1)).sum(dim=1).contiguous()


class SelectiveKernels(nn.Module):
    """As in SKNet: paths in a stack, a softmax over them."""

    def forward(self, x):
        paths = torch.stack([x, x.exp(), x.square()], 1)
        scores = paths.sum(1).mean((2, 3)).unsqueeze(1) * torch.arange(3).double().view(1, 3, 1)
        return (paths * scores.softmax(1)[..., None, None]).sum(1)


class GlobalContext(nn.Module):
    """As in GCNet: a mean over positions with weights of a softmax over positions."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(C, 1, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        weights = F.softmax(self.score(x).reshape(b, 1, h * w), dim=-1).unsqueeze(3)
        context = x.reshape(b, c, h * w).unsqueeze(1) @ weights
        return x + context.view(b, c, 1, 1)


class ChannelAttention(nn.Module):
    """As in XCiT and EdgeNeXt: a softmax over channels against channels, of sums over positions."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.temperature = nn.Parameter(torch.full((2, 1, 1), 1.5))

    def forward(self, x):
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1)
        y = (weights @ v).permute(0, 3, 1, 2).reshape(b, h * w, c)
        return y.transpose(1, 2).reshape(b, c, h, w)


class Fusion(nn.Module):
    """As in BiFPN: a stack at the end, times one weight for each map."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.4, 1.3]))

    def forward(self, x):
        weights = F.relu(self.weight)
        return (torch.stack([x, x.sin()], -1) * weights).sum(-1) / (weights.sum() + 1e-4)


class Ghost(nn.Module):
    """As in GhostNet and FasterNet: slices, computed in part, and assigned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        y = x.clone()
        y[:, :2, :, :] = self.conv(x[:, :2, :, :])
        return torch.cat([y, x[:, 2:]], dim=1)[:, : x.shape[1], :, :]


MODULES = {
    "split attention": SplitAttention(),
    "selective kernels": SelectiveKernels(),
    "global context": GlobalContext(),
    "channel attention": ChannelAttention(),
    "fusion": Fusion(),
    "ghost": Ghost(),
    "PReLU": nn.Sequential(nn.Conv2d(C, C, 1), nn.PReLU(C)),
    "PReLU of one": nn.Sequential(nn.Conv2d(C, C, 1), nn.PReLU()),
    "Dropout2d": nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(C, C, 1)),
    "Dropout2d in place": nn.Sequential(nn.Conv2d(C, C, 1), nn.Dropout2d(0.5, inplace=True)),
    "AlphaDropout": nn.Sequential(nn.AlphaDropout(0.3), nn.Conv2d(C, C, 1)),
    "RReLU": nn.Sequential(nn.Conv2d(C, C, 1), nn.RReLU()),
    "ChannelShuffle": nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(C, 4, 3, padding=1)),
    "PixelShuffle": nn.Sequential(nn.Conv2d(C, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3, 1, 1)),
    "PixelUnshuffle": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * C, 3, 3, padding=1)),
    "GLU": nn.Sequential(nn.Conv2d(C, 4, 1), nn.GLU(1), nn.Conv2d(2, 2, 3, padding=1)),
    "Softmax2d": nn.Sequential(nn.Conv2d(C, 4, 1), nn.Softmax2d()),
    "LocalResponseNorm": nn.Sequential(nn.LocalResponseNorm(3), nn.Conv2d(C, 2, 1)),
    "InstanceNorm2d": nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_equivalent(name, training):
    found = check_equivalence(MODULES[name].train(training), make_map(), MASK)
    assert found.outputs < 1e-12
    assert 0 < found.gradients < 1e-11 or name in ("split attention", "selective kernels")


def test_dropout2d_draws_what_it_draws_densely():
    images = make_map()
    for inplace in (False, True):
        torch.manual_seed(3)
        found = nn.Dropout2d(0.4, inplace)(pack(hide(images)))
        torch.manual_seed(3)
        expected = torch.where(VISIBLE, nn.Dropout2d(0.4)(images), 0)
        assert torch.equal(found.dense(), expected)
    zero = (expected == 0).flatten(2).all(2)[[0, 2, 3]]
    assert bool(zero.any())
    assert not bool(zero.all())


def test_gradients_of_views():
    """Nothing is lost on the way through 5 and 6 dimensions, and back."""
    features = random_tensor((MASK.num_visible, SIDE * SIDE, C), torch.float64).requires_grad_()

    def function(features):
        x = Packed(features, MASK)
        y = SHUFFLES["space to depth"](SHUFFLES["shuffle"](x))
        return SplitAttention()(y)[:, 1:].features

    assert torch.autograd.gradcheck(function, (features,), fast_mode=True)


@pytest.mark.parametrize("axes", ["BHW", "BCCHW", "BCN", "BHCWC"])
def test_packed_of_other_axes(axes, tmp_path):
    channels = (2, 3)[: axes.count("C")]
    features = random_tensor((MASK.num_visible, 4, *channels))
    x = Packed(features, MASK, axes=axes)
    sizes = iter(channels)
    expected = {"B": B, "H": 6, "W": 8, "N": 48}
    shape = tuple(next(sizes) if a == "C" else expected[a] for a in axes)
    assert (tuple(x.shape), x.ndim, x.dim()) == (shape, len(axes), len(axes))
    torch.save(x, tmp_path / "x.pt")
    again = torch.load(tmp_path / "x.pt")
    assert torch.equal(again.dense(), x.dense())
    assert again.axes == axes
    with pytest.raises(ValueError, match="features must have 5 dimensions for axes BCCCHW"):
        Packed(features, MASK, axes="BCCCHW")


@pytest.mark.parametrize("mask", [ck.BlockMask.full(B, (3, 4)), MASK], ids=["full", "ragged"])
def test_products_of_matrices(mask):
    images, matrices = make_map(), random_tensor((B, 5, C), torch.float64)
    x = pack(hide(images, 0), mask=mask).flatten(2)
    dense = torch.where(mask.to_dense(SIDE), hide(images, 0), 0).flatten(2)
    torch.testing.assert_close((matrices @ x).dense(), matrices @ dense)
    torch.testing.assert_close((x.transpose(1, 2) @ matrices.mT).dense(), dense.mT @ matrices.mT)
    torch.testing.assert_close(torch.bmm(x, x.transpose(1, 2)), dense @ dense.mT)
    with pytest.raises(NotImplementedError, match="attention looks at all positions"):
        x.transpose(1, 2) @ x
