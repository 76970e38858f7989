"""What the user chose to measure on: model, batch, image size, mask ratio and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convmae_kernels import BlockMask

PATCH = 16


@dataclass(frozen=True)
class Setting:
    """The sizes that all cases share.

    Attributes:
        model: a name that `convmae.create_model` knows; the operators take its channel counts.
        batch_size, img_size, mask_ratio: as in pretraining; `img_size` in pixels.
        device: "cpu" or "cuda".
        compile: measure compiled dense operators too.
        compile_models: measure compiled models too (compiling them takes minutes on a CPU).
        compile_blocks: measure the packed model compiled block by block too.

    Raises:
        ValueError: a size is out of range.
    """

    model: str = "convmae_base"
    batch_size: int = 8
    img_size: int = 224
    mask_ratio: float = 0.75
    device: torch.device = torch.device("cpu")
    compile: bool = True
    compile_models: bool = False
    compile_blocks: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.img_size < PATCH or self.img_size % PATCH:
            raise ValueError(f"img_size must be a multiple of {PATCH}, got {self.img_size}")
        length = (self.img_size // PATCH) ** 2
        keep = int(length * (1 - self.mask_ratio))
        if not 0 < keep < length:
            raise ValueError(
                f"mask_ratio must leave some of the {length} blocks visible and hide some, got "
                f"{self.mask_ratio}, which leaves {keep}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks in a column and in a row."""
        return self.img_size // PATCH, self.img_size // PATCH

    def noise(self) -> Tensor:
        """The noise `[B, L]` that the mask is drawn from, the same in every case."""
        return torch.rand(
            self.batch_size,
            self.grid[0] * self.grid[1],
            generator=torch.Generator().manual_seed(0),
        ).to(self.device)

    def block_mask(self, visible: float | None = None) -> BlockMask:
        """The mask of every case, or one that shows this share of the blocks, in `(0, 1]`."""
        if visible is None:
            return BlockMask.from_noise(self.noise(), self.grid, self.mask_ratio)
        return BlockMask.from_noise(self.noise(), self.grid, 1 - visible, "round")

    def randn(self, *shape: int, seed: int = 1) -> Tensor:
        """Float32 noise, the same for the same shape and seed in every process."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)
