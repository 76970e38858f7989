"""`gather_visible` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.tile import tile_of_program
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

CONFIGURATIONS = (
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("square", {"POSITIONS": 32, "CHANNELS": 32}, num_warps=4),
    Configuration("tall", {"POSITIONS": 256, "CHANNELS": 4}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions"])
def gather_visible_kernel(
    images_ptr,  # [B, C, gh*s, gw*s], any strides
    block_index_ptr,  # int64 [T]
    packed_ptr,  # [T, s*s, C]
    positions,  # T * s*s
    channels,
    grid_rows,
    grid_columns,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    SIDE_BITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    position, channel = tile_of_program(channels, POSITIONS, CHANNELS)
    inside = position < positions

    block = tl.load(block_index_ptr + (position >> (2 * SIDE_BITS)), mask=inside, other=0)
    image = block // (grid_rows * grid_columns)
    row = (block // grid_columns % grid_rows << SIDE_BITS) + compact(position >> 1, SIDE_BITS)
    column = (block % grid_columns << SIDE_BITS) + compact(position, SIDE_BITS)
    source = image * stride_image + row * stride_row + column * stride_column

    mask = inside[:, None] & (channel < channels)[None, :]
    channel = channel.to(tl.int64)
    values = tl.load(images_ptr + source[:, None] + channel[None, :] * stride_channel, mask=mask)
    tl.store(packed_ptr + position[:, None] * channels + channel[None, :], values, mask=mask)


def launch(
    configuration: Configuration, images: Tensor, block_index: Tensor, gh: int, gw: int
) -> tuple[Tensor]:
    """Runs one configuration; the same as `gather_visible`."""
    channels, side = images.shape[1], images.shape[2] // gh
    packed = images.new_empty(block_index.shape[0], side * side, channels)
    if packed.numel() > 0:
        positions = packed.shape[0] * side * side
        gather_visible_kernel[configuration.grid(POSITIONS=positions, CHANNELS=channels)](
            images,
            block_index.contiguous(),
            packed,
            positions,
            channels,
            gh,
            gw,
            *images.stride(),
            SIDE_BITS=side_bits(side * side),
            **configuration.options,
        )
    return (packed,)


def gather_visible(images: Tensor, block_index: Tensor, gh: int, gw: int) -> Tensor:
    """`[B, C, gh*s, gw*s] -> [T, s*s, C]`, see `reference.gather_visible`."""
    layout = "last" if images.stride(1) == 1 else "first"
    problem = f"side {images.shape[2] // gh}, {images.shape[1]} channels {layout}, {images.dtype}"
    (packed,) = tuning.run(
        "gather_visible", problem, CONFIGURATIONS, launch, (images, block_index, gh, gw)
    )
    return packed
