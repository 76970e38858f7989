"""`nn.MaskedConv2d`: a `torch.nn.Conv2d` that can skip what a mask hides."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.testing import assert_within_budget, make_mask, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def twins(channels=6, kernel=5, **options):
    """A `MaskedConv2d` and the `Conv2d` of the same seed."""
    modules = []
    for cls in (ck.nn.MaskedConv2d, torch.nn.Conv2d):
        torch.manual_seed(3)
        modules.append(cls(channels, channels, kernel, padding="same", groups=channels, **options))
    return modules


def test_parameters_are_those_of_conv2d():
    masked, plain = twins()
    assert isinstance(masked, torch.nn.Conv2d)
    assert list(masked.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    for key, value in plain.state_dict().items():
        assert torch.equal(masked.state_dict()[key], value)
    masked.load_state_dict(plain.state_dict())
    assert ck.nn.MaskedConv2d(4, 4, 3, groups=4, bias=False).bias is None
    double = ck.nn.MaskedConv2d(4, 4, 3, groups=4, dtype=torch.float64, device="meta")
    assert (double.weight.dtype, double.weight.device.type) == (torch.float64, "meta")


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"bias": False}, {"dilation": (1, 3)}])
@pytest.mark.parametrize("kernel", [3, (7, 3)])
def test_dense_and_packed_features_agree_with_conv2d(kernel, options):
    masked, plain = twins(kernel=kernel, **options)
    mask = make_mask("ragged")
    visible = mask.to_dense(4)
    images = random_tensor((4, 6, 12, 16))
    clean = torch.where(visible, images, 0)
    exact = torch.where(visible, plain.double()(clean.double()), 0)
    plain.float()
    terms = torch.nn.functional.conv2d(
        clean.abs(), plain.weight.abs(), padding="same", groups=6, dilation=plain.dilation
    )
    dense = masked(torch.where(visible, images, float("nan")), mask)
    expected = torch.where(visible, plain(clean), 0)
    assert_within_budget(dense, exact, expected, terms + 1)
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert not dense[~visible.expand_as(dense)].any()
    packed = masked(ck.gather_visible(images, mask), mask)
    assert torch.equal(packed, ck.gather_visible(dense, mask))
    assert torch.equal(masked(images), plain(images))


def test_gradients_reach_parameters_and_input():
    masked, plain = twins()
    mask = make_mask("equal")
    visible = mask.to_dense(4)
    images = random_tensor((2, 6, 12, 16)).requires_grad_()
    masked(images, mask).square().sum().backward()
    found = [images.grad, masked.weight.grad, masked.bias.grad]
    images.grad = None
    torch.where(visible, plain(torch.where(visible, images, 0)), 0).square().sum().backward()
    expected = [images.grad, plain.weight.grad, plain.bias.grad]
    torch.testing.assert_close(found, expected)
    assert not found[0][~visible.expand_as(images)].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_any_channels_and_groups(groups):
    module = ck.nn.MaskedConv2d(6, 4, 3, groups=groups, dtype=torch.float64)
    mask = make_mask("ragged")
    images = random_tensor((4, 6, 12, 16), torch.float64)
    visible = mask.to_dense(4)
    expected = torch.where(visible, module(torch.where(visible, images, 0)), 0)
    torch.testing.assert_close(module(images, mask), expected)


def test_even_kernels_of_stride_1_work_without_a_mask_only():
    module = ck.nn.MaskedConv2d(6, 6, 4, groups=6)
    assert module(torch.zeros(2, 6, 12, 16)).shape == (2, 6, 12, 16)
    with pytest.raises(ValueError, match=r"padding .* kernel \(4, 4\), stride 1 .* impossible"):
        module(torch.zeros(2, 6, 12, 16), make_mask("equal"))


def test_same_padding_by_numbers():
    for kernel, dilation, padding in ((5, 1, 2), ((3, 7), 2, (2, 6)), (1, 1, 0)):
        module = ck.nn.MaskedConv2d(4, 4, kernel, padding=padding, dilation=dilation, groups=4)
        assert module(torch.zeros(2, 4, 12, 16)).shape == (2, 4, 12, 16)


def test_rejects():
    for padding in (1, "valid", (2, 1)):
        with pytest.raises(ValueError, match=r'padding must be "same" or \(2, 2\).*got'):
            ck.nn.MaskedConv2d(4, 4, 5, padding=padding, groups=4)
    module = ck.nn.MaskedConv2d(4, 4, 3, groups=4)
    with pytest.raises(ValueError, match="need their mask, got mask=None"):
        module(torch.zeros(8, 16, 4))
    with pytest.raises(TypeError, match="mask must be a BlockMask, got Tensor"):
        module(torch.zeros(2, 4, 12, 16), make_mask("equal").visible)
    with pytest.raises(ValueError, match="images has batch size 3, but the mask is for 2"):
        module(torch.zeros(3, 4, 12, 16), make_mask("equal"))
    with pytest.raises(ValueError, match="x has 3 channels, but weight"):
        module(torch.zeros(8, 16, 3), make_mask("equal"))
