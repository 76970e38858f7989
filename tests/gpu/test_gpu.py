"""Every op on a GPU, by the compiled CUDA kernels and by Triton; `make gpu` runs these."""

import subprocess
import sys
from functools import partial

import pytest
import torch

import convmae
import convmae_kernels as ck
from convmae_kernels.ops import add_layer_norm, bias_gelu
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    MASKS,
    assert_within_budget,
    dense_masked_conv2d,
    make_mask,
    oracle,
    random_tensor,
    value_and_grads,
)
from convmae_kernels.zorder import BLOCK_SIZES
from tests.support.paths import ROOT
from tests.support.rows import check_add_layer_norm, check_bias_gelu
from tests.support.strided_conv2d import SHAPES, check_results, make_problem, strided_results

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]
impls = pytest.mark.parametrize("impl", ["cuda", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HALF, SINGLE, *OTHERS = torch.bfloat16, torch.float32, torch.float16, torch.float64
# Triton compiles for each dtype and for what 16 divides of the strides: all layouts in one dtype.
LAYOUTS_BY_IMPL = [("cuda", dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
LAYOUTS_BY_IMPL += [("triton", HALF, layout) for layout in LAYOUTS]
LAYOUTS_BY_IMPL += [("triton", dtype, "sliced") for dtype in (SINGLE, *OTHERS)]
KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (15, 15), (1, 7))
# The compiled library has every kernel on every side. Triton compiles each pair, for seconds: every
# kernel on one side, every side with one kernel, the farthest reaching on the smallest.
ON_SIDES = [("cuda", kernel, dtype, BLOCK_SIZES) for kernel in KERNELS for dtype in DTYPES]
ON_SIDES += [("triton", kernel, dtype, (4,)) for kernel in KERNELS for dtype in (HALF, SINGLE)]
ON_SIDES += [("triton", (5, 5), HALF, BLOCK_SIZES)]
ON_SIDES += [("triton", kernel, HALF, (1,)) for kernel in ((15, 15), (1, 7))]
ON_SIDES += [("triton", (5, 5), dtype, (4,)) for dtype in OTHERS]
MOST_TAPS = 49  # with second derivatives, whose oracles launch hundreds of kernels for each tap
NAMES = ("y", "grad_x", "grad_weight", "grad_bias", "second in x", "in weight", "in grad")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch, tmp_path):
    """float32 is float32 in the dense convolutions too; choices of configurations stay here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def make_inputs(mask, side, channels, kernel, dtype=torch.float32, layout="contiguous"):
    """x, weight, bias, the gradient of y, and the gradients of the first three's gradients."""
    packed = (mask.num_visible, side * side, channels)
    shapes = (packed, (channels, 1, *kernel), (channels,), packed)
    return [random_tensor(shape, dtype, layout, DEVICE) for shape in (*shapes, *shapes[:3])]


def derivatives(conv, inputs):
    """y, its three gradients and, given gradients of these, theirs in x, weight and grad.

    Of kernels with more than `MOST_TAPS` taps the second derivatives are left out.
    """
    x, weight, bias, grad = (t.detach().requires_grad_() for t in inputs[:4])
    y = conv(x, weight, bias)
    twice = weight[0].numel() <= MOST_TAPS
    first = torch.autograd.grad(y, (x, weight, bias), grad, create_graph=twice)
    if not twice:
        return [t.detach() for t in (y, *first)]
    second = torch.autograd.grad(first, (x, weight, grad), inputs[4:])
    return [t.detach() for t in (y, *first, *second)]


def assert_accurate(found, exact, plain, terms, name):
    """`assert_within_budget`; in float64, where the oracle rounds as much, 1e-14 of the terms."""
    if found.dtype != torch.float64:
        assert_within_budget(found, exact, plain, terms, name)
        return
    assert (found.dtype, found.shape) == (exact.dtype, exact.shape), name
    assert (found - exact).norm() <= 1e-14 * terms.norm(), name


def check(impl, mask, inputs, dilation=1):
    """Values, gradients and second derivatives within the budget of `assert_within_budget`."""

    def exact(inputs):
        inputs = [t.double() for t in inputs]
        return derivatives(lambda *xs: oracle(*xs, mask, dilation), inputs)

    found = derivatives(
        lambda x, weight, bias: ck.masked_conv2d(
            x, weight, bias, mask, dilation=dilation, groups=x.shape[2], impl=impl
        ),
        inputs,
    )
    plain = derivatives(lambda *xs: dense_masked_conv2d(*xs, mask, dilation), inputs)
    terms = exact([t.abs() for t in inputs])
    for values in zip(found, exact(inputs), plain, terms, NAMES[: len(found)], strict=True):
        assert_accurate(*values)


def pretraining_mask(batch=4):
    """A mask of the usual size, from a generator of its own."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return ck.BlockMask.random(batch, (14, 14), 0.75, generator=generator)


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("impl", "dtype", "layout"), LAYOUTS_BY_IMPL, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_gather_and_scatter(impl, dtype, layout, name):
    mask = make_mask(name, DEVICE)
    gh, gw = mask.grid
    for side, channels in ((1, 255), (2, 7), (4, 1), (4, 64), (16, 3)):
        images = random_tensor(
            (mask.batch_size, channels, gh * side, gw * side), dtype, layout, DEVICE
        )
        x = ck.gather_visible(images, mask, impl=impl)
        assert torch.equal(x, ck.gather_visible(images, mask, impl="reference"))
        x = random_tensor(x.shape, dtype, layout, DEVICE).requires_grad_()
        y = ck.scatter_visible(x, mask, fill=2.0, impl=impl)
        assert torch.equal(y, ck.scatter_visible(x, mask, fill=2.0, impl="reference"))
        (grad,) = torch.autograd.grad(y, x, images)
        assert torch.equal(grad, ck.gather_visible(images, mask, impl="reference"))


@impls
@dtypes
@pytest.mark.parametrize("name", MASKS)
def test_gather_windows(impl, dtype, name):
    mask = make_mask(name, DEVICE)
    for side, channels, halo in (
        (1, 255, (2, 1, 0, 3)),
        (4, 64, (1, 1, 1, 1)),
        (8, 7, (-1, 3, 9, 0)),
    ):
        x = random_tensor((mask.num_visible, side * side, channels), dtype, device=DEVICE)
        found, expected = (
            ck.gather_windows(x.requires_grad_(), mask, halo, -1.5, impl=name)
            for name in (impl, "reference")
        )
        assert torch.equal(found, expected)
        grad = random_tensor(found.shape, dtype, device=DEVICE).mul(2).round()  # exact sums
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (found, expected)]
        assert torch.equal(*gradients)


@impls
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_of_dense_channels(impl, dtype, stride):
    mask = make_mask("ragged", DEVICE)
    for side in (4, 16):
        shapes = ((mask.num_visible, side * side, 24), (40, 24, 3, 3), (40,))
        inputs = [random_tensor(shape, dtype, device=DEVICE) for shape in shapes]

        def conv(x, w, b, impl=impl):
            return ck.masked_conv2d(x, w, b, mask, stride, impl=impl)

        grad = random_tensor(conv(*inputs).shape, dtype, device=DEVICE)
        exact = [t.double() for t in inputs]
        plain = value_and_grads(partial(conv, impl="reference"), inputs, grad)
        terms = value_and_grads(conv, [t.abs() for t in exact], grad.double().abs())
        found = value_and_grads(conv, inputs, grad)
        expected = value_and_grads(partial(conv, impl="reference"), exact, grad.double())
        for values in zip(found, expected, plain, terms, NAMES, strict=False):
            assert_within_budget(*values)


@impls
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("name", MASKS)
def test_masked_conv2d(impl, dtype, layout, name):
    mask = make_mask(name, DEVICE)
    for side, channels, kernel in ((1, 255, (3, 3)), (2, 7, (5, 5)), (4, 64, (5, 5))):
        check(impl, mask, make_inputs(mask, side, channels, kernel, dtype, layout))


@pytest.mark.parametrize(("impl", "kernel", "dtype", "sides"), ON_SIDES, ids=str)
def test_kernels_and_sides(impl, kernel, dtype, sides):
    for side in sides:
        mask = make_mask("ragged" if side < 8 else "corner", DEVICE)
        # Each kernel meets both numbers of channels, and so does each side.
        channels = (24, 128)[(KERNELS.index(kernel) + BLOCK_SIZES.index(side)) % 2]
        check(impl, mask, make_inputs(mask, side, channels, kernel, dtype))


@impls
@dtypes
def test_strided_conv2d(impl, dtype):
    """Channels that fill 16 bytes, and others."""
    mask = make_mask("ragged", DEVICE)
    ops = torch.ops.convmae_triton if impl == "triton" else torch.ops.convmae
    table = mask.neighbours(2)
    for i, shape in enumerate(SHAPES):
        tensors, rest = make_problem(mask, (64, 7)[i % 2], shape, dtype)
        found = strided_results(ops, tensors, table, rest)
        check_results(found, tensors, table, rest)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_rows(dtype, layout):
    """Widths with and without a rest, one row, none, and sizes that all configurations try."""
    vectors = torch.float64 if dtype == torch.float64 else SINGLE
    shapes = ((3, 2, 33), (1, 5), (0, 7), (640, 96)) if layout == "sliced" else ((17, 4, 384),)
    if layout == "contiguous":
        shapes = ((1030, 4, 256), (2061, 768), (150, 2048))
    for shape in shapes:
        check_bias_gelu("triton", shape, dtype, vectors, layout, DEVICE)
        for with_bias in (True, False):
            kinds = (dtype, dtype, vectors)
            check_add_layer_norm("triton", shape, kinds, layout, with_bias, DEVICE)


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
def test_rows_of_two_dtypes(dtype):
    check_add_layer_norm("triton", (700, 384), (SINGLE, dtype, SINGLE), device=DEVICE)
    check_add_layer_norm("triton", (9, 40), (dtype,) * 3, device=DEVICE)
    check_bias_gelu("triton", (9, 40), dtype, dtype, device=DEVICE)


def test_rows_are_repeatable_captured_and_do_not_wait():
    shapes = ((2000, 384), (2000, 384), (384,), (384,), (384,))
    inputs = [random_tensor(shape, HALF, device=DEVICE).requires_grad_() for shape in shapes]

    def run():
        x, branch, weight, bias, branch_bias = inputs
        total, normed = add_layer_norm(x, branch, weight, bias, 1e-6, branch_bias)
        y = total + bias_gelu(normed, bias)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, expected))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        inputs[1].copy_(torch.randn_like(inputs[1]))
    graph.replay()
    assert all(map(torch.equal, captured, run()))


@impls
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (9, 9)])
def test_dilations(impl, kernel):
    mask = make_mask("ragged", DEVICE)
    for side in (2, 4):
        check(impl, mask, make_inputs(mask, side, 16, kernel, HALF), dilation=(2, 3))


@impls
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_the_shapes_of_pretraining(impl, dtype):
    """Large enough for Triton to try every configuration."""
    mask = pretraining_mask()
    for side, channels in ((4, 256), (2, 384)):
        check(impl, mask, make_inputs(mask, side, channels, (5, 5), dtype))


@impls
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_contiguous_tensors_that_begin_anywhere(impl, dtype):
    """A storage offset of one element: addresses that 16, and of half types 4, do not divide."""
    mask = make_mask("ragged", DEVICE)
    inputs = make_inputs(mask, 4, 64, (5, 5), dtype)
    moved = [t.new_zeros(t.numel() + 1)[1:].view_as(t).copy_(t) for t in inputs]
    assert all(t.is_contiguous() and t.storage_offset() == 1 for t in moved)
    check(impl, mask, moved)
    images = random_tensor((mask.batch_size, 64, 12, 16), dtype, device=DEVICE)
    images = images.new_zeros(images.numel() + 1)[1:].view_as(images).copy_(images)
    x = ck.gather_visible(images, mask, impl=impl)
    assert torch.equal(x, ck.gather_visible(images, mask, impl="reference"))
    x = x.new_zeros(x.numel() + 1)[1:].view_as(x).copy_(x)
    y, windows = (
        ck.scatter_visible(x, mask, impl=impl),
        ck.gather_windows(x, mask, (1,) * 4, impl=impl),
    )
    assert torch.equal(y, ck.scatter_visible(x, mask, impl="reference"))
    assert torch.equal(windows, ck.gather_windows(x, mask, (1,) * 4, impl="reference"))


@impls
def test_another_gpu_than_the_current_one(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    mask, weight = pretraining_mask(), random_tensor((64, 1, 5, 5), device=DEVICE)
    x = random_tensor((mask.num_visible, 16, 64), device=DEVICE)
    expected = ck.masked_conv2d(x, weight, None, mask, groups=64, impl=impl)
    other = mask.to("cuda:1")
    found = ck.masked_conv2d(x.to("cuda:1"), weight.to("cuda:1"), None, other, groups=64, impl=impl)
    assert found.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(found.cpu(), expected.cpu())


@impls
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_hidden_pixels_change_no_bit(impl, value):
    mask = pretraining_mask()
    images = random_tensor((4, 32, 56, 56), device=DEVICE)
    spoiled = images.masked_fill(~mask.to_dense(4), value)
    weight = random_tensor((32, 1, 5, 5), device=DEVICE)

    def run(images):
        x = ck.gather_visible(images, mask, impl=impl).requires_grad_()
        y = ck.masked_conv2d(x, weight, None, mask, groups=32, impl=impl)
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    for a, b in zip(run(images), run(spoiled), strict=True):
        assert torch.equal(a, b)


@impls
def test_more_than_two_to_the_31_elements(impl):
    """The last image of a large batch is computed as it is alone."""
    blocks = 196 * 16 * 256
    batch = 2**31 // blocks + 2
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    mask, one = (ck.BlockMask.full(n, (14, 14), DEVICE) for n in (batch, 1))
    x = torch.randn(batch * 196, 16, 256, dtype=torch.bfloat16, device=DEVICE)
    weight = random_tensor((256, 1, 5, 5), torch.bfloat16, device=DEVICE)
    y = ck.masked_conv2d(x, weight, None, mask, groups=256, impl=impl)
    alone = ck.masked_conv2d(x[-196:], weight, None, one, groups=256, impl=impl)
    assert torch.equal(y[-196:], alone)
    dense = ck.scatter_visible(y, mask, impl=impl)
    assert torch.equal(ck.gather_visible(dense, mask, impl=impl)[-196:], alone)


# -- streams, graphs, compilation ---------------------------------------------------------------


def outputs(mask, impl, images, weight, bias):
    """Packed images, their convolution, and that as a dense map."""
    x = ck.gather_visible(images, mask, impl=impl)
    y = ck.masked_conv2d(x, weight, bias, mask, groups=x.shape[2], impl=impl)
    return x, y, ck.scatter_visible(y, mask, impl=impl)


def everything(mask, tensors, impl, forward=outputs):
    """Outputs and gradients of the three ops."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    x, y, z = forward(mask, impl, *inputs)
    return [x, y, z, *torch.autograd.grad(z.square().sum(), inputs)]


def tensors_of(dtype, channels=64):
    shapes = ((4, channels, 56, 56), (channels, 1, 5, 5), (channels,))
    return [random_tensor(shape, dtype, device=DEVICE) for shape in shapes]


@impls
@dtypes
def test_the_same_bits_again_and_on_other_streams(impl, dtype):
    mask, tensors = pretraining_mask(), tensors_of(dtype)
    expected = everything(mask, tensors, impl)
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = everything(mask, tensors, impl)
        torch.cuda.current_stream().wait_stream(stream)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@impls
def test_cuda_graph(impl):
    tensors = tensors_of(torch.bfloat16)
    noise = torch.rand(4, 196, device=DEVICE)

    def run():
        return everything(ck.BlockMask.from_noise(noise, (14, 14), 0.75), tensors, impl)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        noise.copy_(torch.rand_like(noise))
        tensors[0].copy_(torch.randn_like(tensors[0]))
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


def test_nothing_waits_for_the_gpu():
    tensors = tensors_of(torch.bfloat16)
    noise = torch.rand(4, 196, device=DEVICE)
    everything(ck.BlockMask.from_noise(noise, (14, 14), 0.75), tensors, "auto")  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(ck.BlockMask.from_noise(noise, (14, 14), 0.75), tensors, "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@impls
def test_compiled_without_breaks_and_for_new_masks(impl):
    tensors = tensors_of(torch.float32)
    compiled = torch.compile(outputs, fullgraph=True)

    def check_mask(mask):
        found, expected = everything(mask, tensors, impl, compiled), everything(mask, tensors, impl)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    masks = [ck.BlockMask.random(4, (14, 14), 0.75, device=DEVICE) for _ in range(3)]
    check_mask(masks[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for mask in masks[1:]:
            check_mask(mask)


FIRST_IN_A_CAPTURE = """
import torch, convmae_kernels as ck
mask = ck.BlockMask.random(2, (4, 4), 0.5, device="cuda")
x = torch.randn(mask.num_visible, 16, 64, device="cuda", dtype=torch.bfloat16)
weight = torch.randn(64, 1, 5, 5, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = ck.masked_conv2d(x, weight, None, mask, groups=64, impl="cuda")
graph.replay()
assert torch.equal(y, ck.masked_conv2d(x, weight, None, mask, groups=64, impl="cuda"))
"""


def test_the_first_launch_of_a_process_may_be_captured():
    command = [sys.executable, "-c", FIRST_IN_A_CAPTURE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-4000:]


# -- the model, wrong arguments -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_that_of_the_cpu(dtype):
    model = convmae.create_model("convmae_tiny", img_size=96, norm_pix_loss=True)
    images, noise = torch.randn(4, 3, 96, 96), torch.rand(4, 36)
    expected = model(images, noise=noise).loss
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    model.to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = model(images.to(DEVICE), noise=noise.to(DEVICE)).loss
    loss.backward()
    found = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    rtol = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(loss.cpu(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(found.cpu(), norm, rtol=3 * rtol, atol=0)


def test_tensors_on_different_devices():
    mask = pretraining_mask()
    with pytest.raises(ValueError, match="images is on cpu, but the mask is on cuda"):
        ck.gather_visible(torch.zeros(4, 3, 224, 224), mask)
    x = torch.zeros(mask.num_visible, 16, 8, device=DEVICE)
    with pytest.raises(ValueError, match="weight is on cpu, but x is on cuda"):
        ck.masked_conv2d(x, torch.zeros(8, 1, 3, 3), None, mask, groups=8)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: the tensor is on cuda"):
        ck.masked_conv2d(x, torch.zeros(8, 1, 3, 3, device=DEVICE), None, mask, 1, 1, 8, impl="cpu")
