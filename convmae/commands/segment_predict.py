"""`convmae segment predict`: label maps of pictures, and overlays to look at."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.commands.segmenting import class_names, load_segmenter, windows_of
from convmae.config import OptionError
from convmae.data import normalise
from convmae.data.apart import is_inside
from convmae.data.errors import DataError, printable
from convmae.data.folder import find_pictures
from convmae.data.label_maps.layout import READ
from convmae.data.label_maps.pairs import SECOND_CHANNELS, open_pairs
from convmae.data.segment_transforms import WholeTransform
from convmae.files import replacing, why_no_folder
from convmae.records.label_pictures import COLOURS, overlay, to_show
from convmae.tasks.accuracy import check_channels
from convmae.tasks.segment_evaluation import pixel_logits
from convmae.training.distributed import join

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from convmae.commands.inference import Loaded
    from convmae.config import ReadOptions, SegmentPredictConfig
    from convmae.data import PhotoSource
    from convmae.tasks.segment_evaluation import Windows
    from convmae.training.distributed import World

LABEL_MAPS, OVERLAYS, CLASSES = "label_maps", "overlays", "classes.txt"
NAMED_AT_MOST = 5


@dataclass
class PredictedMaps:
    """What `segment_predict` did.

    Attributes:
        output_dir: the folder.
        written: how many label maps.
        unreadable: the pictures that could not be read, and why, of this process.
        unreadable_count: how many there are in all processes.
        images_per_s: pictures in a second.
        max_unreadable: the share of unreadable pictures that was allowed.
    """

    output_dir: Path
    written: int
    unreadable: dict[str, str] = field(default_factory=dict)
    unreadable_count: int = 0
    images_per_s: float = 0.0
    max_unreadable: float = 1.0

    @property
    def failed(self) -> bool:
        """Whether more pictures were unreadable than allowed."""
        total = self.written + self.unreadable_count
        return self.unreadable_count > self.max_unreadable * total


def segment_predict(config: SegmentPredictConfig) -> PredictedMaps:
    """Writes the label map of each picture, and the picture with the classes drawn over it.

    `output_dir/label_maps/NAME.png` has the size of the picture and the number of the class in each
    pixel, with a palette to look at; `output_dir/overlays/NAME.png` shows both;
    `output_dir/classes.txt` has the names of the classes, from 0 on.

    Raises:
        OptionError (a ValueError): an option cannot work, the checkpoint is no segmenter, or the
            folder holds predictions already.
        convmae.data.DataError (a ValueError): no such pictures.
    """
    config.validate()
    output = Path(config.output_dir).expanduser()
    _check_output(config, output)
    with join(config.device, "auto") as world:
        loaded, learnt = load_segmenter(config, world.device)
        windows = windows_of(config, loaded.model, learnt)
        reading, notes = config.reading.over(loaded.weights.reading)
        source, names = _open(config, reading, learnt)
        check_channels(source, loaded.model, config.data_path)
        classes = class_names(loaded)
        if world.main:
            for note in (*notes, *map(str, source.left_out)):
                print(f"note: {note.removeprefix('note: ')}", file=sys.stderr)
            output.mkdir(parents=True, exist_ok=True)
            _write_text(output / CLASSES, classes)
        world.share(None)
        return _predict(config, loaded, windows, source, names, output, world)


def _predict(
    config: SegmentPredictConfig,
    loaded: Loaded,
    windows: Windows,
    source: PhotoSource,
    names: list[str],
    output: Path,
    world: World,
) -> PredictedMaps:
    """Predicts the pictures of this process and writes what they come to."""
    from tqdm import tqdm

    workers = source.workers if config.num_workers is None else config.num_workers
    batches: Any = source.evaluation_batches(
        WholeTransform(loaded.model.img_size),
        config.batch_size,
        rank=world.rank,
        world=world.size,
        workers=workers,
        pin=loaded.device.type == "cuda",
    )
    summary = PredictedMaps(output, 0, max_unreadable=config.max_unreadable)
    began = time.perf_counter()
    steps = source.evaluation_steps(config.batch_size, world.size)
    with closing(batches), torch.inference_mode():
        for batch in tqdm(batches, total=steps, unit="batches", disable=not world.main):
            summary.unreadable |= {failure.name: failure.reason for failure in batch.failures}
            images = normalise(batch.images.to(loaded.device), *loaded.statistics)
            with loaded.autocast():
                classes = pixel_logits(loaded.model, images, windows).argmax(1).byte().cpu()
            for place, index in enumerate(batch.keys[:, 1].tolist()):
                if index >= source.pictures or source.photos.name(index) in summary.unreadable:
                    continue
                image = batch.images[place] if config.overlays else None
                _write_maps(output, names[index], classes[place].numpy(), image)
                summary.written += 1
    seconds = time.perf_counter() - began
    counts = world.mean(float(summary.written), float(len(summary.unreadable)))
    summary.written, summary.unreadable_count = (round(n * world.size) for n in counts)
    summary.images_per_s = summary.written / seconds
    return summary


def _open(
    config: SegmentPredictConfig, reading: ReadOptions, learnt: dict[str, Any]
) -> tuple[PhotoSource, list[str]]:
    """The pictures, and the name of each below the folder that was opened, without extension.

    Raises:
        DataError: no pictures, two of one name, or one without its second picture.
    """
    given = Path(config.data_path).expanduser()
    root = given.parent if given.is_file() else given
    paths = [given] if given.is_file() else find_pictures(given, extensions=READ)
    names = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    first: dict[str, Path] = {}
    for name, path in zip(names, paths):
        if name in first:
            raise DataError(
                f"--data_path {config.data_path!r} has {first[name].name} and {path.name}, whose "
                "label maps would have the same name; rename one"
            )
        first[name] = path
    second: list[Path] = []
    if config.second_images is not None:
        second = _second_pictures(config.second_images, names)
    told = learnt.get("second_chans")
    channels = config.second_chans or (told if isinstance(told, int) else SECOND_CHANNELS)
    source = open_pairs(paths, second, str(root), reading, channels, max_unreadable=1.0)
    return source, names


def _second_pictures(folder: str, names: list[str]) -> list[Path]:
    """The second picture of each name.

    Raises:
        DataError: there is none.
    """
    root = Path(folder).expanduser()
    there: dict[str, Path] = {}
    for path in find_pictures(root, "--second_images", READ):
        there[path.relative_to(root).with_suffix("").as_posix()] = path
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"--second_images {folder!r} lacks {len(missing):,} of {len(names):,} pictures: "
            f"{', '.join(missing[:NAMED_AT_MOST])}; expected a file of that name for each"
        )
    return [there[name] for name in names]


# -- writing --------------------------------------------------------------------------------------


def _check_output(config: SegmentPredictConfig, output: Path) -> None:
    """Raises `OptionError` where the folder cannot be written, or would mix with what is there."""
    reason = why_no_folder(output)
    if reason is not None:
        raise OptionError(f"--output_dir {config.output_dir!r} cannot be written: {reason}")
    data = Path(config.data_path).expanduser()
    if data.is_dir() and is_inside(output, data):
        raise OptionError(
            f"--output_dir {config.output_dir!r} lies in --data_path {config.data_path!r}, where "
            "label maps would be read as pictures next time; give a folder outside"
        )
    if not config.overwrite and (output / LABEL_MAPS).is_dir():
        raise OptionError(
            f"--output_dir {config.output_dir!r} holds predictions already; give another folder, "
            "or --overwrite"
        )


def _write_maps(output: Path, name: str, classes: np.ndarray, image: torch.Tensor | None) -> None:
    """The label map of a picture and, where the picture is given, the overlay."""
    from PIL import Image

    indexed = Image.fromarray(classes)  # uint8
    indexed.putpalette(COLOURS.tobytes())
    _save(indexed, output / LABEL_MAPS / f"{name}.png")
    if image is not None:
        drawn = Image.fromarray(overlay(to_show(image), classes))
        _save(drawn, output / OVERLAYS / f"{name}.png")


def _save(picture: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        picture.save(new, format="png")


def _write_text(path: Path, lines: Sequence[str]) -> None:
    with replacing(path) as new:
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(config: SegmentPredictConfig) -> int:
    """The command: `segment_predict`, and what it did; returns the exit status."""
    summary = segment_predict(config)
    if int(os.environ.get("RANK", "0")) != 0:
        return 1 if summary.failed else 0
    for name, reason in list(summary.unreadable.items())[:NAMED_AT_MOST]:
        print(f"warning: unreadable: {printable(name)}: {reason}", file=sys.stderr)
    print(
        f"wrote {summary.written} label maps into {summary.output_dir}, "
        f"{summary.unreadable_count} pictures unreadable, {summary.images_per_s:.1f} images/s"
    )
    if summary.failed:
        print(
            f"convmae: error: {summary.unreadable_count} pictures are unreadable, more than "
            f"--max_unreadable {summary.max_unreadable:g} allows",
            file=sys.stderr,
        )
    return 1 if summary.failed else 0
