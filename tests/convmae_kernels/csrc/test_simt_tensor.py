"""The 7x7 convolution on tensor cores, on the emulator of `tests/simt`."""

import math

import pytest
import torch
from simt.emulator import why_not

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.testing import make_mask, random_tensor
from tests.convmae_kernels.csrc.test_simt_kernels import check_forward
from tests.support.simt_emulation import CODES, INF, NAN, array, emulate, same

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}"),
    pytest.mark.thorough(but_every=3),
]


def forward(x, weight, bias, table, offset=0, warps=132, runs=0, seeds=(3,)):
    """`y`, and whether tensor cores were chosen."""
    y, _, tensor = emulate(
        "masked_conv2d", CODES[x.dtype], array(x), array(weight),
        None if bias is None else array(bias), table.numpy(), [1, 1], offset, warps, runs,
        like=x, seeds=seeds,
    )  # fmt: skip
    return y, tensor


def problem(mask, side, channels, dtype, kernel=7):
    """x, weight, bias, and the neighbour table."""
    x = random_tensor((mask.num_visible, side * side, channels), dtype)
    weight = random_tensor((channels, 1, kernel, kernel), dtype)
    reach = math.ceil(kernel // 2 / side)
    return x, weight, random_tensor((channels,), dtype), mask.neighbours(reach)


@pytest.mark.parametrize(
    ("dtype", "side", "channels", "kernel", "offset", "tensor"),
    [
        (torch.bfloat16, 4, 32, 7, 0, True),
        (torch.float16, 8, 64, 7, 8, True),
        (torch.float32, 4, 32, 7, 0, False),
        (torch.bfloat16, 4, 32, 5, 0, False),
        (torch.float16, 2, 32, 7, 0, False),
        (torch.float16, 4, 24, 7, 0, False),  # less than a slice
        (torch.bfloat16, 4, 40, 7, 0, False),  # no whole slices
        (torch.bfloat16, 4, 32, 7, 2, False),  # not aligned
    ],
)
def test_when_tensor_cores_are_chosen(dtype, side, channels, kernel, offset, tensor):
    mask = make_mask("one")
    inputs = problem(mask, side, channels, dtype, kernel)
    assert forward(*inputs, offset)[1] == tensor


@pytest.mark.parametrize("name", ["ragged", "none", "one", "all"])
def test_masks(name):
    """With two slices, and groups that are not full."""
    check_forward(make_mask(name), 4, 64, (7, 7), torch.bfloat16, runs=2, seeds=(3,))


@pytest.mark.parametrize(("side", "name", "bias"), [(8, "row", True), (16, "column", False)])
def test_tiles_of_larger_blocks(side, name, bias):
    check_forward(
        make_mask(name), side, 32, (7, 7), torch.float16, runs=3, with_bias=bias, seeds=(2,)
    )


def test_as_before_where_tensor_cores_do_not_fit():
    check_forward(make_mask("ragged"), 4, 12, (7, 7), torch.float16, runs=3, seeds=(2,))


def test_how_tiles_are_cut_changes_no_bit():
    """Tiles meet others in their groups; a sum of -0 would show the zeros of hidden tiles."""
    mask = ck.BlockMask.random(2, (3, 4), 0.4, generator=torch.Generator().manual_seed(0))
    x, weight, bias, table = problem(mask, 4, 32, torch.bfloat16)
    bias[:] = -0.0
    x[:, :, 0] = 0
    first, _ = forward(x, weight, bias, table, warps=1, seeds=(0,))
    for options in ({"runs": 5}, {"warps": 1000}):
        same(forward(x, weight, bias, table, **options)[0], first)


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_reaches_its_window_and_channel_only(value):
    """Zeros of the matrices meet it too; the outputs that it must not reach are computed again."""
    mask = make_mask("row")
    x, weight, bias, table = problem(mask, 4, 32, torch.bfloat16)
    clean, _ = forward(x, weight, bias, table, runs=1)
    spot = torch.zeros(mask.num_visible, 16, 1)
    spot[-1, 10] = 1
    window = reference.masked_conv2d(spot, torch.ones(1, 1, 7, 7), None, table, [1, 1]) > 0
    x[-1, 10, 8] = value
    y, _ = forward(x, weight, bias, table, runs=1)
    inside = window & (torch.arange(32) == 8)
    assert not y[inside].isfinite().any()
    torch.testing.assert_close(y[~inside], clean[~inside], rtol=2**-7, atol=1e-2)
