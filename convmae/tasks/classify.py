"""`convmae finetune` and `convmae linprobe`: what a step of classification computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, for_option, suggest
from convmae.data import (
    DataError,
    EvalTransform,
    open_source,
)
from convmae.models import ConvViT, create_model, full_name, list_models
from convmae.tasks.accuracy import accuracy, better, check_channels, check_labels
from convmae.training.distributed import whole_model
from convmae.training.state import Run, TrainingError
from convmae.training.task import Task
from convmae.weights.checkpoint import save_weights
from convmae.weights.foreign import open_foreign
from convmae.weights.pretrained import classifier_for, load_pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convmae.config import ReadOptions
    from convmae.config.classify import ClassifyConfig
    from convmae.data import Batch, Source, Statistics
    from convmae.records.log import RunLog
    from convmae.weights.foreign import ForeignWeights


class Classification(Task):
    """What finetuning and probing share: the classifier, its evaluation and its best weights."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.nb_classes = 0
        self.initial_statistics: Statistics | None = None
        self.initial: ForeignWeights | None = None
        self.val: Source | None = None
        self.ema: Any = None
        self.saved_ema: dict[str, Tensor] | None = None
        self.criterion: nn.Module = torch.nn.CrossEntropyLoss()

    # -- building ---------------------------------------------------------------------------------

    def build(self, config: ClassifyConfig, source: Source) -> tuple[nn.Module, str, list[str]]:
        data = f"--data_path {config.data_path!r}"
        self.nb_classes = config.nb_classes or len(source.classes or ())
        check_labels(source, self.nb_classes or 1, data)
        self.val = open_source(
            config.data_path,
            split="val",
            max_unreadable=config.max_unreadable,
            seed=config.seed,
            reading=self.reading,
        )
        check_labels(self.val, self.nb_classes, f"the val split of {data}")
        initial = self._initial(config)
        with for_option("finetune"):
            fitting = None if initial is None else classifier_for(initial)
        name = config.model or fitting or "convvit_base"
        model = self._create(name, config, source.channels)
        check_channels(self.val, model, config.data_path)
        notes = [f"{self.nb_classes} classes; {self.val.description} (val)"]
        if initial is None:
            notes.append("starting from random weights (no --finetune)")
        else:
            with for_option("finetune"):
                notes.append(str(load_pretrained(model, initial)))
            self.initial_statistics = None if initial.ours is None else initial.ours.pictures
        if source.classes is not None and len(source.classes) == self.nb_classes:
            self.classes = tuple(source.classes)
        return model, full_name(name), notes

    def _create(self, name: str, config: ClassifyConfig, channels: int) -> Any:
        try:
            model = create_model(
                name,
                img_size=config.size,
                in_chans=channels,
                num_classes=self.nb_classes,
                global_pool=config.global_pool,
                **self.model_options(config),
            )
        except ValueError as error:
            raise OptionError(f"--model: {error}") from error
        except TypeError:  # a ConvMAE does not classify
            model = None
        if not isinstance(model, ConvViT):
            like = name.replace("fastconvmae", "convvit").replace("convmae", "convvit")
            known = list_models("convvit_*")
            raise OptionError(f"--model {name!r} does not classify{suggest(like, known)}")
        return model

    def model_options(self, config: Any) -> dict[str, Any]:
        """Arguments of the classifier that only this task gives."""
        return {}

    def statistics(self, config: ClassifyConfig) -> Statistics | None:
        return self.initial_statistics

    def learnt_reading(self, config: ClassifyConfig) -> ReadOptions | None:
        self.initial = self._initial(config)
        ours = None if self.initial is None else self.initial.ours
        return None if ours is None else ours.reading

    def _initial(self, config: ClassifyConfig) -> ForeignWeights | None:
        """The weights to start from, opened once; `build` lets go of them."""
        initial, self.initial = self.initial, None
        if initial is None and config.finetune is not None:
            with for_option("finetune"):
                initial = open_foreign(config.finetune)
        return initial

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(self, run: Run, log: RunLog) -> None:
        config = run.config
        if not run.due(config.eval_every):
            return
        assert self.val is not None
        began = time.perf_counter()
        batches = self.val.evaluation_batches(
            EvalTransform(config.size, config.crop_pct),
            config.eval_batch_size or config.batch_size,
            rank=run.world.rank,
            world=run.world.size,
            workers=run.workers,
            pin=config.pin_mem and run.world.device.type == "cuda",
        )
        model = run.model if self.ema is None else self.ema.module
        figures = accuracy(
            model, batches, self.nb_classes, run.statistics, run.world, run.autocast()
        )
        figures["seconds"] = round(time.perf_counter() - began, 2)
        log.evaluation(run.step, run.epoch, figures)
        if better(figures, self.best):
            self.best = figures["acc1"]
            self._keep(run)

    def _keep(self, run: Run) -> None:
        """Writes the best weights so far."""
        weights = whole_model(run.model) if self.ema is None else self.ema.module.state_dict()
        problem = None
        if run.world.main:
            try:
                save_weights(
                    run.folder.best,
                    run.model,
                    run.model_name,
                    weights,
                    run.statistics,
                    self.classes,
                    run.reading,
                )
            except OSError as error:
                problem = f"the best weights of step {run.step} could not be written: {error}"
        problem = run.world.share(problem)
        if problem:
            raise TrainingError(problem)

    def labels(self, batch: Batch, images: Tensor) -> Tensor:
        """The labels of a batch, where its images are.

        Raises:
            DataError: a picture has none, or one that the model does not have.
        """
        low, high = int(batch.labels.min()), int(batch.labels.max())
        if low < 0 or high >= self.nb_classes:
            found = "no label" if low < 0 else f"label {high}"
            raise DataError(
                f"a picture has {found}; expected 0 to {self.nb_classes - 1} (--nb_classes "
                f"{self.nb_classes})"
            )
        return batch.labels.to(images.device, non_blocking=True)

    def state(self, run: Run) -> dict[str, Any]:
        ema = None if self.ema is None else self.ema.module.state_dict()
        return {"best": self.best, "ema": ema}

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.saved_ema = state["ema"]


def linear_of_head(model: Any) -> Any:
    """The linear layer of a classifier's head."""
    return model.head[-1] if isinstance(model.head, torch.nn.Sequential) else model.head
