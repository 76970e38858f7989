"""`Padded`: a map with explicit padding, which the next convolution or pooling takes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from convmae_kernels.packed.axes import NCHW
from convmae_kernels.packed.map_like import MapLike

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.functional.borders import Border
    from convmae_kernels.packed.packed import Packed

PADDED_HANDLERS: dict[Callable | str, Callable] = {}


class Padded(MapLike):
    """What `F.pad` makes of a `Packed`: it looks like the padded map, and waits.

    A padded map does not divide into blocks of equal size, so nothing is computed yet. The
    convolution or pooling that comes next looks at the border where it reaches beyond the image,
    and gives a `Packed` again. Whatever else is asked of it is an error.

    Args:
        source: the map that was padded, `[B, C, H, W]`.
        border: what lies around it.
    """

    handlers: ClassVar[dict[Callable | str, Callable]] = PADDED_HANDLERS
    axes = NCHW
    absent = (
        "a padded map is not on the grid of blocks: only a convolution, a pooling or more padding "
        "may follow F.pad"
    )

    def __init__(self, source: Packed, border: Border) -> None:
        self.source = source
        self.border = border

    @property
    def shape(self) -> torch.Size:
        """Of the padded map."""
        batch, channels, height, width = self.source.shape
        top, bottom, left, right = self.border[:4]
        return torch.Size((batch, channels, top + height + bottom, left + width + right))

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """Of the features."""
        return self.source.device

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the features."""
        return self.source.requires_grad

    def __repr__(self) -> str:
        return f"Padded({self.source!r}, {self.border!r})"


def unpadded(x: Any) -> Any:
    """The map that was padded, or `x` itself."""
    return x.source if isinstance(x, Padded) else x
