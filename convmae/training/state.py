"""A run: everything its loop needs, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import MessageError
from convmae.records.report import Report

if TYPE_CHECKING:
    from torch import nn

    from convmae.config import ReadOptions
    from convmae.data import Source, Statistics
    from convmae.data.fingerprint import Fingerprint
    from convmae.records.folder import RunFolder
    from convmae.training.distributed import World
    from convmae.training.lock import RunLock
    from convmae.training.step_graph import StepGraph


class TrainingError(MessageError, RuntimeError):
    """A run had to stop; the message says why, and what is left of it."""


@dataclass
class Run:
    """Everything the loop needs, checked, and how far it has come."""

    config: Any  # a RunConfig, of the task's own kind
    folder: RunFolder
    world: World
    dtype: torch.dtype
    source: Source
    statistics: Statistics  # of the pictures
    model: Any  # a ConvMAE or ConvViT, with its own parameter names
    model_name: str
    step_model: nn.Module  # what a step calls: the model, or its data-parallel wrapper
    optimizer: torch.optim.Optimizer
    scheduler: Any  # of timm
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    workers: int
    reading: ReadOptions  # of the pictures
    lock: RunLock | None = None  # of the folder; in the main process
    fingerprint: Fingerprint | None = None  # of the pictures
    data_changes: str | None = None  # since the checkpoint that it went on from, in words
    graph: StepGraph | None = None  # runs whole steps, where that was asked for and can be
    step: int = 0  # optimizer steps done, skipped ones included
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    nonfinite: int = 0  # steps skipped in a row
    skipped: int = 0  # steps skipped in all
    saved_step: int = 0  # of the checkpoint in the folder; 0 without one
    evaluation_pending: bool = False  # the evaluation of this step, where one is due, is to come
    report: Report = field(init=False)  # of the folder

    def __post_init__(self) -> None:
        self.report = Report(self.folder)

    @property
    def total_steps(self) -> int:
        return self.config.total_steps(self.steps_per_epoch)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        return self.config.effective_batch(self.world.size)

    def autocast(self) -> torch.autocast:
        """The arithmetic of the run, for its forward passes."""
        half = self.dtype != torch.float32
        dtype = self.dtype if half else None
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=half)

    def due(self, every: float) -> bool:
        """Whether the step just done ends a span of `every` epochs, or the run."""
        steps = max(1, round(every * self.steps_per_epoch))
        return self.step % steps == 0 or self.step == self.total_steps
