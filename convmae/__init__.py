"""ConvMAE: masked-image pretraining of convolution-transformer hybrids that skips what is hidden.

`create_model` and `list_models` are all that most programs need. Names are imported on first use,
so that `import convmae` alone (and `convmae --help`) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convmae.models import (
        ConvMAE,
        ConvMAEOutput,
        ConvViT,
        Reconstruction,
        create_model,
        list_models,
    )

__version__ = "0.1.0"

__all__ = [
    "ConvMAE",
    "ConvMAEOutput",
    "ConvViT",
    "Reconstruction",
    "__version__",
    "create_model",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("convmae.models"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
