"""Label maps: where they lie, what their values mean, and pictures with them."""

from convmae.data.label_maps.pairs import LabelMapPhotos, StackedPhotos, open_label_maps
from convmae.data.label_maps.values import LabelReading, read_label_map

__all__ = ["LabelMapPhotos", "LabelReading", "StackedPhotos", "open_label_maps", "read_label_map"]
