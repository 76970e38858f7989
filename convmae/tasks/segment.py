"""`convmae segment train`: a class for every pixel."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError
from convmae.data import DataError, full_scale, normalise
from convmae.data.classes import listed
from convmae.data.label_maps import LabelMapPhotos, open_label_maps
from convmae.data.label_maps.classes import classes_of_maps, told_classes
from convmae.data.label_maps.pairs import survey_label_maps
from convmae.data.segment_transforms import SegmentEvalTransform, SegmentTransform
from convmae.models import create_model
from convmae.models.task_names import SEGMENT
from convmae.records.folder import RunFolder
from convmae.records.label_pictures import ComparedPicture, comparison_sheet
from convmae.records.scores import main_score
from convmae.records.unreadable import UnreadableTally
from convmae.tasks.accuracy import check_channels
from convmae.tasks.dense_task import DenseTask
from convmae.tasks.segment_evaluation import Windows, details, evaluate_segments, pixel_logits
from convmae.training.distributed import held_whole
from convmae.training.optim import Groups, layered_groups
from convmae.training.run import RunSummary, run_task
from convmae.weights.checkpoint import WEIGHTS

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.config import ReadOptions, SegmentTrainConfig
    from convmae.data import Batch, Failure, PhotoSource, Source, Statistics
    from convmae.records.log import RunLog
    from convmae.training.distributed import World
    from convmae.training.state import Run
    from convmae.weights.checkpoint import Weights


def segment_train(config: SegmentTrainConfig) -> RunSummary:
    """Trains a segmenter on pictures with label maps, from given or from random weights.

    `config.output_dir` then holds what `pretrain` leaves, `best/model.safetensors`, the weights
    with the highest mIoU on the val split (or IoU of small targets), and `evaluation/`, the last
    evaluation class by class.

    Raises:
        OptionError (a ValueError): an option cannot work. Nothing was trained or overwritten.
        convmae.data.DataError (a ValueError): no pictures, too many of them unreadable, or label
            maps that do not fit them or the classes.
        TrainingError: as `pretrain`.
    """
    return run_task(config, Segmentation())


def main(config: SegmentTrainConfig) -> int:
    """The command: `segment_train`, and what to see of it; returns the exit status."""
    summary = segment_train(config)
    folder = RunFolder.of(summary.output_dir)
    return summary.report(folder.best / WEIGHTS, folder.report)


class Segmentation(DenseTask):
    """A segmenter learns label maps, its early layers more slowly."""

    command = "segment train"

    def __init__(self) -> None:
        super().__init__()
        self.used_statistics: Statistics | None = None  # known when the run begins

    # -- data -------------------------------------------------------------------------------------

    def open_data(self, config: Any, reading: ReadOptions, world: World) -> Source:
        limits = {"max_unreadable": config.max_unreadable, "seed": config.seed}
        train = open_label_maps(
            *(config.data_path, "train", config, reading), max_samples=config.max_samples, **limits
        )
        val = open_label_maps(config.data_path, "val", config, reading, **limits)
        found, problem = None, ""
        if world.main:
            try:
                found = _check(config, train, val)
            except DataError as error:
                problem = error.with_flags
        found, problem = world.share((found, problem))
        if found is None:
            raise DataError(problem)
        self.classes, self.notes, *failures = found
        for source, broken in zip((train, val), failures, strict=True):
            source.failures += broken
            _photos(source).count = len(self.classes)
        self.train, self.val = train, val
        return train

    def transform(self, config: SegmentTrainConfig) -> Any:
        fill = None
        if self.used_statistics is not None:
            scale = full_scale(self.train.dtype)
            fill = [scale * mean for mean in self.used_statistics.mean]
        return SegmentTransform(
            config.size,
            config.short,
            config.scale,
            config.hflip,
            config.distort,
            config.most_of_one_class,
            fill,
        )

    # -- building ---------------------------------------------------------------------------------

    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        assert self.classes is not None
        initial = self.take_initial(config)
        name = SEGMENT + self.backbone_name(config, initial).removeprefix(SEGMENT)
        model = self._create(name, config, source.channels)
        check_channels(self.val, model, config.data_path)
        self.val_tally = UnreadableTally(self.val, config.max_unreadable)
        notes = [f"{self.val.description} (val)", *self.notes]
        notes += [f"note: {left_out} (val)" for left_out in self.val.left_out]
        if config.distort and (source.channels, source.dtype) != (3, torch.uint8):
            notes.append("note: --distort has no effect: it is for 8-bit pictures of 3 channels")
        notes += self.start_backbone(model, config, initial, source.channels)
        return model, name, notes

    def _create(self, name: str, config: SegmentTrainConfig, channels: int) -> Any:
        assert self.classes is not None
        options: dict[str, Any] = {
            "num_classes": len(self.classes),
            "img_size": config.size,
            "in_chans": channels,
            "drop_path_rate": config.drop_path,
        }
        of_heads = ("head", "head_width", "aux_width", "dropout")
        for option in (*of_heads, "loss", "class_weights", "mean_over"):
            options[option] = getattr(config, option)
        try:
            return create_model(name, **options)
        except (ValueError, TypeError) as error:
            option = str(error).partition(" ")[0]
            known = option in options and hasattr(config, option)
            flag = "" if known else f"model {name.removeprefix(SEGMENT)!r}: "
            raise OptionError(f"--{flag}{error}") from error

    def groups(self, model: nn.Module, config: SegmentTrainConfig) -> Groups:
        return layered_groups(model, config.weight_decay, config.layer_decay)

    # -- training ---------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        self.used_statistics = run.statistics

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        labels = batch.targets.to(images.device, non_blocking=True)
        losses = run.step_model(images, labels)
        return torch.stack(list(losses.values())).sum()

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(self, run: Run, log: RunLog) -> None:
        assert self.classes is not None
        config, began = run.config, time.perf_counter()
        batches = self.val.evaluation_batches(
            SegmentEvalTransform(config.size),
            config.eval_batch_size,
            rank=run.world.rank,
            world=run.world.size,
            workers=run.workers,
            pin=config.pin_mem and run.world.device.type == "cuda",
        )
        failures: list[Failure] = []
        with held_whole(run.model, run.world):  # pictures have different numbers of windows
            found = evaluate_segments(
                run.model,
                run.world.together(batches),
                len(self.classes),
                Windows(config.short, config.size),
                run.statistics,
                run.world,
                run.autocast(),
                self.val,
                config.metrics == "small-targets",
                failures,
            )
        self.val_tally.add(failures, log, run.step)
        scores = found.scores | {"seconds": round(time.perf_counter() - began, 2)}
        log.evaluation(run.step, run.epoch, scores)
        main = "iou" if config.metrics == "small-targets" else main_score(scores)
        figure = None if main is None else scores[main]
        self.record(run, log, details(found, self.classes, run.step), figure)

    @torch.no_grad()
    def draw(self, run: Run) -> PILImage.Image | None:
        assert self.classes is not None
        photos, transform = _photos(self.val), SegmentEvalTransform(run.config.size)
        was_training = run.model.training
        run.model.eval()
        rows = []
        for index, (image, truth) in self.drawn_pictures(transform):
            inputs = normalise(image[None].to(run.world.device), *run.statistics)
            with run.autocast():
                logits = pixel_logits(run.model, inputs, Windows(run.config.short, run.config.size))
            name = photos.name(index).removeprefix(self.val.root)
            rows.append(ComparedPicture(image, truth, logits.argmax(1)[0].cpu(), name))
        run.model.train(was_training)
        return comparison_sheet(rows, self.classes) if rows else None

    # -- checkpoints ------------------------------------------------------------------------------

    def resume_classes(self, config: SegmentTrainConfig, weights: Weights) -> list[str]:
        assert self.classes is not None
        check_classes(weights.classes, self.classes, f"--resume {weights.path}", "the label maps")
        return []


def check_classes(
    known: tuple[str, ...] | None, classes: tuple[str, ...], model: str, data: str
) -> None:
    """Raises `OptionError` where the classes of label maps are not those of a checkpoint.

    Args:
        known: of the checkpoint; None where it does not tell.
        classes: of the label maps.
        model, data: what to call them in messages.
    """
    if known is None or tuple(known) == tuple(classes):
        return
    raise OptionError(
        f"{data} have {len(classes)} classes: {listed(classes)}; but {model} has {len(known)}: "
        f"{listed(known)}; expected the same names in the same order (--class_names, --palette or "
        "--nb_classes)"
    )


def _photos(source: PhotoSource) -> LabelMapPhotos:
    photos = source.photos
    assert isinstance(photos, LabelMapPhotos)
    return photos


def _check(config: SegmentTrainConfig, train: PhotoSource, val: PhotoSource) -> Any:
    """The classes, what to tell about them, and what of train and val cannot be read."""
    reading, data = _photos(train).reading, f"--data_path {config.data_path!r}"
    told = told_classes(config, reading)
    surveys = {
        "train": survey_label_maps(train, f"{data} (train)"),
        "val": survey_label_maps(val, f"{data} (val)"),
    }
    classes, notes = classes_of_maps(told, surveys, data, reading)
    notes.insert(0, f"{len(classes)} classes: {listed(classes)}")
    both = {str(path) for path in _photos(train).labels} & {str(p) for p in _photos(val).labels}
    if both:
        notes.append(f"note: {len(both):,} pictures are in both train and val, {min(both)} first")
    return classes, notes, surveys["train"].failures, surveys["val"].failures
