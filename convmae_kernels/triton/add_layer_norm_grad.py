"""`add_layer_norm_grad` in Triton: one gradient of rows, and sums of parts of them.

Means and deviations are computed again from the rows, which are read in any case. No sum depends
on the configuration: rows in a step and parts are the problem's, and all are added up pairwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import (
    accumulator,
    add_parts,
    empty_parts,
    pairwise_sum,
    parts_of,
)
from convmae_kernels.triton.add_layer_norm import columns_of, describe, normalised
from convmae_kernels.triton.tuning import Configuration

if TYPE_CHECKING:
    from torch import Tensor

BYTES_OF_STEP, MOST_ROWS_OF_STEP = 8192, 16  # of the rows that a program holds, as they are summed
MIN_ROWS_PER_PART, MAX_PARTS = 32, 512

CONFIGURATIONS = (
    Configuration("four_warps", {}, num_warps=4),
    Configuration("eight_warps", {}, num_warps=8),
)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def add_layer_norm_grad_kernel(
    grad_total_ptr,  # [rows, C], or any pointer without
    grad_normed_ptr,  # [rows, C]
    total_ptr,  # [rows, C]
    weight_ptr,  # [C]
    grad_x_ptr,  # [rows, C]
    parts_ptr,  # [parts, 2 or 3, C]: of the weight, the bias and the branch's bias
    rows,
    rows_per_part,
    channels,
    EPS: tl.constexpr,
    HAS_GRAD_TOTAL: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, COLUMNS)
    real = channel < channels
    weight = tl.load(weight_ptr + channel, mask=real, other=0).to(ACCUMULATOR)
    weight_sums = tl.zeros([ROWS, COLUMNS], ACCUMULATOR)
    bias_sums = tl.zeros([ROWS, COLUMNS], ACCUMULATOR)
    branch_sums = tl.zeros([ROWS, COLUMNS], ACCUMULATOR)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & real[None, :]
        place = row[:, None] * channels + channel[None, :]
        total = tl.load(total_ptr + place, mask=mask, other=0).to(ACCUMULATOR)
        grad = tl.load(grad_normed_ptr + place, mask=mask, other=0).to(ACCUMULATOR)
        normed, scale = normalised(total, real, channels, EPS, ROWS, COLUMNS)
        weight_sums += grad * normed
        bias_sums += grad
        grad *= weight[None, :]
        # Both at once: one by one, Triton 3.6 moves rows so often that registers do not suffice.
        sums = pairwise_sum(tl.join(grad, grad * normed), ROWS, COLUMNS, 2) / channels
        mean, along = tl.split(sums)
        grad = (grad - mean[:, None] - normed * along[:, None]) * scale
        if HAS_GRAD_TOTAL:
            grad += tl.load(grad_total_ptr + place, mask=mask, other=0).to(ACCUMULATOR)
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_BRANCH_BIAS:
            branch_sums += grad
    VECTORS: tl.constexpr = 3 if HAS_BRANCH_BIAS else 2
    sums_ptr = parts_ptr + part * VECTORS * channels + channel[None, :]
    tl.store(sums_ptr, _sum_of_columns(weight_sums, ROWS, COLUMNS), mask=real[None, :])
    tl.store(sums_ptr + channels, _sum_of_columns(bias_sums, ROWS, COLUMNS), mask=real[None, :])
    if HAS_BRANCH_BIAS:
        tl.store(
            sums_ptr + 2 * channels, _sum_of_columns(branch_sums, ROWS, COLUMNS), mask=real[None, :]
        )


@triton.jit
def _sum_of_columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`[ROWS, COLUMNS] -> [1, COLUMNS]`."""
    return pairwise_sum(tl.reshape(x, (1, ROWS, COLUMNS)), 1, ROWS, COLUMNS)


def rows_of_step(columns: int, kind: tl.dtype) -> int:
    """The rows that a program holds at a time, a power of two; `columns` is one as well."""
    rows = BYTES_OF_STEP // (columns * kind.primitive_bitwidth // 8)
    return max(1, min(MOST_ROWS_OF_STEP, rows))


def split(rows: int) -> tuple[int, int]:
    """The rows of a part, and how many parts there are."""
    return parts_of(rows, MIN_ROWS_PER_PART, MAX_PARTS)


def launch(
    configuration: Configuration,
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    has_branch_bias: bool,
) -> tuple[Tensor, ...]:
    """Runs one configuration; the same as `add_layer_norm_grad`."""
    grad_x, channels = total.new_empty(total.shape), total.shape[-1]
    rows, columns = grad_x.numel() // max(channels, 1), columns_of(channels)
    per_part, parts = split(rows)
    sums = empty_parts(grad_x.view(rows, channels), parts, 3 if has_branch_bias else 2)
    kind = accumulator(total.dtype)
    if sums.numel() > 0:
        add_layer_norm_grad_kernel[(parts,)](
            total if grad_total is None else grad_total.contiguous(),
            grad_normed.contiguous(),
            total.contiguous(),
            weight.contiguous(),
            grad_x,
            sums,
            rows,
            per_part,
            channels,
            EPS=eps,
            HAS_GRAD_TOTAL=grad_total is not None,
            HAS_BRANCH_BIAS=has_branch_bias,
            ACCUMULATOR=kind,
            ROWS=rows_of_step(columns, kind),
            COLUMNS=columns,
            **configuration.options,
        )
    found = add_parts(sums, weight.dtype)
    return grad_x, *found, *([] if has_branch_bias else [weight.new_empty(0)])


def add_layer_norm_grad(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    has_branch_bias: bool,
) -> tuple[Tensor, ...]:
    """Gradients in x, weight, bias, branch bias, see `reference.add_layer_norm_grad`."""
    problem = describe(total, grad_normed, weight)
    problem += f", {grad_total is not None}, {has_branch_bias}"
    arguments = (grad_normed, grad_total, total, weight, eps, has_branch_bias)
    return tuning.run("add_layer_norm_grad", problem, CONFIGURATIONS, launch, arguments)
