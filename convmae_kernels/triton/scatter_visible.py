"""`scatter_visible` in Triton."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.tile import tile_of_program
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import side_bits, spread

CONFIGURATIONS = (
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("square", {"POSITIONS": 32, "CHANNELS": 32}, num_warps=4),
    Configuration("tall", {"POSITIONS": 256, "CHANNELS": 4}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions"])
def scatter_visible_kernel(
    packed_ptr,  # [T, s*s, C]
    row_of_block_ptr,  # int64 [B * gh * gw], -1 where hidden
    fill_ptr,  # [1]
    images_ptr,  # [B, gh*s, gw*s, C]
    positions,  # B * gh*s * gw*s
    channels,
    grid_rows,
    grid_columns,
    SIDE_BITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    position, channel = tile_of_program(channels, POSITIONS, CHANNELS)
    inside = position < positions

    SIDE: tl.constexpr = 1 << SIDE_BITS
    width = grid_columns << SIDE_BITS
    row, column = position // width, position % width  # rows of all images, one after the other
    block = (row >> SIDE_BITS) * grid_columns + (column >> SIDE_BITS)
    rank = spread(row & (SIDE - 1), SIDE_BITS) << 1 | spread(column & (SIDE - 1), SIDE_BITS)
    packed_row = tl.load(row_of_block_ptr + block, mask=inside, other=-1)
    source = (packed_row << (2 * SIDE_BITS)) + rank

    mask = inside[:, None] & (channel < channels)[None, :]
    visible = mask & (packed_row >= 0)[:, None]
    channel = channel.to(tl.int64)
    values = tl.load(
        packed_ptr + source[:, None] * channels + channel[None, :],
        mask=visible,
        other=tl.load(fill_ptr),
    )
    tl.store(images_ptr + position[:, None] * channels + channel[None, :], values, mask=mask)


def launch(
    configuration: Configuration,
    x: Tensor,
    block_index: Tensor,
    batch: int,
    gh: int,
    gw: int,
    fill: float,
) -> tuple[Tensor]:
    """Runs one configuration; the same as `scatter_visible`."""
    blocks, square, channels = x.shape
    side = math.isqrt(square)
    images = x.new_empty(batch, gh * side, gw * side, channels)
    if images.numel() > 0:
        row_of_block = block_index.new_full((batch * gh * gw,), -1)
        row_of_block[block_index] = torch.arange(blocks, device=x.device)
        positions = row_of_block.shape[0] * square
        scatter_visible_kernel[configuration.grid(POSITIONS=positions, CHANNELS=channels)](
            x.contiguous(),
            row_of_block,
            x.new_full((1,), fill),
            images,
            positions,
            channels,
            gh,
            gw,
            SIDE_BITS=side_bits(square),
            **configuration.options,
        )
    return (images.permute(0, 3, 1, 2),)


def scatter_visible(
    x: Tensor, block_index: Tensor, batch: int, gh: int, gw: int, fill: float
) -> Tensor:
    """`[T, s*s, C] -> [B, C, gh*s, gw*s]` (channels-last), see `reference.scatter_visible`."""
    problem = f"side {math.isqrt(x.shape[1])}, {x.shape[2]} channels, {x.dtype}"
    arguments = (x, block_index, batch, gh, gw, fill)
    (images,) = tuning.run("scatter_visible", problem, CONFIGURATIONS, launch, arguments)
    return images
