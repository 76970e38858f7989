"""The convolution's CUDA kernels on the emulator of `tests/simt`, against the reference in float64.

The barriers of all kernels are tested here too.
"""

import math

import pytest
import torch
from simt.emulator import ROOT, EmulatorError, Removed, module, why_not

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.testing import (
    MASKS,
    assert_within_budget,
    make_mask,
    random_tensor,
)
from convmae_kernels.zorder import BLOCK_SIZES
from tests.support.simt_emulation import (
    CODES,
    INF,
    NAN,
    SEEDS,
    all_dtypes,
    array,
    emulate,
    gather,
    images_for,
    same,
    scatter,
)
from tests.support.simt_strided import check_strided

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}"),
    pytest.mark.thorough(but_every=5),
]


# -- the convolution ----------------------------------------------------------------------------


def reach(side, kernel, dilation):
    return max(-(-d * (k // 2) // side) for k, d in zip(kernel, dilation, strict=True))


def runs_on_tiles(dtype, side, channels, kernel, dilation, offset):
    words = channels * dtype.itemsize % 4 == 0 and offset * dtype.itemsize % 4 == 0
    square = kernel in ((3, 3), (5, 5), (7, 7)) and dilation == (1, 1)
    return dtype != torch.float64 and words and square and side > 1


def forward(x, weight, bias, mask, dilation=(1, 1), offset=0, runs=0, warps=1716, **options):
    """`y`, and the side of the tiles that the kernel works on."""
    side = math.isqrt(x.shape[1])
    table = mask.neighbours(reach(side, weight.shape[2:], dilation))
    return emulate(
        "masked_conv2d", CODES[x.dtype], array(x), array(weight),
        None if bias is None else array(bias), table.numpy(), [*dilation], offset, warps, runs,
        like=x, **options,
    )[:2]  # fmt: skip


def weight_grad(grad, x, mask, kernel, dilation=(1, 1), offset=0, runs=0, **options):
    """Gradients of weight and bias, and the side of the tiles."""
    table = mask.neighbours(reach(math.isqrt(x.shape[1]), kernel, dilation))
    return emulate(
        "masked_conv2d_weight_grad", CODES[x.dtype], array(grad), array(x), table.numpy(),
        [*kernel], [*dilation], offset, runs, like=x, **options,
    )  # fmt: skip


def grads(grad, x, weight, mask, dilation=(1, 1), offset=0, runs=0, **options):
    """Gradients of x, weight and bias, and the side of the tiles.

    Without tiles only that of x: the forward kernel with flipped taps.
    """
    table = mask.neighbours(reach(math.isqrt(x.shape[1]), weight.shape[2:], dilation))
    return emulate(
        "masked_conv2d_grads", CODES[x.dtype], array(grad), array(x), array(weight), table.numpy(),
        [*dilation], offset, runs, like=x, **options,
    )  # fmt: skip


def problem(mask, side, channels, kernel, dtype, dilation, offset):
    """x, weight, bias, gradient; the neighbour table; whether kernels on tiles can do it."""
    packed = (mask.num_visible, side * side, channels)
    shapes = (packed, (channels, 1, *kernel), (channels,), packed)
    table = mask.neighbours(reach(side, kernel, dilation))
    on_tiles = runs_on_tiles(dtype, side, channels, kernel, dilation, offset)
    return [random_tensor(shape, dtype) for shape in shapes], table, on_tiles


def within_budget(name, actual, function, *inputs):
    wide = [t if t is None else t.double() for t in inputs]
    terms = function(*(t if t is None else t.abs() for t in wide))
    assert_within_budget(actual, function(*wide), function(*inputs), terms, name)


def check_forward(
    mask, side=4, channels=8, kernel=(5, 5), dtype=torch.float32, dilation=(1, 1), offset=0,
    with_bias=True, **options,
):  # fmt: skip
    inputs, table, on_tiles = problem(mask, side, channels, kernel, dtype, dilation, offset)
    x, weight, bias = *inputs[:2], inputs[2] if with_bias else None
    y, tile_side = forward(x, weight, bias, mask, dilation, offset, **options)
    assert (tile_side > 0) == on_tiles

    def convolve(x, weight, bias):
        return reference.masked_conv2d(x, weight, bias, table, list(dilation))

    within_budget("output", y, convolve, x, weight, bias)


def check_weight_grad(
    mask, side=4, channels=8, kernel=(5, 5), dtype=torch.float32, dilation=(1, 1), offset=0,
    **options,
):  # fmt: skip
    (x, _, _, grad), table, on_tiles = problem(
        mask, side, channels, kernel, dtype, dilation, offset
    )
    *found, tile_side = weight_grad(grad, x, mask, kernel, dilation, offset, **options)
    assert (tile_side > 0) == on_tiles
    for i, name in enumerate(("weight", "bias")):

        def reduce(grad, x, i=i):
            both = reference.masked_conv2d_weight_grad(grad, x, table, list(kernel), list(dilation))
            return both[i]

        within_budget(f"gradient of {name}", found[i], reduce, grad, x)


def check_grads(
    mask, side=4, channels=8, kernel=(5, 5), dtype=torch.float32, dilation=(1, 1), offset=0,
    **options,
):  # fmt: skip
    (x, weight, _, grad), table, on_tiles = problem(
        mask, side, channels, kernel, dtype, dilation, offset
    )
    *found, tile_side = grads(grad, x, weight, mask, dilation, offset, **options)
    enough_registers = kernel != (7, 7) or side == 2 or dtype == torch.float32
    assert (tile_side > 0) == (on_tiles and enough_registers)

    def input_gradient(grad, weight):
        return reference.masked_conv2d(grad, weight.flip(2, 3), None, table, list(dilation))

    within_budget("gradient of x", found[0], input_gradient, grad, weight)
    for i, name in enumerate(("weight", "bias")[: len(found) - 1]):

        def reduce(grad, x, i=i):
            both = reference.masked_conv2d_weight_grad(grad, x, table, list(kernel), list(dilation))
            return both[i]

        within_budget(f"gradient of {name}", found[1 + i], reduce, grad, x)


def check(*arguments, **options):
    """Forward and weight gradient against the reference, and which kernel was chosen."""
    check_forward(*arguments, **options)
    check_weight_grad(*arguments, **options)


@all_dtypes
@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7)], ids=str)
def test_specialised_kernels(kernel, side, dtype):
    check(make_mask("equal" if side == 8 else "ragged"), side, 24, kernel, dtype, runs=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, dtype):
    check(make_mask(name), 2, dtype=dtype)
    check(make_mask(name), 1, dtype=dtype)


