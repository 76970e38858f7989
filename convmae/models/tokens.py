"""Tokens: packed rows to padded sequences and back, and which of them are hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from convmae_kernels.ops.library import transforms_active

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
    """The hidden patches of each image; None if it is certain that there are none.

    Without synchronisation where all images have the same number of visible patches.
    """
    visible = mask.visible.flatten(1)
    order = visible.to(torch.uint8).argsort(dim=1, stable=True)  # hidden first, in raster order
    if mask.visible_per_image is not None:
        count = visible.shape[1] - mask.visible_per_image
        return HiddenPatches(order[:, :count], None) if count else None
    counts = (~visible).sum(dim=1, keepdim=True)
    count = int(counts.max())
    return HiddenPatches(order[:, :count], torch.arange(count, device=counts.device) < counts)


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
