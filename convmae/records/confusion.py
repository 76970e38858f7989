"""A confusion matrix as a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image as PILImage
    from torch import Tensor

MOST_NAMED = 40  # classes that a matrix has names for
MOST_NUMBERED = 12  # and numbers in its fields


def confusion_picture(matrix: Tensor, names: Sequence[str], unit: str) -> PILImage.Image:
    """Of each true class (rows) the share of each prediction (columns).

    Args:
        matrix: counts, int64 `[K, K]`.
        names: of the classes.
        unit: what a share is one of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    count = len(names)
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 3.2 + 0.3 * count)
    figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= MOST_NAMED:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= MOST_NUMBERED:
        for row in range(count):
            for column in range(count):
                share = float(shares[row, column])
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(drawn, ax=axes, label=unit)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
