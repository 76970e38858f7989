"""`torch.utils.flop_counter.FlopCounterMode` on networks of packed features."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import convmae_kernels as ck

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps
GRID = (2, 3)


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def images():
    return torch.randn(2, 3, 32 * GRID[0], 32 * GRID[1])


def test_a_whole_mask_costs_what_the_dense_network_does():
    model = timm.create_model("resnet18", num_classes=10)
    x, sparse = images(), ck.sparsify(model)
    dense = count(lambda: model(x).sum().backward())
    assert dense > 1e9
    assert count(lambda: sparse(x, ck.BlockMask.full(2, GRID)).sum().backward()) == dense


def test_work_is_as_much_as_is_visible():
    model = timm.create_model("convnext_atto", num_classes=0)
    x, sparse = images(), ck.sparsify(model)
    masks = [ck.BlockMask.from_visible(torch.arange(12).view(2, *GRID) < n) for n in (12, 6, 3)]
    whole, half, quarter = (count(lambda mask=mask: sparse(x, mask)) for mask in masks)
    assert whole == 2 * half == 4 * quarter == count(lambda: model(x))


def test_depthwise_convolutions_by_hand():
    x = torch.randn(5, 16, 6, requires_grad=True)
    mask = ck.BlockMask.from_visible(torch.arange(8).view(2, 2, 2) < 5)
    weight = torch.randn(6, 1, 3, 5, requires_grad=True)
    y = [None]

    def forward():
        y[0] = ck.masked_conv2d(x, weight, None, mask, groups=6)

    forward_flops = 2 * 5 * 16 * 6 * 3 * 5
    assert count(forward) == forward_flops
    assert count(lambda: y[0].sum().backward()) == 2 * forward_flops  # input and weight


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_in_groups_by_hand(stride):
    x = torch.randn(5, 16, 6, requires_grad=True)
    mask = ck.BlockMask.from_visible(torch.arange(8).view(2, 2, 2) < 5)
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    y = [None]

    def forward():
        y[0] = ck.masked_conv2d(x, weight, None, mask, stride, groups=2)

    forward_flops = 2 * 5 * (16 // stride**2) * 8 * 3 * 3 * 3
    assert count(forward) == forward_flops
    assert count(lambda: y[0].sum().backward()) == 2 * forward_flops


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "convmae_kernels"])
@pytest.mark.thorough(but_every=5)
def test_in_any_order_of_import(first):
    """The counter may have been imported before the package, or comes after it."""
    program = (
        f"import torch, {first}, convmae_kernels\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "ops = torch.ops.convmae, torch.ops.convmae_triton\n"
        "print(all(op.masked_conv2d in flop_registry for op in ops))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
