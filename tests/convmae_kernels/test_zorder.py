"""The Z-order of the positions of a block."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.zorder import BLOCK_SIZES, block_side, patch_matrix


def z_index(row, column):
    """The bits of row and column alternated, the row's first."""
    return sum((row >> bit & 1) << 2 * bit + 1 | (column >> bit & 1) << 2 * bit for bit in range(5))


@pytest.mark.parametrize("side", BLOCK_SIZES)
def test_zorder(side):
    square = torch.arange(2 * side * side).view(2, side, side)
    packed = ck.to_zorder(square)
    assert packed.shape == (2, side * side)
    for row in range(side):
        for column in range(side):
            assert packed[1, z_index(row, column)] == square[1, row, column]
    assert torch.equal(ck.from_zorder(packed), square)
    assert block_side(side * side) == side


def test_zorder_of_a_square_of_two_is_its_raster_order():
    square = torch.arange(64).view(8, 8)
    groups = ck.to_zorder(square).view(16, 4)
    assert groups[0].tolist() == [0, 1, 8, 9]
    assert groups[1].tolist() == [2, 3, 10, 11]
    assert groups[2].tolist() == [16, 17, 24, 25]


@pytest.mark.parametrize("side", BLOCK_SIZES)
def test_patch_matrix(side):
    weight = torch.randn(6, 5, side, side)
    expected = ck.to_zorder(weight).transpose(1, 2).flatten(1)
    assert torch.equal(patch_matrix(weight), expected)


@pytest.mark.parametrize("positions", [0, 3, 8, 9, 36, 4096])
def test_blocks_of_other_sides(positions):
    with pytest.raises(ValueError, match=rf"got s\*s = {positions}"):
        block_side(positions)
