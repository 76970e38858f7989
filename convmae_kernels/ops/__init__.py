"""One module per op: schema, fake, derivative formulas, public function.

`reference` is what the ops mean, in plain PyTorch; `support` is what serves them.
"""

from convmae_kernels.ops import neighbour_table  # noqa: F401  (a mask calls the registered op)
from convmae_kernels.ops.add_layer_norm import add_layer_norm
from convmae_kernels.ops.bias_gelu import bias_gelu
from convmae_kernels.ops.gather_visible import gather_visible
from convmae_kernels.ops.gather_windows import gather_windows
from convmae_kernels.ops.masked_conv2d import masked_conv2d, masked_conv_transpose2d
from convmae_kernels.ops.scatter_visible import scatter_visible

__all__ = [
    "add_layer_norm",
    "bias_gelu",
    "gather_visible",
    "gather_windows",
    "masked_conv2d",
    "masked_conv_transpose2d",
    "scatter_visible",
]
