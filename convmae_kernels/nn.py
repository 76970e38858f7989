"""Modules over the ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convmae_kernels.ops import gather_visible, masked_conv2d, scatter_visible

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask


class MaskedConv2d(torch.nn.Conv2d):
    """A `torch.nn.Conv2d` with "same" padding that skips what a `BlockMask` hides.

    The parameters, their names and their initialisation are those of `torch.nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as in
            `torch.nn.Conv2d`. With a mask this version computes depthwise convolutions
            (`groups == in_channels == out_channels`) of stride 1 and odd kernels up to 15.
        padding: "same", or the number of positions that amounts to it.

    Raises:
        ValueError: `padding` is not "same" padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        same = tuple(d * (k // 2) for d, k in zip(self.dilation, self.kernel_size))
        if self.padding not in ("same", same):
            raise ValueError(
                f'padding must be "same" or {same} for kernel_size={self.kernel_size} and '
                f"dilation={self.dilation}, got {padding!r}"
            )

    def forward(self, x: Tensor, mask: BlockMask | None = None) -> Tensor:
        """`conv2d(x * visible)` at visible positions.

        Args:
            x: packed features `[T, s*s, C]`, or a dense map `[B, C, H, W]`.
            mask: which blocks are visible; None for an ordinary convolution of a dense map.

        Returns:
            Packed for packed, dense for dense (channels-last, 0 at hidden positions).

        Raises:
            TypeError, ValueError, NotImplementedError: see `masked_conv2d`.
        """
        if mask is None:
            if x.dim() == 3:
                raise ValueError(
                    f"packed features {list(x.shape)} need their mask, got mask=None "
                    "(an image without a batch needs unsqueeze(0))"
                )
            return super().forward(x)
        dense = x.dim() == 4
        if dense:
            x = gather_visible(x, mask)
        stride, dilation = (self.stride[0], self.stride[1]), (self.dilation[0], self.dilation[1])
        x = masked_conv2d(x, self.weight, self.bias, mask, stride, dilation, self.groups)
        return scatter_visible(x, mask) if dense else x
