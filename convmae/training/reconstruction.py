"""`convmae reconstruct`: what a checkpoint paints where it cannot see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import convmae
from convmae.data import DemoPhotos, FolderPhotos, find_pictures
from convmae.training.checkpoint import load_model
from convmae.training.config import OptionError, ReconstructConfig, check_patches
from convmae.training.machine import pick_device
from convmae.training.pictures import reconstruction_picture, save_picture
from convmae.training.sources import Source, preview

if TYPE_CHECKING:
    from convmae.data.crops import Photos


def reconstruct(config: ReconstructConfig) -> Path:
    """Draws a labelled grid, one row a picture; returns the path of what was written.

    Every picture is cut to a centred crop of the size that the model was trained at. An unreadable
    picture is replaced by the next.

    Raises:
        OptionError (a ValueError): an option cannot work, no such checkpoint or picture.
        convmae.data.DataError (a ValueError): a folder without pictures, or none is readable.
    """
    config.validate()
    device = pick_device(config.device)
    model = load_model(config.checkpoint, device)
    if not isinstance(model, convmae.ConvMAE):
        raise OptionError(
            f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}, which has no "
            "decoder; expected a ConvMAE from convmae pretrain"
        )
    check_patches(config.mask_ratio, *model.img_size)
    photos = _open(config.images)
    source = Source(photos, len(photos), "", workers=0)
    images = preview(source, config.max_images, model.img_size)
    picture = reconstruction_picture(model, images, config.mask_ratio, config.seed)
    output = Path(config.output).expanduser()
    save_picture(picture, output)
    return output


def _open(names: tuple[str, ...]) -> Photos:
    if names == ("demo",):
        return DemoPhotos()
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            paths.append(path)
        elif path.is_dir():
            paths += find_pictures(path, "--images")
        else:
            raise OptionError(f"--images {name!r} does not exist; expected a file or a folder")
    return FolderPhotos(paths)
