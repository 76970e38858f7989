"""Features of visible blocks that flow through ordinary modules, and networks that run on them."""

from convmae_kernels.packed import (  # noqa: F401  (they fill the tables of functions)
    channel_functions,
    dense_channels,
    functions,
    masked_dense_positions,
    position_functions,
    products,
    reductions,
    view_functions,
)
from convmae_kernels.packed.equivalence import Equivalence, EquivalenceError, check_equivalence
from convmae_kernels.packed.map_like import ELEMENTWISE, OPERATORS, MapLike, handles
from convmae_kernels.packed.masked_dense import MaskedDense
from convmae_kernels.packed.packed import HANDLERS, Packed, broadcast, first_packed
from convmae_kernels.packed.sparsify import SparseModel, sparsify

__all__ = [
    "ELEMENTWISE",
    "HANDLERS",
    "OPERATORS",
    "Equivalence",
    "EquivalenceError",
    "MapLike",
    "MaskedDense",
    "Packed",
    "SparseModel",
    "broadcast",
    "check_equivalence",
    "first_packed",
    "handles",
    "sparsify",
]
