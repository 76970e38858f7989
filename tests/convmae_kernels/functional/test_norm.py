"""Norms of packed features, against PyTorch's on the visible positions and against loops."""

import pytest
import torch
import torch.nn.functional as F

import convmae_kernels as ck
from convmae_kernels.functional import norm
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    assert_within_budget,
    make_mask,
    random_tensor,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CHANNELS = 6
NAMES = ("output", "gradient of x", "gradient of weight", "gradient of bias")
masks = pytest.mark.parametrize("name", ["ragged", "equal", "none", "one", "all"])


def make_inputs(mask, dtype=torch.float64, layout="contiguous"):
    """x, off zero, weight, bias and the gradient of the output."""
    x = random_tensor((mask.num_visible, 16, CHANNELS), dtype, layout)
    grad = random_tensor(x.shape, dtype, layout)
    return [x * 2 + 1, random_tensor((CHANNELS,), dtype), random_tensor((CHANNELS,), dtype), grad]


def images_of(x, mask):
    """The rows `[n, C]` of every image."""
    counts = mask.visible.flatten(1).sum(1).tolist()
    return [part.reshape(-1, x.shape[2]) for part in x.split(counts)]


def each_image(function, x, mask):
    """`function`, of `[n, C]`, of every image that has visible positions."""
    rows = [function(r) if len(r) else r for r in images_of(x, mask)]
    return torch.cat(rows).reshape(x.shape)


def loop_group_norm(x, mask, weight, bias, groups, eps=1e-5):
    def one(rows):
        return F.group_norm(rows.t().unsqueeze(0), groups, weight, bias, eps)[0].t()

    return each_image(one, x, mask)


def loop_grn(x, mask, weight, bias, eps=1e-6):
    def one(rows):
        norms = torch.stack([column.square().sum().sqrt() for column in rows.unbind(1)])
        return rows + weight * rows * (norms / (norms.mean() + eps)) + bias

    return each_image(one, x, mask)


def group_norm(groups):
    return (
        lambda mask, x, w, b: ck.masked_group_norm(x, mask, groups, w, b),
        lambda mask, x, w, b: loop_group_norm(x, mask, w, b, groups),
    )


def batch_norm():
    def loop(mask, x, w, b):
        rows = x.reshape(-1, CHANNELS)
        if not len(rows):
            return x
        return F.batch_norm(rows, None, None, w, b, True).view(x.shape)

    return lambda mask, x, w, b: ck.masked_batch_norm(x, mask, None, None, w, b, True), loop


NORMS = {
    "batch_norm": batch_norm(),
    "group_norm_1": group_norm(1),
    "group_norm_3": group_norm(3),
    "group_norm_6": group_norm(6),
    "instance_norm": (
        lambda mask, x, w, b: ck.masked_instance_norm(x, mask, None, None, w, b),
        lambda mask, x, w, b: loop_group_norm(x, mask, w, b, CHANNELS),
    ),
    "grn": (
        lambda mask, x, w, b: ck.masked_grn(x, mask, w, b),
        lambda mask, x, w, b: loop_grn(x, mask, w, b),
    ),
}
every_norm = pytest.mark.parametrize("kind", NORMS)
OF_IMAGES = [kind for kind in NORMS if kind != "batch_norm"]


def run(function, mask, inputs):
    *arguments, grad = inputs
    leaves = [x.detach().requires_grad_() for x in arguments]
    y = function(mask, *leaves)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


@every_norm
@masks
def test_values_and_gradients(kind, name):
    function, loop = NORMS[kind]
    mask = make_mask(name)
    for layout in LAYOUTS:
        inputs = make_inputs(mask, layout=layout)
        if layout == "expanded":  # all blocks equal, but not all positions
            assert inputs[0].shape[0] < 2 or torch.equal(inputs[0][0], inputs[0][1])
        expected = run(loop, mask, inputs) if mask.num_visible else None
        found = run(function, mask, inputs)
        if expected is None:
            assert found[0].shape == (0, 16, CHANNELS)
            assert not found[2].any()
            assert not found[3].any()
            continue
        for a, b, part in zip(found, expected, NAMES, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=part: f"{n}: {m}"
            )


