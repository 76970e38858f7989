"""`convmae finetune` and `convmae linprobe`: what a step of classification computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, for_option, suggest
from convmae.data import DataError, EvalTransform, open_source
from convmae.models import ConvViT, create_model, full_name, list_models
from convmae.models.cnn.classifier import TimmClassifier, has_drop_path
from convmae.models.cnn.names import is_timm_name
from convmae.records.unreadable import UnreadableTally
from convmae.tasks.accuracy import accuracy, better, check_channels
from convmae.tasks.matching import classes_to_learn, match_labels
from convmae.training.distributed import whole_model
from convmae.training.saving import save_best
from convmae.training.task import Task
from convmae.weights.foreign import open_foreign
from convmae.weights.pretrained import classifier_for, load_pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convmae.config import ReadOptions
    from convmae.config.classify import ClassifyConfig
    from convmae.data import Batch, Failure, Source, Statistics
    from convmae.records.log import RunLog
    from convmae.training.state import Run
    from convmae.weights.checkpoint import Weights
    from convmae.weights.foreign import ForeignWeights


class Classification(Task):
    """What finetuning and probing share: the classifier, its evaluation and its best weights."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.nb_classes = 0
        self.initial_statistics: Statistics | None = None
        self.train: Source | None = None
        self.initial: ForeignWeights | None = None
        self.val: Source | None = None
        self.keeps_head = False  # that of the weights to start from
        self.ema: Any = None
        self.saved_ema: dict[str, Tensor] | None = None
        self.criterion: nn.Module = torch.nn.CrossEntropyLoss()

    # -- building ---------------------------------------------------------------------------------

    def build(self, config: ClassifyConfig, source: Source) -> tuple[nn.Module, str, list[str]]:
        data = f"--data_path {config.data_path!r}"
        self.classes, class_notes = classes_to_learn(source, config.nb_classes, data)
        self.nb_classes, self.train = len(self.classes), source
        self.val = open_source(
            config.data_path,
            split="val",
            max_unreadable=config.max_unreadable,
            seed=config.seed,
            reading=self.reading,
        )
        class_notes += self._match(self.val, config, "val", "its train split")
        initial = self._initial(config)
        with for_option("finetune"):
            known = config.model is not None or initial is None
            fitting = None if known or initial is None else classifier_for(initial)
        name = config.model or fitting or "convvit_base"
        stride = None if initial is None or initial.ours is None else _output_stride(initial.ours)
        model, model_notes = self._create(name, config, source.channels, stride)
        check_channels(self.val, model, config.data_path)
        self.val_tally = UnreadableTally(self.val, config.max_unreadable)
        notes = [f"{self.nb_classes} classes; {self.val.description} (val)", *class_notes]
        notes += [f"note: {left_out} (val)" for left_out in self.val.left_out]
        notes += model_notes
        if initial is None:
            notes.append("starting from random weights (no --finetune)")
        else:
            with for_option("finetune"):
                report = load_pretrained(model, initial, config.adapt_input, self.classes)
            notes += report.lines()
            self.keeps_head = report.keeps_head
            self.initial_statistics = report.statistics
        return model, full_name(name), notes

    def _match(
        self, source: Source, config: Any, split: str, model: str, all_of_them: bool = False
    ) -> list[str]:
        """Gives the pictures of a split the labels of `self.classes`; what to tell about it."""
        assert self.classes is not None
        data = f"the {split} split of --data_path {config.data_path!r}"
        return match_labels(source, self.classes, self.nb_classes, data, model, all_of_them)

    def _create(
        self, name: str, config: ClassifyConfig, channels: int, output_stride: int | None
    ) -> tuple[Any, list[str]]:
        """The classifier, with fresh parameters, and what to tell about it."""
        options: dict[str, Any] = {"img_size": config.size, "in_chans": channels}
        options |= {"num_classes": self.nb_classes} | self.model_options(config)
        notes: list[str] = []
        if is_timm_name(name):
            notes = _options_of_network(name, config, options)
            if output_stride is not None:
                options["output_stride"] = output_stride
        elif config.gp is not None:
            raise OptionError(
                f"--gp {config.gp} is for networks of timm; {name} has --no_global_pool"
            )
        else:
            options["global_pool"] = config.global_pool
        try:
            if is_timm_name(name):
                _try_out(name, config, options)
            model: Any = create_model(name, **options)
        except OptionError:
            raise
        except ValueError as error:
            raise OptionError(f"--model: {error}") from error
        except TypeError:  # a ConvMAE does not classify
            model = None
        if not isinstance(model, ConvViT | TimmClassifier):
            like = name.replace("fastconvmae", "convvit").replace("convmae", "convvit")
            known = list_models("convvit_*")
            raise OptionError(f"--model {name!r} does not classify{suggest(like, known)}")
        return model, notes

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

    def evaluation_due(self, run: Run) -> bool:
        return run.due(run.config.eval_every)

    def folder_lost(self, run: Run) -> None:
        self.best = None  # the next evaluation writes the best weights again

    def evaluate(self, run: Run, log: RunLog) -> None:
        config = run.config
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
        failures: list[Failure] = []
        figures = accuracy(
            model,
            run.world.together(batches),
            self.nb_classes,
            run.statistics,
            run.world,
            run.autocast(),
            failures,
        )
        self.val_tally.add(failures, log, run.step)
        figures["seconds"] = round(time.perf_counter() - began, 2)
        log.evaluation(run.step, run.epoch, figures)
        if better(figures, self.best):
            self.best = figures["acc1"]
            whole = whole_model(run.model) if self.ema is None else self.ema.module.state_dict()
            save_best(run, whole, self.classes)

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

    def resume_classes(self, config: ClassifyConfig, weights: Weights) -> list[str]:
        """Goes on with the classes of a checkpoint, in its order; what to tell about it.

        Raises:
            OptionError: those of the data are others.
        """
        assert self.train is not None and self.val is not None and self.classes is not None
        where = f"--resume {weights.path}"
        if weights.classes is None:
            return [f"note: {where} does not tell the names of its classes: they are not compared"]
        before, self.classes = self.classes, weights.classes
        self.nb_classes = int(weights.config.get("num_classes", len(self.classes)))
        notes = self._match(self.train, config, "train", where, all_of_them=True)
        self._match(self.val, config, "val", where)
        if self.classes != before and set(self.classes) == set(before):
            notes.append(f"note: classes have the order that they have in {weights.path}")
        return notes

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.saved_ema = state["ema"]


