"""The strided convolution's CUDA kernels on the emulator of `tests/simt`, against the reference."""

import pytest
import torch
from simt.emulator import why_not

from convmae_kernels.testing import make_mask
from tests.support.simt_emulation import SEEDS, all_dtypes, same
from tests.support.simt_strided import check_strided, convolve_strided
from tests.support.strided_conv2d import SHAPES, make_problem

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")


@all_dtypes
def test_every_shape(dtype):
    for i, shape in enumerate(SHAPES):
        seeds = SEEDS if i == 0 else SEEDS[2 + i % 2 : 3 + i % 2]
        check_strided(make_mask("ragged"), (16, 7)[i % 2], shape, dtype, seeds=seeds)


@pytest.mark.parametrize("name", ["none", "one", "all"])
def test_other_masks_and_many_channels(name):
    """More channels than lie along a thread block, and addresses that are no multiples of 16."""
    mask = make_mask(name)
    check_strided(mask, 264, SHAPES[1], torch.bfloat16, seeds=SEEDS[2:3])
    check_strided(mask, 4, SHAPES[2], offset=1, seeds=SEEDS[2:3])


def test_runs_and_long_sums():
    """Of 2,048 outputs in runs, the last one shorter, and in one run."""
    mask, shape = make_mask("all"), (16, (3, 3), 2, (1, 1), (1, 1))
    check_strided(mask, 4, shape, torch.float32, blocks_per_run=7, seeds=SEEDS[2:3])
    check_strided(mask, 4, shape, torch.float32, blocks_per_run=100, seeds=SEEDS[2:3])


def test_rows_that_are_hidden_are_not_read():
    mask = make_mask("ragged")
    (x, weight, _, grad), rest = make_problem(mask, 8, SHAPES[0], torch.float32)
    table = mask.neighbours(1)
    hidden = torch.arange(mask.num_visible) % 4 == 1
    seen = (table >= 0) & ~hidden[table.long().clamp(min=0)]
    table = torch.where(seen, table, -1).int()
    for source, backwards in ((x, False), (grad, True)):
        results = [
            convolve_strided(
                torch.where(hidden[:, None, None], value, source), weight, None, table, rest,
                backwards, seeds=(0,),
            )
            for value in (0.0, float("nan"))
        ]  # fmt: skip
        same(*results)


def test_without_a_bias():
    mask = make_mask("row")
    (x, weight, bias, _), rest = make_problem(mask, 8, SHAPES[0], torch.float32)
    table = mask.neighbours(1)
    found = convolve_strided(x, weight, None, table, rest, seeds=(0,))
    same(found, convolve_strided(x, weight, torch.zeros_like(bias), table, rest, seeds=(0,)))
