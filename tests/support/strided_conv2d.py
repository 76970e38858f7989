"""Shapes of the op `strided_conv2d`, tensors for it and its gradients, and their comparison."""

import torch

from convmae_kernels.ops import reference
from convmae_kernels.testing import assert_within_budget, random_tensor
from tests.support.conv_results import check_close

SHAPES = [  # side, kernel, stride, padding, dilation
    (8, (3, 3), 2, (1, 1), (1, 1)),
    (2, (3, 3), 2, (1, 1), (1, 1)),
    (4, (4, 4), 2, (1, 1), (1, 1)),
    (1, (2, 2), 1, (0, 1), (1, 1)),
    (2, (3, 1), 1, (2, 0), (1, 1)),
    (8, (2, 5), 4, (0, 1), (1, 2)),  # between some of the inputs that an output meets lie others
    (4, (1, 1), 4, (0, 0), (1, 1)),  # most inputs meet nothing
    (4, (3, 2), 2, (-1, 2), (2, 3)),
]


def make_problem(mask, channels, shape, dtype=torch.float64):
    """x, weight, bias, the gradient of the output, and what else the ops take."""
    side, kernel, stride, padding, dilation = shape
    blocks, outputs = mask.num_visible, (side // stride) ** 2
    shapes = (blocks, side * side, channels), (channels, 1, *kernel), (channels,)
    shapes = (*shapes, (blocks, outputs, channels))
    tensors = [random_tensor(s, dtype, device=mask.device) for s in shapes]
    return tensors, (stride, padding, dilation)


def strided_results(ops, tensors, neighbours, rest):
    """The convolution and its gradients, by `torch.ops.convmae`, another library or `reference`."""
    x, weight, bias, grad = tensors
    return [
        ops.strided_conv2d(x, weight, bias, neighbours, *rest),
        ops.strided_conv2d_input_grad(grad, weight, neighbours, *rest),
        *ops.strided_conv2d_weight_grad(grad, x, neighbours, weight.shape[2:], *rest),
    ]


def check_results(found, tensors, neighbours, rest):
    """What `strided_results` returns agrees with the reference in float64."""
    wide = [t.double() for t in tensors]
    exact = strided_results(reference, wide, neighbours, rest)
    if tensors[0].dtype == torch.float64:  # then the plain results are exact, and err by nothing
        check_close(found, exact)
        return
    plain = strided_results(reference, tensors, neighbours, rest)
    terms = strided_results(reference, [t.abs() for t in wide], neighbours, rest)
    for values in zip(found, exact, plain, terms, strict=True):
        assert_within_budget(*values, name=f"{list(tensors[1].shape)}, {rest}")
