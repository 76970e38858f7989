"""Tokens: packed rows to padded sequences and back, and which tokens are hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from convmae_kernels import BlockMask


class Hidden(NamedTuple):
    """The hidden patches of each image, in raster order.

    Attributes:
        patches: int64 `[N, H]`, their places in `[0, L)`; `H` is the largest number in one image.
        real: bool `[N, H]`, False where an image has fewer and the entry is a filler; None where
            all images have the same number.
    """

    patches: Tensor
    real: Tensor | None


def removed(mask: BlockMask) -> Tensor:
    """MAE's mask: float32 `[N, L]` in raster order, 1 = removed (hidden), 0 = kept."""
    return (~mask.visible).flatten(1).float()


def hidden_patches(mask: BlockMask) -> Hidden | None:
    """The hidden patches of each image; None if it is certain that there are none.

    Without synchronisation where all images have the same number of visible patches.
    """
    visible = mask.visible.flatten(1)
    order = visible.to(torch.uint8).argsort(dim=1, stable=True)  # hidden first, in raster order
    if mask.visible_per_image is not None:
        count = visible.shape[1] - mask.visible_per_image
        return Hidden(order[:, :count], None) if count else None
    counts = (~visible).sum(dim=1, keepdim=True)
    count = int(counts.max())
    return Hidden(order[:, :count], torch.arange(count, device=counts.device) < counts)


def key_padding(mask: BlockMask) -> Tensor | None:
    """bool `[N, K]`, True where an image has fewer visible patches than `K`, the most of all.

    None where all images have the same number; else it reads `K` on the host.
    """
    if mask.visible_per_image is not None:
        return None
    counts = mask.visible.flatten(1).sum(dim=1, keepdim=True)
    return torch.arange(int(counts.max()), device=counts.device) >= counts


def pad(x: Tensor, mask: BlockMask, padding: Tensor | None) -> Tensor:
    """Packed tokens `[T, D]` to sequences `[N, K, D]`, zero where `padding` is True."""
    if padding is None:
        return x.view(mask.batch_size, -1, x.shape[1])
    sequences = x.new_zeros(*padding.shape, x.shape[1])
    return sequences.masked_scatter(~padding.unsqueeze(2), x)


def unpad(x: Tensor, mask: BlockMask) -> Tensor:
    """Sequences `[N, K, D]` back to packed tokens `[T, D]`."""
    padding = key_padding(mask)
    return x.flatten(0, 1) if padding is None else x[~padding]


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`x[n, index[n, q]]`: `[N, K, D]`, int64 `[N, Q]` -> `[N, Q, D]`."""
    images, tokens, dim = x.shape
    first = torch.arange(images, device=index.device).unsqueeze(1) * tokens
    rows = (index + first).flatten()
    return x.reshape(images * tokens, dim).index_select(0, rows).view(images, -1, dim)
