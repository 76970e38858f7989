"""The sizes of ConvMAE and of what it becomes."""

from __future__ import annotations

from typing import Any

# Base is the official size. Official code has no other: small is that of moreh-dev/FastConvMAE,
# large that of MCG-NJU/MixFormer, huge that of a public denoising fork ("dconvmae"); so do not
# expect released large or huge weights to fit. Tiny is ours, for CPUs.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": (64, 128, 256),
        "depth": (2, 2, 4),
        "num_heads": 4,
        "mlp_ratio": (4, 4, 4),
    },
    "small": {
        "embed_dim": (128, 256, 384),
        "depth": (2, 2, 11),
        "num_heads": 6,
        "mlp_ratio": (4, 4, 4),
    },
    "base": {
        "embed_dim": (256, 384, 768),
        "depth": (2, 2, 11),
        "num_heads": 12,
        "mlp_ratio": (4, 4, 4),
    },
    "large": {
        "embed_dim": (384, 768, 1024),
        "depth": (2, 2, 20),
        "num_heads": 16,
        "mlp_ratio": (4, 4, 4),
    },
    "huge": {
        "embed_dim": (768, 1024, 1280),
        "depth": (2, 2, 31),
        "num_heads": 16,
        "mlp_ratio": (8, 8, 4),
    },
}
