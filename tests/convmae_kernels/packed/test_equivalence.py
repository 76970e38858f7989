"""`check_equivalence`, its dense oracle `MaskedDense`, and `sparsify`."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convmae_kernels as ck
from convmae_kernels import EquivalenceError, Packed, check_equivalence, sparsify
from convmae_kernels.packed import HANDLERS, MaskedDense
from convmae_kernels.testing import make_mask, random_tensor

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps
MASK = ck.BlockMask.from_visible(
    torch.tensor([[[1, 0, 1], [1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 0, 0], [1, 0, 0]]]).bool()
)
GRID = 3


def make_images(block=8, channels=3, mask=MASK):
    gh, gw = mask.grid
    return random_tensor((mask.batch_size, channels, gh * block, gw * block))


class Block(nn.Module):
    """A residual block with most of what convolutional networks are made of."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.grn = timm.layers.grn.GlobalResponseNorm(2 * width)
        self.reduce = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.2)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x):
        y = self.conv(x).permute(0, 2, 3, 1)
        y = self.reduce(self.grn(F.gelu(self.expand(self.norm(y)))))
        return x + self.gamma * self.drop(y.permute(0, 3, 1, 2))


class Net(nn.Module):
    """Stride, norms, squeeze-excite, pooling, residuals, two resolutions; a map and logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.block = Block(8)
        self.se = timm.layers.SEModule(8, rd_channels=4, add_maxpool=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.gn = nn.GroupNorm(2, 8)
        self.average = nn.AvgPool2d(2)
        self.up = nn.Upsample(scale_factor=2)
        self.merge = nn.Conv2d(16, 8, 1)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)
        self.head = nn.Linear(8, 5)
        for name, parameter in self.named_parameters():
            if "grn" in name or "norm" in name:
                nn.init.normal_(parameter)

    def forward(self, x):
        x = self.se(self.block(self.act(self.bn(self.stem(x)))))
        x = self.gn(self.pool(x))
        x = self.merge(torch.cat([x, self.up(self.average(x))], dim=1))
        y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        x = x * self.spatial(y).sigmoid()
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a * b, torch.where(a > 0, a, 0.1 * b)], 1)
        return {"map": x, "logits": self.head(x.mean((2, 3)) + x.norm(2, (2, 3)))}


def make_net(training=True):
    torch.manual_seed(0)
    return Net().train(training)


# -- models that are equivalent -----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_network_of_everything(training):
    found = check_equivalence(make_net(training), make_images(), MASK)
    assert 0 < found.outputs < 1e-12
    assert 0 < found.gradients < 1e-12
    assert (0 < found.buffers < 1e-12) if training else (found.buffers == 0)
    names = ["stem", "bn", "act", "block.conv", "block.norm", "block.expand", "block.grn"]
    assert list(found.modules)[: len(names)] == names
    assert list(found.modules)[-1] == ""
    assert set(found.modules) == {name for name, _ in make_net().named_modules()}
    assert max(found.modules.values()) == found.outputs
    assert "modules" not in repr(found)


@pytest.mark.parametrize("mask", ["equal", "all", "row", "column", "ragged"])
def test_masks(mask):
    mask = make_mask(mask)
    found = check_equivalence(make_net(), make_images(mask=mask), mask)
    assert found.outputs < 1e-12


def test_single_precision():
    found = check_equivalence(make_net(), make_images(), MASK, dtype=torch.float32)
    assert 1e-9 < found.outputs < 1e-4
    with pytest.raises(EquivalenceError, match="at most 1e-09 was expected"):
        check_equivalence(make_net(), make_images(), MASK, dtype=torch.float32, tolerance=1e-9)


def test_hidden_pixels_may_be_anything():
    hidden = ~MASK.to_dense(8).expand(-1, 3, -1, -1)
    images = make_images().masked_fill(hidden, float("nan"))
    first = nn.Sequential(nn.ReLU(inplace=True), Net())  # writes into what it is given
    assert check_equivalence(first, images, MASK).gradients < 1e-12
    assert images[hidden].isnan().all()


def test_what_a_pooling_leaves_hidden_does_not_spoil_gradients():
    """A maximum of hidden positions only is infinite, and nobody sees it."""
    norm = nn.GroupNorm(1, 3)

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            return x * self.weight

    model = nn.Sequential(nn.MaxPool2d(2), Scale(), norm)
    assert check_equivalence(model, make_images(), MASK).gradients < 1e-12


def test_random_numbers_are_the_same():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5, inplace=True))
    assert check_equivalence(model, make_images(), MASK).outputs == 0
    model = nn.Sequential(timm.layers.DropPath(0.5), nn.Conv2d(3, 3, 1))
    for seed in range(4):
        assert check_equivalence(model, make_images(), MASK, seed=seed).outputs < 1e-12


def test_a_module_that_is_called_twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    found = check_equivalence(nn.Sequential(conv, nn.ReLU(), conv), make_images(), MASK)
    assert list(found.modules) == ["0", "1", "0#2", ""]


TIMM = ["convnext_atto", "convnextv2_atto", "efficientnet_b0", "regnety_004", "resnet18"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name, training):
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.2} if name != "regnety_004" or training else {}
    model = timm.create_model(name, num_classes=7, **options).train(training)
    for key, parameter in model.named_parameters():
        if "grn" in key or "gamma" in key or key.endswith("bn2.weight"):
            nn.init.normal_(parameter, 0.5, 0.2)  # zero at first, which would hide errors
    found = check_equivalence(model, make_images(32), MASK)
    assert len(found.modules) > 50
    assert found.outputs < 1e-10


# -- what the check leaves alone ----------------------------------------------------------------


def test_the_model_is_left_untouched():
    model = make_net()
    model.se.eval()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    images = make_images().requires_grad_()
    kept, state = images.detach().clone(), torch.get_rng_state()
    check_equivalence(model, images, MASK)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert images.grad is None
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value)
        assert after[name].dtype == value.dtype
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "stem.weight")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_it_can_be_repeated():
    model, images = make_net(), make_images()
    assert check_equivalence(model, images, MASK) == check_equivalence(model, images, MASK)


# -- deviations ---------------------------------------------------------------------------------


class Different(nn.Module):
    """Passes on its input, but packed and dense ones otherwise."""

    def __init__(self, module, packed):
        super().__init__()
        self.inner = module
        self.packed = packed

    def forward(self, x):
        y = self.inner(x)
        return self.packed(y) if isinstance(y, Packed) else y


class NearlyTheSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-6)


DEVIATIONS = {
    "a little": lambda y: y * (1 + 1e-8),
    "at one position": lambda y: y.like(
        torch.cat([y.features[:-1], y.features[-1:] + 1e-6 * y.features[-1:].abs().max()])
    ),
    "nan": lambda y: y * float("nan"),
    "another shape": lambda y: F.interpolate(y, scale_factor=2),
    "two outputs": lambda y: [y, y],
}


@pytest.mark.parametrize("name", DEVIATIONS)
@pytest.mark.parametrize("where", ["stem", "block.conv", "gn", "merge"])
def test_a_deviation_is_named(where, name):
    if name in ("another shape", "two outputs"):  # what follows would stop
        where, model = "1", nn.Sequential(nn.Identity(), Different(nn.ReLU(), DEVIATIONS[name]))
    else:
        model = make_net()
        module = Different(model.get_submodule(where), DEVIATIONS[name])
        model.set_submodule(where, module)
    message = f"packed and dense runs differ: first in the output of module '{where}' (Different)"
    with pytest.raises(EquivalenceError, match=f"^{re.escape(message)}, by a relative error of "):
        check_equivalence(model, make_images(), MASK)


class Amplify(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return (x * self.factor).sin()


def test_rounding_of_an_ill_conditioned_network_is_none_of_a_deviation():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Amplify(1e8))
    assert 1e-9 < check_equivalence(model, make_images(), MASK).outputs < 1e-5
    with pytest.raises(EquivalenceError, match=r"module '1' \(Amplify\), .* at most 1e-09 was exp"):
        check_equivalence(model, make_images(), MASK, tolerance=1e-9)
    model[0] = Different(model[0], DEVIATIONS["a little"])
    with pytest.raises(
        EquivalenceError, match=r"module '0' \(Different\), .* at most 1e-09 was exp"
    ):
        check_equivalence(model, make_images(), MASK)


def test_a_network_of_rounding_alone_is_not_judged():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Amplify(1e15))
    message = r"module '1' .* at most 1e-03 .* Other last bits of the images change it by .* larger"
    with pytest.raises(EquivalenceError, match=message):
        check_equivalence(model, make_images(), MASK)


def test_the_first_deviation_is_named():
    model = make_net()
    for where in ("gn", "stem", "merge"):
        module = Different(model.get_submodule(where), DEVIATIONS["a little"])
        model.set_submodule(where, module)
    with pytest.raises(EquivalenceError, match=r"first in the output of module 'stem' \(Differ"):
        check_equivalence(model, make_images(), MASK)


def test_a_deviation_outside_all_modules_is_that_of_the_model():
    class Model(nn.Module):
        def forward(self, x):
            return x + isinstance(x, Packed)

    with pytest.raises(EquivalenceError, match=r"module '' \(Model\), by a relative error of "):
        check_equivalence(Model(), make_images(), MASK)


def test_a_deviation_of_the_second_call():
    calls = []

    def second(y):
        calls.append(y)
        return y + 1 if len(calls) == 2 else y

    module = Different(nn.Tanh(), second)
    with pytest.raises(EquivalenceError, match=r"output of module '0#2' \(Different\)"):
        check_equivalence(nn.Sequential(module, nn.ReLU(), module), make_images(), MASK)


@pytest.mark.parametrize("where", ["bn", "block.conv", "merge"])
def test_wrong_gradients_are_found(where):
    model = make_net()
    module = Different(
        model.get_submodule(where), lambda y: y.like(NearlyTheSame.apply(y.features))
    )
    model.set_submodule(where, module)
    with pytest.raises(EquivalenceError, match="gradient of .* No module's output differs"):
        check_equivalence(model, make_images(), MASK)


def test_a_missing_gradient_is_found():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), Different(nn.ReLU(), lambda y: y.detach()), nn.Conv2d(4, 4, 1)
    )
    with pytest.raises(EquivalenceError, match="gradient of '0.bias', by a relative error of inf"):
        check_equivalence(model, make_images(), MASK)


def test_a_wrong_gradient_of_the_images_is_found():
    model = Different(nn.Identity(), lambda y: y.like(NearlyTheSame.apply(y.features)))
    with pytest.raises(EquivalenceError, match="gradient of 'images', by a relative error of 1.0"):
        check_equivalence(model, make_images(), MASK)


class Counts(nn.Module):
    """Keeps the mean of what it sees, of packed features another."""

    def __init__(self, wrong):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("flag", torch.tensor(True))
        self.wrong = wrong

    def forward(self, x):
        self.seen = x.detach().mean()
        if isinstance(x, Packed):
            self.seen = self.seen * (1 + self.wrong)
        return x


def test_wrong_buffers_are_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Counts(0.0))
    assert check_equivalence(model, make_images(), MASK).buffers < 1e-12
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Counts(1e-3))
    message = r"buffer '1.seen', by a relative error of 1.00e-03.* No module's output differs"
    with pytest.raises(EquivalenceError, match=message):
        check_equivalence(model, make_images(), MASK)


def test_dense_statistics_are_a_deviation():
    """The usual mistake: statistics of a map in which hidden positions are zero."""

    class Zeros(nn.BatchNorm2d):
        def forward(self, x):
            if not isinstance(x, Packed):
                return super().forward(x)
            return Packed.gather(super().forward(x.dense()), x.mask)

    model = make_net()
    model.bn = Zeros(8)
    with pytest.raises(EquivalenceError, match=r"first in the output of module 'bn' \(Zeros\)"):
        check_equivalence(model, make_images(), MASK)


def test_what_is_not_supported_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(NotImplementedError, match="^flatten in Flatten.forward: "):
        check_equivalence(model, make_images(), MASK)
    model = nn.Conv2d(3, 4, 3)  # dense maps can
    with pytest.raises(ValueError, match="^conv2d in Conv2d._conv_forward: padding must keep"):
        check_equivalence(model, make_images(), MASK)


def test_images_must_fit():
    with pytest.raises(ValueError, match="images"):
        check_equivalence(make_net(), make_images()[:1], MASK)


# -- the oracle ---------------------------------------------------------------------------------


def test_the_oracle_has_all_that_packed_features_have():
    assert set(HANDLERS) == set(MaskedDense.handlers)


def test_the_oracle_is_dense():
    """It convolves whole maps, and a mask with nothing hidden makes it the model itself."""
    full = ck.BlockMask.full(2, (GRID, GRID))
    model, images = make_net(training=False), make_images()
    plain, found = model(images), model(MaskedDense(images, full))
    torch.testing.assert_close(found["logits"], plain["logits"])
    torch.testing.assert_close(found["map"].nchw(), plain["map"])
    x = MaskedDense(images, MASK)
    y = nn.Conv2d(3, 4, 3, padding=1)(x)
    assert y.shape == (2, 4, 24, 24)
    assert y.values[~MASK.to_dense(8).expand_as(y.values)].abs().max() > 0
    assert torch.equal(x.masked(), torch.where(MASK.to_dense(8), images, 0))


# -- sparsify -----------------------------------------------------------------------------------


def test_sparsify_returns_packed():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.GELU())
    images, sparse = make_images(), sparsify(model)
    y = sparse(images, MASK)
    assert isinstance(y, Packed)
    assert y.mask is MASK
    assert y.shape == (2, 8, 6, 6)
    model.eval()
    y = sparse(images, MASK)
    assert torch.equal(y.features, model(Packed.gather(images, MASK)).features)
    visible = MASK.to_dense(2)
    expected = torch.where(visible, model(images), 0)  # the kernel is the stride
    torch.testing.assert_close(sparse(images, MASK, dense=True), expected)
    filled = sparse(images, MASK, dense=True, fill=-3.0)
    torch.testing.assert_close(filled, torch.where(visible, model(images), -3))


def test_sparsify_wraps():
    model = make_net()
    sparse = sparsify(model)
    assert sparse.model is model
    assert [n for n, _ in sparse.named_parameters()] == [
        f"model.{n}" for n, _ in model.named_parameters()
    ]
    assert sparse.eval().model.training is False
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        sparsify(make_net)


def test_sparsify_does_not_read_hidden_pixels():
    hidden = ~MASK.to_dense(8).expand(-1, 3, -1, -1)
    images, sparse = make_images(), sparsify(make_net(training=False))
    plain, other = sparse(images, MASK), sparse(images.masked_fill(hidden, float("nan")), MASK)
    assert torch.equal(plain["map"].features, other["map"].features)
    assert torch.equal(plain["logits"], other["logits"])


def test_sparsify_of_nested_outputs():
    images, sparse = make_images(), sparsify(make_net(training=False))
    packed, dense = sparse(images, MASK), sparse(images, MASK, dense=True, fill=2.0)
    assert isinstance(packed["map"], Packed)
    assert torch.equal(packed["map"].dense(2.0), dense["map"])
    assert torch.equal(packed["logits"], dense["logits"])


def test_sparsify_of_features():
    model = timm.create_model("resnet18", features_only=True).eval()
    images, sparse = make_images(32), sparsify(model)
    with torch.no_grad():
        packed, dense = sparse(images, MASK), sparse(images, MASK, dense=True, fill=-1.0)
        shapes = [x.shape for x in model(images)]
    assert type(packed) is type(dense) is list
    assert all(isinstance(x, Packed) for x in packed)
    assert [x.shape for x in packed] == [x.shape for x in dense] == shapes
    for x, y in zip(packed, dense):
        assert torch.equal(x.dense(-1.0), y)


def test_sparsify_of_a_classifier():
    model = timm.create_model("resnet18", num_classes=7).eval()
    with torch.no_grad():
        images = make_images(32)
        logits = sparsify(model)(images, MASK)
        full = sparsify(model)(images, ck.BlockMask.full(2, (GRID, GRID)))
        expected = model(images)
    assert type(logits) is torch.Tensor
    assert logits.shape == (2, 7)
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2)


def test_sparsify_names_what_is_not_supported():
    model = timm.create_model("vgg11", num_classes=3)
    with pytest.raises(NotImplementedError, match="adaptive_avg_pool2d|conv2d|flatten"):
        sparsify(model)(make_images(32), MASK)
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Unfold(2))
    with pytest.raises(NotImplementedError, match="^unfold in Unfold.forward: "):
        sparsify(model)(make_images(), MASK)


def test_sparsify_needs_blocks_as_large_as_the_stride():
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 4, 4))
    with pytest.raises(ValueError, match="^conv2d in Conv2d._conv_forward: stride must be a power"):
        sparsify(model)(make_images(), MASK)
    with pytest.raises(ValueError, match="images has batch size 1, but the mask is for 2"):
        sparsify(model[0])(make_images()[:1], MASK)