def fresh_head(model: Any, std: float) -> None:
    """A new classifier of a model: weights N(0, std), biases 0."""
    head = linear_of_head(model)
    torch.nn.init.trunc_normal_(head.weight, std=std)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


def linear_of_head(model: Any) -> Any:
    """The layer of a classifier that tells classes apart."""
    head = model.get_classifier()
    return head[-1] if isinstance(head, torch.nn.Sequential) else head


def _output_stride(weights: Weights) -> int | None:
    """That of the network that was trained; None where it is as timm has it."""
    return weights.config.get("output_stride") if is_timm_name(weights.model) else None


def _options_of_network(name: str, config: Any, options: dict[str, Any]) -> list[str]:
    """Adds to `options` what `create_model` takes for one of timm's networks; what to tell of it.

    Raises:
        OptionError: an option means nothing for this network.
    """
    if not config.global_pool:
        raise OptionError(
            f"--no_global_pool classifies the top-left token, which {name} has not; leave it out "
            "(--gp chooses how maps are pooled)"
        )
    options["global_pool"] = True if config.gp is None else config.gp
    rate = options.get("drop_path_rate", 0.0)
    if not rate or has_drop_path(name):
        return []
    if rate != type(config).drop_path:
        raise OptionError(
            f"--drop_path {rate:g}: {name} has no stochastic depth in timm; leave it out"
        )
    options["drop_path_rate"] = 0.0
    return [f"note: {name} has no stochastic depth in timm: --drop_path has no effect"]


def _try_out(name: str, config: ClassifyConfig, options: dict[str, Any]) -> None:
    """Runs a step on tensors without values, before the network is built.

    Raises:
        OptionError: it cannot: the strides leave nothing of the pictures, or a BatchNorm sees one
            position.
        ValueError: there is no such network.
    """
    height, width = config.size
    with torch.device("meta"):
        model: Any = create_model(name, **options).train()
        images = torch.empty(config.batch_size, options["in_chans"], height, width)
        try:
            model(images)
        except (ValueError, RuntimeError) as error:
            words = str(error).strip().splitlines()[0]
            raise OptionError(
                f"--input_size {height} x {width} with --batch_size {config.batch_size}: {name} "
                f"cannot learn from such batches: {words}; give larger pictures or batches"
            ) from error
