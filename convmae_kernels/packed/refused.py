"""Functions of positions that a grid of blocks cannot have, each with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

NO_INDICES = (
    "there are no indices of maxima: they would point into a map that is not there; expected "
    "return_indices=False"
)
WHY_REFUSED: dict[Callable, str] = {
    F.max_pool2d_with_indices: NO_INDICES,
    F.adaptive_max_pool2d_with_indices: NO_INDICES,
    F.max_unpool2d: "it needs indices of maxima, which packed features do not have",
    F.lp_pool2d: (
        "a norm over windows of visible positions is not defined; expected avg_pool2d of powers"
    ),
    F.fractional_max_pool2d: "its windows do not keep the grid of blocks",
    F.unfold: ("its columns are positions of a dense map, hidden ones too; expected a convolution"),
    F.fold: "it adds up positions of a dense map, hidden ones too; expected conv_transpose2d",
    F.grid_sample: "it reads positions anywhere in the image, hidden ones too",
}


def refuse(func: Callable, *_: Any, **__: Any) -> NoReturn:
    """The handler of the functions of `WHY_REFUSED`.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(WHY_REFUSED[func])
