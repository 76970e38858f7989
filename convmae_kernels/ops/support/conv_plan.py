"""Which way a convolution of packed features is computed: decided once, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from convmae_kernels.ops.support.geometry import (
    check_padding,
    check_stride,
    pair,
    reach,
    window_halo,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DEPTHWISE_KERNEL = 15  # the longest side that the kernels of the op `masked_conv2d` have
MAX_PRODUCT_SIDE = 4  # outputs in a row of a block, up to which one matrix product is faster

ConvWay = Literal["product", "depthwise", "groups", "windows, product", "windows, convolution"]
DESCRIPTIONS: dict[ConvWay, str] = {
    "product": "one matrix product of packed features, which PyTorch computes",
    "depthwise": "computed by the depthwise kernels",
    "groups": "computed by the kernels for groups on a CPU; on a GPU by Triton's where a group has "
    "16 channels or more, elsewhere by PyTorch's convolution of windows that the kernels gather",
    "windows, product": "a matrix product by PyTorch of windows that the kernels gather; of many "
    "channels on a CPU, one of what is visible for each tap; of 16 channels or more on a GPU in "
    "half types, computed by Triton's kernels",
    "windows, convolution": "PyTorch's convolution of windows that the kernels gather; of 16 "
    "channels or more on a GPU in half types, computed by Triton's kernels",
}


@dataclass(frozen=True)
class ConvPlan:
    """How `masked_conv2d` computes one convolution.

    Attributes:
        way: what computes it; `DESCRIPTIONS` says each in words.
        sampled: the convolution is one of every `sampled`-th position of a block, in Z-order: the
            square of the stride of a 1 x 1 kernel, which looks at no other position; else 1.
        stride: of the convolution of what was sampled.
        first: of a depthwise convolution with a stride, which is computed at every position: the
            place, in Z-order, of the one that is kept among each `stride * stride`.
        padding: positions above and left of the map.
        dilation: of rows and of columns.
        groups: as in `torch.nn.functional.conv2d`.
        radius: how many blocks around its own an output looks at.
    """

    way: ConvWay
    sampled: int
    stride: int
    first: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    radius: int

    @property
    def has_kernels(self) -> bool:
        """Whether kernels of this package take part, among which an `impl` can choose."""
        return self.way != "product"

    @property
    def description(self) -> str:
        """The way in words."""
        return DESCRIPTIONS[self.way]


def plan_conv2d(
    side: int,
    weight_shape: Sequence[int],
    stride: int | tuple[int, int],
    padding: str | int | tuple,
    dilation: int | tuple[int, int],
    groups: int,
) -> ConvPlan:
    """The plan of a convolution of blocks of this side; arguments are those of `masked_conv2d`.

    Args:
        side: of the blocks, in positions of the input.
        weight_shape: `[C_out, C_in / groups, kh, kw]`, with a number of groups that fits.
        stride, padding, dilation, groups: see `masked_conv2d`.

    Raises:
        ValueError: stride, padding or dilation do not fit.
    """
    out_channels, group_channels, *kernel = weight_shape
    steps = pair("dilation", dilation)
    step = check_stride(stride, side)
    margins = check_padding(padding, (kernel[0], kernel[1]), step, steps)
    sampled, first = 1, 0
    if kernel == [1, 1] and margins == (0, 0):
        sampled, side, step = step * step, side // step, 1

    way: ConvWay
    halo = window_halo(kernel, step, margins, steps)
    if min(halo) <= -side:
        raise ValueError(f"padding {padding!r} leaves no window of blocks of side {side}")
    rows, columns = (d * (k // 2) - p for d, k, p in zip(steps, kernel, margins))
    if (
        groups == out_channels
        and group_channels == 1
        and all(k % 2 == 1 and k <= MAX_DEPTHWISE_KERNEL for k in kernel)
        and (rows == columns == 0 or (step == 2 and {rows, columns} <= {0, 1}))
    ):  # the kernels have it: their window is centred, `rows` and `columns` before ours
        way, first = "depthwise", 2 * rows + columns  # in Z-order of 2 x 2
        halo = (margins[0] + rows, margins[0] + rows, margins[1] + columns, margins[1] + columns)
    elif (
        groups == 1
        and kernel == [step, step]
        and margins == (0, 0)
        and (step == 1 or max(steps) == 1)
    ):
        way = "product"
    elif groups > 1:
        way = "groups"
    elif multiplies_windows(side, step, groups):
        way = "windows, product"
    else:
        way = "windows, convolution"
    radius = 0 if way == "product" else reach(halo, side)
    return ConvPlan(way, sampled, step, first, margins, steps, groups, radius)


def multiplies_windows(side: int, stride: int, groups: int) -> bool:
    """Whether a convolution of windows is one matrix product with what every output looks at.

    Where few outputs lie in a block it is faster; where many do, PyTorch's convolution is as fast
    and copies less.
    """
    return groups == 1 and side // stride <= MAX_PRODUCT_SIDE
