"""Convolutions of many channels by Triton's kernels: values, derivatives, and which run when."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.testing import assert_within_budget, make_mask, random_tensor
from convmae_kernels.triton import (
    grouped_conv2d,
    grouped_conv2d_input_grad,
    grouped_conv2d_weight_grad,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")
OPS = torch.ops.convmae_triton
NAMES = ("y", "grad_x", "grad_weight", "grad_bias")


@pytest.fixture(autouse=True)
def some_parts(monkeypatch):
    """Of 64 positions each, the least."""
    monkeypatch.setattr(grouped_conv2d_weight_grad, "MIN_POSITIONS_PER_PART", 1)


def with_nan_before(x):
    """A copy of packed features with a block of NaN before them: where a hidden one, -1, is."""
    return torch.cat([x.new_full((1, *x.shape[1:]), float("nan")), x])[1:]


def make_problem(name, side, groups, channels, kernel, shape, dtype=torch.float32):
    """x, weight, bias and the gradient of the output; the table; what else the ops take."""
    mask, (stride, *_) = make_mask(name), shape
    inputs, outputs = channels
    packed = (mask.num_visible, side * side, groups * inputs)
    tensors = [
        with_nan_before(random_tensor(packed, dtype)),
        random_tensor((groups * outputs, inputs, *kernel), dtype),
        random_tensor((groups * outputs,), dtype),
        with_nan_before(random_tensor((packed[0], (side // stride) ** 2, groups * outputs), dtype)),
    ]
    return tensors, mask.neighbours(2 if side < 4 else 1), (*shape, groups)


def everything(ops, tensors, table, options):
    """The convolution and its gradients, by Triton's ops or by the reference."""
    x, weight, bias, grad = tensors
    convolve = ops.window_conv2d if ops is reference else ops.grouped_conv2d
    return [
        convolve(x, weight, bias, table, *options),
        ops.grouped_conv2d_input_grad(grad, weight, table, *options),
        *ops.grouped_conv2d_weight_grad(grad, x, table, weight.shape[2:], *options),
    ]


@pytest.mark.parametrize(
    "problem",
    [
        # stride, padding, dilation
        ("ragged", 2, 1, (20, 24), (2, 3), (1, (0, 1), (1, 1)), torch.float32),
        ("all", 2, 2, (5, 3), (3, 1), (2, (1, 0), (1, 1)), torch.float16),
        ("corner", 4, 1, (16, 40), (1, 4), (2, (0, 2), (1, 1)), torch.bfloat16),
        ("corner", 4, 1, (70, 3), (1, 2), (1, (-1, 1), (1, 1)), torch.float32),
        ("corner", 4, 1, (3, 16), (2, 3), (4, (3, 2), (2, 1)), torch.float64),
        ("column", 1, 3, (8, 16), (3, 1), (1, (2, 0), (2, 1)), torch.float16),
        ("none", 2, 1, (16, 16), (3, 3), (1, (1, 1), (1, 1)), torch.float32),
    ],
    ids=str,
)
def test_values(problem):
    tensors, table, options = make_problem(*problem)
    wide = [t.double() for t in tensors]
    found = everything(OPS, tensors, table, options)
    plain = everything(reference, tensors, table, options)
    exact = everything(reference, wide, table, options)
    terms = everything(reference, [t.abs() for t in wide], table, options)
    for values in zip(found, exact, plain, terms, NAMES, strict=True):
        assert_within_budget(*values)
        assert values[0].is_contiguous()


def test_every_configuration():
    """Small integers: all sums are exact, so that a term that is missed or counted twice shows."""
    tensors, table, options = make_problem("row", 1, 1, (20, 33), (1, 2), (1, (0, 1), (1, 1)))
    x, weight, bias, grad = tensors = [t.mul(2).round() for t in tensors]
    y, grad_x, *expected = everything(reference, tensors, table, options)
    for configuration in grouped_conv2d.CONFIGURATIONS:
        (found,) = grouped_conv2d.launch(configuration, x, weight, bias, table, *options)
        assert torch.equal(found, y), configuration.name
        (found,) = grouped_conv2d_input_grad.launch(configuration, grad, weight, table, *options)
        assert torch.equal(found, grad_x), configuration.name
    module = grouped_conv2d_weight_grad
    for configuration in module.OF_MANY_CHANNELS + module.OF_FEW_CHANNELS:
        grads = module.launch(configuration, grad, x, table, [1, 2], *options)
        assert all(map(torch.equal, grads, expected)), configuration.name


def test_parts_follow_from_the_problem():
    parts = grouped_conv2d_weight_grad._positions_per_part
    assert parts(1, 1) == 64
    assert parts(6400, 10) == 64
    assert parts(6400, 512) == 3200  # two parts make enough tiles
    assert parts(6401, 512) == 3264  # the next multiple of 64
    assert parts(6400, 5000) == 6400


def test_no_channels_and_no_blocks():
    for problem in (
        ("corner", 2, 1, (0, 3), (3, 3), (1, (1, 1), (1, 1))),
        ("corner", 2, 1, (3, 0), (3, 3), (1, (1, 1), (1, 1))),
    ):
        tensors, table, options = make_problem(*problem)
        y, grad_x, grad_weight, grad_bias = everything(OPS, tensors, table, options)
        assert torch.equal(y, tensors[2].expand_as(y))
        assert not grad_x.any()
        assert grad_weight.shape == tensors[1].shape
        torch.testing.assert_close(grad_bias, tensors[3].sum((0, 1)))


def test_opcheck():
    tensors, table, options = make_problem("corner", 2, 1, (2, 1), (1, 3), (2, (0, 1), (1, 1)))
    x, weight, bias, grad = (t.requires_grad_() for t in tensors)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (OPS.grouped_conv2d, (x, weight, bias, table)),
        (OPS.grouped_conv2d_input_grad, (grad, weight, table)),
        (OPS.grouped_conv2d_weight_grad, (grad, x, table, (1, 3))),
    ):
        opcheck(op.default, (*arguments, *options), test_utils=checks)


class Recorder(TorchDispatchMode):
    """The names of the ops of this package that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("convmae"):
            self.names.add(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("channels", "groups", "dtype", "impl", "without_windows"),
    [
        (16, 1, torch.float32, "triton", True),
        (32, 2, torch.float16, "triton", True),
        (30, 2, torch.float32, "triton", False),  # 15 channels a group
        (16, 1, torch.float64, "triton", False),
        (16, 1, torch.float16, "auto", False),  # on a CPU
    ],
    ids=str,
)
def test_which_kernels_run(channels, groups, dtype, impl, without_windows):
    mask = make_mask("corner")
    x = random_tensor((3, 4, channels), dtype).requires_grad_()
    weight = random_tensor((channels, channels // groups, 1, 3), dtype).requires_grad_()
    with Recorder() as recorder:
        ck.masked_conv2d(x, weight, None, mask, groups=groups, impl=impl).sum().backward()
    kernels = {
        f"convmae_triton.{m.__name__.rpartition('.')[2]}"
        for m in (grouped_conv2d, grouped_conv2d_input_grad, grouped_conv2d_weight_grad)
    }
    assert (kernels <= recorder.names) == without_windows
    assert any("window" in name for name in recorder.names) != without_windows
