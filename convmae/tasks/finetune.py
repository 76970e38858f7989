"""`convmae finetune`: all layers learn, the early ones more slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.data import FinetuneTransform
from convmae.records.folder import RunFolder
from convmae.tasks.classify import Classification, fresh_head
from convmae.training.optim import Groups, adamw, lamb, layer_decay_groups
from convmae.training.run import RunSummary, run_task
from convmae.weights.checkpoint import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn

    from convmae.config import FinetuneConfig
    from convmae.data import Batch, Source
    from convmae.training.state import Run

BETAS = (0.9, 0.999)
HEAD_STD = 2e-5  # of a new head on pretrained features


def finetune(config: FinetuneConfig) -> RunSummary:
    """Trains a classifier, a ConvViT or a network of timm, from given or from random weights.

    `config.output_dir` then holds what `pretrain` leaves, and `best/model.safetensors`, the weights
    with the highest accuracy on the val split.

    Raises:
        OptionError (a ValueError): an option cannot work. Nothing was trained or overwritten.
        convmae.data.DataError (a ValueError): no pictures, or too many of them unreadable.
        TrainingError: as `pretrain`.
    """
    return run_task(config, Finetuning())


def main(config: FinetuneConfig) -> int:
    """The command: `finetune`, and what to see of it; returns the exit status."""
    summary = finetune(config)
    folder = RunFolder.of(summary.output_dir)
    return summary.report(folder.best / WEIGHTS, folder.report)


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
        model, name, notes = super().build(config, source)
        if config.finetune is not None and not self.keeps_head:
            fresh_head(model, HEAD_STD)
        return model, name, notes

    def groups(self, model: nn.Module, config: FinetuneConfig) -> Groups:
        return layer_decay_groups(model, config.weight_decay, config.layer_decay)

    def optimizer(self, groups: Groups, config: FinetuneConfig) -> torch.optim.Optimizer:
        if config.opt == "lamb":
            return lamb(groups, BETAS, config.clip_grad, finetuning=True)
        return adamw(groups, BETAS)

    def begin(self, run: Run) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing
        from timm.loss import (
            BinaryCrossEntropy,
            LabelSmoothingCrossEntropy,
            SoftTargetCrossEntropy,
        )
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
        if config.bce_loss:  # what mixes pictures smooths their labels itself
            self.criterion = BinaryCrossEntropy(config.smoothing)
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
