"""`convmae reconstruct`: what a checkpoint paints where it cannot see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.config import OptionError, ReconstructConfig, check_patches, for_option
from convmae.data import DataError, PhotoSource, find_pictures, open_source
from convmae.data.arrays import ARRAY_EXTENSION
from convmae.data.open import open_files
from convmae.data.pillow import EXTENSIONS
from convmae.models import ConvMAE
from convmae.records.pictures import reconstruction_picture, save_picture
from convmae.training.machine import pick_device
from convmae.weights.checkpoint import open_weights

if TYPE_CHECKING:
    from convmae.config import ReadOptions
    from convmae.data import Source


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
    with for_option("checkpoint"):
        weights = open_weights(config.checkpoint)
        model = weights.build_model(device)
        statistics = weights.statistics
    if not isinstance(model, ConvMAE):
        raise OptionError(
            f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}, which has no "
            "decoder; expected a ConvMAE from convmae pretrain"
        )
    check_patches(config.mask_ratio, *model.img_size)
    reading, notes = config.reading.over(weights.reading)
    for note in notes:
        print(note, file=sys.stderr)
    source = _open(config.images, reading)
    if source.channels != model.in_chans:
        raise OptionError(
            f"--images have {source.channels} channels, but the model of --checkpoint takes "
            f"{model.in_chans}"
        )
    images = source.preview(config.max_images, model.img_size)
    picture = reconstruction_picture(model, images, config.mask_ratio, config.seed, *statistics)
    output = Path(config.output).expanduser()
    save_picture(picture, output)
    return output


def _open(names: tuple[str, ...], reading: ReadOptions) -> Source:
    """One folder, set of shards or demo as `--data_path` takes it; or files and folders of them."""
    if len(names) == 1 and not Path(names[0]).expanduser().is_file():
        try:
            return open_source(names[0], max_unreadable=1.0, reading=reading)
        except DataError as error:
            raise DataError(error.with_flags.replace("--data_path", "--images")) from error
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            paths.append(path)
        elif path.is_dir():
            paths += find_pictures(path, "--images", EXTENSIONS | {ARRAY_EXTENSION})
        else:
            raise OptionError(f"--images {name!r} does not exist; expected a file or a folder")
    try:
        photos, failures, description, _ = open_files(paths, None, Path(), 1.0, reading)
    except DataError as error:
        raise DataError(error.with_flags.replace("--data_path", "--images")) from error
    return PhotoSource(photos, description=description, failures=failures, max_unreadable=1.0)


def main(config: ReconstructConfig) -> int:
    """The command: `reconstruct`, and what it says of itself; returns the exit status."""
    print(f"wrote {reconstruct(config)}")
    return 0