@all_dtypes
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 66, 255, 256])
def test_channels(channels, dtype):
    check(make_mask("column"), 2, channels, (3, 3), dtype)


@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7)], ids=str)
def test_every_block_side(kernel, side):
    check(make_mask("corner"), side, 4, kernel, seeds=SEEDS[2:] if side > 8 else SEEDS)


GENERAL = [
    ((1, 1), (1, 1)),
    ((9, 9), (1, 1)),
    ((15, 15), (1, 1)),
    ((3, 5), (1, 1)),
    ((15, 1), (1, 1)),
    ((3, 3), (2, 2)),
    ((5, 3), (1, 3)),
    ((7, 7), (1, 2)),
]


@all_dtypes
@pytest.mark.parametrize(("kernel", "dilation"), GENERAL, ids=str)
def test_general_kernels(kernel, dilation, dtype):
    check(make_mask("row"), 2, 5, kernel, dtype, dilation)


@pytest.mark.parametrize("side", [1, 4, 8])
@pytest.mark.parametrize(("kernel", "dilation"), GENERAL, ids=str)
def test_general_kernels_on_block_sides(kernel, dilation, side):
    check(make_mask("corner"), side, 3, kernel, dilation=dilation, seeds=SEEDS[2:])


@pytest.mark.thorough
def test_long_sums_are_cut():
    """A weight gradient over 3,072 positions: one chain of additions errs beyond the budget."""
    check_weight_grad(make_mask("corner"), 32, 128, (9, 9), seeds=SEEDS[2:])