@every_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(kind, dtype):
    function, loop = NORMS[kind]
    mask = make_mask("ragged")
    inputs = make_inputs(mask, dtype)
    exact = run(loop, mask, [x.double() for x in inputs])
    x, weight, bias, grad = [x.double() for x in inputs]
    scaled = loop(mask, x, torch.ones_like(weight), bias) - loop(mask, x, 0 * weight, bias)
    terms = [x.abs() for x in exact[:2]]
    terms += [(grad * scaled).abs().sum((0, 1)), grad.abs().sum((0, 1))]
    plain = run(loop, mask, inputs)
    found = run(function, mask, inputs)
    assert [t.dtype for t in found] == [dtype] * 4
    for values in zip(found, exact, plain, terms, NAMES, strict=True):
        assert_within_budget(*values)


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features_with_float32_parameters(kind, dtype):
    function, loop = NORMS[kind]
    mask = make_mask("ragged")
    x, weight, bias, _ = make_inputs(mask, dtype)
    y = function(mask, x, weight.float(), bias.float())
    assert y.dtype == dtype
    exact = loop(mask, x.double(), weight.double(), bias.double())
    assert_within_budget(y, exact, loop(mask, x, weight, bias), exact)


@every_norm
def test_derivatives(kind):
    mask = make_mask("row")
    inputs = [t.requires_grad_() for t in make_inputs(mask)[:3]]
    inputs[0] = inputs[0][:, :4].detach().requires_grad_()
    function = lambda *xs: NORMS[kind][0](mask, *xs)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", OF_IMAGES)
@pytest.mark.parametrize("name", ["ragged", "equal"])
def test_an_image_alone_gives_the_same(kind, name):
    function, mask = NORMS[kind][0], make_mask(name)
    x, weight, bias, _ = make_inputs(mask)
    counts = mask.visible.flatten(1).sum(1).tolist()
    together = function(mask, x, weight, bias).split(counts)
    for i, part in enumerate(x.split(counts)):
        alone = ck.BlockMask.from_visible(mask.visible[i : i + 1])
        torch.testing.assert_close(
            function(alone, part, weight, bias), together[i], rtol=1e-12, atol=1e-12
        )


def test_nan_of_one_image_stays_there():
    mask = make_mask("equal")
    x, weight, bias, _ = make_inputs(mask)
    dirty = x.clone()
    dirty[:4] = float("nan")
    for kind in OF_IMAGES:
        clean, found = (NORMS[kind][0](mask, t, weight, bias) for t in (x, dirty))
        assert torch.equal(found[4:], clean[4:])
        assert found[:4].isnan().all()


# -- batch norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ragged", "equal", "all"])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics(name, momentum):
    mask = make_mask(name)
    x, weight, bias, _ = make_inputs(mask)
    packed = [torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()]
    rows = [t.clone() for t in packed]
    for _ in range(2):
        y = ck.masked_batch_norm(x, mask, *packed, weight, bias, True, momentum, 1e-3)
        flat = x.reshape(-1, CHANNELS)
        expected = F.batch_norm(flat, *rows, weight, bias, True, momentum, 1e-3)
        torch.testing.assert_close(y, expected.view(y.shape))
        torch.testing.assert_close(packed, rows)
        x = 3 * x + 1
    assert not torch.allclose(packed[0], torch.zeros(CHANNELS).double())
    before = [t.clone() for t in packed]
    y = ck.masked_batch_norm(x, mask, *packed, weight, bias, False, momentum, 1e-3)
    expected = (x - rows[0]) / (rows[1] + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(packed, before, strict=True))


def test_statistics_are_those_of_visible_pixels():
    mask = make_mask("ragged")
    images = random_tensor((4, CHANNELS, 12, 16), torch.float64)
    images = torch.where(mask.to_dense(4), images, float("nan"))
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    y = ck.masked_batch_norm(ck.gather_visible(images, mask), mask, mean, var, None, None, True, 1)
    seen = images.transpose(0, 1)[mask.to_dense(4).transpose(0, 1).expand(CHANNELS, -1, -1, -1)]
    seen = seen.view(CHANNELS, -1)
    torch.testing.assert_close(mean, seen.mean(1))
    torch.testing.assert_close(var, seen.var(1))
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(CHANNELS).double())


