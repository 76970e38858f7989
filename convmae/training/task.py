"""What a kind of training must say: its model, its loss, and what is to be seen of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from convmae.config import ReadOptions
from convmae.data import open_source

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.data import Batch, Source, Statistics
    from convmae.data.classes import ClassNames
    from convmae.records.log import RunLog
    from convmae.training.distributed import World
    from convmae.training.state import Run
    from convmae.weights.checkpoint import Weights


class Task(ABC):
    """One kind of training: what it trains, on what, and what is to be seen of it."""

    command: str
    drawn = "reconstruction"  # what `draw` draws
    reading = ReadOptions()  # how pictures are read; set before `build`
    classes: ClassNames | None = None  # names of what the model tells apart, in their order
    resumed: Path | None = None  # the checkpoint folder that the run goes on from

    def open_data(self, config: Any, reading: ReadOptions, world: World) -> Source:
        """The pictures to train on; what takes long to check, the main process alone checks."""
        return open_source(
            config.data_path,
            max_unreadable=config.max_unreadable,
            max_samples=config.max_samples,
            seed=config.seed,
            reading=reading,
        )

    @abstractmethod
    def transform(self, config: Any) -> Any:
        """From a stored picture to one of a training batch."""

    @abstractmethod
    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        """The model, its name for `convmae.create_model`, and what to tell about it."""

    @abstractmethod
    def groups(self, model: nn.Module, config: Any) -> list[dict[str, Any]]:
        """Parameter groups with their decays, and `lr_scale` where a group learns more slowly."""

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
        """The optimizer of these groups; its learning rate is set in every step."""

    @abstractmethod
    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        """The mean loss of a batch; `images` are on the device and normalised."""

    def inputs(self, run: Run, batch: Batch) -> Any:
        """What `captured_loss` reads besides the images: tensors on the device, of fixed shapes.

        A task whose options have `cuda_graph` defines this and `captured_loss`.
        """
        raise NotImplementedError(f"the steps of {self.command} cannot be captured")

    def captured_loss(self, run: Run, images: Tensor, inputs: Any) -> Tensor:
        """`loss` of images and of what `inputs` gave; decides nothing on the host."""
        raise NotImplementedError(f"the steps of {self.command} cannot be captured")

    def statistics(self, config: Any) -> Statistics | None:
        """Mean and deviation that the weights to start from were trained with, if any."""
        return None

    def learnt_reading(self, config: Any) -> ReadOptions | None:
        """How the pictures of the weights to start from were read, if they say."""
        return None

    def begin(self, run: Run) -> None:
        """Called once before the first step, when a resumed state has been loaded."""
        return

    def after_step(self, run: Run) -> None:
        """Called after every optimizer step that was not skipped."""
        return

    def evaluation_due(self, run: Run) -> bool:
        """Whether the step just done is followed by an evaluation."""
        return False

    def evaluate(self, run: Run, log: RunLog) -> None:
        """Called after a step that an evaluation follows."""
        return

    def folder_lost(self, run: Run) -> None:
        """Called when the run's folder was deleted and made again."""
        return

    def draw(self, run: Run) -> PILImage.Image | None:
        """A picture of what the model does, in all processes, or None."""
        return None

    def state(self, run: Run) -> dict[str, Any]:
        """What a checkpoint has to hold besides model and optimizer: tensors and plain values."""
        return {}

    def resume_classes(self, config: Any, weights: Weights) -> list[str]:
        """Checks the classes of a checkpoint to go on from; what to tell about them."""
        return []

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        return