@all_dtypes
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_not_multiples_of_16_bytes(offset, dtype):
    check(make_mask("row"), 4, 16, (5, 5), dtype, offset=offset)


@pytest.mark.parametrize("runs", [1, 2, 7, 1000])
@pytest.mark.parametrize("side", [2, 4, 8])
def test_runs(side, runs):
    check(make_mask("equal"), side, 40, (5, 5), torch.bfloat16, runs=runs, seeds=SEEDS[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpus_that_hold_few_or_many_warps_give_the_same_bits(dtype):
    """Runs of all tiles, of some with a shorter last one, of one; fewer warps than slices."""
    mask = ck.BlockMask.random(2, (5, 5), 0.25, generator=torch.Generator().manual_seed(0))
    (x, weight, bias, _), *_ = problem(mask, 4, 136, (5, 5), dtype, (1, 1), 0)
    check_forward(mask, 4, 136, (5, 5), dtype, warps=40, seeds=(2,))
    first, _ = forward(x, weight, bias, mask, warps=0, seeds=(0,))
    for warps in (1, 13, 40, 2000):
        same(forward(x, weight, bias, mask, warps=warps, seeds=(0,))[0], first)


@all_dtypes
def test_without_bias(dtype):
    for side in (1, 4):
        check_forward(make_mask("row"), side, 8, (3, 3), dtype, with_bias=False)


@pytest.mark.parametrize(
    ("dtype", "side", "channels", "kernel", "options"),
    [
        (torch.bfloat16, 4, 72, (5, 5), {}),
        (torch.bfloat16, 2, 24, (7, 7), {"runs": 2}),
        (torch.bfloat16, 4, 6, (7, 7), {}),  # two kernels
        (torch.float16, 4, 64, (7, 7), {}),  # of which one has tensor cores
        (torch.float16, 8, 26, (3, 3), {"runs": 3}),  # words
        (torch.float16, 2, 24, (5, 5), {"offset": 2}),
        (torch.float16, 2, 7, (5, 5), {}),  # no words
        (torch.float32, 4, 9, (7, 7), {"runs": 1}),
        (torch.float32, 2, 40, (3, 3), {}),
        (torch.float32, 4, 4, (5, 3), {"dilation": (1, 3)}),
        (torch.float64, 4, 3, (5, 5), {}),
    ],
    ids=str,
)
def test_all_gradients_at_once(dtype, side, channels, kernel, options):
    check_grads(make_mask("ragged"), side, channels, kernel, dtype, **options, seeds=(0, 3))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.thorough(but_every=5)
def test_all_gradients_at_once_for_every_mask(name):
    check_grads(make_mask(name), 2, 8, (5, 5), torch.float16, seeds=(2,))


def test_hidden_pixels_change_no_bit_of_all_gradients():
    mask, side = make_mask("ragged"), 4
    visible, weight = mask.to_dense(side), random_tensor((6, 1, 5, 5))
    images, dense = (images_for(mask, side, 6) for _ in range(2))

    def through(hidden):
        x, grad = (gather(torch.where(visible, t, hidden), mask) for t in (images, dense))
        found = grads(grad, x, weight, mask, seeds=(1,))
        return [scatter(found[0], mask), *found[1:3]]

    for clean, dirty in zip(through(0.0), through(NAN), strict=True):
        assert clean.isfinite().all()
        same(clean, dirty)


# -- what moves, and which kernel moves it -------------------------------------------------------


@pytest.mark.thorough
def test_bytes_that_move():
    """Forward reads and writes the features once; all gradients at once read twice as much."""
    mask = ck.BlockMask.random(2, (7, 7), 0.5, generator=torch.Generator().manual_seed(0))
    (x, weight, bias, grad), *_ = problem(mask, 4, 64, (5, 5), torch.bfloat16, (1, 1), 0)
    emulator = module("kernels", "races", None)  # the one that `emulate` asks
    options = {"checker": "races", "seeds": (0,)}

    def traffic():
        """Of the arrays that are like x: bytes once for each kernel, and all, in sizes of x."""
        found = [array for array in emulator.call("take_traffic") if array[0] == array_bytes]
        return [sum(array[i] + array[i + 1] for array in found) / array_bytes for i in (1, 3)]

    array_bytes = x.nbytes
    traffic()
    forward(x, weight, bias, mask, **options)
    once, total = traffic()
    assert once == 2 and 2 < total < 4  # with the surroundings of tiles
    grads(grad, x, weight, mask, **options)
    once, total = traffic()
    assert once == 3 and 3 < total < 5


def test_which_kernels_are_chosen():
    def plan(dtype, side, kernel):
        """ConvMAE-Base, batch 128, on a GPU that holds 1,716 thread blocks of one warp."""
        return tuple(
            module("kernels", "address", None).call("plan", dtype, 6272, 256, side, kernel, 1716)
        )

    assert plan(1, 4, 5) == ("tiles", 419, "tiles", 33)
    assert plan(1, 2, 5) == ("tiles", 419, "tiles", 98)
    assert plan(1, 8, 7)[::2] == ("tensor", "any")  # too few registers for all gradients
    assert plan(0, 8, 7)[::2] == ("tiles", "tiles")
    assert plan(3, 4, 5)[::2] == plan(1, 4, 9)[::2] == ("any", "any")


# -- hidden means hidden ------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kernel", [(5, 5), (3, 7)], ids=str)
@pytest.mark.thorough(but_every=5)
def test_hidden_pixels_change_no_bit(kernel, value, dtype):
    mask, side, channels = make_mask("ragged"), 4, 6
    visible = mask.to_dense(side)
    images, grads = (images_for(mask, side, channels, dtype) for _ in range(2))
    weight = random_tensor((channels, 1, *kernel), dtype)

    def through(hidden):
        x, grad = (gather(torch.where(visible, t, hidden), mask) for t in (images, grads))
        y, _ = forward(x, weight, None, mask)
        return [scatter(y, mask), *weight_grad(grad, x, mask, kernel)[:2]]

    for clean, dirty in zip(through(0.0), through(value), strict=True):
        assert clean.isfinite().all()
        same(clean, dirty)


@all_dtypes
@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7), (3, 5)], ids=str)
@pytest.mark.thorough(but_every=11)
def test_values_reach_their_window_only(kernel, side, dtype):
    mask, channels = make_mask("ragged"), 4
    x = random_tensor((mask.num_visible, side * side, channels), dtype)
    weight = random_tensor((channels, 1, *kernel), dtype)
    clean = forward(x, weight, None, mask, runs=2, seeds=(3,))[0]
    for block, position in ((0, 0), (5, 3), (mask.num_visible - 1, 2)):
        spot = torch.zeros(mask.num_visible, side * side, 1)
        spot[block, position] = 1
        window = reference.masked_conv2d(
            spot,
            torch.ones(1, 1, *kernel),
            None,
            mask.neighbours(reach(side, kernel, (1, 1))),
            [1, 1],
        )
        dirty = forward(torch.where(spot > 0, NAN, x), weight, None, mask, runs=2, seeds=(3,))[0]
        inside = (window > 0).expand_as(dirty)
        assert dirty[inside].isnan().all()
        assert torch.equal(dirty[~inside], clean[~inside])


