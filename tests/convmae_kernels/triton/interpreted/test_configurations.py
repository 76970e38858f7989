"""Every configuration of every kernel gives the same bits: a choice changes no result."""

import pytest
import torch

from convmae_kernels.testing import make_mask, random_tensor
from convmae_kernels.triton import (
    add_layer_norm,
    add_layer_norm_grad,
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

MASK = make_mask("equal")  # 8 blocks, of 4 positions
X, GRAD = (random_tensor((8, 4, 70)) for _ in range(2))
WEIGHT, BIAS = random_tensor((70, 1, 3, 3)), random_tensor((70,))
IMAGES = random_tensor((2, 70, 6, 8))
WINDOWS = random_tensor((8, 5, 4, 70))
TABLE = MASK.neighbours(1)
FEW = make_mask("corner").neighbours(1)  # 3 blocks
TAPS, SHAPE = WEIGHT[:, :, :2, 1:], (2, [0, 1], [1, 1])  # stride, padding, dilation
PROBLEMS = {
    add_layer_norm: (X[:2], GRAD[:2], BIAS, BIAS, BIAS, 1e-5),
    add_layer_norm_grad: (GRAD, X, X, BIAS, 1e-5, True),
    bias_gelu: (X, BIAS),
    bias_gelu_grad: (GRAD, X, BIAS),
    gather_visible: (IMAGES, MASK.block_index, 3, 4),
    scatter_visible: (X, MASK.block_index, 2, 3, 4, 0.5),
    gather_windows: (X, TABLE, [2, 1, -1, 2], 0.5),
    gather_windows_grad: (WINDOWS, TABLE, [2, 1, 0, 2]),
    masked_conv2d: (X, WEIGHT, BIAS, TABLE, [1, 1]),
    masked_conv2d_grads: (GRAD[:3, :, :18], X[:3, :, :18], WEIGHT[:18, :, :, 1:2], FEW, [1, 1]),
    masked_conv2d_weight_grad: (GRAD, X, TABLE, [3, 3], [1, 1]),
    strided_conv2d: (X, TAPS, BIAS, TABLE, *SHAPE),
    strided_conv2d_input_grad: (GRAD[:, :1], TAPS, TABLE, *SHAPE),
    strided_conv2d_weight_grad: (GRAD[:, :1], X, TABLE, [2, 2], *SHAPE),
}


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr(masked_conv2d_weight_grad, "MIN_POSITIONS_PER_PART", 16)
    for module in (add_layer_norm_grad, bias_gelu_grad):
        monkeypatch.setattr(module, "MIN_ROWS_PER_PART", 20)


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        pytest.param(module, dtype, id=f"{module.__name__.rpartition('.')[2]}-{dtype}")
        for module in PROBLEMS
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32 or "strided" not in module.__name__  # like masked_conv2d
    ],
)
@pytest.mark.thorough(but_every=5)
def test_same_bits(module, dtype, monkeypatch):
    if module is strided_conv2d_weight_grad:  # a quarter as many positions
        monkeypatch.setattr(masked_conv2d_weight_grad, "MIN_POSITIONS_PER_PART", 4)
    first, *others = module.CONFIGURATIONS
    arguments = [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in PROBLEMS[module]
    ]
    expected = module.launch(first, *arguments)
    assert all(t.isfinite().all() and t.any() for t in expected)
    assert others
    for configuration in others:
        found = module.launch(configuration, *arguments)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), configuration.name


def test_the_order_of_a_sum_shows():
    """So the test above can fail: sums in another order have other bits."""
    lanes = masked_conv2d_weight_grad.LANES
    first, arguments = (
        masked_conv2d_weight_grad.CONFIGURATIONS[0],
        PROBLEMS[masked_conv2d_weight_grad],
    )
    expected = masked_conv2d_weight_grad.launch(first, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_conv2d_weight_grad, "LANES", 2 * lanes)
        found = masked_conv2d_weight_grad.launch(first, *arguments)
    assert not torch.equal(found[0], expected[0])
    torch.testing.assert_close(found, expected)


def test_the_number_of_parts_is_bounded():
    module = masked_conv2d_weight_grad
    arguments = (random_tensor((180, 1, 1)), random_tensor((180, 1, 1)))
    table = torch.arange(180, dtype=torch.int32)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_POSITIONS_PER_PART", 1)
        patch.setattr(module, "MAX_PARTS", 40)  # two rounds of PART_LANES
        weight, bias = module.launch(module.CONFIGURATIONS[-1], *arguments, table, [1, 1], [1, 1])
    grad, x = (a.double().flatten() for a in arguments)
    torch.testing.assert_close(weight.item(), (grad @ x).item(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.item(), grad.sum().item(), rtol=1e-5, atol=1e-5)
