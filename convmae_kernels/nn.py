"""Modules over the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convmae_kernels.block_mask import BlockMask
from convmae_kernels.functional import masked_sync_batch_norm
from convmae_kernels.functional.norm import sync_batch_norm
from convmae_kernels.ops import gather_visible, masked_conv2d, scatter_visible
from convmae_kernels.ops.support.geometry import check_padding, pair
from convmae_kernels.packed import Packed
from convmae_kernels.recording import is_exported

# The density from which a dense map is convolved densely: where both ways took as long on a CPU,
# with 3x3 convolutions of 64 to 256 channels, forward and backward, from dense map to dense map.
DENSE_ABOVE = 0.65


class MaskedConv2d(torch.nn.Conv2d):
    """A `torch.nn.Conv2d` that skips what a `BlockMask` hides.

    The parameters, their names and their initialisation are those of `torch.nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as in
            `torch.nn.Conv2d`; the stride is a power of two, the same in both directions.
        padding_mode: "zeros"; there is no other, for what lies beyond the image counts as hidden.
        padding: "same", or numbers of positions with which a map's side shrinks by `stride`
            exactly; see `masked_conv2d`.
        dense_above: from this density of the mask on, a dense map is convolved by PyTorch's
            convolution of the map times the mask, as skipping does not pay; 0 always does so, and a
            number above 1 never. Exported programs always do so. If None it is `DENSE_ABOVE`, and
            for depthwise convolutions, where skipping always pays, never. Packed features are never
            made dense.

    Raises:
        ValueError: `stride` or `padding` does not keep the grid of blocks, or `padding_mode` is not
            "zeros".
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
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dense_above: float | None = None,
    ) -> None:
        kernel, strides = pair("kernel_size", kernel_size), pair("stride", stride)
        if strides[0] != strides[1] or strides[0] & (strides[0] - 1):
            raise ValueError(
                f"stride must be a power of two, the same in both directions, got {stride}"
            )
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be 'zeros', got {padding_mode!r}: what lies beyond the image "
                "counts as hidden, and hidden positions as zero"
            )
        positions = check_padding(padding, kernel, strides[0], pair("dilation", dilation))
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            strides,
            positions,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        if dense_above is None:
            depthwise = groups == in_channels == out_channels
            dense_above = float("inf") if depthwise else DENSE_ABOVE
        self.dense_above = dense_above

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        """`conv2d(x * visible)` at visible positions.

        Args:
            x: packed features `[T, s*s, C]`, a `Packed`, or a dense map `[B, C, H, W]`.
            mask: which blocks are visible; None for a `Packed`, which has its own, and for an
                ordinary convolution of a dense map.

        Returns:
            Packed for packed, dense for dense (channels-last, 0 at hidden positions).

        Raises:
            TypeError, ValueError: see `masked_conv2d`.
        """
        if isinstance(x, Packed) and mask is not None:
            raise ValueError("a Packed has its own mask, so mask must be None")
        if mask is None:
            if not isinstance(x, Packed) and x.dim() == 3:
                raise ValueError(
                    f"packed features {list(x.shape)} need their mask, got mask=None "
                    "(an image without a batch needs unsqueeze(0))"
                )
            return super().forward(x)
        if not isinstance(mask, BlockMask):
            raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
        if x.dim() == 4 and (is_exported() or mask.density >= self.dense_above):
            return self._dense(x, mask)
        dense = x.dim() == 4
        if dense:
            x = gather_visible(x, mask)
        stride, dilation = (self.stride[0], self.stride[1]), (self.dilation[0], self.dilation[1])
        padding = (int(self.padding[0]), int(self.padding[1]))
        x = masked_conv2d(
            x, self.weight, self.bias, mask, stride, dilation, self.groups, padding=padding
        )
        return scatter_visible(x, mask) if dense else x

    def _dense(self, x: Tensor, mask: BlockMask) -> Tensor:
        """The same by the dense convolution; a hidden NaN reaches nothing here either."""
        if x.shape[0] != mask.batch_size:
            raise ValueError(
                f"x has batch size {x.shape[0]}, but the mask is for {mask.batch_size}"
            )
        side = x.shape[2] // mask.grid[0]
        if x.shape[2:] != (mask.grid[0] * side, mask.grid[1] * side) or side % self.stride[0]:
            raise ValueError(
                f"x of {x.shape[2]} x {x.shape[3]} does not divide into a grid of {mask.grid[0]} x "
                f"{mask.grid[1]} square blocks whose side the stride {self.stride[0]} divides"
            )
        if mask.hides_nothing or (not is_exported() and mask.num_visible == mask.num_blocks):
            return super().forward(x)
        y = super().forward(torch.where(mask.to_dense(side), x, 0))
        return torch.where(mask.to_dense(side // self.stride[0]), y, 0)


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """A `torch.nn.SyncBatchNorm` that takes `Packed`: the statistics of visible positions.

    PyTorch's own takes tensors only, on GPUs only. Arguments, parameters and buffers are the same;
    for a `Packed`, and for tensors on a CPU, any backend of `torch.distributed` does.
    """

    def forward(self, input: Any) -> Any:
        """Like `input`, a `Packed` or what `torch.nn.SyncBatchNorm` takes.

        Raises:
            ValueError: there is a single value for each channel in all processes.
        """
        shared = isinstance(input, Packed) or input.device.type == "cpu"
        if shared and takes_part(self):
            return batch_norm_of_all(self, input)
        return super().forward(input)

    @classmethod
    def convert_sync_batchnorm(
        cls,
        module: torch.nn.Module,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> torch.nn.Module:
        """Replaces every `torch.nn.BatchNorm2d` and `torch.nn.SyncBatchNorm` in a module by this.

        Parameters and buffers stay the same tensors. Subclasses of the two are left as they are,
        as what else they do is unknown.
        """
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.SyncBatchNorm) and type(module) in (
            torch.nn.BatchNorm2d,
            torch.nn.SyncBatchNorm,
        ):
            new = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
            )
            new.weight, new.bias = module.weight, module.bias
            new._buffers.update(module._buffers)
            return new.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module


def batch_norm_of_all(module: Any, input: Any) -> Any:
    """The forward pass of a BatchNorm in training, with the statistics of all processes.

    Args:
        module: a BatchNorm; its running statistics are updated. Where it has a `process_group`,
            these are the processes.
        input: a `Packed`, whose visible positions count, or a tensor `[N, C, ...]`.

    Returns:
        Like `input`.

    Raises:
        ValueError: there is a single value for each channel in all processes.
    """
    momentum = 0.0 if module.momentum is None else module.momentum
    updates = module.training and module.track_running_stats
    if updates and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    rest = (
        module.running_mean if updates else None,
        module.running_var if updates else None,
        module.weight,
        module.bias,
        momentum,
        module.eps,
        getattr(module, "process_group", None),
    )
    if isinstance(input, Packed):
        return input.like(masked_sync_batch_norm(input.features, input.mask, *rest))
    return sync_batch_norm(input.movedim(1, -1), *rest).movedim(-1, 1)


def takes_part(module: Any) -> bool:
    """Whether a BatchNorm takes statistics of the batch, and there are processes to share them."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together and (module.training or module.running_mean is None)
