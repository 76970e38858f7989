"""Any convolutional network as one that is called with images and a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmae_kernels.block_mask import BlockMask
from convmae_kernels.ops.support.dispatch import transforms_active
from convmae_kernels.packed.map_like import run_named
from convmae_kernels.packed.packed import Packed
from convmae_kernels.packed.rehearsal import rehearse
from convmae_kernels.recording import is_exported, is_recorded


class SparseModel(nn.Module):
    """A model that computes visible blocks only; see `sparsify`.

    Attributes:
        model: the model as it was, its parameters shared.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._rehearsed: set[tuple] = set()

    def check(self, images: Tensor, mask: BlockMask) -> None:
        """The model can run on such images with such a mask; nothing is computed.

        A copy of the model runs on shapes alone, once for each image size, number of channels, grid
        and set of modules; `forward` asks for it. A mask too fine for the network's stride, and an
        operation that blocks cannot have, are found here.

        Args:
            images: `[B, C, H, W]`; values are not read.
            mask: the visible blocks.

        Raises:
            NotImplementedError, TypeError, ValueError: names operation, module and reason.
        """
        modules = [(id(m), m.training) for m in self.model.modules()]
        key = tuple(images.shape[1:]), mask.grid, hash(tuple(modules))
        if key not in self._rehearsed:
            rehearse(self.model, images.shape, mask)
            self._rehearsed.add(key)

    def forward(
        self, images: Tensor, mask: BlockMask, *, dense: bool = False, fill: float = 0.0
    ) -> Any:
        """What the model gives for the visible blocks of `images`.

        Args:
            images: `[B, C, H, W]`; hidden positions are not read.
            mask: the visible blocks.
            dense: return dense maps in place of `Packed`.
            fill: their value at hidden positions.

        Returns:
            What the model returns: `Packed`, a list of them (`features_only` models), logits.

        Raises:
            NotImplementedError: the model does something that packed features do not support.
            TypeError, ValueError: images and mask do not fit; see `gather_visible`. Both are raised
                before anything is computed; see `check`.
        """
        plain = isinstance(images, Tensor) and images.dim() == 4 and isinstance(mask, BlockMask)
        if plain and not is_recorded() and not is_exported() and not transforms_active():
            self.check(images, mask)
        packed = Packed.gather(images, mask)
        output = self.model(packed) if is_recorded() else run_named(self.model, packed)
        if not dense:
            return output

        def is_packed(leaf: object) -> bool:
            return isinstance(leaf, Packed)

        return pytree.tree_map(
            lambda leaf: leaf.dense(fill) if is_packed(leaf) else leaf, output, is_leaf=is_packed
        )


def sparsify(model: nn.Module) -> SparseModel:
    """Wraps a convolutional network, unmodified, so that it skips what a mask hides.

    The network runs on `Packed`, through PyTorch's own modules: nothing in it is replaced, and it
    can be called with dense images as before. `sparsify(model)(images, mask)` is
    `model(Packed.gather(images, mask))`, whose block sides must divide by the network's stride:
    with blocks of 32 pixels, a network of stride 32 ends with blocks of one position.

    Args:
        model: takes a map `[B, C, H, W]`.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return SparseModel(model)
