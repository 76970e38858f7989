"""Pictures in, uint8 crops out: the demo photographs, folders of pictures, and their loader."""

from convmae.data.crops import CropDataset, denormalise, derive_seed, normalise
from convmae.data.demo import DemoPhotos
from convmae.data.folder import FolderPhotos, check_readable, find_pictures
from convmae.data.loader import Batch, make_loader
from convmae.data.picture import DataError, read_picture

__all__ = [
    "Batch",
    "CropDataset",
    "DataError",
    "DemoPhotos",
    "FolderPhotos",
    "check_readable",
    "denormalise",
    "derive_seed",
    "find_pictures",
    "make_loader",
    "normalise",
    "read_picture",
]
