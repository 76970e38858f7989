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
        FastConvMAE,
        Reconstruction,
        create_model,
        full_name,
        list_models,
    )

__version__ = "0.1.0"

__all__ = [
    "ConvMAE",
    "ConvMAEOutput",
    "ConvViT",
    "FastConvMAE",
    "Reconstruction",
    "__version__",
    "create_model",
    "full_name",
    "list_models",
    "register_timm",
]


def register_timm() -> None:
    """Makes `timm.create_model("convvit_base", ...)` and its like work: see `timm_models`.

    timm cannot find models of other packages by itself. Calling it again does nothing.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    import_module("convmae.models.timm_models")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("convmae.models"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
