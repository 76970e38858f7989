"""What the tests of interpreted kernels share."""

import pytest
import triton
from triton.runtime import interpreter

from convmae_kernels.triton import (
    add_layer_norm,
    bias_gelu,
    bias_gelu_grad,
    gather_visible,
    gather_windows,
    gather_windows_grad,
    masked_conv2d,
    masked_conv2d_grads,
    masked_conv2d_weight_grad,
    scatter_visible,
    strided_conv2d,
    strided_conv2d_input_grad,
    strided_conv2d_weight_grad,
)
from convmae_kernels.triton.tuning import Configuration

POSITION_TILES = (
    bias_gelu,
    gather_visible,
    gather_windows,
    gather_windows_grad,
    masked_conv2d,
    scatter_visible,
    strided_conv2d,
    strided_conv2d_input_grad,
)


@pytest.fixture(autouse=True, scope="session")
def bounds_of_loops():
    """Mends Triton 3.6: `int()` of an array of one element, which numpy has refused since 2.4."""
    if not triton.__version__.startswith("3.6."):
        yield
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
    yield
    interpreter._patch_lang_tensor = patch_tensor


@pytest.fixture
def few_programs(monkeypatch):
    """Returns a function that sets tiles for few, full programs: they are the interpreter's time.

    Tests of the configurations themselves do not use it.
    """

    def set_tiles(channels):
        across = triton.next_power_of_2(max(channels, 1))
        down = 128 if across <= 8 else 32
        tile = Configuration("test", {"POSITIONS": down, "CHANNELS": across}, 1)
        for module in POSITION_TILES:
            monkeypatch.setattr(module, "CONFIGURATIONS", (tile,))
        tile = Configuration("test", {"TAPS": 16, "CHANNELS": across}, 1)
        for module in (masked_conv2d_weight_grad, strided_conv2d_weight_grad):
            monkeypatch.setattr(module, "CONFIGURATIONS", (tile,))
        tile = Configuration("test", {"CHANNELS": across}, 1)
        for module in (bias_gelu_grad, masked_conv2d_grads):
            monkeypatch.setattr(module, "CONFIGURATIONS", (tile,))
        tile = Configuration("test", {"ROWS": down}, 1)
        monkeypatch.setattr(add_layer_norm, "CONFIGURATIONS", (tile,))
        for module in (bias_gelu_grad, masked_conv2d_grads, masked_conv2d_weight_grad):
            monkeypatch.setattr(module, "LANES", down // 4)

    set_tiles(8)
    return set_tiles
