"""Pooling of packed features, and sums over images, against dense maps and loops."""

import pytest
import torch
import torch.nn.functional as F

import convmae_kernels as ck
from convmae_kernels.functional import pooling
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    MASKS,
    assert_within_budget,
    make_mask,
    random_tensor,
    value_and_grads,
)

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.thorough(but_every=3)]

INF, NAN = float("inf"), float("nan")
# side, kernel, stride, padding, dilation
MAX_POOLS = [
    (1, 3, 1, 1, 1),
    (2, 2, None, 0, 1),
    (4, (3, 5), 1, (1, 2), 1),
    (4, 3, 2, 1, 1),
    (8, (4, 2), 4, (1, 0), 1),
    (4, 3, 2, 2, 2),
    (2, 2, 1, 1, 2),  # a window without its own position
    (2, 2, 1, 2, 4),  # nor any other of its block
    (32, 4, 4, 0, 1),
]
AVG_POOLS = [pool[:4] for pool in MAX_POOLS if pool[4] == 1]


def mask_for(side, name="ragged"):
    return make_mask("corner" if side >= 16 else name)


def dense_max(x, mask, kernel, stride, padding, dilation=1):
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    dense = ck.scatter_visible(x, mask, fill=-INF, impl="reference")
    dense = F.pad(dense, (columns, columns, rows, rows), value=-INF)
    y = F.max_pool2d(dense, kernel, stride, 0, dilation)
    y = y.where(y > -INF, 0)  # of windows with nothing visible
    return ck.gather_visible(y, mask, impl="reference")


