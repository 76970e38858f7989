"""What predicting and embedding share: a model run over pictures, resumable, in many processes."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.config import MessageError, OptionError, for_option
from convmae.data import EvalTransform, normalise, open_source
from convmae.data.named import files_of, named_batches
from convmae.data.source import PhotoSource
from convmae.data.stream import ShardSource
from convmae.models.task_names import split_task
from convmae.records.parts import PartWriter, Rows, WriteError, disk_errors, open_parts
from convmae.records.row_files import check_format
from convmae.tasks.accuracy import check_channels
from convmae.training.distributed import join
from convmae.training.interrupts import Interrupts
from convmae.training.machine import pick_dtype
from convmae.weights.checkpoint import open_weights
from convmae.weights.networks import encoder_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from convmae.config import InferenceConfig, ReadOptions, RowsConfig
    from convmae.data import Source, Statistics
    from convmae.data.named import NamedBatch
    from convmae.records.parts import Parts
    from convmae.training.distributed import World
    from convmae.weights.checkpoint import Weights

# Options that change no row: a run goes on with others.
FREE = (
    *("checkpoint", "data_path", "output", "overwrite", "save_every", "num_workers"),
    *("max_unreadable", "device", "amp", "input_size"),  # `_about` has what the last come to
)
NAMED_AT_MOST = 5  # unreadable pictures named on the terminal; the table names all
NOT_FINITE = "the model's output for it is not finite"


@dataclass
class Loaded:
    """A model on its device, and how to call it."""

    weights: Weights
    model: Any
    statistics: Statistics
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """The arithmetic of `--amp`."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half)


def load(config: InferenceConfig, device: torch.device) -> Loaded:
    """The model of `--checkpoint`, for pictures of `--input_size`.

    Of a run that pretrained a network of timm it is that network, without a classifier.

    Raises:
        OptionError: there is none, or it cannot take pictures of that size.
    """
    with for_option("checkpoint"):
        weights = encoder_weights(open_weights(config.checkpoint))
        task = split_task(weights.model)[0].removesuffix(":")
        if task:
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {weights.model}, neither a classifier "
                f"nor an encoder; `convmae {task} predict` and `convmae {task} evaluate` take it"
            )
        model: Any = weights.build_model(device)
        statistics = weights.statistics
    if config.size is not None and config.size != model.img_size:
        if not hasattr(model, "set_input_size"):
            height, width = model.img_size
            raise OptionError(
                f"--input_size {config.size[0]} x {config.size[1]}: the {type(model).__name__} of "
                f"--checkpoint takes {height} x {width} only; convmae convert --kind convvit "
                "--input_size makes an encoder of another size"
            )
        model.set_input_size(config.size)
    dtype, _ = pick_dtype(config.amp, device)
    return Loaded(weights, model, statistics, device, dtype)


# -- the summary ----------------------------------------------------------------------------------


@dataclass
class RowsSummary:
    """What `predict` or `embed` did.

    Attributes:
        output: the file; None where the table was printed.
        pictures: how many rows it has.
        unreadable: how many of them could not be read, or came to no finite numbers.
        examples: names of the first of these, and why.
        shards: how many there are.
        damaged_shards: those whose end is lost, so that not all their pictures have a row, and why.
        computed: pictures of this run; the others were stored by one before.
        seconds: what computing them took.
        stopped: the signal that ended the run before the table was written; None if it was.
        max_unreadable: the share of unreadable pictures that was allowed.
    """

    output: Path | None
    pictures: int
    unreadable: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    shards: int = 0
    damaged_shards: list[tuple[str, str]] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0
    stopped: int | None = None
    max_unreadable: float = 1.0

    @property
    def images_per_s(self) -> float:
        """Pictures that this run computed in a second."""
        return self.computed / self.seconds if self.seconds else 0.0

    @property
    def failed(self) -> bool:
        """Whether more pictures were unreadable, or more shards damaged, than allowed."""
        limit, damaged = self.max_unreadable, len(self.damaged_shards)
        return self.unreadable > limit * self.pictures or damaged > limit * self.shards

    def __str__(self) -> str:
        where = "printed" if self.output is None else f"wrote {self.output}:"
        parts = [f"{where} {self.pictures} pictures, {self.unreadable} of them unreadable"]
        if self.damaged_shards:
            parts.append(f"{len(self.damaged_shards)} shards damaged")
        if self.computed < self.pictures:
            parts.append(f"{self.pictures - self.computed} of them from before")
        return f"{', '.join(parts)}, {self.images_per_s:.1f} images/s"


