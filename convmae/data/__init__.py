"""From stored pictures to batches: sources of pictures, transforms, loader, statistics."""

from convmae.data.demo import DemoPhotos
from convmae.data.errors import (
    DataError,
    Failure,
    LoadingError,
    UnreadableError,
    check_share,
)
from convmae.data.folder import FolderPhotos, check_readable, find_pictures
from convmae.data.formats.pillow import read_picture
from convmae.data.loader import Batch
from convmae.data.normalisation import (
    IMAGENET,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Statistics,
    denormalise,
    full_scale,
    normalise,
)
from convmae.data.open import open_source
from convmae.data.picture import Photos, Picture, Pixels
from convmae.data.source import PhotoSource, Source
from convmae.data.statistics import channel_statistics
from convmae.data.transforms import (
    CentreTransform,
    EvalTransform,
    FinetuneTransform,
    LinprobeTransform,
    PretrainTransform,
    Transform,
)

__all__ = [
    "IMAGENET",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "CentreTransform",
    "DataError",
    "DemoPhotos",
    "EvalTransform",
    "Failure",
    "LoadingError",
    "FinetuneTransform",
    "FolderPhotos",
    "LinprobeTransform",
    "PhotoSource",
    "Photos",
    "Picture",
    "Pixels",
    "PretrainTransform",
    "Source",
    "Statistics",
    "Transform",
    "UnreadableError",
    "channel_statistics",
    "check_share",
    "check_readable",
    "denormalise",
    "find_pictures",
    "full_scale",
    "normalise",
    "open_source",
    "read_picture",
]
