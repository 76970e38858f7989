"""`grouped_conv2d_input_grad` in Triton: by the kernel of `grouped_conv2d`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae_kernels.triton import tuning
from convmae_kernels.triton.grouped_conv2d import CONFIGURATIONS, describe, sum_taps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from convmae_kernels.triton.tuning import Configuration


def launch(
    configuration: Configuration,
    grad: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor]:
    """Runs one configuration; the same as `grouped_conv2d_input_grad`."""
    matrices = weight.flatten(2).unflatten(0, (groups, -1)).permute(3, 0, 1, 2).contiguous()
    shape = weight.shape[2:], stride, padding, dilation
    return (sum_taps(configuration, grad, matrices, None, neighbours, *shape, is_grad=True),)


def grouped_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient in the input, see `reference.grouped_conv2d_input_grad`."""
    problem = describe(grad, weight.shape, stride, groups)
    arguments = (grad, weight, neighbours, stride, padding, dilation, groups)
    (x,) = tuning.run("grouped_conv2d_input_grad", problem, CONFIGURATIONS, launch, arguments)
    return x
