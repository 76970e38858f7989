"""Networks of timm and torchvision, one for each of the things that they do with channels."""

import pytest
import torch
from torch import nn

import convmae_kernels as ck
from convmae_kernels import EquivalenceError, check_equivalence, sparsify
from convmae_kernels.testing import random_tensor

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

NETWORKS = {  # what they ask for
    "resnest14d": "views in groups, softmax over them",
    "skresnet18": "stacks, sums over a dimension of groups",
    "gcresnext26ts": "softmax and sums over positions",
    "ghostnet_050": "slices",
    "fasternet_t0": "a convolution of some channels, split and joined",
    "cs3darknet_focus_s": "steps of positions",
    "dla60_res2net": "parts of channels in turn",
    "edgenext_xx_small": "attention of channels",
    "test_nfnet": "standardised weights, gains",
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.thorough(but_every=11)
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).train()
    for parameter in model.parameters():
        if parameter.dim() == 1 and bool((parameter == parameter[0]).all()):
            nn.init.normal_(parameter, 0.5, 0.3)  # gains of 0 would hide what they multiply
    mask = ck.BlockMask.random(2, (2, 3), 0.4, torch.Generator().manual_seed(0))
    found = check_equivalence(model, random_tensor((2, 3, 64, 96)), mask)
    assert 0 < found.outputs < 1e-9


def test_shufflenet_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    mask = ck.BlockMask.random(2, (2, 3), 0.4, torch.Generator().manual_seed(0))
    model = models.shufflenet_v2_x0_5()
    found = check_equivalence(model, random_tensor((2, 3, 64, 96)), mask)
    assert 0 < found.outputs < 1e-9


@pytest.mark.parametrize("name", ["FilterResponseNormAct2d", "EvoNorm2dS0"])
def test_norms_that_are_always_in_float32(name):
    """They round more than the dtype of the check; a deviation beyond that is still found."""
    layers = pytest.importorskip("timm.layers")
    from tests.convmae_kernels.packed.test_equivalence import Different

    norm = getattr(layers, name)(8) if name.startswith("F") else getattr(layers, name)(8, groups=4)
    nn.init.normal_(norm.weight)
    mask = ck.BlockMask.random(2, (3, 3), 0.4, torch.Generator().manual_seed(0))
    images = random_tensor((2, 3, 24, 24))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 1))
    found = check_equivalence(model, images, mask)
    assert 1e-9 < max(found.outputs, found.gradients) < 1e-6
    model[1] = Different(norm, lambda y: y * (1 + 1e-4))
    with pytest.raises(EquivalenceError, match=r"module '1' \(Different\), by a .* at most .e-05"):
        check_equivalence(model, images, mask)


def test_an_ill_conditioned_network_in_float32():
    """As large ones are that are checked in float32; a deviation before that is still found."""
    pytest.importorskip("timm")
    from tests.convmae_kernels.packed.test_equivalence import Amplify, Different

    mask = ck.BlockMask.random(2, (3, 3), 0.4, torch.Generator().manual_seed(0))
    images = random_tensor((2, 3, 24, 24))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Amplify(3e3))
    found = check_equivalence(model, images, mask, dtype=torch.float32)
    assert 1e-3 < found.outputs < 1e-2
    model[0] = Different(model[0], lambda y: y * (1 + 1e-2))
    with pytest.raises(EquivalenceError, match=r"module '0' \(Different\), .* at most 1e-03 was"):
        check_equivalence(model, images, mask, dtype=torch.float32)


def test_attention_in_windows_is_refused_with_a_reason():
    timm = pytest.importorskip("timm")
    model = sparsify(timm.create_model("halonet26t", num_classes=0))
    mask = ck.BlockMask.full(1, (2, 2))
    why = r"^HaloAttn.forward: AssertionError at `_assert\(H % self.block_size == 0, ''\)`: the mod"
    with pytest.raises(NotImplementedError, match=why):
        model(random_tensor((1, 3, 64, 64)), mask)
    model = timm.create_model("botnet26t_256", num_classes=0)
    with pytest.raises(NotImplementedError, match=r"^BottleneckAttn.forward: AssertionError at "):
        check_equivalence(model, random_tensor((1, 3, 64, 64)), mask)


def test_errors_with_a_message_keep_it():
    class Asserts(nn.Module):
        def forward(self, x):
            raise AssertionError("height must be 7")

    with pytest.raises(AssertionError, match="^height must be 7$"):
        sparsify(Asserts())(random_tensor((1, 3, 64, 64)), ck.BlockMask.full(1, (2, 2)))
