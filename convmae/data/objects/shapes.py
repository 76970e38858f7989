"""Shapes of objects: COCO's polygons and run-length codes, checked and turned into masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from convmae.data.crops import Size

FEWEST_NUMBERS = 6  # of a polygon: three points


def shape_problem(shape: Any, size: Size) -> tuple[Any, str | None]:
    """A shape without polygons that enclose nothing, and why it cannot be used.

    Args:
        shape: polygons `[[x, y, x, y, ...], ...]`, or a code `{"size": [h, w], "counts": ...}`.
        size: height and width of the picture.

    Returns:
        The shape, None where nothing of it is left; and the problem in words, None without one.
    """
    if isinstance(shape, dict):
        try:
            told = tuple(int(side) for side in shape["size"])
            counts = shape["counts"]
        except (KeyError, TypeError, ValueError):
            return shape, 'has a code of a mask without "size" and "counts"'
        if told != tuple(size):
            return shape, "has a mask of another size than its picture"
        if isinstance(counts, list):
            lengths = np.asarray(counts)
            if lengths.dtype.kind not in "iu" or (lengths < 0).any():
                return shape, "has a code of a mask that is no list of lengths"
            if int(lengths.sum()) != size[0] * size[1]:
                return shape, "has a mask whose code is of another number of pixels"
        elif not isinstance(counts, str | bytes):
            return shape, "has a code of a mask that is neither text nor a list"
        return shape, None
    if not isinstance(shape, list) or not all(isinstance(part, list) for part in shape):
        return shape, "has a segmentation that is neither polygons nor a code"
    try:
        parts = [np.asarray(part, dtype=np.float64) for part in shape]
    except (TypeError, ValueError):
        return shape, "has polygons that are no lists of numbers"
    if any(len(part) % 2 or not np.isfinite(part).all() for part in parts):
        return shape, "has polygons that are no pairs of finite numbers"
    kept = [part.tolist() for part in parts if len(part) >= FEWEST_NUMBERS]
    return kept or None, None


def encoded_shape(shape: Any, size: Size) -> dict[str, Any]:
    """The compressed run-length code of a shape on a picture of `size`."""
    from pycocotools import mask as coco_masks

    height, width = size
    if isinstance(shape, list):
        return coco_masks.merge(coco_masks.frPyObjects(shape, height, width))
    if isinstance(shape["counts"], list):
        return coco_masks.frPyObjects(shape, height, width)
    return shape


def shape_mask(shape: Any, size: Size) -> np.ndarray:
    """The pixels of a shape, uint8 `[h, w]`."""
    from pycocotools import mask as coco_masks

    return coco_masks.decode(encoded_shape(shape, size))


def shape_area(shape: Any, size: Size) -> float:
    """How many pixels a shape has."""
    from pycocotools import mask as coco_masks

    return float(coco_masks.area(encoded_shape(shape, size)))


def encoded_mask(mask: np.ndarray) -> dict[str, Any]:
    """The run-length code of a mask `[h, w]`, as plain values that JSON holds."""
    from pycocotools import mask as coco_masks

    code = coco_masks.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
