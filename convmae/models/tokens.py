"""Tokens: packed rows to padded sequences and back, and which of them are hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from convmae_kernels.ops.support.dispatch import transforms_active

if TYPE_CHECKING:
    from convmae_kernels import BlockMask


class HiddenPatches(NamedTuple):
    """The hidden patches of each image, in raster order.

    Attributes:
        patches: int64 `[N, H]`, their numbers in `[0, L)`; `H` is the largest number in one image.
        real: bool `[N, H]`, False where an image has fewer and the entry is a filler; None where
            all images have the same number.
    """

    patches: Tensor
    real: Tensor | None


def removed_mask(mask: BlockMask) -> Tensor:
    """MAE's mask: float32 `[N, L]` in raster order, 1 = removed (hidden), 0 = kept."""
    return (~mask.visible).flatten(1).float()


def hidden_patches(mask: BlockMask) -> HiddenPatches | None:
    """The hidden patches of each image; None if it is certain that there are none."""
    visible = mask.visible.flatten(1)
    order = visible.to(torch.uint8).argsort(dim=1, stable=True)  # hidden first, in raster order
    count = visible.shape[1] - mask.min_per_image
    if mask.visible_per_image is not None:
        return HiddenPatches(order[:, :count], None) if count else None
    counts = (~visible).sum(dim=1, keepdim=True)
    return HiddenPatches(order[:, :count], torch.arange(count, device=counts.device) < counts)


def key_padding(mask: BlockMask) -> Tensor | None:
    """bool `[N, K]`, True where an image has fewer visible patches than `K`, the most of all.

    None where all images have the same number.
    """
    if mask.visible_per_image is not None:
        return None
    counts = mask.visible.flatten(1).sum(dim=1, keepdim=True)
    return torch.arange(mask.max_per_image, device=counts.device) >= counts


def pad(x: Tensor, mask: BlockMask, padding: Tensor | None) -> Tensor:
    """Packed tokens `[T, D]` to sequences `[N, K, D]`, zero where `padding` is True."""
    if padding is None:
        return x.view(mask.batch_size, -1, x.shape[1])
    sequences = x.new_zeros(padding.numel(), x.shape[1]).index_copy(0, _padded_rows(mask), x)
    return sequences.view(*padding.shape, x.shape[1])


def unpad(x: Tensor, mask: BlockMask) -> Tensor:
    """Sequences `[N, K, D]` back to packed tokens `[T, D]`."""
    x = x.flatten(0, 1)
    return x if mask.visible_per_image is not None else x.index_select(0, _padded_rows(mask))


def _padded_rows(mask: BlockMask) -> Tensor:
    """Where each visible patch is in the rows of padded sequences: int64 `[T]` in `[0, N * K)`."""
    counts = mask.visible.flatten(1).sum(1)
    padded = mask.max_per_image * torch.arange(mask.batch_size, device=mask.device)
    moved = padded - (counts.cumsum(0) - counts)  # how far the rows of each image move down
    return torch.arange(mask.num_visible, device=mask.device) + moved[mask.image_index]


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`x[n, index[n, q]]`: `[N, K, D]`, int64 `[N, Q]` -> `[N, Q, D]`."""
    images, tokens, dim = x.shape
    first = torch.arange(images, device=index.device).unsqueeze(1) * tokens
    rows = (index + first).flatten()
    return x.reshape(images * tokens, dim).index_select(0, rows).view(images, -1, dim)


class TokenRows(NamedTuple):
    """Which row each token is: a visible token has its own row, hidden tokens share rows.

    Rows are `[T + L, D]`: those of the `T` visible patches of all images, then one for each of the
    `L` patches of an image, which stands for that patch wherever it is hidden.

    Attributes:
        row_of_token: int64 `[N * L]`, the row of each token.
        visible: int64 `[T]`, the tokens that have a row of their own; ascending.
        hidden: float32 `[N, L]`, 1 where a token shares its row, else 0.
    """

    row_of_token: Tensor
    visible: Tensor
    hidden: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """Rows `[T + L, D]` to the tokens of each image `[N, L, D]`."""
        if transforms_active():
            return _spread(x, *self)
        return _Spread.apply(x, *self)


def token_rows(mask: BlockMask) -> TokenRows:
    """The row of each token of a batch; hidden tokens of one patch number share one."""
    blocks = mask.num_visible
    own = torch.arange(blocks, device=mask.device)
    shared = torch.arange(blocks, blocks + mask.grid[0] * mask.grid[1], device=mask.device)
    row_of_token = shared.repeat(mask.batch_size).index_copy(0, mask.block_index, own)
    return TokenRows(row_of_token, mask.block_index, removed_mask(mask))


def _spread(x: Tensor, row_of_token: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    return x.index_select(0, row_of_token).view(*hidden.shape, x.shape[1])


class _Spread(torch.autograd.Function):
    """`_spread`; its gradient adds up the tokens that share a row in a fixed order."""

    @staticmethod
    def forward(ctx, x, row_of_token, visible, hidden):
        ctx.save_for_backward(visible, hidden)
        return _spread(x, row_of_token, visible, hidden)

    @staticmethod
    def backward(ctx, grad):
        visible, hidden = ctx.saved_tensors
        own = grad.flatten(0, 1).index_select(0, visible)
        shared = torch.einsum("nl,nld->ld", hidden.to(grad.dtype), grad)
        return torch.cat([own, shared]), None, None, None
