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
    in_order = (4, 8, 3, 1, 1, 1, 4, False, "zeros", "meta", torch.float64)
    for cls in (ck.nn.MaskedConv2d, torch.nn.Conv2d):
        module = cls(*in_order)
        assert (module.bias, module.padding_mode, module.weight.shape) == (
            None,
            "zeros",
            (8, 1, 3, 3),
        )
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


@pytest.mark.parametrize("dense_above", [0.0, None, 2.0])
@pytest.mark.parametrize("name", ["ragged", "all"])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 2), (4, 4, 1), (7, 2, 1)]
)
def test_strides_and_the_dense_path(kernel, stride, groups, name, dense_above):
    """The same whether a dense map is convolved densely or not, in either layout."""
    mask, padding = make_mask(name), 0 if kernel == stride else kernel // 2
    options = {"stride": stride, "groups": groups, "dtype": torch.float64}
    module = ck.nn.MaskedConv2d(6, 4, kernel, dense_above=dense_above, **options)
    assert module.padding == (padding, padding)
    before, after = mask.to_dense(4), mask.to_dense(4 // stride)
    for layout in ("contiguous", "channels_last"):
        images = random_tensor((mask.batch_size, 6, 12, 16), torch.float64, layout)
        images = torch.where(before, images, float("nan")).requires_grad_()
        y = module(images, mask)
        expected = torch.where(after, module(torch.where(before, images, 0)), 0)
        torch.testing.assert_close(y, expected)
        (found,) = torch.autograd.grad(y.sin().sum(), images, retain_graph=True)
        (grad,) = torch.autograd.grad(expected.sin().sum(), images)
        torch.testing.assert_close(found, grad)


def test_which_densities_are_dense(monkeypatch):
    half = ck.BlockMask.random(2, (4, 4), 0.5)
    images = torch.zeros(2, 4, 8, 8)
    dense = []
    monkeypatch.setattr(
        ck.nn.MaskedConv2d, "_dense", lambda self, x, mask: dense.append(mask.density)
    )
    ck.nn.MaskedConv2d(4, 4, 3)(images, half)
    ck.nn.MaskedConv2d(4, 4, 3, groups=4)(images, ck.BlockMask.full(2, (4, 4)))
    assert not dense
    ck.nn.MaskedConv2d(4, 4, 3)(images, ck.BlockMask.full(2, (4, 4)))
    ck.nn.MaskedConv2d(4, 4, 3, dense_above=0.5)(images, half)
    ck.nn.MaskedConv2d(4, 4, 3, dense_above=0.5)(ck.gather_visible(images, half), half)
    assert dense == [1.0, 0.5]


def test_packed_in_and_out():
    mask = make_mask("ragged")
    module = ck.nn.MaskedConv2d(6, 4, 3, stride=2)
    images = random_tensor((4, 6, 12, 16))
    packed = module(ck.Packed.gather(images, mask))
    assert isinstance(packed, ck.Packed) and packed.shape == (4, 4, 6, 8)
    torch.testing.assert_close(packed.dense(), module(images, mask))
    with pytest.raises(ValueError, match="a Packed has its own mask"):
        module(ck.Packed.gather(images, mask), mask)


def test_same_padding_by_numbers():
    for kernel, dilation, padding in ((5, 1, 2), ((3, 7), 2, (2, 6)), (1, 1, 0)):
        module = ck.nn.MaskedConv2d(4, 4, kernel, padding=padding, dilation=dilation, groups=4)
        assert module(torch.zeros(2, 4, 12, 16)).shape == (2, 4, 12, 16)


def test_rejects():
    for padding in (1, "valid", (2, 1)):
        with pytest.raises(ValueError, match=r"padding must keep the grid .* one of \[2\], got"):
            ck.nn.MaskedConv2d(4, 4, 5, padding=padding, groups=4)
    with pytest.raises(ValueError, match=r"padding .* kernel \(4, 4\), stride 1 .* impossible"):
        ck.nn.MaskedConv2d(6, 6, 4, groups=6)
    for mode in ("reflect", "circular", "nonsense"):
        with pytest.raises(ValueError, match=f"padding_mode must be 'zeros', got '{mode}': what"):
            ck.nn.MaskedConv2d(4, 4, 3, padding_mode=mode)
    for stride in (3, (1, 2)):
        with pytest.raises(ValueError, match="stride must be a power of two, the same in both"):
            ck.nn.MaskedConv2d(4, 4, 3, stride=stride)
    dense = ck.nn.MaskedConv2d(4, 4, 3, stride=2, dense_above=0)
    with pytest.raises(ValueError, match="x has batch size 3, but the mask is for 2"):
        dense(torch.zeros(3, 4, 12, 16), make_mask("equal"))
    for size in ((12, 12), (3, 4)):
        with pytest.raises(ValueError, match="does not divide into a grid of 3 x 4 square blocks"):
            dense(torch.zeros(2, 4, *size), make_mask("equal"))
    module = ck.nn.MaskedConv2d(4, 4, 3, groups=4)
    with pytest.raises(ValueError, match="need their mask, got mask=None"):
        module(torch.zeros(8, 16, 4))
    with pytest.raises(TypeError, match="mask must be a BlockMask, got Tensor"):
        module(torch.zeros(2, 4, 12, 16), make_mask("equal").visible)
    with pytest.raises(ValueError, match="images has batch size 3, but the mask is for 2"):
        module(torch.zeros(3, 4, 12, 16), make_mask("equal"))
    with pytest.raises(ValueError, match="x has 3 channels, but weight"):
        module(torch.zeros(8, 16, 3), make_mask("equal"))
