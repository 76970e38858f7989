"""What PyTorch does with functions: compile, export, autocast, `torch.func`, forward mode."""

import io
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.library import opcheck

import convmae_kernels as ck
from convmae_kernels.testing import (
    DTYPES,
    dense_masked_conv2d,
    implementations,
    make_mask,
    random_tensor,
)

pytestmark = pytest.mark.thorough(but_every=7)  # a sample of long sweeps

GRID, CHANNELS = (3, 4), 5
OPS = torch.ops.convmae
compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler"
)


class Net(torch.nn.Module):
    """The three ops in a row, with something pointwise between them."""

    def __init__(self):
        super().__init__()
        self.conv = ck.nn.MaskedConv2d(CHANNELS, CHANNELS, 5, groups=CHANNELS)

    def forward(self, images, mask):
        x = ck.gather_visible(images, mask)
        return ck.scatter_visible(x + self.conv(x, mask).relu(), mask)


def images_for(mask, side=4):
    return random_tensor((mask.batch_size, CHANNELS, GRID[0] * side, GRID[1] * side))


def gradients(model, function, *arguments):
    """The output of a function, and the gradient of its square in the model's parameters."""
    model.zero_grad()
    y = function(*arguments)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


# -- registration -------------------------------------------------------------------------------


def samples(dtype, requires_grad):
    """Arguments of every op, by its name; odd channels, and a kernel that looks two blocks far."""
    mask = make_mask("ragged")
    t, side, kernel = mask.num_visible, 2, (5, 7)

    def tensor(*shape, layout="contiguous"):
        return random_tensor(shape, dtype, layout).requires_grad_(requires_grad)

    images = tensor(4, 7, 3 * side, 4 * side, layout="channels_last")
    x, grad, far = tensor(t, 4, 7), tensor(t, 4, 7), mask.neighbours(2)
    weight, bias = tensor(7, 1, *kernel), tensor(7)
    single, halo = make_mask("single_block"), [1, 3, 0, -1]
    dense = (x, tensor(5, 7, 3, 2), tensor(5), mask.neighbours(1), 2, [1, 0], [1, 1], 1)
    x6, split, grad9 = tensor(t, 4, 6), tensor(9, 2, 3, 2), tensor(t, 1, 9)
    options = (mask.neighbours(1), 2, [1, 0], [1, 1], 3)
    single_taps, strided = tensor(7, 1, 3, 2), options[:-1]
    return [
        (OPS.gather_visible.default, (images, mask.block_index, *GRID)),
        (OPS.scatter_visible.default, (x, mask.block_index, 4, *GRID, 0.5)),
        (OPS.scatter_visible.default, (tensor(2, 16, 3), single.block_index, 3, 1, 1, 0.0)),
        (OPS.masked_conv2d.default, (x, weight, bias, far, [1, 1])),
        (OPS.masked_conv2d.default, (x, weight, None, far, [2, 1])),
        (OPS.masked_conv2d_weight_grad.default, (grad, x, far, list(kernel), [1, 1])),
        (OPS.masked_conv2d_grads.default, (grad, x, weight, far, [1, 1])),
        (OPS.neighbour_table.default, (mask.visible, mask.block_index, 2)),
        (OPS.gather_windows.default, (x, far, halo, 0.5)),
        (OPS.gather_windows_grad.default, (tensor(t, 6, 1, 7), far, halo)),
        (OPS.window_conv2d.default, dense),
        (OPS.grouped_conv2d.default, (x6, split, tensor(9), *options)),
        (OPS.grouped_conv2d_input_grad.default, (grad9, split, *options)),
        (OPS.grouped_conv2d_weight_grad.default, (grad9, x6, options[0], [3, 2], *options[1:])),
        (OPS.strided_conv2d.default, (x, single_taps, bias, *strided)),
        (OPS.strided_conv2d_input_grad.default, (tensor(t, 1, 7), single_taps, *strided)),
        (
            OPS.strided_conv2d_weight_grad.default,
            (tensor(t, 1, 7), x, strided[0], [3, 2], *strided[1:]),
        ),
        (OPS.tap_conv2d.default, dense[:-1]),
        (OPS.tap_conv2d_input_grad.default, (tensor(t, 1, 5), dense[1], *dense[3:-1])),
        (OPS.tap_conv2d_weight_grad.default, (tensor(t, 1, 5), x, dense[3], [3, 2], *dense[4:-1])),
        (OPS.bias_gelu.default, (x, bias)),
        (OPS.bias_gelu_grad.default, (grad, x, bias)),
        (OPS.add_layer_norm.default, (x, grad, bias, tensor(7), tensor(7), 1e-5)),
        (OPS.add_layer_norm_grad.default, (grad, tensor(t, 4, 7), x, bias, 1e-5, True)),
    ]


