"""Where numbers and pictures of a run go besides its log: TensorBoard, Weights & Biases."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Protocol

from convmae.config import OptionError
from convmae.files import replacing
from convmae.records.terminal import say

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from convmae.records.folder import RunFolder

FINISH_SECONDS = 60.0  # that the end of a run waits for the network


class Tracker(Protocol):
    """Takes numbers and pictures of a run."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, such as `train/loss`."""

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 `[H, W, 3]`."""

    def close(self) -> None:
        """Writes what is left."""


class Guarded:
    """A tracker that never stops a run: at its first failure it warns once, and is off from then.

    Args:
        name: what to call it in the warning.
        make: builds the tracker; may fail too.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", make()))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, if the tracker still works."""
        self._call("scalars", values, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, if the tracker still works."""
        self._call("picture", name, picture, step)

    def close(self) -> None:
        """Writes what is left, if the tracker still works."""
        self._call("close")
        self._tracker = None

    def _call(self, method: str, *args: Any) -> None:
        if self._tracker is not None:
            self._try(lambda: getattr(self._tracker, method)(*args))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, training matters more
            self._tracker = None
            reason = f"{type(error).__name__}: {error}"
            say(f"warning: {self.name} is off from here on: {reason}", error=True)


class TensorBoard:
    """Event files in `folder/tensorboard`.

    Args:
        folder: the run's folder.
        first_step: what was written of later steps, by a run that crashed, is hidden.
    """

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = first_step + 1 if first_step else None  # that step and all later ones
        self._writer = SummaryWriter(folder.tensorboard, purge_step=purged)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One curve a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 `[H, W, 3]`."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; a resumed run goes on in the one it began in.

    `WANDB_MODE=offline` and its other variables are obeyed.

    Args:
        folder: the run's folder; it gets `wandb/` and `wandb_id.txt`.
        project: of Weights & Biases.
        config: options of the run.
    """

    def __init__(self, folder: RunFolder, project: str, config: dict[str, Any] | None) -> None:
        self._wandb = import_wandb()
        settings: dict[str, Any] = {"console": "off"}
        if "finish_timeout" in self._wandb.Settings.model_fields:  # not in older versions
            settings["finish_timeout"] = FINISH_SECONDS
        if not folder.wandb_id.is_file():
            with replacing(folder.wandb_id) as new:
                new.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = self._wandb.init(
            project=project,
            dir=folder.path,
            id=folder.wandb_id.read_text(encoding="utf-8").strip(),
            name=folder.path.resolve().name,
            config=config,
            resume="allow",
            settings=self._wandb.Settings(**settings),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run may step back

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One curve a name."""
        self._run.log({**values, "step": step})

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 `[H, W, 3]`."""
        self._run.log({name: self._wandb.Image(picture), "step": step})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


def import_wandb() -> Any:
    """The package wandb.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise _no_wandb() from error
    if not hasattr(wandb, "init"):  # a folder of that name, such as a run leaves
        raise _no_wandb()
    return wandb


def _no_wandb() -> OptionError:
    return OptionError(
        "--log_wandb needs the package wandb, which is not installed: pip install wandb, or "
        "leave the option out"
    )
