"""`convmae detect train`: boxes, names and masks of the objects in pictures."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError
from convmae.data import DataError, normalise
from convmae.data.classes import ClassNames, listed, match_classes
from convmae.data.objects.open import open_objects
from convmae.data.objects.transforms import FitTransform, JitterTransform
from convmae.models import create_model
from convmae.models.task_names import DETECT
from convmae.records.folder import RunFolder
from convmae.records.object_pictures import object_sheet
from convmae.records.unreadable import UnreadableTally
from convmae.tasks.accuracy import check_channels
from convmae.tasks.dense_task import DenseTask
from convmae.tasks.detection_evaluation import compared, details, evaluate_detections
from convmae.tasks.detection_steps import canvas, detections, learned, padding_of, sizes_seen
from convmae.training.optim import Groups, layered_groups
from convmae.training.run import RunSummary, run_task
from convmae.weights.checkpoint import WEIGHTS

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.config import DetectTrainConfig, ReadOptions
    from convmae.data import Batch, Failure, Source
    from convmae.data.objects.open import ObjectSource
    from convmae.records.log import RunLog
    from convmae.training.distributed import World
    from convmae.training.state import Run
    from convmae.weights.checkpoint import Weights

# Arguments of a model whose option has another name.
FLAGS = {"img_size": "input_size", "drop_path_rate": "drop_path", "kind": "pyramid"}


def detect_train(config: DetectTrainConfig) -> RunSummary:
    """Trains a detector on pictures with objects, from given or from random weights.

    `config.output_dir` then holds what `pretrain` leaves, `best/model.safetensors`, the weights
    with the highest average precision of boxes on the val split, and `evaluation/`, the last
    evaluation class by class.

    Raises:
        OptionError (a ValueError): an option cannot work. Nothing was trained or overwritten.
        convmae.data.DataError (a ValueError): no pictures, too many of them missing or unreadable,
            or annotations that cannot be used.
        TrainingError: as `pretrain`.
    """
    return run_task(config, Detection())


def main(config: DetectTrainConfig) -> int:
    """The command: `detect_train`, and what to see of it; returns the exit status."""
    summary = detect_train(config)
    folder = RunFolder.of(summary.output_dir)
    return summary.report(folder.best / WEIGHTS, folder.report)


class Detection(DenseTask):
    """A detector learns objects on pictures that are resized at random."""

    command = "detect train"
    val: ObjectSource

    # -- data -------------------------------------------------------------------------------------

    def open_data(self, config: Any, reading: ReadOptions, world: World) -> Source:
        limits = {"max_unreadable": config.max_unreadable, "masks": config.masks}
        self.train = open_objects(
            config.data_path,
            "train",
            config.object_options("train"),
            reading,
            max_samples=config.max_samples,
            seed=config.seed,
            keep_empty=config.keep_empty,
            **limits,
        )
        self.val = open_objects(
            config.data_path, "val", config.object_options("val"), reading, **limits
        )
        self.classes = ClassNames(self.train.annotations.classes)
        self.notes = [
            f"{len(self.classes)} classes: {listed(self.classes)}",
            f"{self.val.description} (val)",
            *(f"note: {note} (train)" for note in self.train.notes),
            *(f"note: {note} (val)" for note in self.val.notes),
            *match_objects(
                self.val, self.classes, f"--data_path {config.data_path!r} (val)", "its train split"
            ),
        ]
        both = {p.name for p in self.train.annotations.pictures}
        both &= {p.name for p in self.val.annotations.pictures}
        if both and self.train.root == self.val.root:
            self.notes.append(
                f"note: {len(both):,} pictures are in both train and val, {min(both)} first"
            )
        return self.train

    def transform(self, config: DetectTrainConfig) -> Any:
        return JitterTransform(
            config.size,
            config.scale_min,
            config.scale_max,
            config.hflip,
            flip_first=padding_of(config.kind) == "mean",
            masks=config.masks,
        )

    # -- building ---------------------------------------------------------------------------------

    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        initial = self.take_initial(config)
        name = DETECT + self.backbone_name(config, initial).removeprefix(DETECT)
        model = self._create(name, config, source.channels)
        check_channels(self.val, model, config.data_path)
        if self.val.dtype != source.dtype:
            raise DataError(
                f"--data_path {config.data_path!r}: the pictures of train are of {source.dtype}, "
                f"those of val of {self.val.dtype}; expected one type of values"
            )
        self.val_tally = UnreadableTally(self.val, config.max_unreadable)
        started = self.start_backbone(model, config, initial, source.channels)
        return model, name, [*self.notes, *started]

    def _create(self, name: str, config: DetectTrainConfig, channels: int) -> Any:
        assert self.classes is not None
        options: dict[str, Any] = {
            "num_classes": len(self.classes),
            "kind": config.kind,
            "img_size": config.size,
            "in_chans": channels,
            "drop_path_rate": config.drop_path,
            "masks": config.masks,
        }
        if config.window_size is not None:
            options["window_size"] = config.window_size
        try:
            return create_model(name, **options, **config.heads())
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            message = str(error)
            argument = message.partition(" ")[0].rstrip(":")
            option = FLAGS.get(argument, argument)
            if hasattr(config, option):
                raise OptionError(f"--{option}: {message}") from error
            raise OptionError(f"--model {config.model!r}: {message}") from error

    def groups(self, model: nn.Module, config: DetectTrainConfig) -> Groups:
        return layered_groups(model, config.weight_decay, config.layer_decay, decay_all=True)

    # -- training ---------------------------------------------------------------------------------

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        padding, targets = padding_of(run.config.kind), batch.targets
        images = canvas(images, targets, run.statistics, padding)
        sizes = sizes_seen(images, targets, padding)
        losses = run.step_model(images, learned(targets, images.device), sizes)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(self, run: Run, log: RunLog) -> None:
        config, began = run.config, time.perf_counter()
        batches = self.val.evaluation_batches(
            FitTransform(config.size),
            config.eval_batch_size or config.batch_size,
            rank=run.world.rank,
            world=run.world.size,
            workers=run.workers,
            pin=config.pin_mem and run.world.device.type == "cuda",
        )
        failures: list[Failure] = []
        found = evaluate_detections(
            run.model,
            run.world.together(batches),
            self.val,
            config.masks,
            run.statistics,
            padding_of(config.kind),
            run.world,
            run.autocast(),
            failures,
        )
        self.val_tally.add(failures, log, run.step)
        scores = found.scores | {"seconds": round(time.perf_counter() - began, 2)}
        log.evaluation(run.step, run.epoch, scores)
        shown = details(found, self.val.annotations.classes, run.step)
        self.record(run, log, shown, scores.get("box_ap", 0.0))

    def draw(self, run: Run) -> PILImage.Image | None:
        transform, padding = FitTransform(run.config.size), padding_of(run.config.kind)
        was_training = run.model.training
        run.model.eval()
        rows = []
        for index, (image, target) in self.drawn_pictures(transform):
            images = normalise(image[None].to(run.world.device), *run.statistics)
            images = canvas(images, [target], run.statistics, padding)
            (found,) = detections(run.model, images, [target], padding, run.autocast())
            assert found is not None
            rows.append(compared(self.val, index, found, run.config.masks))
        run.model.train(was_training)
        return object_sheet(rows, self.val.annotations.classes) if rows else None

    # -- checkpoints ------------------------------------------------------------------------------

    def resume_classes(self, config: DetectTrainConfig, weights: Weights) -> list[str]:
        """Goes on with the classes of a checkpoint, in its order; what to tell about it.

        Raises:
            OptionError: those of the data are others.
        """
        where, before = f"--resume {weights.path}", self.classes
        if weights.classes is None:
            return [f"note: {where} does not tell the names of its classes: they are not compared"]
        data, self.classes = f"--data_path {config.data_path!r}", weights.classes
        for source, split in ((self.train, "train"), (self.val, "val")):
            match_objects(source, self.classes, f"{data} ({split})", where, all_of_them=True)
        if self.classes != before:
            return [f"note: classes have the order that they have in {weights.path}"]
        return []


def match_objects(
    source: ObjectSource, classes: ClassNames, data: str, model: str, all_of_them: bool = False
) -> list[str]:
    """Gives the objects of a source the labels of a model, by the names of their classes.

    Args:
        source: its annotations are changed.
        classes: of the model.
        data, model: what to call them in messages.
        all_of_them: whether no class of the model may lack in the data.

    Returns:
        What to tell about it.

    Raises:
        OptionError: the source has a class that the model does not know.
    """
    found = source.annotations.classes
    match = match_classes(found, None, classes, len(classes), data, model, all_of_them=all_of_them)
    assert match.numbers is not None
    source.annotations.renumber(match.numbers, classes)
    return [f"note: {note}" for note in match.notes]
