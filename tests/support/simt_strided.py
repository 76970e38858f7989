"""Calls of the strided convolution's CUDA kernels on the emulator, and their comparison."""

import torch

from tests.support.simt_emulation import CODES, array, emulate
from tests.support.strided_conv2d import check_results, make_problem


def convolve_strided(source, weight, bias, neighbours, shape, backwards=False, offset=0, **options):
    """The convolution or, backwards, its gradient in the input."""
    (stride, padding, dilation), kernel = shape, weight.shape[2:]
    return emulate(
        "strided_conv2d", CODES[source.dtype], array(source), array(weight.flatten(1).t()),
        None if bias is None else array(bias), neighbours.numpy(), [*kernel], stride, [*padding],
        [*dilation], backwards, offset, like=source, **options,
    )[0]  # fmt: skip


def weight_grad_strided(grad, x, neighbours, kernel, shape, offset=0, blocks_per_run=0, **options):
    stride, padding, dilation = shape
    return emulate(
        "strided_conv2d_weight_grad", CODES[x.dtype], array(grad), array(x), neighbours.numpy(),
        [*kernel], stride, [*padding], [*dilation], offset, blocks_per_run, like=x, **options,
    )  # fmt: skip


def check_strided(
    mask, channels, shape, dtype=torch.float32, offset=0, blocks_per_run=0, **options
):
    """All three against the reference."""
    (x, weight, bias, grad), rest = make_problem(mask, channels, shape, dtype)
    table, kernel = mask.neighbours(2), shape[1]
    found = [
        convolve_strided(x, weight, bias, table, rest, offset=offset, **options),
        convolve_strided(grad, weight, None, table, rest, True, offset, **options),
        *weight_grad_strided(grad, x, table, kernel, rest, offset, blocks_per_run, **options),
    ]
    check_results(found, [x, weight, bias, grad], table, rest)
