"""What a segmenter learns from: losses of logits against label maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae.config.label_maps import IGNORED


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    mean_over: str = "all",
) -> Tensor:
    """`sum of cross_entropy(logits, labels) / number of pixels`.

    Ignored pixels add nothing to the sum. By default they count in the number of pixels, as in
    mmseg 0.11: the loss of a batch with many ignored pixels is small. PyTorch's own mean leaves
    them out.

    Args:
        logits: `[N, K, H, W]`.
        labels: int64 `[N, H, W]` in `[0, K)`, or `IGNORED`.
        class_weights: float32 `[K]`, a factor of each pixel by its label; the number of pixels is
            not weighted.
        mean_over: `"all"` pixels, or `"labelled"`: those that are not ignored.

    Returns:
        A float32 scalar; 0 where every pixel is ignored.
    """
    total = F.cross_entropy(
        logits.float(), labels, class_weights, ignore_index=IGNORED, reduction="sum"
    )
    if mean_over == "labelled":
        return total / (labels != IGNORED).sum().clamp_min(1)
    return total / labels.numel()


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`1 - mean over classes of 2 * sum(p * t) / (sum(p) + sum(t))`: soft Dice of a batch.

    `p` is the softmax of the logits, `t` the label as 0 or 1; sums go over all labelled pixels of
    the batch, the mean over the classes that are in its labels. A target of few pixels weighs as
    much as a background of many.

    Args:
        logits: `[N, K, H, W]`.
        labels: int64 `[N, H, W]` in `[0, K)`, or `IGNORED`.

    Returns:
        A float32 scalar in `[0, 1]`; 0 where every pixel is ignored.
    """
    classes = torch.arange(logits.shape[1], device=labels.device).view(1, -1, 1, 1)
    truth = labels[:, None] == classes  # bool [N, K, H, W], False at ignored pixels
    share = logits.float().softmax(dim=1) * (labels != IGNORED)[:, None]
    both, sizes, pixels = (x.sum(dim=(0, 2, 3)) for x in (share * truth, share, truth))
    each = 1 - 2 * both / (sizes + pixels).clamp_min(1e-6)
    there = pixels > 0
    return (each * there).sum() / there.sum().clamp_min(1)
