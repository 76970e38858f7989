"""`convmae detect predict`: objects in pictures, as COCO's JSON and drawn on them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.commands.detection import load_detector
from convmae.config import OptionError
from convmae.data import normalise, open_source
from convmae.data.apart import check_apart
from convmae.data.classes import listed
from convmae.data.errors import DataError, UnreadableError, printable
from convmae.data.objects.coco import read_ids
from convmae.data.objects.open import open_pairs
from convmae.data.objects.transforms import FitTransform
from convmae.files import replacing
from convmae.records.object_pictures import picture_with
from convmae.tasks.accuracy import check_channels
from convmae.tasks.detection_evaluation import found_objects
from convmae.tasks.detection_steps import canvas, detections
from convmae.tasks.measures.average_precision import result_entries
from convmae.training.distributed import join

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.commands.detection import LoadedDetector
    from convmae.config import DetectPredictConfig, ReadOptions
    from convmae.data import Source
    from convmae.training.distributed import World

UNSAFE = re.compile(r"[^\w.-]+")


@dataclass
class DetectSummary:
    """What `detect_predict` did.

    Attributes:
        output: the JSON file of results.
        pictures: the folder of drawn pictures, if they were asked for.
        images, objects: how many were looked at, and found.
        unreadable: pictures that could not be read, and why.
        seconds: what it took.
        max_unreadable: the share of unreadable pictures that was allowed.
        notes: what is to be told.
    """

    output: Path
    pictures: Path | None
    images: int
    objects: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    max_unreadable: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether more pictures were unreadable than allowed."""
        return len(self.unreadable) > self.max_unreadable * self.images

    def __str__(self) -> str:
        drawn = "" if self.pictures is None else f", drawn in {self.pictures}"
        return (
            f"wrote {self.output}: {self.objects:,} objects in {self.images:,} pictures, "
            f"{len(self.unreadable)} of them unreadable{drawn}, "
            f"{self.images / max(self.seconds, 1e-9):.1f} images/s"
        )


def detect_predict(config: DetectPredictConfig) -> DetectSummary:
    """Finds objects in pictures; writes COCO's results, and draws them if asked to.

    The JSON file is a list of results as COCO has them: `image_id`, `category_id`, `bbox` (left,
    top, width, height in pixels of the picture), `score`, and of a detector with masks
    `segmentation` (a run-length code); besides `file_name` and `category`, the names.

    Returns:
        Counts and speed.

    Raises:
        OptionError (a ValueError): an option cannot work, or the checkpoint is no detector.
        convmae.data.DataError (a ValueError): no such pictures.
    """
    config.validate()
    output = Path(str(config.output)).expanduser()
    folder = None if config.pictures is None else Path(config.pictures).expanduser()
    _check_new(config, output, folder)
    with join(config.device, "auto") as world:
        loaded = load_detector(config, world.device)
        reading, notes = config.reading.over(loaded.weights.reading)
        source = _open(config, reading)
        check_channels(source, loaded.model, " ".join(config.paths))
        names = _names(source)
        numbers, categories, more = _ids(config, names, loaded)
        began = time.perf_counter()
        if folder is not None and world.main:
            folder.mkdir(parents=True, exist_ok=True)
        world.share(None)
        entries, failures = _run(config, loaded, source, names, numbers, categories, folder, world)
        if world.main:
            output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(output) as new:
                new.write_text(json.dumps(entries) + "\n", encoding="utf-8")
        return DetectSummary(
            output,
            folder,
            len(names),
            len(entries),
            failures,
            time.perf_counter() - began,
            config.max_unreadable,
            [*notes, *source.notes, *map(str, source.left_out), *more],
        )


def _check_new(config: DetectPredictConfig, output: Path, folder: Path | None) -> None:
    """Raises `OptionError` where something would be written over or into what is read."""
    if output.exists() and not config.overwrite:
        raise OptionError(f"--output {config.output!r} exists; give another, or --overwrite")
    if folder is None:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not config.overwrite:
        raise OptionError(
            f"--pictures {config.pictures!r} exists and is not an empty folder; give another, or "
            "--overwrite"
        )
    for path in config.paths:
        try:
            check_apart(folder, path)
        except OptionError as error:
            message = error.with_flags.replace("--output_dir", "--pictures")
            raise OptionError(message) from error


def _open(config: DetectPredictConfig, reading: ReadOptions) -> Source:
    if config.second_images is not None or config.image_folder is not None:
        return open_pairs(
            config.paths[0],
            config.image_folder,
            config.second_images,
            1 if config.second_chans is None else config.second_chans,
            reading,
            config.max_unreadable,
        )
    paths = config.paths
    return open_source(
        paths if len(paths) > 1 else paths[0],
        split=config.split,
        max_unreadable=config.max_unreadable,
        labelled=False,
        reading=reading,
    )


