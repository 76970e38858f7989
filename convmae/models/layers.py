"""The layers of ConvMAE: on packed features `[T, s*s, C]` and on tokens `[N, K, D]`.

Parameters have the names and shapes of the official code (1x1 convolutions are 4-D weights), so the
convolution modules here only hold parameters: on packed features they are matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.tokens import TokenRows, take_tokens
from convmae_kernels.nn import MaskedConv2d
from convmae_kernels.ops import add_layer_norm, bias_gelu
from convmae_kernels.ops.support import arithmetic
from convmae_kernels.ops.support.arithmetic import as_cast, cast_together, multiply, patch_conv2d
from convmae_kernels.ops.support.autocast import autocast_is_on
from convmae_kernels.ops.support.rows import has_row_kernels

if TYPE_CHECKING:
    from convmae_kernels import BlockMask

CONV_EPS = 1e-5  # of the LayerNorms of patch embeddings and convolution blocks
TOKEN_EPS = 1e-6  # of all others
# Devices on which the features between blocks stay float32 under autocast to bfloat16: on a CPU,
# PyTorch's layer norm adds up the gradients of its parameters in the dtype of the features.
FLOAT32_BETWEEN_BLOCKS = frozenset({"cpu"})


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """`cat(sin(w * f), cos(w * f), sin(h * f), cos(h * f))`, `f_k = 10000 ** (-k / (dim / 4))`.

    The fixed two-dimensional position embedding of MAE; `(h, w)` is the row and column of a patch.

    Args:
        dim: width of the embedding, a multiple of 4.
        grid: `(gh, gw)` patches.

    Returns:
        float32 `[1, gh * gw, dim]` on the CPU, in raster order, computed in float64.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"the width of a sin-cos embedding must be a multiple of 4, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") for n in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [position.reshape(-1, 1) * frequency for position in (column, row)]
    parts = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