def test_no_visible_block_leaves_the_running_statistics():
    mask = make_mask("none")
    mean, var = torch.full((CHANNELS,), 2.0), torch.full((CHANNELS,), 3.0)
    for training in (True, False):
        y = ck.masked_batch_norm(torch.zeros(0, 4, CHANNELS), mask, mean, var, None, None, training)
        z = ck.masked_instance_norm(
            torch.zeros(0, 4, CHANNELS), mask, mean, var, None, None, training
        )
        assert y.shape == z.shape == (0, 4, CHANNELS)
        assert (mean == 2).all()
        assert (var == 3).all()


# -- group norm and GRN -------------------------------------------------------------------------


def test_without_parameters():
    mask = make_mask("ragged")
    x, weight, bias, _ = make_inputs(mask)
    plain = ck.masked_group_norm(x, mask, 2)
    assert torch.equal(
        plain, ck.masked_group_norm(x, mask, 2, torch.ones_like(weight), torch.zeros_like(bias))
    )
    torch.testing.assert_close(
        ck.masked_group_norm(x, mask, 2, weight, eps=0.5),
        loop_group_norm(x, mask, weight, None, 2, 0.5),
    )
    torch.testing.assert_close(
        ck.masked_grn(x, mask, weight, bias, eps=0.5), loop_grn(x, mask, weight, bias, 0.5)
    )
    assert torch.equal(ck.masked_grn(x, mask, 0 * weight, 0 * bias), x)


def test_image_norm():
    mask = make_mask("ragged")
    x = make_inputs(mask)[0]
    x[..., 2] = 0
    expected = torch.stack([rows.norm(dim=0) for rows in images_of(x, mask)])
    found, grad = value_and_grads(
        lambda x: norm.image_norm(x, mask), [x], torch.ones_like(expected)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        grad, each_image(lambda rows: rows / rows.norm(dim=0).where(rows.any(0), 1), x, mask)
    )
    large = torch.full((mask.num_visible, 4, 1), 300.0, dtype=torch.float16)  # squares overflow
    counts = 4 * mask.visible.flatten(1).sum(1)
    torch.testing.assert_close(
        norm.image_norm(large, mask)[:, 0], (300 * counts.sqrt()).half(), rtol=1e-3, atol=0
    )


def test_group_norm_of_half_features_far_from_zero():
    mask = make_mask("equal")
    x = (random_tensor((mask.num_visible, 16, CHANNELS)) + 300).half()  # squares overflow
    exact = loop_group_norm(x.double(), mask, None, None, 2)
    found = ck.masked_group_norm(x, mask, 2)
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)


# -- bad input ----------------------------------------------------------------------------------

MASK = make_mask("equal")
X, P = torch.zeros(8, 4, 6), torch.zeros(6)


def test_every_norm_rejects_what_is_not_packed():
    for function, _ in NORMS.values():
        with pytest.raises(ValueError, match="x has 7 blocks, but the mask has 8 visible ones"):
            function(MASK, X[:7], P, P)
        with pytest.raises(TypeError, match="x must be float32, .*got torch.int32"):
            function(MASK, X.int(), P, P)
        with pytest.raises(TypeError, match="mask must be a BlockMask, got Tensor"):
            function(MASK.visible, X, P, P)


@pytest.mark.parametrize("kind", OF_IMAGES)
def test_parameters_of_another_length(kind):
    function = NORMS[kind][0]
    with pytest.raises(ValueError, match=r"weight must be \[6\], .* got \[1\]"):
        function(MASK, X, P[:1], P)
    with pytest.raises(ValueError, match=r"bias must be \[6\], .* got \[1, 6\]"):
        function(MASK, X, P, P[None])


@pytest.mark.parametrize("groups", [0, -1, 4, 7, None, 2.0])
def test_group_norm_rejects(groups):
    with pytest.raises(ValueError, match=f"num_groups must divide the 6 channels.*, got {groups}"):
        ck.masked_group_norm(X, MASK, groups)


def test_batch_norm_rejects():
    with pytest.raises(RuntimeError, match="running_mean should contain 6 elements not 5"):
        ck.masked_batch_norm(X, MASK, P[:5], P)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ck.masked_batch_norm(X[:1, :1], make_mask("one"), P, P, training=True)
