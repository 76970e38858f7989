"""What the trainings of segmenters and detectors share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.config import OptionError, for_option
from convmae.data.errors import UnreadableError
from convmae.data.picture import ChosenPicture
from convmae.data.source import evenly_spaced
from convmae.training.distributed import whole_model
from convmae.training.optim import Groups, adamw
from convmae.training.saving import save_best
from convmae.training.task import Task
from convmae.weights.dense_names import backbone_of, load_trunk
from convmae.weights.foreign import open_foreign

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from convmae.config import ReadOptions
    from convmae.data import PhotoSource, Statistics
    from convmae.records.evaluation import EvaluationDetails
    from convmae.records.log import RunLog
    from convmae.training.state import Run
    from convmae.weights.foreign import ForeignWeights

BETAS = (0.9, 0.999)
PREVIEWS = 6  # pictures of the val split that are drawn with each checkpoint
DEFAULT_BACKBONE = "convvit_base"


class DenseTask(Task):
    """A model with a backbone that `--init` may start, and a val split that finds the best weights.

    Attributes:
        best: the highest figure so far that decides which weights are kept.
        val: the held-out pictures; set by `open_data`, as `classes` is.
    """

    drawn = "prediction"
    val: PhotoSource

    def __init__(self) -> None:
        self.best: float | None = None
        self.notes: list[str] = []
        self.initial: ForeignWeights | None = None
        self.initial_statistics: Statistics | None = None

    # -- weights to start from --------------------------------------------------------------------

    def take_initial(self, config: Any) -> ForeignWeights | None:
        """The weights of `--init`, opened once; whoever takes them lets go of them."""
        initial, self.initial = self.initial, None
        if initial is None and config.init is not None:
            with for_option("init"):
                initial = open_foreign(config.init)
        return initial

    def learnt_reading(self, config: Any) -> ReadOptions | None:
        self.initial = self.take_initial(config)
        ours = None if self.initial is None else self.initial.ours
        return None if ours is None else ours.reading

    def backbone_name(self, config: Any, initial: ForeignWeights | None) -> str:
        """What `--model` names, else the backbone of the weights to start from.

        Raises:
            OptionError: those are of no known size.
        """
        if config.model is not None or initial is None:
            return config.model or DEFAULT_BACKBONE
        with for_option("init"):
            found = backbone_of(initial)
        if found is None:
            raise OptionError(
                f"--init {config.init!r} is of no known size; give the backbone by --model"
            )
        return found

    def start_backbone(
        self, model: Any, config: Any, initial: ForeignWeights | None, channels: int
    ) -> list[str]:
        """Puts the weights to start from into the backbone, unless the run goes on.

        Args:
            channels: of the pictures; of others no mean and deviation are taken over.

        Returns:
            What to tell about it.
        """
        if initial is None:
            return ["starting from random weights (no --init)"]
        if self.resumed is not None:
            return [
                f"note: --init {config.init!r} is not read: the run goes on from its own weights"
            ]
        with for_option("init"):
            report = load_trunk(model.backbone, initial, config.adapt_input)
        learnt = report.statistics
        if learnt is not None and len(learnt.mean) == channels:
            self.initial_statistics = learnt
        return report.lines()

    def statistics(self, config: Any) -> Statistics | None:
        return self.initial_statistics

    def optimizer(self, groups: Groups, config: Any) -> torch.optim.Optimizer:
        return adamw(groups, BETAS)

    # -- evaluation -------------------------------------------------------------------------------

    def evaluation_due(self, run: Run) -> bool:
        return run.due(run.config.eval_every)

    def folder_lost(self, run: Run) -> None:
        self.best = None  # the next evaluation writes the best weights again

    def record(
        self, run: Run, log: RunLog, details: EvaluationDetails, figure: float | None
    ) -> None:
        """Leaves an evaluation's details, and the weights if they are the best so far.

        Args:
            details: for the page of the run.
            figure: what decides; None: nothing could be measured.
        """
        if run.world.main:
            try:
                details.write(run.folder.evaluation)
            except OSError as error:
                log.say(f"warning: the details of this evaluation were not written: {error}")
        if figure is not None and (self.best is None or figure > self.best):
            self.best = figure
            save_best(run, whole_model(run.model), self.classes)

    def drawn_pictures(self, transform: Any) -> Iterator[tuple[int, Any]]:
        """Number and transformed picture of those of the val split that are drawn.

        They are evenly spaced; what turns out to be unreadable is left out.
        """
        broken = {failure.name for failure in self.val.failures}
        photos = self.val.photos
        readable = [i for i in range(len(photos)) if photos.name(i) not in broken]
        for place in evenly_spaced(len(readable), PREVIEWS):
            index = readable[place]
            try:
                yield index, transform(ChosenPicture(photos, index))
            except UnreadableError:  # evaluations tell of it
                continue

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self, run: Run) -> dict[str, Any]:
        return {"best": self.best}

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.best = state["best"]