# -- races, and barriers that are missing -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7)], ids=str)
@pytest.mark.thorough
def test_no_races(kernel, side, dtype):
    channels = 64 if kernel == (7, 7) else 40  # tensor cores have whole slices only
    check(make_mask("row"), side, channels, kernel, dtype, runs=2, checker="races", seeds=(0, 3))


@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.thorough
def test_no_races_in_all_gradients_at_once(side):
    check_grads(make_mask("row"), side, 40, runs=2, checker="races", seeds=(0, 3))


def move(**options):
    mask = make_mask("row")
    for layout in ("contiguous", "channels_last"):
        images = images_for(mask, 4, 40, layout=layout)
        same(
            gather(images, mask, **options),
            reference.gather_visible(images, mask.block_index, *mask.grid),
        )
    x = random_tensor((mask.num_visible, 16, 40))
    same(
        scatter(x, mask, **options),
        reference.scatter_visible(x, mask.block_index, mask.batch_size, *mask.grid, 0.0),
    )


def reduce_on_tiles(**options):
    """Two warps with one tile each, so that their sums go to where that tile was."""
    mask = ck.BlockMask.full(1, (1, 2))
    check_weight_grad(mask, 4, 80, dtype=torch.float16, runs=1, **options)


def all_gradients_on_tiles(**options):
    """Two warps with one tile each and two without, whose weights come where sums go to."""
    mask = ck.BlockMask.full(1, (1, 2))
    check_grads(mask, 2, 80, dtype=torch.float16, runs=1, **options)