def _names(source: Source) -> list[str]:
    """What the pictures are called, below their folder.

    Raises:
        DataError: they are in shards.
    """
    photos: Any = getattr(source, "photos", None)
    if photos is None:
        raise DataError("--data_path has shards, which convmae detect does not read; unpack them")
    root = getattr(source, "root", "")
    return [photos.name(index).removeprefix(root) for index in range(len(photos))]


def _ids(
    config: DetectPredictConfig, names: list[str], loaded: LoadedDetector
) -> tuple[list[int], list[int], list[str]]:
    """COCO's id of each picture and of each class, and what to tell about it.

    Raises:
        DataError: `--coco_ids` does not know one of them.
    """
    if config.coco_ids is None:
        return list(range(1, len(names) + 1)), list(range(1, len(loaded.classes) + 1)), []
    images, categories = read_ids(Path(config.coco_ids).expanduser())
    unknown = [name for name in names if name not in images]
    lacking = [name for name in loaded.classes if name not in categories]
    if unknown or lacking:
        what = "images" if unknown else "categories"
        raise DataError(
            f"--coco_ids {config.coco_ids!r} has no {what} of {len(unknown or lacking):,} names: "
            f"{listed(unknown or lacking, 5)}"
        )
    return [images[n] for n in names], [categories[n] for n in loaded.classes], []


def _run(
    config: DetectPredictConfig,
    loaded: LoadedDetector,
    source: Any,
    names: list[str],
    numbers: list[int],
    categories: list[int],
    folder: Path | None,
    world: World,
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The results of all processes, in the order of the pictures, and what could not be read."""
    batches = source.evaluation_batches(
        FitTransform(loaded.size),
        config.batch_size,
        rank=world.rank,
        world=world.size,
        workers=source.workers if config.num_workers is None else config.num_workers,
        pin=loaded.device.type == "cuda",
    )
    by_id = dict(zip(categories, loaded.classes))
    found: list[tuple[int, list[dict[str, Any]]]] = []
    failures: list[tuple[str, str]] = []
    for batch in world.together(batches):
        failures += [(printable(name), reason) for name, reason in batch.failures]
        images = normalise(batch.images.to(loaded.device), *loaded.statistics)
        images = canvas(images, batch.targets, loaded.statistics, loaded.padding)
        results = detections(loaded.model, images, batch.targets, loaded.padding, loaded.autocast())
        for (_, place), each in zip(batch.keys.tolist(), results):
            if each is None:
                continue
            entries = result_entries(numbers[place], each, categories)
            for entry in entries:
                entry |= {"file_name": names[place], "category": by_id[entry["category_id"]]}
            found.append((place, entries))
            if folder is not None:
                _draw(config, loaded, source.photos, place, names[place], each, folder)
    every = sorted((part for parts in world.gather(found) for part in parts), key=lambda p: p[0])
    broken = sorted({part for parts in world.gather(failures) for part in parts})
    return [entry for _, entries in every for entry in entries], broken


def _draw(
    config: DetectPredictConfig,
    loaded: LoadedDetector,
    photos: Any,
    place: int,
    name: str,
    found: dict[str, Tensor],
    folder: Path,
) -> None:
    """Writes a picture with what was found in it, as PNG; its name tells its folders too."""
    from PIL import Image

    try:
        image = photos.load(place)
    except UnreadableError:  # it was read a moment ago
        return
    drawn = picture_with(image, found_objects(found, config.draw_score), loaded.classes)
    file = UNSAFE.sub("_", Path(name).with_suffix("").as_posix()).strip("_") or "picture"
    Image.fromarray(drawn).save(folder / f"{place:06}_{file[-100:]}.png")


def main(config: DetectPredictConfig) -> int:
    """The command: `detect_predict`, and what it says of itself; returns the exit status."""
    summary = detect_predict(config)
    if int(os.environ.get("RANK", "0")) == 0:
        for note in summary.notes:
            print(f"note: {note.removeprefix('note: ')}", file=sys.stderr)
        for name, reason in summary.unreadable[:5]:
            print(f"warning: unreadable: {name}: {reason}", file=sys.stderr)
        print(summary)
        if summary.failed:
            print(
                f"convmae: error: {len(summary.unreadable)} of {summary.images} pictures are "
                f"unreadable, more than --max_unreadable {summary.max_unreadable:g} allows",
                file=sys.stderr,
            )
    return 1 if summary.failed else 0
