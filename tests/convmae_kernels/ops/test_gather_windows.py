"""`gather_windows` and its gradient, against padding and slicing of the dense map."""

from functools import partial

import pytest
import torch
from torch.nn.functional import pad

import convmae_kernels as ck
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    MASKS,
    implementations,
    make_mask,
    random_tensor,
    value_and_grads,
)
from convmae_kernels.zorder import BLOCK_SIZES

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.thorough(but_every=3)]

all_impls = pytest.mark.parametrize("impl", implementations())
HALOS = [(1, 1, 1, 1), (0, 0, 0, 0), (3, 2, 0, 5), (-1, 0, 2, -1)]


def windows_of_dense(x, mask, halo, fill=0.0):
    """The same from the dense map, in float64."""
    top, bottom, left, right = halo
    dense = ck.scatter_visible(x.double(), mask, fill=fill, impl="reference")
    gh, gw = mask.grid
    side = dense.shape[2] // gh
    margin = 8
    dense = pad(dense, (margin,) * 4, value=fill)
    windows = []
    for block in mask.block_index.tolist():
        image, row, column = block // (gh * gw), block // gw % gh * side, block % gw * side
        rows = slice(margin + row - top, margin + row + side + bottom)
        columns = slice(margin + column - left, margin + column + side + right)
        windows.append(dense[image, :, rows, columns].permute(1, 2, 0))
    if windows:
        return torch.stack(windows)
    return dense.flatten()[:0].view(0, top + side + bottom, left + side + right, x.shape[2])


def small_enough(halo, side):
    return min(halo) > -side and halo[0] + halo[1] > -side and halo[2] + halo[3] > -side


@all_impls
@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_every_block_side(impl, side, name):
    mask = make_mask(name)
    x = random_tensor((mask.num_visible, side * side, 3))
    for halo in HALOS:
        if small_enough(halo, side):
            windows = ck.gather_windows(x, mask, halo, impl=impl)
            assert windows.is_contiguous()
            assert torch.equal(windows, windows_of_dense(x, mask, halo).float())


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "equal", "none", "all"])
def test_values_and_gradients(impl, dtype, layout, name):
    mask = make_mask(name)
    for side, channels, halo in ((1, 7, HALOS[2]), (2, 255, HALOS[0]), (4, 8, HALOS[3])):
        if not small_enough(halo, side):
            continue
        x = random_tensor((mask.num_visible, side * side, channels), dtype, layout)
        expected = windows_of_dense(x, mask, halo, fill=-1.5)
        # Small integers: their sums are exact in every dtype.
        grad = random_tensor(expected.shape, dtype, layout).mul(2).round()
        windows, grad_x = value_and_grads(
            partial(ck.gather_windows, mask=mask, halo=halo, fill=-1.5, impl=impl), [x], grad
        )
        assert windows.dtype == grad_x.dtype == dtype
        assert torch.equal(windows, expected.to(dtype))
        (exact,) = value_and_grads(
            partial(windows_of_dense, mask=mask, halo=halo), [x.double()], grad.double()
        )[1:]
        assert torch.equal(grad_x, exact.to(dtype))


@all_impls
@pytest.mark.parametrize("fill", [float("-inf"), float("nan"), 1e30, -0.0])
def test_what_hidden_positions_hold(impl, fill):
    mask = make_mask("ragged")
    x = random_tensor((mask.num_visible, 4, 5))
    windows = ck.gather_windows(x, mask, (2, 3, 1, 1), fill=fill, impl=impl)
    expected = windows_of_dense(x, mask, (2, 3, 1, 1), fill=fill).float()
    assert torch.equal(windows.view(torch.int32), expected.view(torch.int32))


@all_impls
def test_second_derivatives(impl):
    mask = make_mask("ragged")
    x = random_tensor((mask.num_visible, 4, 2), torch.float64).requires_grad_()
    gather = lambda x: ck.gather_windows(x, mask, (1, 2, 0, 3), impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(gather, x)
    assert torch.autograd.gradgradcheck(lambda x: gather(x).square(), x)


def test_registration():
    mask = make_mask("ragged")
    halo, neighbours = (1, 2, 0, 3), mask.neighbours(2)
    x = random_tensor((mask.num_visible, 4, 3)).requires_grad_()
    torch.library.opcheck(torch.ops.convmae.gather_windows, (x, neighbours, halo, 0.5))
    grad = random_tensor((mask.num_visible, 5, 5, 3)).requires_grad_()
    torch.library.opcheck(torch.ops.convmae.gather_windows_grad, (grad, neighbours, halo))


def test_the_same_bits_whatever_the_number_of_threads(threads):
    mask = ck.BlockMask.random(8, (14, 14), 0.5)
    x = random_tensor((mask.num_visible, 16, 64)).requires_grad_()
    found = []
    for number in (1, 2, 3):
        threads(number)
        windows = ck.gather_windows(x, mask, (2, 2, 2, 2))
        (grad,) = torch.autograd.grad(windows.sin().sum(), x)
        found.append((windows.detach(), grad))
    for windows, grad in found[1:]:
        assert torch.equal(windows, found[0][0]) and torch.equal(grad, found[0][1])


@pytest.mark.parametrize(
    ("halo", "message"),
    [
        ((1, 1), r"halo must be \(top, bottom, left, right\), got \(1, 1\)"),
        (1, r"halo must be \(top, bottom, left, right\), got 1"),
        ((-4, 0, 0, 0), "leaves no window of blocks of side 4"),
        ((-2, -2, 0, 0), "leaves no window of blocks of side 4"),
    ],
)
def test_wrong_halos(halo, message):
    mask = make_mask("ragged")
    with pytest.raises(ValueError, match=message):
        ck.gather_windows(torch.zeros(mask.num_visible, 16, 3), mask, halo)


def test_wrong_arguments_of_the_compiled_op():
    mask = make_mask("ragged")
    x = torch.zeros(mask.num_visible, 16, 3)
    if "cpu" not in implementations():
        pytest.skip("needs the compiled kernels")
    with pytest.raises(RuntimeError, match="a halo of 5 positions does not fit"):
        torch.ops.convmae.gather_windows(x, mask.neighbours(1), (5, 0, 0, 0), 0.0)
    with pytest.raises(RuntimeError, match="neighbours must be int32"):
        torch.ops.convmae.gather_windows(x, mask.neighbours(1)[1:], (1, 0, 0, 0), 0.0)
