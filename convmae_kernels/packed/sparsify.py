"""Any convolutional network as one that is called with images and a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmae_kernels.packed.map_like import run_named
from convmae_kernels.packed.packed import Packed
from convmae_kernels.recording import is_recorded

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask


class SparseModel(nn.Module):
    """A model that computes visible blocks only; see `sparsify`.

    Attributes:
        model: the model as it was, its parameters shared.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

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
            TypeError, ValueError: images and mask do not fit; see `gather_visible`.
        """
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
