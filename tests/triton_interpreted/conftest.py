"""What the tests of interpreted kernels share."""

import pytest

from convmae_kernels.triton import (
    gather_visible,
    masked_conv2d,
    masked_conv2d_weight_grad,
    scatter_visible,
)
from convmae_kernels.triton.tuning import Configuration


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter's time goes by programs: few large ones. Others test the real tiles."""
    tile = {"POSITIONS": 512, "CHANNELS": 256}
    for module in (gather_visible, scatter_visible, masked_conv2d):
        monkeypatch.setattr(module, "CONFIGURATIONS", (Configuration("all", tile, 1),))
    tile = {"TAPS": 32, "CHANNELS": 256}
    monkeypatch.setattr(
        masked_conv2d_weight_grad, "CONFIGURATIONS", (Configuration("all", tile, 1),)
    )
