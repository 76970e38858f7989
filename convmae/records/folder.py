"""The folder of a run: where everything lies that the run leaves."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.config import OptionError, read_yaml
from convmae.files import (
    CHECKPOINT,
    replaced_folder,
    replacing,
    why_no_folder,
    with_digest_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DRAWN = ("reconstruction", "prediction")
STEP_PICTURE = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, each named here and nowhere else; what is in `checkpoint` is weights'."""

    path: Path
    drawn: str = "reconstruction"
    """What pictures of the model's work are called, in the singular."""

    @classmethod
    def of(cls, path: str | Path | RunFolder, drawn: str | None = None) -> RunFolder:
        """The folder of that path, in which `~` may stand for the user's.

        Args:
            path: the folder, or what was made of it here.
            drawn: `RunFolder.drawn`; by default what a run has drawn there, if one has.
        """
        if isinstance(path, RunFolder):
            return path
        here = Path(path).expanduser()
        if drawn is None:
            drawn = next((kind for kind in DRAWN if os.path.isdir(here / f"{kind}s")), DRAWN[0])
        return cls(here, drawn)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def lock(self) -> Path:
        """Says which process has the folder, while one has."""
        return self.path / "run.lock"

    @property
    def log(self) -> Path:
        """A JSON object a line: losses, evaluations, events."""
        return self.path / "log.txt"

    @property
    def options(self) -> Path:
        """The options, as `--config` takes them."""
        return self.path / "args.yaml"

    @property
    def environment(self) -> Path:
        """Command, versions, devices and processes, as JSON."""
        return self.path / "environment.json"

    @property
    def val_list(self) -> Path:
        """Names of the pictures that were kept out of training, as `--val_list` takes them."""
        return self.path / "val_list.txt"

    @property
    def checkpoint(self) -> Path:
        """The folder of the last checkpoint."""
        return self.path / CHECKPOINT

    @property
    def best(self) -> Path:
        """The folder of the best weights."""
        return self.path / "best"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The run's name at Weights & Biases, so that a resumed run goes on in the same one."""
        return self.path / "wandb_id.txt"

    @property
    def report(self) -> Path:
        """A page with all that people want to see."""
        return self.path / "report.html"

    @property
    def evaluation(self) -> Path:
        """The folder of what the last evaluation found, class by class and picture by picture."""
        return self.path / "evaluation"

    @property
    def loss_picture(self) -> Path:
        """The curve of the loss."""
        return self.path / "loss.png"

    @property
    def picture(self) -> Path:
        """The last picture of what the model does."""
        return self.path / f"{self.drawn}.png"

    @property
    def step_picture_folder(self) -> Path:
        """The folder of the pictures after steps."""
        return self.path / f"{self.drawn}s"

    def step_picture(self, step: int) -> Path:
        """The picture after a step."""
        return self.step_picture_folder / f"step-{step:08}.png"

    def page_picture(self, path: Path) -> Path:
        """The smaller copy, for the report, of a picture."""
        return self.step_picture_folder / "page" / f"{path.stem}.webp"

    def step_pictures(self) -> list[tuple[int, Path]]:
        """The step and the path of every picture after a step, the first step's first."""
        files = self.step_picture_folder.glob("*.png")
        matches = ((STEP_PICTURE.fullmatch(path.name), path) for path in files)
        return sorted((int(match[1]), path) for match, path in matches if match)

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, or one that was being replaced."""
        return self.checkpoint.exists() or replaced_folder(self.checkpoint).exists()

    def traces(self) -> list[str]:
        """Names of what a run has left here already."""
        kept = (self.log, self.checkpoint, replaced_folder(self.checkpoint), self.options)
        return [path.name for path in kept if path.exists()]

    def check_writable(self) -> None:
        """Raises `OptionError` where the folder is a file, or cannot be made or written."""
        reason = why_no_folder(self.path)
        if reason is not None:
            raise OptionError(f"--output_dir {str(self)!r} cannot be written: {reason}")

    def write_options(self, values: dict[str, Any]) -> None:
        """Writes the options of the run."""
        import yaml

        with replacing(self.options) as new:
            text = yaml.safe_dump(values, sort_keys=False)
            new.write_text(with_digest_line(text), encoding="utf-8")

    def write_environment(self, entries: dict[str, str]) -> None:
        """Writes where and how the run was made."""
        with replacing(self.environment) as new:
            new.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    def write_val_list(self, names: Iterable[str]) -> None:
        """Writes which pictures were kept out of training."""
        with replacing(self.val_list) as new:
            text = "".join(f"{name}\n" for name in names)
            new.write_text(text, encoding="utf-8", errors="surrogateescape")

    def read_options(self) -> dict[str, Any]:
        """The options of the run; empty where they cannot be read."""
        return _read_mapping(lambda: read_yaml(self.options))

    def read_environment(self) -> dict[str, str]:
        """Where and how the run was made; empty where that cannot be read."""
        entries = _read_mapping(lambda: json.loads(self.environment.read_text(encoding="utf-8")))
        return {str(name): str(value) for name, value in entries.items()}


def _read_mapping(read: Callable[[], Any]) -> dict[str, Any]:
    try:
        values = read()
    except (OSError, ValueError, RecursionError):  # of YAML, JSON and UTF-8 as well
        return {}
    return values if isinstance(values, dict) else {}
