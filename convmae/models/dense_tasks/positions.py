"""Relative positions: what two tokens of a map know of each other's place, added to attention.

A table over a grid of `gh x gw` tokens has a row for each of the `(2 gh - 1) (2 gw - 1)` distances
that two tokens can have, and a column for each head. A decomposed one has a vector for each of the
`2 gh - 1` distances of rows, and of the `2 gw - 1` of columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class RelativePositionTable(nn.Module):
    """`table[distance(p, q)]` of all pairs of tokens, for each head: one table for several blocks.

    Its parameter has the official name, `relative_position_bias_table`.

    Args:
        grid: `(gh, gw)` tokens.
        num_heads: heads of the attention.
    """

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = new_table(grid, num_heads)

    def forward(self, grid: Grid) -> Tensor:
        """`[1, heads, L, L]` for a map of `grid`; the table is resampled if it is of another."""
        return table_bias(resample_table(self.relative_position_bias_table, self.grid, grid), grid)

    def window(self, size: Grid) -> Tensor:
        """`[1, heads, L, L]` for a window that is smaller in one direction or both.

        Distances keep their meaning: it is the middle of the table.
        """
        table = _as_map(self.relative_position_bias_table, self.grid)
        for axis, (own, wanted) in enumerate(zip(self.grid, size, strict=True), start=1):
            table = table.narrow(axis, own - wanted, 2 * wanted - 1)
        return _bias_of_map(table, size)


def new_table(grid: Grid, num_heads: int) -> nn.Parameter:
    """Zeros `[(2 gh - 1) (2 gw - 1), heads]`."""
    return nn.Parameter(torch.zeros((2 * grid[0] - 1) * (2 * grid[1] - 1), num_heads))


def resample_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """The table of another grid: `interpolate(mode="bicubic")` of its distances, as a picture.

    Args:
        table: `[(2 gh - 1) (2 gw - 1), heads]` of the old grid.
        old: `(gh, gw)` tokens of it.
        new: `(gh, gw)` tokens of the result.

    Returns:
        The same of the new grid; the table itself where the grids are equal.
    """
    if old == new:
        return table
    size = [2 * n - 1 for n in new]
    image = F.interpolate(_as_map(table, old).unsqueeze(0), size=size, mode="bicubic")
    return image[0].flatten(1).t()


def table_bias(table: Tensor, grid: Grid) -> Tensor:
    """`bias[0, h, p, q] = table[distance(p, q), h]`, `[1, heads, L, L]` with `L = gh * gw`.

    Tokens are in raster order; the row of the table is `relative_position_index(grid)[p, q]`.

    Args:
        table: `[(2 gh - 1) (2 gw - 1), heads]`.
        grid: `(gh, gw)`.
    """
    return _bias_of_map(_as_map(table, grid), grid)


def relative_position_index(grid: Grid) -> Tensor:
    """`(row_p - row_q + gh - 1) (2 gw - 1) + column_p - column_q + gw - 1`: int64 `[L, L]`.

    Official files hold it for every table; here it is not needed.
    """
    rows, columns = (torch.arange(n) for n in grid)
    row, column = (x.flatten() for x in torch.meshgrid(rows, columns, indexing="ij"))
    down = row[:, None] - row + grid[0] - 1
    return down * (2 * grid[1] - 1) + column[:, None] - column + grid[1] - 1


def decomposed_bias(q: Tensor, rows: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """`q[p] . rows[row_p - row_q] + q[p] . columns[column_p - column_q]`.

    Args:
        q: queries `[N, heads, L, d]` of tokens in raster order, not scaled.
        rows: `[n, d]`, one vector for each distance of rows, the most negative first; resampled
            where `n` is not `2 gh - 1`.
        columns: likewise.
        grid: `(gh, gw)`, whose tokens they are.

    Returns:
        `[N, heads, L, L]`.
    """
    x = q.unflatten(2, grid)
    down = torch.einsum("nhrcd,rkd->nhrck", x, _distances(rows, grid[0]).to(q.dtype))
    right = torch.einsum("nhrcd,ckd->nhrck", x, _distances(columns, grid[1]).to(q.dtype))
    return (down.unsqueeze(5) + right.unsqueeze(4)).flatten(4, 5).flatten(2, 3)


def resample_distances(vectors: Tensor, count: int) -> Tensor:
    """`[n, d]` to `[count, d]`: `interpolate(mode="linear")` along the distances."""
    if vectors.shape[0] == count:
        return vectors
    return F.interpolate(vectors.t().unsqueeze(0), size=count, mode="linear")[0].t()


def square_grid(distances: int) -> Grid | None:
    """The square grid whose table has so many rows, `(2 g - 1) ** 2`; None if none has."""
    side = math.isqrt(distances)
    return ((side + 1) // 2, (side + 1) // 2) if side % 2 and side * side == distances else None


def _as_map(table: Tensor, grid: Grid) -> Tensor:
    """`[heads, 2 gh - 1, 2 gw - 1]`, a view."""
    return table.t().unflatten(1, (2 * grid[0] - 1, 2 * grid[1] - 1))


def _bias_of_map(table: Tensor, grid: Grid) -> Tensor:
    """`[heads, 2 gh - 1, 2 gw - 1]` to `[1, heads, L, L]`, without an index of `L * L` numbers."""
    windows = table.unfold(1, grid[0], 1).unfold(2, grid[1], 1)  # a view [heads, gh, gw, gh, gw]
    tokens = (
        grid[0] * grid[1]
    )  # a window has the distances of a token to the last key ... the first
    return windows.flip(3, 4).reshape(1, table.shape[0], tokens, tokens)


def _distances(vectors: Tensor, tokens: int) -> Tensor:
    """`[n, d]` to `[tokens, tokens, d]`: the vector of query `p` and key `q`."""
    windows = resample_distances(vectors, 2 * tokens - 1).unfold(0, tokens, 1)  # [tokens, d, keys]
    return windows.flip(2).transpose(1, 2)
