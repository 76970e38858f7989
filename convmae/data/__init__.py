"""Pictures in, batches out: folders, arrays, IDX files and shards, their transforms and loader."""

from convmae.data.base import PhotoSource, Source, check_share
from convmae.data.demo import DemoPhotos
from convmae.data.folder import FolderPhotos, check_readable, find_pictures
from convmae.data.loader import Batch
from convmae.data.photos import Failure, Photos, Picture, Pixels, UnreadableError
from convmae.data.picture import DataError, read_picture
from convmae.data.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise, full_scale, normalise
from convmae.data.sources import open_source
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
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "CentreTransform",
    "DataError",
    "DemoPhotos",
    "EvalTransform",
    "Failure",
    "FinetuneTransform",
    "FolderPhotos",
    "LinprobeTransform",
    "PhotoSource",
    "Photos",
    "Picture",
    "Pixels",
    "PretrainTransform",
    "Source",
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