def dense_avg(x, mask, kernel, stride, padding):
    dense = ck.scatter_visible(x, mask, impl="reference")
    seen = mask.to_dense(dense.shape[2] // mask.grid[0]).to(x.dtype)
    y, share = (F.avg_pool2d(t, kernel, stride, padding) for t in (dense, seen))
    return ck.gather_visible(y / share.where(share > 0, 1), mask, impl="reference")


@pytest.mark.parametrize("pool", MAX_POOLS, ids=str)
@pytest.mark.parametrize("name", ["ragged", "none", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool(pool, name, dtype):
    side, *sizes = pool
    mask = mask_for(side, name)
    for layout in ("contiguous", "sliced", "transposed"):
        x = random_tensor((mask.num_visible, side * side, 5), dtype, layout)
        assert torch.equal(ck.masked_max_pool2d(x, mask, *sizes), dense_max(x, mask, *sizes))
        # Many ties: the gradient is the first's. Small integers: its sums are exact.
        x = x.round()
        expected = dense_max(x, mask, *sizes)
        grad = random_tensor(expected.shape, dtype, layout).mul(2).round()
        found = value_and_grads(lambda x: ck.masked_max_pool2d(x, mask, *sizes), [x], grad)
        plain = value_and_grads(lambda x: dense_max(x, mask, *sizes), [x], grad)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("pool", AVG_POOLS, ids=str)
@pytest.mark.parametrize("name", ["ragged", "none", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avg_pool(pool, name, dtype):
    side, *sizes = pool
    mask = mask_for(side, name)
    x = random_tensor((mask.num_visible, side * side, 5), dtype, "sliced")
    grad = random_tensor(dense_avg(x, mask, *sizes).shape, dtype)

    def dense(x, grad):
        return value_and_grads(lambda x: dense_avg(x, mask, *sizes), [x], grad)

    found = value_and_grads(lambda x: ck.masked_avg_pool2d(x, mask, *sizes), [x], grad)
    exact, plain = dense(x.double(), grad.double()), dense(x, grad)
    terms = dense(x.double().abs(), grad.double().abs())
    for values in zip(found, exact, plain, terms, ("output", "gradient"), strict=True):
        assert_within_budget(*values)


def test_windows_by_a_loop():
    mask, side = make_mask("ragged"), 2
    visible = mask.to_dense(side)
    dense = random_tensor((4, 2, 6, 8), torch.float64)
    x = ck.gather_visible(dense, mask)
    largest, mean = dense.clone(), dense.clone()
    for image, row, column in visible[:, 0].nonzero().tolist():
        window = (image, slice(None), slice(max(row - 1, 0), row + 2))
        columns = slice(max(column - 2, 0), column + 3)
        seen = visible[image, 0, window[2], columns]
        values = dense[window][..., columns][:, seen]
        largest[image, :, row, column] = values.amax(1)
        mean[image, :, row, column] = values.mean(1)
    found = ck.masked_max_pool2d(x, mask, (3, 5), 1, (1, 2))
    assert torch.equal(found, ck.gather_visible(largest, mask))
    found = ck.masked_avg_pool2d(x, mask, (3, 5), 1, (1, 2))
    torch.testing.assert_close(found, ck.gather_visible(mean, mask))


def test_an_infinity_is_a_value_and_nothing_is_zero():
    """A dilated window that lies in other blocks, of which one is visible or none."""
    visible = torch.tensor([[[1, 0], [0, 1]], [[1, 0], [0, 0]]]).bool()
    mask, pool = ck.BlockMask.from_visible(visible), (2, 1, 2, 4)
    x = torch.full((3, 4, 1), -INF).requires_grad_()
    y = ck.masked_max_pool2d(x, mask, *pool)
    assert sorted(y.flatten().tolist()) == [-INF] * 8 + [0.0] * 4
    y.where(y == 0, 0).sum().backward()
    assert not x.grad.any()


def test_derivatives_of_pooling():
    mask = make_mask("row")
    x = random_tensor((mask.num_visible, 4, 2), torch.float64).requires_grad_()
    for pool in (ck.masked_max_pool2d, ck.masked_avg_pool2d):
        function = lambda x, pool=pool: pool(x, mask, 3, 1, 1)  # noqa: E731
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x).square(), x)


def test_hidden_pixels_change_no_bit():
    mask, side = make_mask("ragged"), 4
    visible = mask.to_dense(side)
    images = random_tensor((4, 3, 12, 16))

    def through(images):
        x = ck.gather_visible(images, mask)
        pooled = [
            ck.masked_max_pool2d(x, mask, 3, 2, 1),
            ck.masked_avg_pool2d(x, mask, 3, 2, 1),
            pooling.image_mean(x, mask),
            pooling.image_max(x, mask).clamp_min(-9),
        ]
        return torch.cat([p.flatten() for p in pooled])

    grad = torch.randn_like(through(images))
    clean, dirty = (
        value_and_grads(through, [torch.where(visible, images, v)], grad) for v in (0.0, NAN)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


# -- all positions of an image ------------------------------------------------------------------


def by_image(x, mask):
    """The rows `[n, C]` of every image."""
    counts = mask.visible.flatten(1).sum(1).tolist()
    return [part.reshape(-1, x.shape[2]) for part in x.split(counts)]


def loop_over_images(reduce, x, mask, empty):
    rows = [reduce(r) if len(r) else r.sum(0) + empty for r in by_image(x, mask)]
    return torch.stack(rows)


REDUCTIONS = {
    "sum": (pooling.image_sum, lambda r: r.sum(0), 0.0),
    "mean": (pooling.image_mean, lambda r: r.mean(0), 0.0),
    "max": (pooling.image_max, lambda r: r.amax(0), 0.0),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_reductions_of_images(reduction, dtype, name):
    function, reduce, empty = REDUCTIONS[reduction]
    mask = make_mask(name)
    for layout in LAYOUTS:
        x = random_tensor((mask.num_visible, 16, 3), dtype, layout)
        result = torch.float32 if reduction == "sum" and x.itemsize == 2 else dtype
        grad = random_tensor((mask.batch_size, 3), result)

        def loop(x, grad, reduce=reduce, empty=empty):
            return value_and_grads(lambda x: loop_over_images(reduce, x, mask, empty), [x], grad)

        found = value_and_grads(lambda x: function(x, mask), [x], grad)
        assert (found[0].dtype, found[1].dtype) == (result, dtype)
        exact, plain = loop(x.double(), grad.double()), loop(x, grad.to(dtype))
        if reduction == "max" and layout != "expanded":  # else ties: gradients are shared
            assert torch.equal(found[0], plain[0])
            assert torch.equal(found[1], plain[1])
        elif reduction == "max":
            assert torch.equal(found[0], plain[0])
        else:
            plain[0] = plain[0].to(result)
            terms = loop(x.double().abs(), grad.double().abs())
            for values in zip(found, exact, plain, terms, ("output", "gradient"), strict=True):
                assert_within_budget(*values)


def test_ties_share_the_gradient_of_a_maximum():
    mask = make_mask("ragged")
    x = torch.zeros(mask.num_visible, 4, 2).requires_grad_()
    pooling.image_max(x, mask).sum().backward()
    for image in by_image(x.grad, mask):
        assert (image > 0).all()
        torch.testing.assert_close(image.sum(0), torch.full((2,), float(len(image) > 0)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["row", "equal"])
def test_derivatives_of_reductions(reduction, name):
    function, mask = REDUCTIONS[reduction][0], make_mask(name)
    x = random_tensor((mask.num_visible, 4, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, mask), x)
    assert torch.autograd.gradgradcheck(lambda x: function(x, mask).square(), x)


@pytest.mark.parametrize("name", MASKS)
def test_values_of_images(name):
    mask = make_mask(name)
    values = random_tensor((mask.batch_size, 2, 3), torch.float64).requires_grad_()
    blocks = pooling.spread_to_blocks(values, mask)
    image = mask.visible.nonzero()[:, 0]
    assert torch.equal(mask.image_index, image)
    assert torch.equal(blocks, values[image])
    counts = mask.visible.flatten(1).sum(1)
    assert torch.equal(pooling.image_counts(mask, 4), 16 * counts)
    (grad,) = torch.autograd.grad(blocks.sum(), values)
    assert torch.equal(grad, counts.double().view(-1, 1, 1).expand_as(values))


def test_no_images():
    mask = ck.BlockMask.full(0, (3, 4))
    x = torch.zeros(0, 16, 3)
    for function, _, _ in REDUCTIONS.values():
        assert function(x, mask).shape == (0, 3)
    assert pooling.spread_to_blocks(torch.zeros(0, 5), mask).shape == (0, 5)
    for pool in (ck.masked_max_pool2d, ck.masked_avg_pool2d):
        assert pool(x, mask, 2).shape == (0, 4, 3)


def test_one_compiled_callable_serves_every_mask():
    def model(x, mask):
        y = ck.masked_max_pool2d(x, mask, 3, 2, 1) + ck.masked_avg_pool2d(x, mask, 2)
        return pooling.image_mean(y, mask) + pooling.image_max(y, mask)

    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            mask = ck.BlockMask.random(2, (3, 4), 0.5)
            x = random_tensor((mask.num_visible, 16, 3))
            torch.testing.assert_close(function(x, mask), model(x, mask))


# -- bad input ----------------------------------------------------------------------------------

MASK = make_mask("equal")
X = torch.zeros(8, 16, 3)


@pytest.mark.parametrize("pool", [ck.masked_max_pool2d, ck.masked_avg_pool2d])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[:7]}, ValueError, "x has 7 blocks, but the mask has 8 visible ones"),
        ({"x": X.int()}, TypeError, "x must be float32, .*got torch.int32"),
        ({"mask": MASK.visible}, TypeError, "mask must be a BlockMask, got Tensor"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be a positive integer .* got 0"),
        ({"kernel_size": None}, ValueError, "kernel_size must be a positive .* got None"),
        ({"kernel_size": 3}, ValueError, r"stride must be a power of two, .* got \(3, 3\)"),
        ({"stride": 8}, ValueError, "stride must .* divides the side of the blocks, 4 here, got 8"),
        ({"stride": (2, 1)}, ValueError, r"stride must .* same in both directions, .* \(2, 1\)"),
        ({"kernel_size": 3, "stride": 1}, ValueError, r"padding must keep .* one of \[1\], got 0"),
        ({"padding": -1}, ValueError, "padding must be a non-negative integer .* got -1"),
    ],
)
def test_pooling_rejects(pool, arguments, error, message):
    good = {"x": X, "mask": MASK, "kernel_size": 2}
    assert pool(**good).shape == (8, 4, 3)
    with pytest.raises(error, match=message):
        pool(**{**good, **arguments})


def test_reductions_reject():
    for function, _, _ in REDUCTIONS.values():
        with pytest.raises(ValueError, match="x has 7 blocks, but the mask has 8 visible ones"):
            function(X[:7], MASK)
        with pytest.raises(TypeError, match="x must be float32, .*got torch.int64"):
            function(X.long(), MASK)
        with pytest.raises(TypeError, match="mask must be a BlockMask, got NoneType"):
            function(X, None)
    with pytest.raises(ValueError, match="values is for 3 images, the mask for 2"):
        pooling.spread_to_blocks(torch.zeros(3, 5), MASK)
    with pytest.raises(ValueError, match="dilation must be a positive integer .* got 0"):
        ck.masked_max_pool2d(X, MASK, 2, dilation=0)
