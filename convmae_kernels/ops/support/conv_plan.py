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

MAX_DEPTHWISE_KERNEL = 15  # the longest side that the depthwise kernels have
MAX_PRODUCT_SIDE = 4  # outputs in a row of a block, up to which one matrix product is faster

ConvWay = Literal[
    "product", "depthwise", "strided", "groups", "windows, product", "windows, convolution"
]
DESCRIPTIONS: dict[ConvWay, str] = {
    "product": "one matrix product of packed features, which PyTorch computes",
    "depthwise": "computed by the depthwise kernels",
    "strided": "computed by the depthwise kernels for strides, even kernels and kernels off their "
    "centre, only where there are outputs",
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
            square of the stride of a 1 x 1 kernel, which looks at no other position; else 1, and
            for depthwise kernels, which need no sample.
        stride: of the convolution of what was sampled.
        padding: positions above and left of the map.
        dilation: of rows and of columns.
        groups: as in `torch.nn.functional.conv2d`.
        radius: how many blocks around its own an output looks at.
    """

    way: ConvWay
    sampled: int
    stride: int
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
    depthwise = (
        groups == out_channels and group_channels == 1 and max(kernel) <= MAX_DEPTHWISE_KERNEL
    )
    sampled = 1
    if kernel == [1, 1] and margins == (0, 0) and (groups == 1 or not depthwise):
        sampled, side, step = step * step, side // step, 1

    way: ConvWay
    halo = window_halo(kernel, step, margins, steps)
    if min(halo) <= -side:
        raise ValueError(f"padding {padding!r} leaves no window of blocks of side {side}")
    centred = all(
        k % 2 == 1 and p == d * (k // 2) for d, k, p in zip(steps, kernel, margins, strict=True)
    )
    patches = (
        groups == 1
        and kernel == [step, step]
        and margins == (0, 0)
        and (step == 1 or max(steps) == 1)
    )
    if depthwise and not (patches and step > 1):
        way = "depthwise" if step == 1 and centred else "strided"
    elif patches:
        way = "product"
    elif groups > 1:
        way = "groups"
    elif multiplies_windows(side, step, groups):
        way = "windows, product"
    else:
        way = "windows, convolution"
    radius = 0 if way == "product" else reach(halo, side)
    return ConvPlan(way, sampled, step, margins, steps, groups, radius)


def multiplies_windows(side: int, stride: int, groups: int) -> bool:
    """Whether a convolution of windows is one matrix product with what every output looks at.

    Where few outputs lie in a block it is faster; where many do, PyTorch's convolution is as fast
    and copies less.
    """
    return groups == 1 and side // stride <= MAX_PRODUCT_SIDE
