"""Results of convolutions in float64, compared."""

import torch

NAMES = ("output", "gradient of x", "gradient of weight", "gradient of bias")


def check_close(found, expected):
    """Equal in float64 but for the order of sums."""
    for a, b, name in zip(found, expected, NAMES, strict=True):
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a, b, rtol=1e-12, atol=1e-12 * size, msg=lambda m, n=name: f"{n}: {m}"
        )
