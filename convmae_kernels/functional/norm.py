"""Norms of packed features, with the statistics of visible positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.functional.pooling import image_counts, image_sum, spread_to_blocks
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.dtypes import accumulation_dtype
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask


def masked_batch_norm(
    x: Tensor,
    mask: BlockMask,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` over the visible positions of the batch.

    Args:
        x: packed features `[T, s*s, C]`.
        mask: the mask that `x` was packed with.
        running_mean, running_var, weight, bias, training, momentum, eps: as in
            `torch.nn.functional.batch_norm`; the running statistics are those of visible positions.

    Returns:
        Like `x`.

    Raises:
        TypeError, ValueError: `x` is not packed with this mask; in training it has a single value
            for each channel.
    """
    check_packed("x", x, mask)
    rows = x.reshape(1, -1, 1, x.shape[2]).permute(0, 3, 1, 2)  # channels-last, which is fast
    y = F.batch_norm(rows, running_mean, running_var, weight, bias, training, momentum, eps)
    # no view of `y` for autograd, to which an activation in place would cost copies
    return torch.ops.aten._unsafe_view(y.permute(0, 2, 3, 1), x.shape)


def masked_sync_batch_norm(
    x: Tensor,
    mask: BlockMask,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """`masked_batch_norm` in training, with the statistics of all processes of a group.

    Every visible position counts once, wherever it is: processes with more of them weigh more.
    Works with any backend of `torch.distributed`, and is differentiable through the statistics.

    Args:
        x: packed features `[T, s*s, C]` of this process; `T` may differ between processes.
        mask: the mask that `x` was packed with.
        running_mean, running_var, weight, bias, momentum, eps: as in `masked_batch_norm`.
        group: the processes; all if None.

    Returns:
        Like `x`; statistics are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: `x` is not packed with this mask; there is a single value for each
            channel in all processes.
    """
    check_packed("x", x, mask)
    return sync_batch_norm(x, running_mean, running_var, weight, bias, momentum, eps, group)


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, with the statistics of all processes.

    Args:
        x: `[..., C]`, channels last.
        running_mean, running_var, weight, bias, momentum, eps, group: as in
            `masked_sync_batch_norm`.

    Returns:
        Like `x`; statistics are computed in float32 (float64 for float64).

    Raises:
        ValueError: there is a single value for each channel in all processes.
    """
    group = torch.distributed.group.WORLD if group is None else group
    wide = x.to(accumulation_dtype(x.dtype))
    rows = wide.reshape(-1, x.shape[-1])
    number = rows.new_tensor([len(rows)])
    total = _SumOfProcesses.apply(torch.cat([rows.sum(0), number]), group)
    count = total[-1].detach()
    if count.device.type == "cpu" and count <= 1:  # a GPU is not waited for
        found = f"got {int(count)}"
        raise ValueError(f"x must have more than 1 value per channel in all processes, {found}")
    mean = total[:-1] / count
    centred = rows - mean
    variance = _SumOfProcesses.apply(centred.square().sum(0), group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    y = centred * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.view(x.shape).to(x.dtype)


class _SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a group, and so the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _SumOfProcesses.apply(grads[0], ctx.group), None


def masked_group_norm(
    x: Tensor,
    mask: BlockMask,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm` over the visible positions of each image.

    Args:
        x: packed features `[T, s*s, C]`.
        mask: the mask that `x` was packed with.
        num_groups, weight, bias, eps: as in `torch.nn.functional.group_norm`.

    Returns:
        Like `x`; statistics are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: `x` is not packed with this mask, `num_groups` does not divide C, or
            `weight` or `bias` is not `[C]`.
    """
    side, channels = check_packed("x", x, mask), x.shape[2]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups!r}")
    _check_affine(channels, weight, bias)
    wide = x.to(accumulation_dtype(x.dtype))
    number = image_counts(mask, side).clamp_min(1).view(-1, 1, 1) * (channels // num_groups)

    def mean_of(values: Tensor) -> Tensor:
        """Over each group: [T, s*s, C] -> [T, 1, C]."""
        sums = image_sum(values, mask).unflatten(1, (num_groups, -1))  # [B, groups, C / groups]
        means = (sums.sum(2, keepdim=True) / number).expand_as(sums).flatten(1)
        return spread_to_blocks(means, mask).unsqueeze(1)

    centred = wide - mean_of(wide)
    y = centred * (mean_of(centred.square()) + eps).rsqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def masked_instance_norm(
    x: Tensor,
    mask: BlockMask,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm` over the visible positions of each image.

    Args:
        x: packed features `[T, s*s, C]`.
        mask: the mask that `x` was packed with.
        running_mean, running_var, weight, bias, use_input_stats, momentum, eps: as in
            `torch.nn.functional.instance_norm`. The running statistics move towards the means,
            over images with visible positions, of the images' means and unbiased variances.

    Returns:
        Like `x`; statistics are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: `x` is not packed with this mask, `weight` or `bias` is not `[C]`,
            or no image has more than a single visible position.
    """
    side, channels = check_packed("x", x, mask), x.shape[2]
    if not use_input_stats:
        return masked_batch_norm(
            x, mask, running_mean, running_var, weight, bias, False, momentum, eps
        )
    if mask.knows_numbers and mask.max_per_image * side * side == 1:
        raise ValueError("x must have more than 1 visible position in an image, got 1")
    if running_mean is not None and running_var is not None and mask.num_visible:
        _move_running_statistics(x.detach(), mask, running_mean, running_var, momentum)
    return masked_group_norm(x, mask, channels, weight, bias, eps)


def _move_running_statistics(
    x: Tensor, mask: BlockMask, running_mean: Tensor, running_var: Tensor, momentum: float
) -> None:
    """Moves them towards the means over images of their means and unbiased variances."""
    with torch.no_grad():
        wide = x.to(accumulation_dtype(x.dtype))
        counts = image_counts(mask, block_side(x.shape[1])).unsqueeze(1)
        images = (counts > 0).sum().clamp_min(1)
        means = image_sum(wide, mask) / counts.clamp_min(1)  # [B, C], 0 without positions
        centred = wide - spread_to_blocks(means, mask).unsqueeze(1)
        variances = image_sum(centred.square(), mask) / (counts - 1).clamp_min(1)
        running_mean.lerp_((means.sum(0) / images).to(running_mean.dtype), momentum)
        running_var.lerp_((variances.sum(0) / images).to(running_var.dtype), momentum)


def masked_grn(
    x: Tensor, mask: BlockMask, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> Tensor:
    """Global response normalisation of each image: `x + weight * x * n + bias`.

    `n` is the Euclidean norm of a channel over the image's visible positions, divided by the mean
    of these norms over the channels plus `eps`.

    Args:
        x: packed features `[T, s*s, C]`.
        mask: the mask that `x` was packed with.
        weight, bias: `[C]`.
        eps: added to the mean.

    Returns:
        Like `x`. One image's result does not depend on the others of the batch.

    Raises:
        TypeError, ValueError: `x` is not packed with this mask, or `weight` or `bias` is not `[C]`.
    """
    check_packed("x", x, mask)
    _check_affine(x.shape[2], weight, bias)
    norms = image_norm(x, mask)
    n = norms / (norms.mean(1, keepdim=True) + eps)
    return (x + weight * (x * spread_to_blocks(n, mask).unsqueeze(1)) + bias).to(x.dtype)


def image_norm(x: Tensor, mask: BlockMask) -> Tensor:
    """The Euclidean norm over an image's visible positions: `[T, s*s, C] -> [B, C]`, like `x`.

    Its gradient is 0 where it is 0. Raises what `image_sum` raises.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    squares = image_sum(wide.square(), mask)
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1).sqrt(), 0).to(x.dtype)


def _check_affine(channels: int, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(
                f"{name} must be [{channels}], one number for each channel of x, got "
                f"{list(tensor.shape)}"
            )
