"""Shapes of the op `strided_conv2d`, and tensors for it and its gradients."""

import torch

from convmae_kernels.testing import random_tensor

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
    tensors = [random_tensor(s, dtype) for s in (*shapes, (blocks, outputs, channels))]
    return tensors, (stride, padding, dilation)