def resample_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    antialias: bool = True,
) -> Tensor:
    """`interpolate(pos_embed, new_grid, mode="bicubic", antialias=antialias)`, in float32.

    For position embeddings of images of another size.

    Args:
        pos_embed: `[1, gh * gw, D]` of `old_grid`, in raster order, without a class token.
        old_grid: `(gh, gw)` patches of it.
        new_grid: `(gh, gw)` patches of the result.
        antialias: as in timm; False as in the official codes of detection and segmentation, whose
            bicubic curve is another one, so that larger grids differ too.

    Returns:
        `[1, gh * gw, D]` of `new_grid`, in the dtype of `pos_embed`; the same tensor if the grids
        are equal.

    Raises:
        ValueError: `pos_embed` does not have the patches of `old_grid`.
    """
    rows, columns = old_grid
    if pos_embed.dim() != 3 or pos_embed.shape[:2] != (1, rows * columns):
        raise ValueError(
            f"pos_embed must be [1, {rows * columns}, D] for a grid of {rows} x {columns}, got "
            f"{list(pos_embed.shape)}"
        )
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    image = pos_embed.float().unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", antialias=antialias)
    return image.flatten(2).transpose(1, 2).contiguous().to(pos_embed.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` by `multiply`."""
    return multiply(F.linear, x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` by `multiply`."""

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """`[..., in_features] -> [..., out_features]`; without the bias, somebody else adds it."""
        return linear(x, self.weight, self.bias if add_bias else None)


def late_bias(layer: nn.Module, x: Tensor, behind: nn.Module) -> Tensor | None:
    """The bias of a product that the kernel behind it should add: it then sums its gradient too.

    PyTorch reads the gradient of the product once more for that sum.

    Args:
        layer: the product's.
        x: what flows through it; sets the device.
        behind: whose kernel would add it.

    Returns:
        `[C]`, or None where the product adds its bias itself: outside of `joining_rows`, on a CPU,
        and where one of the two layers is of another kind.
    """
    if isinstance(layer, Linear | nn.Conv2d) and isinstance(behind, GELU | LayerNorm):
        return layer.bias if has_row_kernels(x) else None
    return None


class GELU(nn.GELU):
    """`torch.nn.GELU` that can add the bias of the product before it."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., C] -> [..., C]`; `bias` `[C]` is from `late_bias`."""
        return super().forward(x) if bias is None else bias_gelu(x, bias)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that on a GPU stays in bfloat16 under autocast to it.

    Statistics and sums are float32 in any case. Autocast would read and write float32, as it must
    for float16, and the product that follows would cast that back.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim] -> [..., dim]`, in the dtype of `x`; for float16 in that of autocast."""
        device = x.device.type
        if (
            x.dtype != torch.bfloat16
            or device in FLOAT32_BETWEEN_BLOCKS
            or not autocast_is_on(device)
        ):
            return super().forward(x)
        weight, bias = (as_cast(p).to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(device, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def add_parameter(x: Tensor, parameter: Tensor) -> Tensor:
    """`x + parameter`, in bfloat16 on a GPU if `x` is bfloat16; else as PyTorch adds them.

    So the sum that every block adds to stays in bfloat16. With float16, which would overflow, it
    is float32.
    """
    narrow = x.dtype == torch.bfloat16 and x.device.type not in FLOAT32_BETWEEN_BLOCKS
    return x + (parameter.to(x.dtype) if narrow else parameter)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`softmax(q @ k.T / sqrt(d) + bias) @ v`.

    On a CPU in bfloat16 it is computed as written: `scaled_dot_product_attention` is several times
    slower there. In float16, whose logits would overflow from 65504, it is computed in float32, and
    so is bfloat16 where the CPU does not multiply it, as in `multiply`.

    Args:
        q: `[N, heads, Q, d]`.
        k: `[N, heads, K, d]`.
        v: `[N, heads, K, d]`.
        key_padding: bool `[N, K]`, True at keys that take no part; None if all do.
        bias: floating `[1, heads, Q, K]` or `[N, heads, Q, K]`, rounded to the dtype of `q`; None
            for none.

    Returns:
        `[N, heads, Q, d]` in the dtype of `q`; the softmax accumulates in float32 at least.
    """
    wide = q.dtype == torch.float16 or q.dtype in arithmetic.SLOW_ON_CPU
    if q.device.type == "cpu" and wide:
        with torch.autocast("cpu", enabled=False):
            return _plain_attention(q.float(), k.float(), v.float(), key_padding, bias).to(q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _plain_attention(q, k, v, key_padding, bias)
    mask = None if key_padding is None else ~key_padding[:, None, None, :]
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, bias: Tensor | None
) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_padding is not None:
        scores = scores.masked_fill(key_padding[:, None, None, :], -torch.inf)
    return scores.softmax(dim=-1) @ v


def split_heads(x: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """`[N, K, n * num_heads * head_dim]` to `n` times `[N, num_heads, K, head_dim]`.

    Cut before it is permuted, so that the gradients are put side by side where they belong.
    """
    x = x.unflatten(2, (-1, num_heads, head_dim))
    return tuple(part.transpose(1, 2) for part in x.unbind(2))


def add_and_norm(
    norm: nn.Module, x: Tensor, branch: Tensor, branch_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x + branch` and its norm; by one kernel inside `joining_rows`.

    Args:
        norm: any; the kernel is that of a `LayerNorm`.
        x: `[..., dim]`.
        branch: `[..., dim]`.
        branch_bias: `[dim]` that the branch still lacks, from `late_bias`.

    Returns:
        The sum, and the norm, which one kernel gives in the dtype of the branch, since a product
        reads it.
    """
    if isinstance(norm, LayerNorm) and has_row_kernels(x):
        return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, branch_bias)
    total = x + branch
    return total, norm(total)


class DropPath(nn.Module):
    """`x * bernoulli(1 - rate) / (1 - rate)`, one draw for each image, in training only.

    Args:
        rate: share of images whose `x` is dropped, in `[0, 1)`.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    @property
    def rate(self) -> float:
        """Share of images whose `x` is dropped; may be set."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = rate
        self._drops, self._keep = rate > 0.0, torch.tensor(1.0 - rate, device="cpu")

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self._drops and self.training

    def forward(self, x: Tensor, mask: BlockMask | None = None) -> Tensor:
        """Tokens `[N, K, D]`, maps `[N, C, H, W]`, or packed `[T, P, C]` and their mask."""
        if not self.drops:
            return x
        images = x.shape[0] if mask is None else mask.batch_size
        # The rate is a tensor here, so that one compiled code serves all rates.
        if torch.compiler.is_compiling():
            scale = (torch.rand(images, device=x.device) < self._keep).to(x.dtype) / self._keep
        else:
            scale = x.new_empty(images).bernoulli_(1 - self.rate) / (1 - self.rate)
        if mask is not None:
            scale = scale[mask.image_index]
        return x * scale.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class PatchEmbed(nn.Module):
    """`gelu(layer_norm(conv2d(x, stride=kernel)))` on packed features.

    Args:
        in_dim: channels of the input.
        dim: channels of the output.
        patch_size: kernel and stride.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch_size, patch_size)
        self.norm = LayerNorm(dim, eps=CONV_EPS)
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        """`[T, P, in_dim] -> [T, P / patch_size**2, dim]`."""
        with cast_together(list(self.parameters()), x):
            return self.act(self.norm(patch_conv2d(x, self.proj.weight, self.proj.bias)))