# The last four meet a dtype each; two of them are traced with their own derivatives, for seconds.
OPCHECKS = [(i, dtype) for i in range(20) for dtype in DTYPES]
OPCHECKS += [(20, torch.float32), (22, torch.bfloat16)]
OPCHECKS += [
    pytest.param(21, torch.float16, marks=pytest.mark.thorough),
    pytest.param(23, torch.float64, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("number", "dtype"), OPCHECKS, ids=str)
def test_opcheck(number, dtype, requires_grad):
    op, arguments = samples(dtype, requires_grad)[number]
    opcheck(op, arguments)


def test_every_op_is_checked():
    registered = {
        name.removeprefix("convmae::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("convmae::")
    }
    checked = {op.__name__.partition(".")[0] for op, _ in samples(torch.float32, False)}
    without_tensors = {"cpu_capability", "cuda_architectures", "explain_kernel", "kernel_names"}
    without_tensors |= {"set_kernel_choice", "clear_kernel_choices"}
    assert registered - without_tensors == checked


# -- compile ------------------------------------------------------------------------------------


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=compiler)])
def test_one_compiled_callable_serves_every_mask(backend):
    net = Net()
    function = compiled(net, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            mask = ck.BlockMask.random(2, GRID, 0.5)
            images = images_for(mask)
            expected = gradients(net, net, images, mask)
            found = gradients(net, function, images, mask)
            torch.testing.assert_close(found, expected)


def test_a_mask_made_inside_a_compiled_function():
    net = Net()

    def model(images, noise):
        return net(images, ck.BlockMask.from_noise(noise, GRID, 0.75))

    function = compiled(model, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            images, noise = random_tensor((2, CHANNELS, 12, 16)), torch.rand(2, 12)
            expected = gradients(net, model, images, noise)
            torch.testing.assert_close(gradients(net, function, images, noise), expected)


def test_ragged_masks_in_one_dynamic_callable():
    net = Net()
    function = compiled(net, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for density in (0.4, 0.5, 0.6, 0.8):
            mask = ck.BlockMask.from_visible(torch.rand(3, *GRID) < density)
            assert mask.visible_per_image is None
            images = images_for(mask)
            expected = gradients(net, net, images, mask)
            torch.testing.assert_close(gradients(net, function, images, mask), expected)


def test_batch_sizes_recompile_once():
    net = Net()
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(net, backend=counter)
    for batch in (2, 3, 4, 5, 6):
        mask = ck.BlockMask.random(batch, GRID, 0.5)
        images = images_for(mask)
        torch.testing.assert_close(function(images, mask), net(images, mask))
    assert counter.frame_count <= 2


# -- export -------------------------------------------------------------------------------------


def test_export_with_a_mask_as_input_and_a_dynamic_batch():
    net, mask = Net().eval(), ck.BlockMask.random(2, GRID, 0.5)
    batch, blocks = torch.export.Dim("batch", min=2), torch.export.Dim.AUTO
    program = torch.export.export(
        net,
        (images_for(mask), mask),
        dynamic_shapes=({0: batch}, [{0: batch}, {0: blocks}, {0: blocks}]),
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"convmae.{op}.default" for op in ("gather_visible", "masked_conv2d")} <= called
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.serialization.safe_globals([ck.BlockMask]):
        loaded = torch.export.load(file)
    for number in (2, 3, 7):
        other = ck.BlockMask.random(number, GRID, 0.5)
        images = images_for(other)
        for exported in (program, loaded):
            torch.testing.assert_close(exported.module()(images, other), net(images, other))


def test_an_exported_program_serves_ragged_masks():
    """Those of the same numbers; and masks that know none serve each other."""
    net = Net().eval()
    batch, blocks = torch.export.Dim("batch", min=2), torch.export.Dim.AUTO
    known = make_mask("ragged")
    unknown = ck.BlockMask(known.visible, known.block_index)
    turned = ck.BlockMask.from_visible(known.visible.flip(0, 2))
    fewer = ck.BlockMask.from_visible(known.visible[:3, :, :] & (torch.rand(3, 3, 4) < 0.6))
    for mask, others in (
        (known, [turned]),
        (unknown, [ck.BlockMask(m.visible, m.block_index) for m in (turned, fewer)]),
    ):
        program = torch.export.export(
            net,
            (images_for(mask), mask),
            dynamic_shapes=({0: batch}, [{0: batch}, {0: blocks}, {0: blocks}]),
        ).module()
        for other in others:
            images = images_for(other)
            torch.testing.assert_close(program(images, other), net(images, other))


# -- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl, dtype):
    mask = make_mask("equal")
    x = random_tensor((mask.num_visible, 16, 6)).requires_grad_()
    weight = random_tensor((6, 1, 5, 5)).requires_grad_()
    bias = random_tensor((6,)).requires_grad_()
    leaves = (x, weight, bias)
    with torch.autocast("cpu", dtype):
        y = ck.masked_conv2d(x, weight, bias, mask, groups=6, impl=impl)
        half = ck.masked_conv2d(x.to(dtype), weight, bias, mask, groups=6, impl=impl)
    assert y.dtype == dtype
    cast = [t.to(dtype) for t in leaves]
    expected = ck.masked_conv2d(*cast, mask, groups=6, impl=impl)
    assert torch.equal(y, expected)
    assert torch.equal(half, expected)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    in_half = torch.autograd.grad(expected, cast, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, in_half, strict=True))


def test_autocast_leaves_float64_alone():
    mask = make_mask("equal")
    x, weight = random_tensor((8, 4, 3), torch.float64), random_tensor((3, 1, 3, 3), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = ck.masked_conv2d(x, weight, None, mask, groups=3)
    assert y.dtype == torch.float64
    assert torch.equal(y, ck.masked_conv2d(x, weight, None, mask, groups=3))


def test_autocast_in_a_compiled_module():
    net, mask = Net(), make_mask("equal")
    images = images_for(mask)

    def model(images, mask):
        with torch.autocast("cpu", torch.bfloat16):
            return net.conv(ck.gather_visible(images, mask), mask)

    found = gradients(net, compiled(model, backend="aot_eager"), images, mask)
    expected = gradients(net, model, images, mask)
    assert found[0].dtype == torch.bfloat16
    assert [g.dtype for g in found[1:]] == [torch.float32] * 2
    torch.testing.assert_close(found, expected)


# -- torch.func and forward mode ----------------------------------------------------------------


@pytest.fixture
def problem():
    """A loss through all three ops by an implementation, the dense same, and their arguments."""
    mask = make_mask("ragged")
    images = random_tensor((4, 3, 6, 8), torch.float64)
    weight, bias = random_tensor((3, 1, 5, 5), torch.float64), random_tensor((3,), torch.float64)

    def loss(images, weight, bias, impl="auto"):
        x = ck.gather_visible(images, mask, impl=impl)
        y = ck.masked_conv2d(x, weight, bias, mask, groups=3, impl=impl)
        return ck.scatter_visible(y.sin(), mask, impl=impl).square().sum()

    def dense(images, weight, bias):
        x = ck.gather_visible(images, mask, impl="reference")
        return dense_masked_conv2d(x, weight, bias, mask).sin().square().sum()

    return loss, dense, (images, weight, bias)


def reverse(function, arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    return torch.autograd.grad(function(*leaves), leaves)


def test_func_grad(problem):
    loss, dense, arguments = problem
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*arguments)
    torch.testing.assert_close(found, reverse(dense, arguments))
    value, pull = torch.func.vjp(loss, *arguments)
    torch.testing.assert_close(value, dense(*arguments))
    torch.testing.assert_close(pull(torch.ones_like(value)), reverse(dense, arguments))


def test_vmap_of_grad_over_weights(problem):
    loss, dense, (images, weight, bias) = problem
    weights = torch.stack([weight, 2 * weight, weight.flip(2)])
    grads = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0, None))
    expected = [reverse(dense, (images, w, bias))[1] for w in weights]
    torch.testing.assert_close(grads(images, weights, bias), torch.stack(expected))
    values = torch.func.vmap(loss, in_dims=(None, 0, None))(images, weights, bias)
    torch.testing.assert_close(values, torch.stack([dense(images, w, bias) for w in weights]))


def test_per_sample_gradients_of_features(problem):
    loss, dense, (images, weight, bias) = problem
    batch = torch.stack([images, images.flip(0)])
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(batch, weight, bias)
    expected = [reverse(dense, (i, weight, bias))[0] for i in batch]
    torch.testing.assert_close(grads, torch.stack(expected))


def test_jvp_and_forward_mode(problem):
    loss, dense, arguments = problem
    tangents = tuple(torch.randn_like(x) for x in arguments)
    slope = sum((g * t).sum() for g, t in zip(reverse(dense, arguments), tangents, strict=True))
    assert slope.abs() > 1e-3
    value, found = torch.func.jvp(loss, arguments, tangents)
    torch.testing.assert_close(value, dense(*arguments))
    torch.testing.assert_close(found, slope)
    for requires_grad in (False, True):
        leaves = [x.detach().requires_grad_(requires_grad) for x in arguments]
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, leaves, tangents)
            tangent = forward_ad.unpack_dual(loss(*duals)).tangent
            assert tangent is not None
            torch.testing.assert_close(tangent.detach(), slope)


