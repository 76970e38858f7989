"""`convmae linprobe`: a linear classifier learns on features that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.data import LinprobeTransform
from convmae.models.cnn.classifier import TimmClassifier
from convmae.records.folder import RunFolder
from convmae.tasks.classify import Classification, fresh_head, linear_of_head
from convmae.training.optim import Groups, decay_groups, lars
from convmae.training.run import RunSummary, run_task
from convmae.weights.checkpoint import WEIGHTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from convmae.config import LinprobeConfig
    from convmae.data import Batch, Source
    from convmae.training.state import Run

HEAD_STD = 0.01  # of a new head


def linprobe(config: LinprobeConfig) -> RunSummary:
    """Trains a linear classifier on a frozen encoder; leaves and raises what `finetune` does."""
    return run_task(config, Probing())


def main(config: LinprobeConfig) -> int:
    """The command: `linprobe`, and what to see of it; returns the exit status."""
    summary = linprobe(config)
    folder = RunFolder.of(summary.output_dir)
    return summary.report(folder.best / WEIGHTS, folder.report)


class Probing(Classification):
    """A BatchNorm without parameters and a linear layer learn, on features that stay."""

    command = "linprobe"

    def transform(self, config: LinprobeConfig) -> Any:
        return LinprobeTransform(config.size)

    def model_options(self, config: LinprobeConfig) -> dict[str, Any]:
        return {"head_norm": True}

    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        model, name, notes = super().build(config, source)
        if not self.keeps_head:
            fresh_head(model, HEAD_STD)
        if isinstance(model, TimmClassifier):
            model.freeze_features()
        else:
            model.requires_grad_(False)
            linear_of_head(model).requires_grad_(True)
        return model, name, notes

    def groups(self, model: nn.Module, config: LinprobeConfig) -> Groups:
        return decay_groups(model, config.weight_decay)

    def optimizer(self, groups: Groups, config: LinprobeConfig) -> torch.optim.Optimizer:
        return lars(groups)

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        return self.criterion(run.step_model(images).float(), self.labels(batch, images))