def report(summary: RowsSummary) -> int:
    """Says what was done, and what was wrong; returns the exit status."""
    if summary.stopped is not None:
        return 128 + summary.stopped
    if int(os.environ.get("RANK", "0")) == 0:
        for name, reason in summary.examples:
            print(f"warning: unreadable: {name}: {reason}", file=sys.stderr)
        if summary.unreadable > len(summary.examples):
            print("warning: others that are unreadable are named in the table", file=sys.stderr)
        for name, reason in summary.damaged_shards:
            print(f"warning: damaged shard: {name}: {reason}", file=sys.stderr)
        print(summary, file=sys.stderr if summary.output is None else sys.stdout)
        if summary.failed:
            what = f"{summary.unreadable} of {summary.pictures} pictures are unreadable"
            if summary.damaged_shards:
                what += f", {len(summary.damaged_shards)} of {summary.shards} shards damaged"
            print(
                f"convmae: error: {what}, more than --max_unreadable {summary.max_unreadable:g} "
                "allows",
                file=sys.stderr,
            )
    return 1 if summary.failed else 0


# -- the job --------------------------------------------------------------------------------------


class Job(ABC):
    """What is computed of pictures, and how it is written.

    Attributes:
        classes: the names of the classes that labels of pictures may be of; None for any.
        true_classes: the classes of the pictures, where they have some and these are among them.
    """

    classes: list[str] | None
    true_classes: list[str] | None = None

    @abstractmethod
    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Of normalised images `[N, C, H, W]` columns `[N, ...]` in float32 or int64."""

    @abstractmethod
    def finish(self, columns: dict[str, np.ndarray], reasons: list[str]) -> dict[str, np.ndarray]:
        """The columns as they are stored; notes in `reasons` what is not to be trusted."""

    @abstractmethod
    def write(self, parts: Parts, output: Path | None) -> None:
        """Writes the table to a file, or prints it."""


def run(config: RowsConfig, make: Callable[[Loaded], Job]) -> RowsSummary:
    """Computes a row for each picture and writes the table.

    What was computed is stored in parts beside the table; where a run of the same options, weights
    and pictures was interrupted, this one goes on. Batches are divided over the processes.

    Args:
        config: the options.
        make: the job, from the model.

    Raises:
        OptionError, convmae.data.DataError: something that was asked for cannot be; nothing was
            computed.
        convmae.records.parts.WriteError: the disk refused; what was stored before is kept.
        KeyboardInterrupt: Ctrl-C; what was computed is stored.
    """
    config.validate()
    _check_output(config)
    check_format(config.table_format)
    with ExitStack() as stack:
        with join(config.device, "auto") as world, Interrupts() as interrupts:
            loaded = load(config, world.device)
            job = make(loaded)
            reading, notes = config.reading.over(loaded.weights.reading)
            source = _open(config, reading)
            if world.main:
                for note in (*notes, *source.notes, *map(str, source.left_out)):
                    print(f"note: {note.removeprefix('note: ')}", file=sys.stderr)
            check_channels(source, loaded.model, " ".join(config.paths))
            job.true_classes = _true_classes(source, job.classes)
            parts, missing = _agreed_parts(config, loaded, source, world, stack)
            summary = _summary(config, source)
            total, rank = len(missing), world.rank
            own = missing[total * rank // world.size : total * (rank + 1) // world.size]
            began = time.perf_counter()
            interrupts.hold()
            try:
                done = _compute(config, loaded, job, source, parts, own, world, interrupts)
            except Exception:
                if config.output is not None:
                    _say_stopped(parts)
                raise
            summary.computed = round(world.mean(done)[0] * world.size)
            summary.seconds = time.perf_counter() - began
            if world.any(interrupts.asked)[0]:
                summary.stopped = interrupts.number or signal.SIGTERM
            elif world.main:
                _count(parts, summary)
            summary = world.share(summary)
        if summary.stopped is not None:
            if world.main and config.output is not None:
                _say_stopped(parts)
            if summary.stopped == signal.SIGINT:
                raise KeyboardInterrupt
        elif world.main:
            with disk_errors(summary.output or parts.folder):
                job.write(parts, summary.output)
            parts.delete()
    return summary


def _compute(
    config: RowsConfig,
    loaded: Loaded,
    job: Job,
    source: Source,
    parts: Parts,
    own: list[int],
    world: World,
    interrupts: Interrupts,
) -> int:
    """Computes the batches `own` and stores their rows; returns how many rows."""
    from tqdm import tqdm

    size = config.batch_size
    total = sum(min(size, source.pictures - number * size) for number in own)
    batches: Any = named_batches(
        source,
        EvalTransform(loaded.model.img_size, config.crop_pct),
        size,
        own,
        workers=source.workers if config.num_workers is None else config.num_workers,
        pin=loaded.device.type == "cuda",
        labelled=job.true_classes is not None,
    )
    writer = PartWriter(parts, config.save_every)
    stored = source.pictures - total if world.size == 1 else 0
    bar = tqdm(
        total=stored + total,
        initial=stored,
        unit="images",
        dynamic_ncols=True,
        disable=not world.main,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    done = 0
    try:
        with bar:
            for batch in batches if own else ():
                writer.add(batch.number, _rows(batch, loaded, job))
                done += len(batch.names)
                bar.update(len(batch.names))
                if interrupts.asked:
                    break
    finally:
        batches.close()  # ends its processes
        writer.flush()
    return done


@torch.inference_mode()
def _rows(batch: NamedBatch, loaded: Loaded, job: Job) -> Rows:
    """The rows of one batch."""
    images = batch.images.to(loaded.device, non_blocking=True)
    with loaded.autocast():
        computed = job.compute(normalise(images, *loaded.statistics))
    columns = {name: values.cpu().numpy() for name, values in computed.items()}
    reasons = list(batch.reasons)
    columns = job.finish(columns, reasons)
    return Rows(batch.names, batch.labels.numpy(), reasons, columns)


def mark_not_finite(values: np.ndarray, reasons: list[str]) -> None:
    """Notes the rows of `values` that hold NaN or an infinity as without a result."""
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    for place in np.flatnonzero(~finite):
        reasons[place] = reasons[place] or NOT_FINITE


def _count(parts: Parts, summary: RowsSummary) -> None:
    for rows in parts.read(columns=False):
        for name, reason in zip(rows.names, rows.reasons):
            if reason:
                summary.unreadable += 1
                if len(summary.examples) < NAMED_AT_MOST:
                    summary.examples.append((name, reason))


def _say_stopped(parts: Parts) -> None:
    try:
        left = len(parts.missing())
    except WriteError:
        return  # the folder is gone: what stopped the run says so
    print(
        f"convmae: stopped; {parts.batches - left} of {parts.batches} batches are stored in "
        f"{parts.folder}: the same command goes on from there",
        file=sys.stderr,
    )


# -- pictures -------------------------------------------------------------------------------------


def _open(config: RowsConfig, reading: ReadOptions) -> Source:
    """The pictures; those that cannot be read are counted at the end."""
    place: Any = config.paths if len(config.paths) > 1 else config.paths[0]
    return open_source(
        place,
        split=config.split,
        max_unreadable=1.0,
        labelled=False,
        reading=reading,
        choice=config.picture_choice,
    )


def _true_classes(source: Source, classes: list[str] | None) -> list[str] | None:
    """The classes of the pictures, if their names are among `classes`; else None."""
    if source.classes is None or (classes is not None and not set(source.classes) <= set(classes)):
        return None
    return source.classes


def _summary(config: RowsConfig, source: Source) -> RowsSummary:
    summary = RowsSummary(output_of(config), source.pictures, max_unreadable=config.max_unreadable)
    if isinstance(source, ShardSource):
        summary.shards = len(source.shards.names)
        summary.damaged_shards = [(name, reason) for name, reason in source.failures]
    return summary


def _data_digest(source: Source) -> str:
    """What tells one set of pictures from another: files, their sizes and dates, and the number."""
    digest = hashlib.sha256(f"{source.pictures} {source.channels} {source.dtype}".encode())
    root = source.root if isinstance(source, PhotoSource) else ""
    for file in files_of(source):
        text = file.removeprefix(root)
        try:
            found = os.stat(file)
            text += f" {found.st_size} {found.st_mtime_ns}"
        except OSError:  # an address, or it has gone
            text += " -"
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def _weights_digest(weights: Weights) -> str:
    digest = hashlib.sha256(f"{weights.describe()} {weights.pictures} {weights.classes}".encode())
    for name, value in sorted(weights.state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# -- where it is written --------------------------------------------------------------------------


def _check_output(config: RowsConfig) -> None:
    """Raises `OptionError` where the table cannot be written, before anything is read."""
    if config.output is None:
        return
    output = Path(config.output).expanduser()
    if output.is_dir():
        raise OptionError(f"--output {config.output!r} is a folder; expected a file")
    if not output.absolute().parent.is_dir():
        raise OptionError(f"--output {config.output!r}: the folder {output.parent} does not exist")
    here = Path(os.path.realpath(output.absolute().parent))
    for path in config.paths:
        data = Path(path).expanduser()
        if data.is_dir() and here.is_relative_to(os.path.realpath(data)):
            raise OptionError(
                f"--output {config.output!r} is inside --data_path {path!r}; expected a file "
                "elsewhere, so that the pictures stay as they are"
            )


def output_of(config: RowsConfig) -> Path | None:
    """The file to write; None where the table is printed."""
    return None if config.output is None else Path(config.output).expanduser()


def _agreed_parts(
    config: RowsConfig, loaded: Loaded, source: Source, world: World, stack: ExitStack
) -> tuple[Parts, list[int]]:
    """The parts of the table and the batches that are missing, the same in every process.

    A table that is printed has its parts in a temporary folder, which goes with `stack`.
    """
    found: Any = None
    if world.main:
        try:
            output = output_of(config)
            if output is None:
                folder = tempfile.TemporaryDirectory(prefix="convmae-", ignore_cleanup_errors=True)
                output = Path(stack.enter_context(folder), "table")
            about = _about(config, loaded, source)
            batches = source.evaluation_steps(config.batch_size)
            parts = open_parts(output, batches, config.batch_size, about, config.overwrite)
            found = parts, parts.missing()
        except MessageError as error:
            found = error
    found = world.share(found)
    if isinstance(found, MessageError):
        raise found
    return found


def _about(config: RowsConfig, loaded: Loaded, source: Source) -> dict[str, Any]:
    """All that the rows depend on."""
    options = {name: v for name, v in asdict(config).items() if name not in FREE}
    return options | {
        "arithmetic": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "input_size": list(loaded.model.img_size),
        "format": config.table_format,
        "weights": _weights_digest(loaded.weights),
        "pictures": _data_digest(source),
    }
