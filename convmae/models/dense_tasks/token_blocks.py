"""Transformer blocks on maps `[N, gh, gw, D]`, with relative positions, global or in windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.dense_tasks.positions import (
    Grid,
    decomposed_bias,
    new_table,
    resample_table,
    table_bias,
)
from convmae.models.layers import (
    DropPath,
    LayerNorm,
    Linear,
    Mlp,
    add_and_norm,
    attention,
    split_heads,
)
from convmae_kernels.ops.support.arithmetic import as_cast, cast_together

if TYPE_CHECKING:
    from collections.abc import Callable


class MapAttention(nn.Module):
    """`proj(softmax(q @ k.T / sqrt(d) + bias) @ v)` with `q, k, v = qkv(x)`, on the tokens of maps.

    Args:
        dim: width of the tokens.
        num_heads: heads; they divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, key_padding: Tensor | None = None
    ) -> Tensor:
        """Every token of a map attends to all of them.

        Args:
            x: `[N, gh, gw, dim]`.
            bias: `[1, heads, L, L]`, added to the logits; None where this module has its own.
            key_padding: bool `[N, L]`, True at tokens that nothing attends to; None for none.

        Returns:
            `[N, gh, gw, dim]`.
        """
        grid = (x.shape[1], x.shape[2])
        q, k, v = split_heads(self.qkv(x).flatten(1, 2), self.num_heads, self.head_dim)
        own = self.position_bias(q, grid)
        y = attention(q, k, v, key_padding, bias if own is None else own)
        return self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, grid)

    def position_bias(self, q: Tensor, grid: Grid) -> Tensor | None:
        """`[1 or N, heads, L, L]` for queries `[N, heads, L, d]` of a grid; here there is none."""
        return None


class TableAttention(MapAttention):
    """Attention with a table of relative positions of its own.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        grid: `(gh, gw)` tokens of the table; of other maps it is resampled.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid) -> None:
        super().__init__(dim, num_heads)
        self.grid = grid
        self.relative_position_bias_table = new_table(grid, num_heads)

    def position_bias(self, q: Tensor, grid: Grid) -> Tensor:
        """`[1, heads, L, L]` of the table."""
        return table_bias(resample_table(self.relative_position_bias_table, self.grid, grid), grid)


class DecomposedAttention(MapAttention):
    """Attention with a vector for each distance of rows and of columns, shared by the heads.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        grid: `(gh, gw)` tokens of the vectors; of other maps they are resampled.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid) -> None:
        super().__init__(dim, num_heads)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, self.head_dim))

    def position_bias(self, q: Tensor, grid: Grid) -> Tensor:
        """`[N, heads, L, L]`, by the queries."""
        return decomposed_bias(q, self.rel_pos_h, self.rel_pos_w, grid)


class MapBlock(nn.Module):
    """`x += gamma_1 * attn(norm(x)); x += gamma_2 * mlp(norm(x))` on maps.

    Args:
        attn: its attention.
        dim: width of the tokens.
        mlp_ratio: hidden width of the MLP / `dim`.
        drop_path: rate of `DropPath` on both branches.
        eps: of the LayerNorms.
        layer_scale: with `gamma_1` and `gamma_2` `[dim]`, which begin at 1.
        window: `(rows, columns)` of the windows within which tokens attend; None for the whole map.
        padding_counts: whether the zeros that complete windows at the right and at the bottom take
            part in the attention, as in the official ViTDet, where they are the biases of `qkv`.
    """

    def __init__(
        self,
        attn: MapAttention,
        dim: int,
        mlp_ratio: float,
        drop_path: float,
        eps: float,
        layer_scale: bool = False,
        window: Grid | None = None,
        padding_counts: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.padding_counts = window, padding_counts
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.ones(dim)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.ones(dim)) if layer_scale else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[N, gh, gw, dim] -> [N, gh, gw, dim]`.

        Args:
            x: maps.
            bias: as in `MapAttention`, of a window if there are such.
        """
        with cast_together(list(self.parameters()), x):
            y = self.norm1(x)
            if self.window is None:
                y = self.attn(y, bias)
            else:
                y = in_windows(self.attn, y, self.window_of(x), bias, self.padding_counts)
            x, y = add_and_norm(self.norm2, x, self.drop_path(_scale(y, self.gamma_1)))
            return x + self.drop_path(_scale(self.mlp(y), self.gamma_2))

    def window_of(self, x: Tensor) -> Grid:
        """The windows of a map `[N, gh, gw, dim]`; where padding is left out, not above the map."""
        assert self.window is not None
        if self.padding_counts:
            return self.window
        return min(self.window[0], x.shape[1]), min(self.window[1], x.shape[2])


def in_windows(
    attn: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    window: Grid,
    bias: Tensor | None = None,
    padding_counts: bool = False,
) -> Tensor:
    """`attn` of every window of maps, apart from all others; windows are not shifted.

    Zeros at the bottom and at the right complete the last windows, and are cut off again.

    Args:
        attn: called as `MapAttention`.
        x: `[N, gh, gw, dim]`.
        window: `(rows, columns)`.
        bias: as in `MapAttention`, of a window.
        padding_counts: whether tokens attend to these zeros.

    Returns:
        `[N, gh, gw, dim]`.
    """
    rows, columns = x.shape[1:3]
    down, right = -rows % window[0], -columns % window[1]
    padding = None
    if down or right:
        if not padding_counts:
            outside = torch.zeros(1, rows, columns, 1, dtype=torch.bool, device=x.device)
            outside = F.pad(outside, (0, 0, 0, right, 0, down), value=True)
            padding = cut_windows(outside, window).flatten(1).repeat(x.shape[0], 1)
        x = F.pad(x, (0, 0, 0, right, 0, down))
    grid = (x.shape[1] // window[0], x.shape[2] // window[1])
    y = join_windows(attn(cut_windows(x, window), bias, padding), grid)
    return y[:, :rows, :columns]


def cut_windows(x: Tensor, window: Grid) -> Tensor:
    """Maps `[N, gh, gw, D]` to windows `[N * gh / rows * gw / columns, rows, columns, D]`.

    Windows are in raster order within a map.
    """
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(0, 2)


def join_windows(x: Tensor, grid: Grid) -> Tensor:
    """The inverse of `cut_windows`, for maps of `grid` windows."""
    return x.unflatten(0, (-1, *grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _scale(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * as_cast(gamma).to(x.dtype)
