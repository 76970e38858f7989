"""What a run tells while it goes: log.txt, trackers, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.files import replacing
from convmae.records.folder import RunFolder
from convmae.records.terminal import say, surviving
from convmae.records.trackers import Guarded, TensorBoard, WandB, import_wandb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

    import numpy as np
    import torch


def read_log(folder: str | Path | RunFolder) -> list[dict[str, Any]]:
    """The lines of `folder/log.txt`; a last line cut short by a crash is left out."""
    path = RunFolder.of(folder).log
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def memory_mib(device: torch.device) -> float | None:
    """Peak memory in MiB: of tensors on a CUDA device, else resident of this process.

    None where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # of Linux: rusage begins at what the parent had there
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


class RunLog:
    """Writes the log of a run, and shows its progress.

    A line of `log.txt` is a JSON object, without NaN and infinities (null stands for them):

    - a loss: `step`, `epoch`, `loss` (mean since the line before), `lr`, `images_per_s`, `seconds`
      since this process began to train, and what else `loss` was given;
    - an evaluation: `event` "evaluation", `step`, `epoch` and its values;
    - another event: `event`, `step` and its details; "resumed" is written here.

    The same numbers go to TensorBoard and Weights & Biases; should those fail, they are off after
    one warning.

    Args:
        folder: the run's folder.
        first_step: where this run begins; later lines, of a run that crashed, are removed.
        total_steps: where it ends.
        images_per_step: pictures in a step.
        enabled: False writes and prints nothing: for all but one of several processes.
        wandb_project: a project of Weights & Biases; not used if not given.
        config: options of the run, for Weights & Biases.

    Raises:
        OptionError: wandb is asked for, but not installed.
        OSError: from here and from every method that writes: `log.txt` could not be written.
    """

    def __init__(
        self,
        folder: str | Path | RunFolder,
        first_step: int,
        total_steps: int,
        images_per_step: int,
        *,
        enabled: bool = True,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        from tqdm import tqdm

        self.enabled, self.folder = enabled, RunFolder.of(folder)
        self.path = self.folder.log
        self.first_step, self.total_steps = first_step, total_steps
        self.images_per_step = images_per_step
        self._file: FileIO | None = None
        self._trackers: list[Guarded] = []
        if enabled:
            if wandb_project is not None:
                import_wandb()
            self._file = self._open()
            if 0 < first_step < total_steps:
                self.write({"event": "resumed", "step": first_step})
            self._trackers = _trackers(self.folder, first_step, wandb_project, config)
        self._live = enabled and sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._live,
        )
        self._began = time.perf_counter()
        self._last = (first_step, self._began)
        self._idle = 0.0

    def _open(self) -> FileIO:
        """Drops what lies beyond the first step; the rest is replaced whole or not at all."""
        kept = [entry for entry in read_log(self.folder) if _step(entry) <= self.first_step]
        with _naming(self.path):
            with replacing(self.path) as new:
                new.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
            return self.path.open("a+b", buffering=0)

    def reopen(self) -> None:
        """Writes all lines again, after the folder was deleted and made again.

        Raises:
            OSError: with the path.
        """
        assert self._file is not None
        lines = b""
        with suppress(OSError):  # of a file deleted by another machine nothing may be left
            self._file.seek(0)
            lines = self._file.read()
        self._file.close()
        with _naming(self.path):
            with replacing(self.path) as new:
                new.write_bytes(lines)
            self._file = self.path.open("a+b", buffering=0)
            if self._trackers:  # TensorBoard opens its file anew for each write
                self.folder.tensorboard.mkdir(exist_ok=True)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one line to `log.txt`.

        Raises:
            OSError: with the path; the disk is full, for example.
        """
        if self._file is None:
            return
        left = _line(entry).encode()
        with _naming(self.path):
            while left:
                left = left[self._file.write(left) :]

    def event(self, event: str, step: int, message: str, **details: Any) -> None:
        """Says `message` and notes it in the log."""
        self.write({"event": event, "step": step, **details})
        self.say(message)

    def say(self, message: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._live:
            with surviving():
                self._bar.write(message)
        elif self.enabled:
            say(message)

    def idle(self, seconds: float) -> None:
        """Time spent on checkpoints and pictures, which is not counted as training."""
        self._idle += seconds

    @property
    def seconds(self) -> float:
        """Seconds since the log was opened."""
        return time.perf_counter() - self._began

    def tick(self) -> None:
        """One step is done."""
        with surviving():
            self._bar.update()

    def loss(self, step: int, epoch: float, loss: float, lr: float, **more: Any) -> dict[str, Any]:
        """Logs a loss everywhere; returns the line.

        Args:
            step, epoch, loss, lr: of the last step; the loss is the mean since the line before.
            more: `grad_norm`, `model_images_per_s`, `input_images_per_s`, `bottleneck` ("model" or
                "input"), `memory_mib`, or others; None is left out.
        """
        before, since = self._last
        now = time.perf_counter()
        busy = max(now - since - self._idle, 1e-9)
        rate = (step - before) * self.images_per_step / busy
        self._last, self._idle = (step, now), 0.0
        entry = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "lr": lr,
            "images_per_s": round(rate, 2),
            **{name: value for name, value in more.items() if value is not None},
            "seconds": round(now - self._began, 2),
        }
        self.write(entry)
        with surviving():
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")
        if not self._live:
            left = (self.total_steps - step) * self.images_per_step / max(rate, 1e-9)
            waits = "  waits for pictures" if more.get("bottleneck") == "input" else ""
            self.say(
                f"step {step}/{self.total_steps}  epoch {epoch:.2f}  loss {loss:.4f}  "
                f"lr {lr:.2e}  {rate:.1f} images/s{waits}  {_clock(left)} left"
            )
        self._track("train", entry, step)
        return entry

    def evaluation(self, step: int, epoch: float, values: dict[str, float]) -> dict[str, Any]:
        """Logs an evaluation everywhere; returns the line.

        Args:
            step, epoch: when.
            values: such as `acc1`, `acc5` (percent) and `loss`.
        """
        entry = {"event": "evaluation", "step": step, "epoch": round(epoch, 4), **values}
        self.write(entry)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"evaluation after step {step}, epoch {epoch:.2f}:  {figures}")
        self._track("eval", values, step)
        return entry

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture for TensorBoard and Weights & Biases, uint8 `[H, W, 3]`."""
        for tracker in self._trackers:
            tracker.picture(name, picture, step)

    def close(self) -> None:
        """Closes the files and the progress bar."""
        with surviving():
            self._bar.close()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _track(self, group: str, values: dict[str, Any], step: int) -> None:
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in values.items()
            if name not in ("step", "epoch", "seconds") and isinstance(value, int | float)
        }
        for tracker in self._trackers:
            tracker.scalars(numbers, step)


def _trackers(
    folder: RunFolder, first_step: int, wandb_project: str | None, config: dict[str, Any] | None
) -> list[Guarded]:
    """TensorBoard, and Weights & Biases if asked for; one that fails says so and is off."""
    trackers = [Guarded("TensorBoard", lambda: TensorBoard(folder, first_step))]
    if wandb_project is not None:
        project = wandb_project
        trackers.append(Guarded("Weights & Biases", lambda: WandB(folder, project, config)))
    return trackers


def _step(entry: dict[str, Any]) -> float:
    step = entry.get("step", 0)
    return step if isinstance(step, int | float) else 0


def _line(entry: dict[str, Any]) -> str:
    """One line of JSON, with null for NaN and infinities, which JSON does not have."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }
    return json.dumps(plain) + "\n"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path into an error of the system: a full disk does not say which file it meant."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
