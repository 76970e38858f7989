"""The CUDA kernels that move features, on the emulator of `tests/simt`: equal to the bit.

Their barriers are tested in `test_simt_kernels.py`, with those of all kernels.
"""

import math

import pytest
import torch
from simt.emulator import module, why_not

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.ops.support.geometry import reach as halo_reach
from convmae_kernels.testing import LAYOUTS, MASKS, make_mask, random_tensor
from convmae_kernels.zorder import BLOCK_SIZES
from tests.support.simt_emulation import (
    CODES,
    NAN,
    SEEDS,
    all_dtypes,
    array,
    check_gather,
    check_scatter,
    emulate,
    gather,
    images_for,
    same,
)

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}"),
    pytest.mark.thorough(but_every=3),
]


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 7, 8, 40])
@pytest.mark.thorough(but_every=11)
def test_gather(layout, channels, dtype):
    mask = make_mask("ragged")
    check_gather(images_for(mask, 4, channels, dtype, layout), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.thorough(but_every=5)
def test_gather_of_every_mask(name, layout):
    for side in (1, 2, 8):
        mask = make_mask(name)
        check_gather(images_for(mask, side, 9, layout=layout), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.thorough(but_every=5)
def test_gather_of_every_block_side(side, layout):
    mask = make_mask("corner")
    check_gather(images_for(mask, side, 16, layout=layout), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gather_of_many_channels(layout):
    mask = make_mask("corner")
    check_gather(images_for(mask, 4, 255, torch.bfloat16, layout), mask)
    check_gather(images_for(mask, 4, 256, torch.bfloat16, layout), mask)


@pytest.mark.parametrize("grid", [(1, 1), (7, 3), (5, 9), (3, 31)], ids=str)
def test_gather_from_grids_of_odd_sides(grid):
    mask = ck.BlockMask.random(3, grid, 0.5, generator=torch.Generator().manual_seed(0))
    for channels, layout in ((3, "contiguous"), (12, "contiguous"), (12, "channels_last")):
        check_gather(images_for(mask, 2, channels, layout=layout), mask)


def test_division_by_multiplication():
    most = 2**63 - 1
    around = [2**n + more for n in (16, 31, 32, 62) for more in (-1, 0, 1)]
    divisors = [*range(1, 40), 196, 3136, *around, most]
    emulator = module("kernels")
    for divisor in divisors:
        last = most // divisor * divisor
        for x in {0, 1, divisor - 1, divisor, divisor + 1, 2**31, last - 1, last, most - 1, most}:
            if 0 <= x <= most:
                assert emulator.call("divide", x, divisor, 0) == x // divisor


@pytest.mark.parametrize("channels", [2, 3, 8, 9])
@pytest.mark.parametrize("side", [1, 16])
def test_gather_of_images_of_few_channels(side, channels):
    """One position for each thread, or one for four, in tiles that end within a block or beyond."""
    check_gather(images_for(make_mask("ragged"), side, channels), make_mask("ragged"))


@all_dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("channels", [1, 7, 8, 255])
@pytest.mark.thorough(but_every=11)
def test_scatter(channels, offset, dtype):
    mask, side = make_mask("ragged"), 2
    x = random_tensor((mask.num_visible, side * side, channels), dtype)
    check_scatter(x, mask, -1.5, offset)


@pytest.mark.parametrize("name", MASKS)
def test_scatter_of_every_mask(name):
    mask = make_mask(name)
    for side in (1, 2, 8):
        check_scatter(random_tensor((mask.num_visible, side * side, 9)), mask, NAN)


@pytest.mark.parametrize("side", BLOCK_SIZES)
def test_scatter_of_every_block_side(side):
    mask = make_mask("corner")
    check_scatter(random_tensor((mask.num_visible, side * side, 16), torch.float16), mask, 1.0)


HALOS = [(1, 1, 1, 1), (0, 0, 0, 0), (3, 2, 0, 5), (-1, 0, 2, -1)]


def check_windows(x, mask, halo, fill=-1.5, offset=0, **options):
    """Windows, and the gradient of random ones, both bit for bit as the reference has them."""
    table = mask.neighbours(halo_reach(halo, math.isqrt(x.shape[1])))
    arguments = [CODES[x.dtype], array(x), table.numpy(), [*halo]]
    value = array(torch.full((1,), fill, dtype=x.dtype))
    windows = emulate("gather_windows", *arguments, value, offset, like=x, **options)[0]
    same(windows, reference.gather_windows(x, table, halo, fill))
    arguments[1] = array(grad := random_tensor(windows.shape, x.dtype))
    grad_x = emulate("gather_windows_grad", *arguments, offset, like=x, **options)[0]
    same(grad_x, reference.gather_windows_grad(grad, table, halo))


@all_dtypes
@pytest.mark.parametrize("halo", HALOS, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 8, 64])
@pytest.mark.thorough(but_every=13)
def test_windows(channels, halo, dtype):
    mask = make_mask("ragged")
    for side in (1, 2, 4, 8):
        if min(halo) > -side:
            x = random_tensor((mask.num_visible, side * side, channels), dtype)
            check_windows(x, mask, halo, seeds=SEEDS[2:])


@pytest.mark.parametrize("halo", [(-1, -1, 2, 3), (2, 3, -1, -1), (-1, -1, -1, -1)], ids=str)
def test_windows_that_leave_out_the_edges_of_their_blocks(halo):
    """Positions that no window holds get gradient 0."""
    mask = make_mask("ragged")
    for side in (4, 8):
        check_windows(random_tensor((mask.num_visible, side * side, 8)), mask, halo)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.thorough(but_every=5)
def test_windows_of_every_mask(name):
    mask = make_mask(name)
    for side in (2, 4):
        for channels in (0, 9):
            check_windows(random_tensor((mask.num_visible, side * side, channels)), mask, HALOS[2])


@all_dtypes
@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.thorough(but_every=5)
def test_windows_at_addresses_that_are_not_multiples_of_16_bytes(offset, dtype):
    mask = make_mask("row")
    for channels in (16, 255):
        x = random_tensor((mask.num_visible, 4, channels), dtype)
        check_windows(x, mask, HALOS[0], NAN, offset)


@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.thorough(but_every=5)
def test_windows_of_every_block_side(side):
    mask = make_mask("corner")
    x = random_tensor((mask.num_visible, side * side, 8), torch.float16)
    check_windows(x, mask, HALOS[0], seeds=SEEDS[2:])


@pytest.mark.parametrize("radius", [1, 2, 7])
@pytest.mark.parametrize("name", MASKS)
def test_neighbour_table(name, radius):
    mask = make_mask(name)
    table = emulate(
        "neighbour_table", mask.visible.numpy(), mask.block_index.numpy(), radius,
        like=mask.neighbours(1),
    )[0]  # fmt: skip
    assert torch.equal(table, mask.neighbours(radius))


@pytest.mark.thorough
def test_no_races_in_gather():
    gather(images_for(make_mask("ragged"), 4, 70), make_mask("ragged"), checker="races")


@pytest.mark.thorough
def test_no_races_in_windows():
    mask = make_mask("row")
    for channels in (7, 256):
        check_windows(
            random_tensor((mask.num_visible, 16, channels)), mask, HALOS[2], checker="races"
        )
