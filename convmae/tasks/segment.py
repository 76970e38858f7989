"""`convmae segment train`: a class for every pixel."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, for_option
from convmae.data import DataError, full_scale, normalise
from convmae.data.classes import listed
from convmae.data.label_maps import LabelMapPhotos, open_label_maps
from convmae.data.label_maps.classes import classes_of_maps, told_classes
from convmae.data.label_maps.pairs import survey_label_maps
from convmae.data.picture import ChosenPicture
from convmae.data.segment_transforms import SegmentEvalTransform, SegmentTransform
from convmae.data.source import evenly_spaced
from convmae.models import create_model
from convmae.models.task_names import SEGMENT
from convmae.records.folder import RunFolder
from convmae.records.label_pictures import ComparedPicture, comparison_sheet
from convmae.records.scores import main_score
from convmae.records.unreadable import UnreadableTally
from convmae.tasks.accuracy import check_channels
from convmae.tasks.segment_evaluation import Windows, details, evaluate_segments, pixel_logits
from convmae.training.distributed import whole_model
from convmae.training.optim import Groups, adamw, layered_groups
from convmae.training.run import RunSummary, run_task
from convmae.training.saving import save_best
from convmae.training.task import Task
from convmae.weights.checkpoint import WEIGHTS
from convmae.weights.dense_names import backbone_of, load_trunk
from convmae.weights.foreign import open_foreign

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.config import ReadOptions, SegmentTrainConfig
    from convmae.data import Batch, Failure, PhotoSource, Source, Statistics
    from convmae.records.log import RunLog
    from convmae.training.distributed import World
    from convmae.training.state import Run
    from convmae.weights.checkpoint import Weights
    from convmae.weights.foreign import ForeignWeights

BETAS = (0.9, 0.999)
PREVIEWS = 6  # pictures of the val split that are drawn with each checkpoint


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


class Segmentation(Task):
    """A segmenter learns label maps, its early layers more slowly."""

    command = "segment train"
    drawn = "prediction"

    def __init__(self) -> None:
        self.best: float | None = None
        self.initial: ForeignWeights | None = None
        self.initial_statistics: Statistics | None = None
        self.used_statistics: Statistics | None = None  # known when the run begins
        self.notes: list[str] = []

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
        initial = self._initial(config)
        known = config.model
        if known is None and initial is not None:
            with for_option("init"):
                known = backbone_of(initial)
        name = SEGMENT + (known or "convvit_base")
        model = self._create(name, config, source.channels)
        check_channels(self.val, model, config.data_path)
        self.val_tally = UnreadableTally(self.val, config.max_unreadable)
        notes = [f"{self.val.description} (val)", *self.notes]
        notes += [f"note: {left_out} (val)" for left_out in self.val.left_out]
        if config.distort and (source.channels, source.dtype) != (3, torch.uint8):
            notes.append("note: --distort has no effect: it is for 8-bit pictures of 3 channels")
        if initial is None:
            return model, name, [*notes, "starting from random weights (no --init)"]
        with for_option("init"):
            report = load_trunk(model.backbone, initial, config.adapt_input)
        learnt = report.statistics
        if learnt is not None and len(learnt.mean) == source.channels:
            self.initial_statistics = learnt
        return model, name, [*notes, *report.lines()]

    def learnt_reading(self, config: SegmentTrainConfig) -> ReadOptions | None:
        self.initial = self._initial(config)
        ours = None if self.initial is None else self.initial.ours
        return None if ours is None else ours.reading

    def _initial(self, config: SegmentTrainConfig) -> ForeignWeights | None:
        """The weights to start from, opened once; `build` lets go of them."""
        initial, self.initial = self.initial, None
        if initial is None and config.init is not None:
            with for_option("init"):
                initial = open_foreign(config.init)
        return initial

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

    def statistics(self, config: SegmentTrainConfig) -> Statistics | None:
        return self.initial_statistics

    def groups(self, model: nn.Module, config: SegmentTrainConfig) -> Groups:
        return layered_groups(model, config.weight_decay, config.layer_decay)

    def optimizer(self, groups: Groups, config: SegmentTrainConfig) -> torch.optim.Optimizer:
        return adamw(groups, BETAS)

    # -- training ---------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        self.used_statistics = run.statistics

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        labels = batch.targets.to(images.device, non_blocking=True)
        losses = run.step_model(images, labels)
        return torch.stack(list(losses.values())).sum()

    # -- evaluation -------------------------------------------------------------------------------

    def evaluation_due(self, run: Run) -> bool:
        return run.due(run.config.eval_every)

    def folder_lost(self, run: Run) -> None:
        self.best = None  # the next evaluation writes the best weights again

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
        if run.world.main:
            try:
                details(found, self.classes, run.step).write(run.folder.evaluation)
            except OSError as error:
                log.say(f"warning: the details of this evaluation were not written: {error}")
        main = "iou" if config.metrics == "small-targets" else main_score(scores)
        if main is not None and (self.best is None or scores[main] > self.best):
            self.best = scores[main]
            save_best(run, whole_model(run.model), self.classes)

    @torch.no_grad()
    def draw(self, run: Run) -> PILImage.Image | None:
        assert self.classes is not None
        photos, transform = _photos(self.val), SegmentEvalTransform(run.config.size)
        was_training = run.model.training
        run.model.eval()
        rows = []
        broken = {failure.name for failure in self.val.failures}
        readable = [i for i in range(len(photos)) if photos.name(i) not in broken]
        for place in evenly_spaced(len(readable), PREVIEWS):
            index = readable[place]
            image, truth = transform(ChosenPicture(photos, index))
            inputs = normalise(image[None].to(run.world.device), *run.statistics)
            with run.autocast():
                logits = pixel_logits(run.model, inputs, Windows(run.config.short, run.config.size))
            name = photos.name(index).removeprefix(self.val.root)
            rows.append(ComparedPicture(image, truth, logits.argmax(1)[0].cpu(), name))
        run.model.train(was_training)
        return comparison_sheet(rows, self.classes) if rows else None

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self, run: Run) -> dict[str, Any]:
        return {"best": self.best}

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.best = state["best"]

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
