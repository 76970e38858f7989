"""How often the host waits for the device: once to make a ragged mask, and never again."""

import pytest
import torch

import convmae
import convmae_kernels as ck
from convmae_kernels.testing import random_tensor
from tests.support.device_waits import device_waits

GRID = (4, 4)


def ragged_visible():
    """Masks of 3 images with 2, 7 and 12 of 16 blocks visible."""
    order = torch.rand(3, 16).argsort(dim=1).argsort(dim=1)
    return (order < torch.tensor([[2], [7], [12]])).view(3, *GRID)


def images(device="cpu"):
    return random_tensor((3, 3, 64, 64)).to(device).requires_grad_()


def ops_step(mask, device="cpu"):
    """Every op and composition, forward and backward."""
    weights = [
        random_tensor(shape).to(device).requires_grad_()
        for shape in ((8, 3, 2, 2), (8, 8, 3, 3), (8, 1, 5, 5), (8, 8, 1, 1))
    ]
    ones = torch.ones(8, device=device)
    x = ck.gather_visible(images(device), mask)
    x = ck.masked_conv2d(x, weights[0], None, mask, stride=2)
    x = ck.masked_conv2d(x, weights[1], ones, mask)
    x = ck.masked_conv2d(x, weights[2], ones, mask, groups=8)
    x = ck.masked_conv2d(x, weights[3], ones, mask)
    x = ck.masked_max_pool2d(x, mask, 3, 2, 1)
    x = ck.masked_avg_pool2d(x, mask, 2)
    x = ck.masked_group_norm(x, mask, 4, ones, ones)
    x = ck.masked_grn(x, mask, ones, ones)
    x = ck.masked_batch_norm(x, mask, None, None, ones, ones, training=True)
    windows = ck.gather_windows(x, mask, (1, 1, 1, 1))
    (windows.sum() + ck.scatter_visible(x, mask).square().sum()).backward()


def network_step(mask, device="cpu"):
    """Unmodified modules on packed features."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 2, stride=2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=2),
        torch.nn.GroupNorm(2, 8),
        torch.nn.Conv2d(8, 8, 5, padding=2, groups=8),
        torch.nn.AvgPool2d(2),
        torch.nn.AdaptiveAvgPool2d(1),
    ).to(device)
    network(ck.Packed.gather(images(device), mask)).square().sum().backward()


def model_step(mask, device="cpu"):
    """ConvMAE's loss and its gradients."""
    model = convmae.create_model("convmae_tiny", img_size=64).to(device)
    model(images(device), mask=mask).loss.backward()


STEPS = [ops_step, network_step, model_step]
every_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(),
        lambda x: torch.zeros(4).repeat_interleave(x),
    ],
)
def test_the_count_sees_a_wait(read):
    with device_waits() as found:
        read(torch.tensor([0, 3, 1, 2]))
    assert len(found) == 1


def test_the_count_sees_waits_of_the_backward_pass():
    x = torch.ones(3, requires_grad=True)
    y = torch.zeros(4).masked_scatter(torch.tensor([True, True, False, True]), x).sum()
    with device_waits() as found:
        y.backward()
    assert len(found) == 1


def test_a_mask_is_made_with_one_wait_at_most():
    visible, noise = ragged_visible(), torch.rand(3, 16)
    ids = noise.argsort(dim=1)[:, :5]
    with device_waits() as found:
        mask = ck.BlockMask.random(3, GRID, 0.5)
        ck.BlockMask.from_noise(noise, GRID, 0.5)
        ck.BlockMask.from_ids(ids, GRID, check=False)
        ck.BlockMask.full(3, GRID)
        assert mask.min_per_image == mask.max_per_image == 8
    assert found == []
    with device_waits() as found:
        ck.BlockMask.from_ids(ids, GRID)
    assert len(found) == 1
    with device_waits() as found:
        mask = ck.BlockMask.from_visible(visible)
        assert (mask.min_per_image, mask.max_per_image) == (2, 12)
    assert len(found) == 1


@every_step
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_a_step_never_waits(step, ragged):
    mask = (
        ck.BlockMask.from_visible(ragged_visible()) if ragged else ck.BlockMask.random(3, GRID, 0.5)
    )
    with device_waits() as found:
        step(mask)
    assert found == []


@every_step
def test_a_ragged_step_without_a_device_to_read(step):
    """On "meta" there are no values: whatever would read one fails."""
    step(ck.BlockMask.from_visible(ragged_visible()).to("meta"), "meta")


@every_step
def test_a_mask_that_does_not_know_its_numbers_asks_once(step):
    mask = ck.BlockMask.from_visible(ragged_visible())
    unknown = ck.BlockMask(mask.visible, mask.block_index)
    with device_waits() as found:
        step(unknown)
    assert len(found) <= 1


def test_complementary_masks_never_wait():
    model = convmae.create_model("fastconvmae_tiny", img_size=64)
    with device_waits() as found:
        model(images()).loss.backward()
    assert found == []