class ConvMlp(nn.Module):
    """`conv1x1(gelu(conv1x1(x)))` on packed features."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, P, dim] -> [T, P, dim]`."""
        late = late_bias(self.fc1, x, self.act)
        x = patch_conv2d(x, self.fc1.weight, self.fc1.bias if late is None else None)
        x = self.act(x) if late is None else self.act(x, late)
        return patch_conv2d(x, self.fc2.weight, self.fc2.bias)


class ConvBlock(nn.Module):
    """`x += conv1x1(masked_conv5x5(conv1x1(norm(x)))); x += mlp(norm(x))` on packed features.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP / `dim`.
        drop_path: rate of `DropPath` on both branches.
        eps: of the LayerNorms.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, drop_path: float = 0.0, eps: float = CONV_EPS
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.attn = MaskedConv2d(dim, dim, 5, padding=2, groups=dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        """`[T, P, dim] -> [T, P, dim]`."""
        with cast_together(list(self.parameters()), x):
            y = patch_conv2d(self.norm1(x), self.conv1.weight, self.conv1.bias)
            late = None if self.drop_path.drops else late_bias(self.conv2, x, self.norm2)
            bias = self.conv2.bias if late is None else None
            y = patch_conv2d(self.attn(y, mask), self.conv2.weight, bias)
            x, y = add_and_norm(self.norm2, x, self.drop_path(y, mask), late)
            return x + self.drop_path(self.mlp(y), mask)


class Attention(nn.Module):
    """`proj(attention(q, k, v))` with several heads and `q, k, v = qkv(x)`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        key_padding: Tensor | None = None,
        queries: Tensor | None = None,
        rows: TokenRows | None = None,
        add_bias: bool = True,
    ) -> Tensor:
        """Tokens attend to all tokens `x` `[N, K, dim]` that are not padding.

        Args:
            x: `[N, K, dim]`, the keys and values; or, if `rows` is given, their rows `[R, dim]`.
            key_padding: as in `attention`.
            queries: `[N, Q, dim]`, the tokens that attend; if None, or if `rows` is given, all.
            rows: which row each token is; None where `x` is tokens.
            add_bias: whether `proj` adds its bias.

        Returns:
            `[N, Q, dim]`.
        """
        if rows is not None:
            q, k, v = self._heads(rows.spread(self.qkv(x)))
        elif queries is None:
            q, k, v = self._heads(self.qkv(x))
        else:
            dim = x.shape[2]
            query_weight, weight = as_cast(self.qkv.weight).split([dim, 2 * dim])
            query_bias, bias = as_cast(self.qkv.bias).split([dim, 2 * dim])
            (q,) = self._heads(linear(queries, query_weight, query_bias))
            k, v = self._heads(linear(x, weight, bias))
        y = attention(q, k, v, key_padding)
        y = y.transpose(1, 2).flatten(2)
        return self.proj(y) if add_bias else self.proj(y, add_bias=False)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[N, K, n * dim]` to `n` times `[N, heads, K, dim / heads]`."""
        return split_heads(x, self.num_heads, self.qkv.in_features // self.num_heads)


class Mlp(nn.Module):
    """`linear(gelu(linear(x)))`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim] -> [..., dim]`."""
        late = late_bias(self.fc1, x, self.act)
        if late is None:
            return self.fc2(self.act(self.fc1(x)))
        return self.fc2(self.act(self.fc1(x, add_bias=False), late))


class Block(nn.Module):
    """`x += attn(norm(x)); x += mlp(norm(x))`, a transformer block.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention; they divide `dim`.
        mlp_ratio: hidden width of the MLP / `dim`.
        drop_path: rate of `DropPath` on both branches.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=TOKEN_EPS)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps=TOKEN_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        key_padding: Tensor | None = None,
        index: Tensor | None = None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """All tokens of `x`, or only those that are asked for.

        Args:
            x: `[N, K, dim]`; or, if `rows` is given, the rows of these tokens, `[R, dim]`: what is
                the same for many tokens is computed once.
            key_padding: bool `[N, K]`, True at tokens that nothing attends to; None for none.
            index: int64 `[N, Q]`, the tokens to compute; None for all, and if `rows` is given.
            rows: which row each token is; None where `x` is tokens.

        Returns:
            `[N, K, dim]`, or `[N, Q, dim]` with `index`.
        """
        with cast_together(list(self.parameters()), x):
            y, queries = self.norm1(x), None
            if index is not None:
                queries, x = take_tokens(y, index), take_tokens(x, index)
            elif rows is not None:
                x = rows.spread(x)
            late = None if self.drop_path.drops else late_bias(self.attn.proj, x, self.norm2)
            y = self.attn(y, key_padding, queries, rows, late is None)
            x, y = add_and_norm(self.norm2, x, self.drop_path(y), late)
            return x + self.drop_path(self.mlp(y))
