"""What a run tells while it goes: log.txt, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

LOG = "log.txt"


class LossWindow:
    """Losses since the last log line; read from the device in one go, to let it run ahead."""

    def __init__(self, values: list[float] | None = None) -> None:
        self.values = list(values or [])
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Notes the loss of a step without waiting for it."""
        self._pending.append((step, loss.detach()))

    def read(self) -> int | None:
        """Waits for the losses noted; the first step whose loss is not finite, if there is one."""
        pending, self._pending = self._pending, []
        for step, loss in pending:
            value = float(loss)
            if not math.isfinite(value):
                return step
            self.values.append(value)
        return None

    def mean(self) -> float:
        """The mean of the losses read since `clear`."""
        return math.fsum(self.values) / len(self.values)

    def clear(self) -> None:
        """Begins a new window."""
        self.values = []


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/log.txt`; a last line cut short by a crash is left out."""
    path = folder / LOG
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class RunLog:
    """Writes the log of a run, and shows its progress.

    A line of `log.txt` is a JSON object: `step`, `epoch`, `loss` (mean since the line before),
    `lr`, `images_per_s`, `seconds` since this process began to train; or `event` and its details.

    Args:
        folder: the run's folder.
        first_step: where this run begins; later lines, of a run that crashed, are removed.
        total_steps: where it ends.
        images_per_step: pictures in a step.
    """

    def __init__(
        self, folder: Path, first_step: int, total_steps: int, images_per_step: int
    ) -> None:
        from tqdm import tqdm

        self.folder, self.total_steps, self.images_per_step = folder, total_steps, images_per_step
        kept = [entry for entry in read_log(folder) if entry.get("step", 0) <= first_step]
        self._rewrite(kept)
        self._file = (folder / LOG).open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(folder, first_step)
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._live,
        )
        self.first_step = first_step
        self._began = time.perf_counter()
        self._last = (first_step, self._began)
        self._idle = 0.0

    def _rewrite(self, entries: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        new = self.folder / f".{LOG}.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.folder / LOG)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one line to `log.txt`."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def event(self, event: str, step: int, message: str, **details: Any) -> None:
        """Says `message` and notes it in the log."""
        self.write({"event": event, "step": step, **details})
        self.say(message)

    def say(self, message: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._live:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def idle(self, seconds: float) -> None:
        """Time spent on checkpoints and pictures, which is not counted as training."""
        self._idle += seconds

    @property
    def seconds(self) -> float:
        """Seconds since the log was opened."""
        return time.perf_counter() - self._began

    def tick(self) -> None:
        """One step is done."""
        self._bar.update()

    def loss(self, step: int, epoch: float, loss: float, lr: float) -> dict[str, Any]:
        """Logs a loss everywhere; returns the line."""
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
            "seconds": round(now - self._began, 2),
        }
        self.write(entry)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s")
        if not self._live:
            left = (self.total_steps - step) * self.images_per_step / max(rate, 1e-9)
            print(
                f"step {step}/{self.total_steps}  epoch {epoch:.2f}  loss {loss:.4f}  "
                f"lr {lr:.2e}  {rate:.1f} images/s  {_clock(left)} left",
                flush=True,
            )
        if self._tensorboard is not None:
            for name in ("loss", "lr", "images_per_s"):
                self._tensorboard.add_scalar(f"train/{name}", entry[name], step)
        return entry

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture for TensorBoard, uint8 `[H, W, 3]`."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files and the progress bar."""
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _tensorboard(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer, or None, having said so, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        print(f"no TensorBoard files: {error}", file=sys.stderr)
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=first_step or None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
