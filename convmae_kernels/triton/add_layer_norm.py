"""`add_layer_norm` in Triton: rows are read once, kept in registers, and written twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator, pairwise_sum
from convmae_kernels.triton.tuning import Configuration

CONFIGURATIONS = (
    Configuration("one_row", {"ROWS": 1}, num_warps=4),
    Configuration("few_rows", {"ROWS": 4}, num_warps=4),
    Configuration("rows", {"ROWS": 8}, num_warps=8),
    Configuration("half_the_warps", {"ROWS": 1}, num_warps=2),
)


@triton.jit
def sum_of_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, COLUMNS] -> [ROWS, 1]`, in an order that no tile and no number of warps decides."""
    return pairwise_sum(tl.reshape(x, (ROWS, COLUMNS, 1)), ROWS, COLUMNS, 1)


@triton.jit
def normalised(x, real, channels, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows less their means, over their deviations, 0 where not `real`; and 1 / deviations.

    `x` is 0 where not `real`.
    """
    mean = sum_of_rows(x, ROWS, COLUMNS) / channels
    centred = tl.where(real[None, :], x - mean, 0.0)
    variance = sum_of_rows(centred * centred, ROWS, COLUMNS) / channels
    scale = tl.rsqrt(variance + EPS)
    return centred * scale, scale


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm_kernel(
    x_ptr,  # [rows, C]
    branch_ptr,  # [rows, C]
    branch_bias_ptr,  # [C], or any pointer without
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    total_ptr,  # [rows, C]
    normed_ptr,  # [rows, C]
    rows,
    channels,
    EPS: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    real = channel < channels
    mask = (row < rows)[:, None] & real[None, :]
    place = row[:, None] * channels + channel[None, :]
    total = tl.load(branch_ptr + place, mask=mask, other=0).to(ACCUMULATOR)
    if HAS_BRANCH_BIAS:
        total += tl.load(branch_bias_ptr + channel, mask=real, other=0).to(ACCUMULATOR)[None, :]
    total += tl.load(x_ptr + place, mask=mask, other=0).to(ACCUMULATOR)
    rounded = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, rounded, mask=mask)
    # What is normalised is what later readers find.
    normed, _ = normalised(rounded.to(ACCUMULATOR), real, channels, EPS, ROWS, COLUMNS)
    weight = tl.load(weight_ptr + channel, mask=real, other=0).to(ACCUMULATOR)
    bias = tl.load(bias_ptr + channel, mask=real, other=0).to(ACCUMULATOR)
    normed = normed * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def columns_of(channels: int) -> int:
    """The columns of a program's rows: the next power of two."""
    return 1 << max(channels - 1, 0).bit_length()


def launch(
    configuration: Configuration,
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Runs one configuration; the same as `add_layer_norm`."""
    channels = x.shape[-1]
    dtype = torch.promote_types(x.dtype, branch.dtype)
    total = x.new_empty(x.shape, dtype=dtype)
    normed = branch.new_empty(x.shape)
    if total.numel() > 0:
        rows = total.numel() // channels
        add_layer_norm_kernel[configuration.grid(ROWS=rows)](
            x.contiguous(),
            branch.contiguous(),
            weight if branch_bias is None else branch_bias.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            total,
            normed,
            rows,
            channels,
            EPS=eps,
            HAS_BRANCH_BIAS=branch_bias is not None,
            ACCUMULATOR=accumulator(dtype),
            COLUMNS=columns_of(channels),
            **configuration.options,
        )
    return total, normed


def describe(x: Tensor, other: Tensor | None, weight: Tensor) -> str:
    """What the choice of a configuration depends on."""
    kinds = (x.dtype, None if other is None else other.dtype, weight.dtype)
    return f"{x.shape[-1]} channels, {', '.join(map(str, kinds))}"


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`x + branch + branch_bias` and its layer norm, see `reference.add_layer_norm`."""
    problem = describe(x, branch, weight) + (", bias" if branch_bias is not None else "")
    arguments = (x, branch, branch_bias, weight, bias, eps)
    return tuning.run("add_layer_norm", problem, CONFIGURATIONS, launch, arguments)