def convolve_on_tiles(**options):
    check_forward(make_mask("row"), 4, 40, runs=2, **options)


def convolve_with_stride(**options):
    check_strided(make_mask("row"), 4, (2, (3, 3), 2, (1, 1), (1, 1)), blocks_per_run=1, **options)


def convolve_on_tensor_cores(**options):
    """Three groups of tiles in one run."""
    check_forward(ck.BlockMask.full(1, (3, 6)), 4, 32, (7, 7), torch.float16, runs=1, **options)


# What runs the statements of synchronisation of each file, and the source that compiles them.
USES = {
    "gather_visible.cuh": ("moves.cpp", move),
    "rows.cuh": ("moves.cpp", move),
    "tiles.cuh": ("masked_conv2d.cpp", convolve_on_tiles),
    "tile_kernels.cuh": ("masked_conv2d_grads.cpp", all_gradients_on_tiles),
    "masked_conv2d_grads.cuh": ("masked_conv2d_grads.cpp", all_gradients_on_tiles),
    "masked_conv2d.cuh": ("masked_conv2d.cpp", convolve_on_tiles),
    "masked_conv2d_tensor.cuh": ("masked_conv2d_tensor.cpp", convolve_on_tensor_cores),
    "masked_conv2d_weight_grad.cuh": ("masked_conv2d_weight_grad.cpp", reduce_on_tiles),
    "strided_conv2d.cuh": ("strided_conv2d.cpp", convolve_with_stride),
}
SYNCHRONISATION = [
    (path.name, statement, occurrence)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    for statement in (
        "__syncthreads();",
        "__syncwarp();",
        "copies_wait();",
        "copies_wait_but_one();",
    )
    for occurrence in range(path.read_text().count(statement))
]


@pytest.mark.parametrize(("file", "statement", "occurrence"), SYNCHRONISATION)
@pytest.mark.thorough
def test_every_synchronisation_is_needed(file, statement, occurrence):
    """Without it there is a race, or a copy that is read before it is there."""
    unit, use = USES[file]
    use(checker="races")
    removed = Removed(unit, file, statement, occurrence)
    with pytest.raises(
        (EmulatorError, AssertionError), match="shared memory that thread|errs by nan"
    ):
        use(checker="races", removed=removed)


@pytest.mark.parametrize("file", ["gather_visible.cuh", "rows.cuh"])
@pytest.mark.thorough
def test_a_removed_barrier_gives_wrong_results(file):
    unit, use = USES[file]
    use()
    with pytest.raises(AssertionError):
        use(removed=Removed(unit, file, "__syncthreads();", 0))