def test_hessian_vector_product(problem):
    loss, dense, (images, weight, bias) = problem
    direction = torch.randn_like(weight)

    def hvp(function):
        grad = torch.func.grad(lambda w: function(images, w, bias))
        return torch.func.jvp(grad, (weight,), (direction,))[1]

    expected = hvp(dense)
    torch.testing.assert_close(hvp(loss), expected)
    # The registered formulas differentiate twice as well.
    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(images, leaf, bias), leaf, create_graph=True)
    (found,) = torch.autograd.grad(grad, leaf, direction)
    torch.testing.assert_close(found, expected)


# -- other habits of PyTorch --------------------------------------------------------------------


def test_meta_tensors_give_shapes():
    mask = make_mask("equal").to("meta")
    x = ck.gather_visible(torch.zeros(2, CHANNELS, 12, 16, device="meta"), mask)
    assert (x.shape, x.device.type) == ((8, 16, CHANNELS), "meta")
    weight = torch.zeros(CHANNELS, 1, 3, 3, device="meta")
    assert ck.masked_conv2d(x, weight, None, mask, groups=CHANNELS).shape == x.shape
    assert ck.scatter_visible(x, mask).shape == (2, CHANNELS, 12, 16)


def test_checkpointing_and_inference_mode():
    net, mask = Net(), make_mask("equal")
    images = images_for(mask).requires_grad_()
    expected = gradients(net, net, images, mask)
    found = gradients(
        net,
        lambda *xs: torch.utils.checkpoint.checkpoint(net, *xs, use_reentrant=False),
        images,
        mask,
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net(images, mask), expected[0])


@pytest.mark.skipif("cpu" not in implementations(), reason="the compiled library is not there")
def test_a_named_kernel_refuses_transforms():
    mask = make_mask("equal")
    x = random_tensor((mask.num_visible, 4, CHANNELS))

    def scatter(x):
        return ck.scatter_visible(x, mask, impl="cpu")

    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: torch.func"):
        torch.func.jvp(scatter, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="need the reference"):
        scatter(forward_ad.make_dual(x, x))
