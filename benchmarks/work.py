"""What a piece of work must move and compute: bytes and FLOPs, counted by formula.

Only work at visible positions counts, whoever does it: the count is the same for a contender that
skips the hidden positions and for one that does not. A multiply-add is one MAC and two FLOPs.
Bias additions, norms, activations and softmax are not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.limits import Rates
    from convmae_kernels import BlockMask

KERNEL = 5  # side of the depthwise kernels of ConvMAE

# Positions of a 16 x 16 pixel block at which each part of the encoder before stage 3 computes.
POSITIONS = {
    "patch_embed1": 16,
    "blocks1": 16,
    "stage1_output_decode": 1,
    "patch_embed2": 4,
    "blocks2": 4,
    "stage2_output_decode": 1,
    "patch_embed3": 1,
    "patch_embed4": 1,
}
STAGES12 = tuple(part for part in POSITIONS if part not in ("patch_embed3", "patch_embed4"))
BLOCK_SIDES = {"blocks1": 4, "blocks2": 2}


@dataclass(frozen=True)
class Work:
    """What must be moved and computed.

    Attributes:
        bytes: bytes that must be read or written.
        flops: floating-point operations, all kinds.
        matmul_flops: those of `flops` that can run at the rate of a matrix product.
    """

    bytes: int
    flops: int = 0
    matmul_flops: int = 0

    def limit_seconds(self, rates: Rates, dtype: torch.dtype) -> float:
        """`max(bytes / copy bandwidth, matrix FLOPs / GEMM rate)`: the least possible time."""
        return max(self.bytes / rates.copy, self.matmul_flops / rates.gemm[dtype])


# -- ops ------------------------------------------------------------------------------------------


def packed_bytes(mask: BlockMask, side: int, channels: int, dtype: torch.dtype) -> int:
    """`T * side^2 * C * itemsize`: packed features, read or written once."""
    return mask.num_visible * side * side * channels * dtype.itemsize


def dense_bytes(mask: BlockMask, side: int, channels: int, dtype: torch.dtype) -> int:
    """`B * gh * gw * side^2 * C * itemsize`: a dense feature map, read or written once."""
    return mask.num_blocks * side * side * channels * dtype.itemsize


def mask_work(mask: BlockMask) -> Work:
    """Reads the noise; writes the mask (1 byte a block), its int64 index and the 3x3 table."""
    return Work(mask.num_blocks * (4 + 1) + mask.num_visible * (8 + 9 * 4))


def gather_work(mask: BlockMask, side: int, channels: int, dtype: torch.dtype) -> Work:
    """Reads the visible positions and writes them: `2 * packed`."""
    return Work(2 * packed_bytes(mask, side, channels, dtype))


def scatter_work(mask: BlockMask, side: int, channels: int, dtype: torch.dtype) -> Work:
    """Reads the packed features and writes the whole map: `packed + dense`."""
    return Work(
        packed_bytes(mask, side, channels, dtype) + dense_bytes(mask, side, channels, dtype)
    )


def visible_taps(mask: BlockMask, side: int, kernel: int = KERNEL) -> int:
    """Pairs `(p, p + d)` of visible positions with `d` in a `kernel x kernel` window.

    That is the number of MACs per channel of a masked depthwise convolution, counted on the mask
    itself: `sum(visible * conv2d(visible, ones))`.
    """
    visible = mask.to_dense(side).double()
    ones = torch.ones(1, 1, kernel, kernel, dtype=torch.float64, device=mask.device)
    seen = torch.nn.functional.conv2d(visible, ones, padding=kernel // 2)
    return int((seen * visible).sum())


def depthwise_work(
    mask: BlockMask,
    side: int,
    channels: int,
    dtype: torch.dtype,
    backward: bool,
    kernel: int = KERNEL,
) -> Work:
    """Depthwise convolution of packed features; its weights are too small to count.

    Forward reads x and writes y: `2 * packed` bytes, `2 * taps * C` FLOPs. Backward, one op for all
    gradients, reads x and dy once each and writes dx: `3 * packed` more, and computes dx and dw:
    twice the FLOPs more.
    None of them run at the rate of a matrix product, so the limit is that of the bytes.
    """
    packed = packed_bytes(mask, side, channels, dtype)
    flops = 2 * visible_taps(mask, side, kernel) * channels
    return Work(5 * packed, 3 * flops) if backward else Work(2 * packed, flops)


def strided_work(
    mask: BlockMask,
    side: int,
    channels: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
    backward: bool,
) -> Work:
    """Depthwise convolution with a stride; `taps` are those of the outputs that it keeps.

    Forward reads x and writes y; backward reads both x and dy once and writes dx.
    """
    visible = mask.to_dense(side).double()
    ones = torch.ones(1, 1, kernel, kernel, dtype=torch.float64, device=mask.device)
    seen = torch.nn.functional.conv2d(visible, ones, None, stride, (kernel - stride + 1) // 2)
    flops = 2 * int((seen * mask.to_dense(side // stride)).sum()) * channels
    x = packed_bytes(mask, side, channels, dtype)
    y = x // (stride * stride)
    return Work(3 * x + 2 * y, 3 * flops) if backward else Work(x + y, flops)


# -- models ---------------------------------------------------------------------------------------


def forward_macs(
    shapes: Mapping[str, Sequence[int]],
    mask: BlockMask,
    *,
    skip_hidden: bool = True,
    loss_only: bool = True,
) -> Counter[str]:
    """MACs of a ConvMAE forward pass for the whole batch, by part of the model.

    Every weight matrix is used once at every position of its part, so a part costs
    `rows * weight.numel()`; attention adds `2 * queries * keys * dim` for each block.

    Args:
        shapes: shape of every parameter by its name in the state dict.
        mask: the visible blocks of the batch.
        skip_hidden: the encoder before stage 3 works at visible positions, and a depthwise
            convolution at visible taps; otherwise everywhere, with `KERNEL^2` taps each.
        loss_only: the last decoder block's queries, its projection and MLP and `decoder_pred` are
            computed for hidden blocks alone, which are all that the loss reads; and in the first
            one (of several) hidden blocks at the same place of all images share queries, keys and
            values, which differ later only.

    Returns:
        MACs by part (`"patch_embed1"`, `"blocks1"`, ..., `"decoder_pred"`). The depthwise
        convolutions are under `"blocks1.depthwise"` and `"blocks2.depthwise"`.
    """
    visible_per_image = mask.visible.flatten(1).sum(1).tolist()
    length = math.prod(mask.grid)
    visible, total = sum(visible_per_image), mask.num_blocks
    depth = _depth(shapes, "decoder_blocks")
    last = f"decoder_blocks.{depth - 1}."
    macs: Counter[str] = Counter()
    for name, shape in shapes.items():
        part = name.split(".")[0]
        if len(shape) < 2 or not name.endswith(".weight"):
            continue
        if part in BLOCK_SIDES and name.endswith(".attn.weight"):
            side = BLOCK_SIDES[part]
            dense_taps = total * side * side * shape[2] * shape[3]
            taps = visible_taps(mask, side, shape[2]) if skip_hidden else dense_taps
            macs[part + ".depthwise"] += taps * shape[0]
        elif part in POSITIONS:
            rows = POSITIONS[part] * (visible if skip_hidden else total)
            macs[part] += rows * math.prod(shape)
        elif part in ("blocks3", "decoder_embed"):
            macs[part] += visible * math.prod(shape)
        elif loss_only and name.startswith(last) and name.endswith("qkv.weight"):
            macs[part] += (total - visible) * shape[1] ** 2 + total * 2 * shape[1] ** 2
        elif loss_only and name == "decoder_blocks.0.attn.qkv.weight":
            macs[part] += min(total, visible + length) * math.prod(shape)
        elif loss_only and (name.startswith(last) or part == "decoder_pred"):
            macs[part] += (total - visible) * math.prod(shape)
        elif part in ("decoder_blocks", "decoder_pred"):
            macs[part] += total * math.prod(shape)
        if name.endswith("attn.qkv.weight"):
            if part == "blocks3":
                pairs = sum(count * count for count in visible_per_image)
            else:
                queries = total - visible if loss_only and name.startswith(last) else total
                pairs = queries * length
            macs[part] += 2 * pairs * shape[1]
    return macs


def _depth(shapes: Mapping[str, Sequence[int]], part: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(part + ".")})


def training_flops(forward: Counter[str]) -> tuple[int, int]:
    """`2 * (3 * forward - patch_embed1)`: FLOPs of a forward and a backward pass.

    The backward pass computes a gradient for both factors of every product, twice the forward
    pass, except that the images need no gradient.

    Returns:
        All FLOPs, and those of matrix products (all but the depthwise convolutions).
    """
    flops = 2 * (3 * forward.total() - forward["patch_embed1"])
    depthwise = sum(macs for part, macs in forward.items() if part.endswith(".depthwise"))
    return flops, flops - 2 * 3 * depthwise


def training_work(
    parameters: Mapping[str, Tensor],
    mask: BlockMask,
    image_elements: int,
    *,
    optimizer: bool,
) -> Work:
    """Forward and backward pass of a model, and an AdamW step if `optimizer`.

    Bytes: every trainable float32 parameter is read by the forward and by the backward pass and
    its gradient written (3 passes); AdamW reads parameter, gradient and both moments and writes
    all but the gradient (7 passes); the pixels are read. Activations are not counted, since an
    ideal machine would keep them in its caches: the limit is one that cannot be beaten.
    """
    forward = forward_macs({name: p.shape for name, p in parameters.items()}, mask)
    flops, matmul_flops = training_flops(forward)
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    passes = 10 if optimizer else 3
    return Work(4 * (passes * trainable + image_elements), flops, matmul_flops)
