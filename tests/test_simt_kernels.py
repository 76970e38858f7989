"""The CUDA kernels on the emulator of `tests/simt`, against the reference in float64."""

import math

import numpy as np
import pytest
import torch
from simt.emulator import ROOT, EmulatorError, Removed, module, why_not

import convmae_kernels as ck
from convmae_kernels.block_mask import BLOCK_SIZES
from convmae_kernels.ops import reference
from convmae_kernels.ops.gather_windows import reach as halo_reach
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    MASKS,
    assert_within_budget,
    make_mask,
    random_tensor,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}")

SEEDS = (0, 1, 2, 3)  # ascending, descending, random, random and interrupted
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NAN, INF = float("nan"), float("inf")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def array(tensor):
    """The tensor as NumPy sees it; bfloat16, which NumPy lacks, as 16-bit integers."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def emulate(function, *arguments, like, seeds=SEEDS, checker="address", removed=None):
    """The outputs of a kernel, as tensors of the dtype of `like`; the same under every seed."""
    emulator = module("kernels", checker, removed)
    first = None
    for seed in seeds:
        results = emulator.call(function, *arguments, seed)
        results = results if isinstance(results, tuple) else (results,)
        if first is None:
            first = results
        for a, b in zip(first, results, strict=True):
            assert np.array_equal(bits(a), bits(b)), f"seed {seed} gives other bits"
    return [torch.from_numpy(r).view(like.dtype) if isinstance(r, np.ndarray) else r for r in first]


def bits(value):
    return np.asarray(value).reshape(-1).view(np.uint8)


# -- moving -------------------------------------------------------------------------------------


def gather(images, mask, **options):
    gh, gw = mask.grid
    count = images.untyped_storage().nbytes() // images.element_size()
    storage = images.as_strided((count,), (1,), 0)
    return emulate(
        "gather_visible", array(storage), images.storage_offset(), list(images.stride()),
        mask.block_index.numpy(), images.shape[1], [gh, gw], images.shape[2] // gh, like=images,
        **options,
    )[0]  # fmt: skip


def scatter(x, mask, fill=0.0, offset=0, **options):
    value = array(torch.full((1,), fill, dtype=x.dtype))
    y = emulate(
        "scatter_visible", array(x), mask.block_index.numpy(), mask.batch_size, list(mask.grid),
        value, offset, like=x, **options,
    )[0]  # fmt: skip
    return y.permute(0, 3, 1, 2)


def images_for(mask, side, channels, dtype=torch.float32, layout="contiguous"):
    gh, gw = mask.grid
    return random_tensor((mask.batch_size, channels, gh * side, gw * side), dtype, layout)


def same(actual, expected):
    assert actual.shape == expected.shape
    assert np.array_equal(bits(array(actual)), bits(array(expected)))


def check_gather(images, mask):
    same(gather(images, mask), reference.gather_visible(images, mask.block_index, *mask.grid))


def check_scatter(x, mask, fill, offset=0):
    expected = reference.scatter_visible(x, mask.block_index, mask.batch_size, *mask.grid, fill)
    same(scatter(x, mask, fill, offset), expected)


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 7, 8, 40])
def test_gather(layout, channels, dtype):
    mask = make_mask("ragged")
    check_gather(images_for(mask, 4, channels, dtype, layout), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MASKS)
def test_gather_of_every_mask(name, layout):
    for side in (1, 2, 8):
        mask = make_mask(name)
        check_gather(images_for(mask, side, 9, layout=layout), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", BLOCK_SIZES)
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
def test_windows_of_every_mask(name):
    mask = make_mask(name)
    for side in (2, 4):
        for channels in (0, 9):
            check_windows(random_tensor((mask.num_visible, side * side, channels)), mask, HALOS[2])


@all_dtypes
@pytest.mark.parametrize("offset", [1, 2])
def test_windows_at_addresses_that_are_not_multiples_of_16_bytes(offset, dtype):
    mask = make_mask("row")
    for channels in (16, 255):
        x = random_tensor((mask.num_visible, 4, channels), dtype)
        check_windows(x, mask, HALOS[0], NAN, offset)


@pytest.mark.parametrize("side", BLOCK_SIZES)
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
    )  # fmt: skip


def weight_grad(grad, x, mask, kernel, dilation=(1, 1), offset=0, runs=0, **options):
    """Gradients of weight and bias, and the side of the tiles."""
    table = mask.neighbours(reach(math.isqrt(x.shape[1]), kernel, dilation))
    return emulate(
        "masked_conv2d_weight_grad", CODES[x.dtype], array(grad), array(x), table.numpy(),
        [*kernel], [*dilation], offset, runs, like=x, **options,
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


# -- hidden means hidden ------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kernel", [(5, 5), (3, 7)], ids=str)
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
def test_no_races(kernel, side, dtype):
    check(make_mask("row"), side, 40, kernel, dtype, runs=2, checker="races", seeds=(0, 3))


def test_no_races_in_gather():
    gather(images_for(make_mask("ragged"), 4, 70), make_mask("ragged"), checker="races")


def test_no_races_in_windows():
    mask = make_mask("row")
    for channels in (7, 256):
        check_windows(
            random_tensor((mask.num_visible, 16, channels)), mask, HALOS[2], checker="races"
        )


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


def convolve_on_tiles(**options):
    check_forward(make_mask("row"), 4, 40, runs=2, **options)


# What runs the statements of synchronisation of each file, and the source that compiles them.
USES = {
    "gather_visible.cuh": ("moves.cpp", move),
    "rows.cuh": ("moves.cpp", move),
    "tiles.cuh": ("masked_conv2d.cpp", convolve_on_tiles),
    "masked_conv2d.cuh": ("masked_conv2d.cpp", convolve_on_tiles),
    "masked_conv2d_weight_grad.cuh": ("masked_conv2d_weight_grad.cpp", reduce_on_tiles),
}
SYNCHRONISATION = [
    (path.name, statement, occurrence)
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    for statement in ("__syncthreads();", "__syncwarp();", "copies_wait();")
    for occurrence in range(path.read_text().count(statement))
]


@pytest.mark.parametrize(("file", "statement", "occurrence"), SYNCHRONISATION)
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
def test_a_removed_barrier_gives_wrong_results(file):
    unit, use = USES[file]
    use()
    with pytest.raises(AssertionError):
        use(removed=Removed(unit, file, "__syncthreads();", 0))
