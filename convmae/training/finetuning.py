"""`convmae finetune` and `convmae linprobe`: what a step of classification computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

import convmae
from convmae.data import (
    DataError,
    EvalTransform,
    FinetuneTransform,
    LinprobeTransform,
    open_source,
)
from convmae.training.checkpoint import save_weights
from convmae.training.config import OptionError, suggest
from convmae.training.distributed import whole_model
from convmae.training.engine import Run, Task, TrainingError
from convmae.training.evaluation import accuracy, better, check_channels, check_labels
from convmae.training.optim import Groups, adamw, decay_groups, lars, layer_decay_groups
from convmae.training.pretrained import load_pretrained, pretrained_model, pretrained_statistics
from convmae.training.running import RunSummary, run_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from convmae.data import Batch, Source
    from convmae.training.config import FinetuneConfig, LinprobeConfig
    from convmae.training.config.classify import ClassifyConfig
    from convmae.training.log import RunLog

BETAS = (0.9, 0.999)
BEST = "best"
HEAD_STD = 2e-5  # of a new head on pretrained features; 0.01 for a probe
PROBE_STD = 0.01


def finetune(config: FinetuneConfig) -> RunSummary:
    """Trains a ConvViT to classify, from pretrained weights or from random ones.

    `config.output_dir` then holds what `pretrain` leaves, and `best/model.safetensors`, the weights
    with the highest accuracy on the val split.

    Raises:
        OptionError (a ValueError): an option cannot work. Nothing was trained or overwritten.
        convmae.data.DataError (a ValueError): no pictures, or too many of them unreadable.
        TrainingError: as `pretrain`.
    """
    return run_task(config, Finetuning())


def linprobe(config: LinprobeConfig) -> RunSummary:
    """Trains a linear classifier on a frozen encoder; leaves and raises what `finetune` does."""
    return run_task(config, Probing())


class Classification(Task):
    """What finetuning and probing share: the classifier, its evaluation and its best weights."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.nb_classes = 0
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
            config.data_path, split="val", max_unreadable=config.max_unreadable, seed=config.seed
        )
        check_labels(self.val, self.nb_classes, f"the val split of {data}")
        name = config.model
        if name is None:
            name = "convvit_base"
            if config.finetune is not None:
                name = pretrained_model(config.finetune) or name
        model = self._create(name, config, source.channels)
        check_channels(self.val, model, config.data_path)
        told = [f"{self.nb_classes} classes; {self.val.description} (val)"]
        if config.finetune is None:
            told.append("starting from random weights (no --finetune)")
        else:
            told.append(str(load_pretrained(model, config.finetune)))
        return model, convmae.full_name(name), told

    def _create(self, name: str, config: ClassifyConfig, channels: int) -> Any:
        try:
            model = convmae.create_model(
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
        if not isinstance(model, convmae.ConvViT):
            like = name.replace("fastconvmae", "convvit").replace("convmae", "convvit")
            known = convmae.list_models("convvit_*")
            raise OptionError(f"--model {name!r} does not classify{suggest(like, known)}")
        return model

    def model_options(self, config: Any) -> dict[str, Any]:
        """Arguments of the classifier that only this task gives."""
        return {}

    def statistics(self, config: ClassifyConfig) -> Any:
        return None if config.finetune is None else pretrained_statistics(config.finetune)

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
            model, batches, self.nb_classes, (run.mean, run.std), run.world, run.autocast()
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
                    run.folder / BEST, run.model, run.model_name, weights, run.mean, run.std
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


class Finetuning(Classification):
    """All layers learn, the early ones more slowly, on strongly augmented pictures."""

    command = "finetune"

    def __init__(self) -> None:
        super().__init__()
        self.mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.erase: Callable[[Tensor], Tensor] | None = None

    def transform(self, config: FinetuneConfig) -> Any:
        return FinetuneTransform(
            config.size, config.min_crop, config.hflip, config.auto_augment, config.color_jitter
        )

    def model_options(self, config: FinetuneConfig) -> dict[str, Any]:
        return {"drop_path_rate": config.drop_path}

    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        model, name, told = super().build(config, source)
        if config.finetune is not None:
            torch.nn.init.trunc_normal_(_head(model).weight, std=HEAD_STD)
        return model, name, told

    def groups(self, model: nn.Module, config: FinetuneConfig) -> Groups:
        return layer_decay_groups(model, config.weight_decay, config.layer_decay)

    def optimiser(self, groups: Groups, config: FinetuneConfig) -> torch.optim.Optimizer:
        return adamw(groups, BETAS)

    def begin(self, run: Run) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
        from timm.utils import ModelEmaV3

        config = run.config
        if config.reprob > 0:
            self.erase = RandomErasing(
                config.reprob,
                mode=config.remode,
                max_count=config.recount,
                device=run.world.device,
            )
        if config.mixes:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=self.nb_classes,
            )
            self.criterion = SoftTargetCrossEntropy()
        elif config.smoothing > 0:
            self.criterion = LabelSmoothingCrossEntropy(config.smoothing)
        if config.model_ema:
            self.ema = ModelEmaV3(run.model, decay=config.model_ema_decay)
            if self.saved_ema is not None:
                self.ema.module.load_state_dict(self.saved_ema)

    def after_step(self, run: Run) -> None:
        if self.ema is not None:
            self.ema.update(run.model)

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        targets = self.labels(batch, images)
        if self.erase is not None:
            images = self.erase(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return self.criterion(run.step_model(images).float(), targets)


class Probing(Classification):
    """A BatchNorm without parameters and a linear layer learn, on features that stay."""

    command = "linprobe"

    def transform(self, config: LinprobeConfig) -> Any:
        return LinprobeTransform(config.size)

    def model_options(self, config: LinprobeConfig) -> dict[str, Any]:
        return {"head_norm": True}

    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        model, name, told = super().build(config, source)
        head = _head(model)
        torch.nn.init.trunc_normal_(head.weight, std=PROBE_STD)
        model.requires_grad_(False)
        head.requires_grad_(True)
        return model, name, told

    def groups(self, model: nn.Module, config: LinprobeConfig) -> Groups:
        return decay_groups(model, config.weight_decay)

    def optimiser(self, groups: Groups, config: LinprobeConfig) -> torch.optim.Optimizer:
        return lars(groups)

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        return self.criterion(run.step_model(images).float(), self.labels(batch, images))


def _head(model: Any) -> Any:
    """The linear layer of a classifier's head."""
    return model.head[-1] if isinstance(model.head, torch.nn.Sequential) else model.head
