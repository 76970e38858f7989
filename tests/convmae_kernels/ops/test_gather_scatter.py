"""`gather_visible` and `scatter_visible`: they move numbers, so every comparison is exact."""

import math

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    MASKS,
    implementations,
    make_mask,
    random_tensor,
    value_and_grads,
    with_layout,
)
from convmae_kernels.zorder import BLOCK_SIZES

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.thorough(but_every=5)]

all_impls = pytest.mark.parametrize("impl", implementations())
POISONS = [float("nan"), float("inf"), -float("inf"), 1e30]


def bits(*tensors):
    """The memory of tensors as integers: NaN equals NaN, and 0 differs from -0."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.contiguous().view(views[t.element_size()]).tolist() for t in tensors]


def positions(mask, side):
    """`(packed row, position, image, row, column)` of every visible position, by loops."""
    gh, gw = mask.grid
    for t, block in enumerate(mask.block_index.tolist()):
        image, top, left = block // (gh * gw), block // gw % gh * side, block % gw * side
        for z in range(side * side):
            row = sum((z >> 2 * bit + 1 & 1) << bit for bit in range(5))
            column = sum((z >> 2 * bit & 1) << bit for bit in range(5))
            yield t, z, image, top + row, left + column


def index_of(mask, side):
    """The indices of all visible positions in packed and in dense tensors, as five vectors."""
    return torch.tensor(list(positions(mask, side)), dtype=torch.long).view(-1, 5).unbind(1)


def gather_by_loops(images, mask):
    side = images.shape[2] // mask.grid[0]
    t, z, image, row, column = index_of(mask, side)
    packed = images.new_zeros(mask.num_visible, side * side, images.shape[1])
    packed[t, z] = images[image, :, row, column]
    return packed


def scatter_by_loops(x, mask, fill=0.0):
    side, (gh, gw) = math.isqrt(x.shape[1]), mask.grid
    t, z, image, row, column = index_of(mask, side)
    dense = x.new_full((mask.batch_size, x.shape[2], gh * side, gw * side), fill)
    dense[image, :, row, column] = x[t, z]
    return dense


def image_shape(mask, side, channels):
    return mask.batch_size, channels, mask.grid[0] * side, mask.grid[1] * side


@all_impls
@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_every_block_side(impl, side, name):
    mask = make_mask(name)
    images = random_tensor(image_shape(mask, side, 3))
    packed = ck.gather_visible(images, mask, impl=impl)
    assert packed.shape == (mask.num_visible, side * side, 3)
    assert packed.is_contiguous()
    assert torch.equal(packed, gather_by_loops(images, mask))
    dense = ck.scatter_visible(packed, mask, impl=impl)
    assert dense.shape == images.shape
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dense, torch.where(mask.to_dense(side), images, 0))


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_gather_and_its_gradient(impl, dtype, layout, name):
    mask = make_mask(name)
    for side, channels in ((1, 7), (2, 255), (4, 1), (4, 8)):
        images = random_tensor(image_shape(mask, side, channels), dtype, layout)
        grad = random_tensor((mask.num_visible, side * side, channels), dtype, layout)
        y, grad_images = value_and_grads(
            lambda images: ck.gather_visible(images, mask, impl=impl), [images], grad
        )
        assert y.dtype == grad_images.dtype == dtype
        assert torch.equal(y, gather_by_loops(images, mask))
        assert torch.equal(grad_images, scatter_by_loops(grad, mask))


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_scatter_and_its_gradient(impl, dtype, layout, name):
    mask = make_mask(name)
    for side, channels in ((1, 7), (2, 255), (4, 1), (4, 8)):
        x = random_tensor((mask.num_visible, side * side, channels), dtype, layout)
        grad = random_tensor(image_shape(mask, side, channels), dtype, layout)
        y, grad_x = value_and_grads(
            lambda x: ck.scatter_visible(x, mask, fill=-1.5, impl=impl), [x], grad
        )
        assert y.dtype == grad_x.dtype == dtype
        assert torch.equal(y, scatter_by_loops(x, mask, -1.5))
        assert torch.equal(grad_x, gather_by_loops(grad, mask))


@all_impls
def test_gradient_of_a_sum(impl):
    # The gradient of a sum is one number, expanded: every stride is 0.
    mask = make_mask("ragged")
    images = random_tensor(image_shape(mask, 4, 5)).requires_grad_()
    ck.gather_visible(images, mask, impl=impl).sum().backward()
    assert torch.equal(images.grad, mask.to_dense(4).expand_as(images).float())
    x = random_tensor((mask.num_visible, 16, 5)).requires_grad_()
    ck.scatter_visible(x, mask, fill=2.0, impl=impl).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", [0.0, -0.0, 0.1, *POISONS[:2]])
def test_fill(impl, dtype, fill):
    mask = make_mask("ragged")
    x = random_tensor((mask.num_visible, 4, 9), dtype)
    dense = ck.scatter_visible(x, mask, fill=fill, impl=impl)
    assert bits(dense) == bits(scatter_by_loops(x, mask, fill))


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", POISONS)
def test_hidden_positions_are_not_read(impl, dtype, value):
    mask, side = make_mask("ragged"), 4
    visible = mask.to_dense(side)
    clean = random_tensor(image_shape(mask, side, 9), dtype)
    dirty = torch.where(visible, clean, value)
    grad = random_tensor((mask.num_visible, 16, 9), dtype)
    for layout in LAYOUTS[:4]:
        results = [
            value_and_grads(
                lambda images: ck.gather_visible(images, mask, impl=impl),
                [with_layout(images, layout)],
                grad,
            )
            for images in (clean, dirty)
        ]
        assert bits(*results[0]) == bits(*results[1])
        assert not results[1][1][~visible.expand_as(clean)].any()
        # The gradient that arrives at hidden positions of a scattered map is not read either.
        results = [
            value_and_grads(
                lambda x: ck.scatter_visible(x, mask, impl=impl),
                [grad],
                with_layout(images, layout),
            )
            for images in (clean, dirty)
        ]
        assert bits(*results[0]) == bits(*results[1])


@all_impls
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-45])
def test_visible_values_pass_unchanged(impl, special):
    mask = make_mask("equal")
    images = torch.full(image_shape(mask, 2, 3), special)
    packed = ck.gather_visible(images, mask, impl=impl)
    dense = ck.scatter_visible(packed, mask, fill=special, impl=impl)
    assert bits(packed) == bits(torch.full_like(packed, special))
    assert bits(dense) == bits(images)


@pytest.mark.parametrize("impl", sorted({*implementations(), "auto"}))
def test_derivatives_of_every_order(impl):
    transforms = impl in (
        "auto",
        "reference",
    )  # others refuse them: tests/convmae_kernels/test_transforms.py
    mask = make_mask("equal")
    images = random_tensor(image_shape(mask, 2, 3), torch.float64).requires_grad_()
    x = random_tensor((mask.num_visible, 4, 3), torch.float64).requires_grad_()

    def gather(images):
        return ck.gather_visible(images, mask, impl=impl).sin()

    def scatter(x):
        return ck.scatter_visible(x, mask, fill=0.5, impl=impl).sin()

    for function, leaf in ((gather, images), (scatter, x)):
        assert torch.autograd.gradcheck(
            function, leaf, check_forward_ad=transforms, check_batched_grad=transforms
        )
        assert torch.autograd.gradgradcheck(function, leaf)


@all_impls
def test_images_of_a_batch_are_independent(impl):
    mask = make_mask("ragged")
    images = random_tensor(image_shape(mask, 4, 6))
    packed = ck.gather_visible(images, mask, impl=impl)
    order = [2, 0, 3, 1]
    per_image = packed.split(mask.visible.flatten(1).sum(1).tolist())
    shuffled = ck.BlockMask.from_visible(mask.visible[order])
    assert torch.equal(
        ck.gather_visible(images[order], shuffled, impl=impl),
        torch.cat([per_image[i] for i in order]),
    )
    for i in range(4):
        alone = ck.BlockMask.from_visible(mask.visible[i : i + 1])
        assert torch.equal(ck.gather_visible(images[i : i + 1], alone, impl=impl), per_image[i])


@all_impls
def test_no_images_and_no_channels(impl):
    for batch, channels in ((0, 3), (2, 0)):
        mask = ck.BlockMask.full(batch, (3, 4))
        images = torch.zeros(batch, channels, 6, 8)
        packed = ck.gather_visible(images, mask, impl=impl)
        assert packed.shape == (batch * 12, 4, channels)
        assert ck.scatter_visible(packed, mask, impl=impl).shape == images.shape


# -- bad input ----------------------------------------------------------------------------------

MASK = make_mask("equal")  # 2 images, 3 x 4 blocks, 8 of them visible


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 12, 16), ValueError, r"images must be \[B, C, H, W\], got 3 dimensions"),
        (torch.zeros(2, 3, 12, 16).long(), TypeError, "images must be float32.*got torch.int64"),
        (torch.zeros(2, 3, 12, 16).cfloat(), TypeError, "images must be.*got torch.complex64"),
        ([1.0], TypeError, "images must be a tensor, got list"),
        (torch.zeros(2, 3, 12, 16, device="meta"), ValueError, "images is on meta, but the mask"),
        (torch.zeros(3, 3, 12, 16), ValueError, "images has batch size 3, but the mask is for 2"),
        (torch.zeros(2, 3, 13, 16), ValueError, "images of 13 x 16 do not divide into a grid"),
        (torch.zeros(2, 3, 12, 17), ValueError, "images of 12 x 17 do not divide into a grid"),
        (torch.zeros(2, 3, 12, 12), ValueError, "images of 12 x 12 do not divide into a grid"),
        (torch.zeros(2, 3, 9, 12), ValueError, "grid of 3 x 4 square blocks of side 1, 2, 4, 8"),
        (torch.zeros(2, 3, 192, 256), ValueError, "images of 192 x 256 do not divide"),
        (torch.zeros(2, 3, 0, 0), ValueError, "images of 0 x 0 do not divide"),
    ],
)
def test_gather_rejects(images, error, message):
    with pytest.raises(error, match=message):
        ck.gather_visible(images, MASK)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(8, 4), ValueError, r"x must be packed features \[T, s\*s, C\], got 2 dim"),
        (torch.zeros(8, 4, 3).int(), TypeError, "x must be float32.*got torch.int32"),
        (None, TypeError, "x must be a tensor, got NoneType"),
        (torch.zeros(8, 4, 3, device="meta"), ValueError, "x is on meta, but the mask is on cpu"),
        (torch.zeros(9, 4, 3), ValueError, "x has 9 blocks, but the mask has 8 visible ones"),
        (torch.zeros(8, 5, 3), ValueError, r"s one of .* got s\*s = 5"),
    ],
)
def test_scatter_rejects(x, error, message):
    with pytest.raises(error, match=message):
        ck.scatter_visible(x, MASK)


@pytest.mark.parametrize("mask", [MASK.visible, None])
def test_a_mask_is_a_block_mask(mask):
    for op, x in (
        (ck.gather_visible, torch.zeros(2, 3, 6, 8)),
        (ck.scatter_visible, torch.zeros(8, 4, 3)),
    ):
        with pytest.raises(TypeError, match="mask must be a BlockMask, got"):
            op(x, mask)


@pytest.mark.parametrize("impl", ["cuda", "triton", "numpy"])
def test_an_implementation_that_cannot_run(impl):
    reason = "not one of" if impl == "numpy" else "GPU"
    for op, x in (
        (ck.gather_visible, torch.zeros(2, 3, 6, 8)),
        (ck.scatter_visible, torch.zeros(8, 4, 3)),
    ):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run: .*{reason}"):
            op(x, MASK, impl=impl)
