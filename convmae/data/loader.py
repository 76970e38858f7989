"""Batches of a whole run, from any step on: what a run sees does not depend on where it began."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import traceback
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset, Sampler

from convmae.config import MessageError
from convmae.data.errors import DataError, Failure, LoadingError, UnreadableError
from convmae.data.picture import NO_LABEL, ChosenPicture
from convmae.seeds import Stream, derive_seed, generator_for, seeded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from convmae.data.picture import Photos
    from convmae.data.transforms import Transform


class Batch(NamedTuple):
    """What one step of one process sees."""

    images: Tensor
    """uint8, uint16 or float32 `[N, C, H, W]`, as stored (not normalised)."""
    labels: Tensor
    """int64 `[N]`; -1 where there is none."""
    keys: Tensor
    """int64 `[N, 2]`, the epoch and the sample: what random numbers for a picture derive from."""
    failures: list[Failure]
    """The pictures that could not be read on the way."""
    seconds: float
    """What preparing this batch took in the process that did it."""
    targets: Any = None
    """What belongs to the images besides a label: int64 label maps `[N, H, W]` to segment, a list
    of one value an image where they cannot be stacked (objects to detect); None if nothing does."""


# In the errors of PyTorch and of the system where memory, shared or not, is used up.
SHARED_MEMORY = ("shared memory", "</torch_")
BROKEN = (ConnectionError, EOFError)  # where a loading process ends while it hands over a batch
SECONDS = 5.0  # that its end is waited for
LACKING_MEMORY = ("annot allocate memory", "can't allocate memory")

SampleKey = tuple[int, int]  # epoch, sample


class Sample(NamedTuple):
    """What a batch is made of."""

    image: Tensor
    label: int
    target: Any = None


def make_batch(
    samples: Sequence[Sample], keys: list[SampleKey], failures: list[Failure], began: float
) -> Batch:
    """Stacks samples; `began` is `time.perf_counter()` at the start of the work."""
    images = torch.stack([sample.image.contiguous() for sample in samples])
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    key_tensor = torch.tensor(keys, dtype=torch.int64)
    targets: Any = [sample.target for sample in samples]
    if all(target is None for target in targets):
        targets = None
    elif all(isinstance(target, Tensor) for target in targets):
        targets = torch.stack(targets)
    return Batch(images, labels, key_tensor, failures, time.perf_counter() - began, targets)


class RunSampler(Sampler[list[SampleKey]]):
    """The batches of steps `first` to `last - 1` of a run, as lists of `(epoch, sample)`.

    Every epoch is a fresh permutation from `(seed, epoch)`, cut into `batches_per_epoch` whole
    batches of `batch_size * world` (what is left over is dropped), of which process `rank` takes
    its contiguous part.

    Args:
        num_samples: samples in an epoch.
        batch_size: samples in a batch of one process.
        batches_per_epoch: at most `num_samples // (batch_size * world)`.
        first, last: batches counted over the whole run.
        seed: of the permutations.
        rank, world: which process this is, of how many.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        batches_per_epoch: int,
        first: int,
        last: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.batches_per_epoch = batches_per_epoch
        self.first, self.last, self.seed = first, last, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order: list[int] = []
        ordered_epoch = -1
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.batches_per_epoch)
            if epoch != ordered_epoch:
                generator = generator_for(self.seed, Stream.ORDER, epoch)
                order = torch.randperm(self.num_samples, generator=generator).tolist()
                ordered_epoch = epoch
            start = (position * self.world + self.rank) * self.batch_size
            yield [(epoch, sample) for sample in order[start : start + self.batch_size]]


class EvaluationSampler(Sampler[list[SampleKey]]):
    """Every sample once over all processes, as lists of `(0, sample)`, in order.

    All processes get the same number of whole batches: where the samples end, numbers from
    `num_samples` on stand for fillers.

    Args:
        num_samples: samples in all.
        batch_size: samples in a batch of one process.
        rank, world: which process this is, of how many.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number in range(len(self)):
            start = (number * self.world + self.rank) * self.batch_size
            yield [(0, start + place) for place in range(self.batch_size)]


class PictureDataset(Dataset[Sample]):
    """`transform` of sample `i` of epoch `e`: random numbers depend on `(seed, e, i)` alone.

    Sample `i` comes from picture `i % len(photos)`. A picture that cannot be read, or whose target
    cannot, is replaced, label and all, by the next one that can (the same in every run), and
    reported.

    Args:
        photos: where the pictures come from.
        transform: what is made of a picture.
        seed: with the epoch and the sample, all that randomness depends on.
    """

    def __init__(self, photos: Photos, transform: Transform, seed: int = 0) -> None:
        self.photos, self.transform, self.seed = photos, transform, seed

    def sample(self, epoch: int, sample: int) -> tuple[Sample, list[Failure]]:
        """The sample, and the pictures that could not be read on the way.

        Raises:
            DataError: no picture at all could be read.
        """
        with seeded(derive_seed(self.seed, Stream.SAMPLE, epoch, sample)):
            return read_or_next(self.photos, sample, self.transform)

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        began = time.perf_counter()
        done = [self.sample(*key) for key in keys]
        failures = [failure for _, sample_failures in done for failure in sample_failures]
        return make_batch([sample for sample, _ in done], keys, failures, began)


class EvaluationDataset(PictureDataset):
    """Each picture once: one that cannot be read is a filler (zeros, label -1), and reported.

    The target of a filler is what the transform says. It is as large as the others in its batch.
    """

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        began = time.perf_counter()
        found: list[Sample | None] = []
        failures = []
        for _, index in keys:
            sample = None
            if index < len(self.photos):
                try:
                    with seeded(derive_seed(self.seed, Stream.EVALUATION, index)):
                        sample = read_sample(self.photos, index, self.transform)
                except UnreadableError as error:
                    failures.append(Failure(self.photos.name(index), str(error)))
            found.append(sample)
        sizes = {tuple(sample.image.shape[1:]) for sample in found if sample is not None}
        if len(sizes) > 1:
            words = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise DataError(
                f"pictures of one batch have sizes of {words} pixels; give --eval_batch_size 1"
            )
        height, width = next(iter(sizes), self.transform.size)
        image = torch.zeros(self.photos.channels, height, width, dtype=self.photos.dtype)
        filler = Sample(image, NO_LABEL, self.transform.target_of_filler((height, width)))
        samples = [filler if sample is None else sample for sample in found]
        return make_batch(samples, keys, failures, began)


def read_sample(photos: Photos, index: int, transform: Transform) -> Sample:
    """Picture `index` as `transform` gives it: an image, or an image and its target.

    Raises:
        UnreadableError: picture or target cannot be read.
    """
    made = transform(ChosenPicture(photos, index))
    image, target = made if isinstance(made, tuple) else (made, None)
    return Sample(image, photos.label(index), target)


def read_or_next(photos: Photos, index: int, transform: Transform) -> tuple[Sample, list[Failure]]:
    """Picture `index % len(photos)` or the next that can be read; what failed.

    Raises:
        DataError: not one of the pictures can be read.
    """
    failures: list[Failure] = []
    for step in range(len(photos)):
        candidate = (index + step) % len(photos)
        try:
            return read_sample(photos, candidate, transform), failures
        except UnreadableError as error:
            failures.append(Failure(photos.name(candidate), str(error)))
    name, reason = failures[0] if failures else ("none", "")
    raise DataError(f"none of the {len(photos)} pictures can be read; the first, {name}: {reason}")


def run_batches(
    dataset: Dataset[Any],
    sampler: Iterable[list[Any]] | None,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Any]:
    """What `dataset.__getitems__` makes of each list of `sampler`, or what `dataset` yields.

    The loading processes live until the iterator ends or is deleted.

    Args:
        dataset: by index, or iterable where `sampler` is None.
        sampler: lists of indices.
        workers: loading processes; 0 loads in this one.
        pin: copies tensors to page-locked memory.

    Raises:
        DataError: from the dataset, without the traceback of another process.
        LoadingError: a loading process died, or memory was lacking.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=1 if sampler is not None else None,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_unchanged,
        worker_init_fn=_begin_worker,
    )
    iterator: Any = None
    children: list[Any] = []
    failure: MessageError
    try:
        iterator, children = _begin(loader)
        yield from iterator
        return
    except Exception as error:
        # A frame of torch in the traceback refers to the error, which refers to the traceback: the
        # loading processes would live on.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, DataError):
            failure = DataError(error.with_flags.rpartition("DataError: ")[2].strip())
        else:
            if children and isinstance(error, BROKEN):
                _await_a_death(children)
            reason = why_loading_failed(error, [child.exitcode for child in children], workers)
            if reason is None:
                raise
            failure = LoadingError(reason)
    iterator = None  # the loading processes end with it
    raise failure


def _begin(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[Any]]:
    """An iterator, and its loading processes.

    PyTorch would raise an error wherever the main thread is when a loading process dies, in the
    middle of a step or a save: its handler of SIGCHLD is taken away. The iterator notices the death
    too, when it next waits for a batch.
    """
    before = {child.pid for child in multiprocessing.active_children()}
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    iterator = iter(loader)
    children = [c for c in multiprocessing.active_children() if c.pid not in before]
    if main:
        of_torch = getattr(handler, "__module__", "").startswith("torch.")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch or handler is None else handler)
    return iterator, children


def _await_a_death(children: Sequence[Any]) -> None:
    """Waits for the exit status of a loading process, which comes a moment after the error."""
    ended = wait([child.sentinel for child in children], SECONDS)
    for child in children:
        if child.sentinel in ended:  # its files are closed, but it may not be gone yet
            child.join(SECONDS)


def why_loading_failed(
    error: BaseException, statuses: Sequence[int | None], workers: int
) -> str | None:
    """What happened to loading processes, and the way out; None where the program is at fault.

    Args:
        error: that the main process got.
        statuses: exit statuses of the loading processes; of a signal negative, None if it runs.
        workers: how many there are.
    """
    fewer = f"give fewer --num_workers (now {workers})"
    dead = [status for status in statuses if status]
    text = str(error)
    if -getattr(signal, "SIGBUS", 0) in dead or any(word in text for word in SHARED_MEMORY):
        return (
            f"a loading process found no room in the shared memory {_shared_memory()}, through "
            f"which pictures pass: {fewer}, or more shared memory (docker run --shm-size 8g)."
        )
    if -getattr(signal, "SIGKILL", 9) in dead:
        return (
            "a loading process was killed (SIGKILL), as the system does when memory runs out: "
            f"{fewer}, or more memory (of the container or job)."
        )
    noticed = "exited unexpectedly" in text  # PyTorch's words for a death
    if noticed or (dead and isinstance(error, BROKEN)):
        how = f" ({_in_words(dead[0])})" if dead else ""
        return f"a loading process ended by itself or was ended{how}: {fewer}, or 0 to see why."
    if isinstance(error, MemoryError) or any(word in text for word in LACKING_MEMORY):
        return f"there is no memory left to load pictures: {fewer}, or a smaller --batch_size."
    if "Too many open files" in text:
        return f"too many files are open: {fewer}, or raise the limit (ulimit -n 65536)."
    return None


def _in_words(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _shared_memory() -> str:
    """Where pictures pass from process to process, and how large it is."""
    try:
        total = shutil.disk_usage("/dev/shm").total
    except OSError:
        return "of the system"
    return f"/dev/shm ({total / 2**20:,.0f} MiB in all)"


def default_workers() -> int:
    """Loading processes: one for each core that this process may use but one, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)) - 1)
    return min(8, (os.cpu_count() or 1) - 1)


def _unchanged(value: Any) -> Any:
    """No collation: the dataset makes whole batches."""
    return value


def _begin_worker(worker: int) -> None:
    MessageError.keep_flags = True  # PyTorch hands over the text of an error
    _ignore_signals()


def _ignore_signals() -> None:
    """Leaves signals, which reach the whole process group, to the main process.

    SIGTERM from the main process itself is obeyed: Python sends it when it exits, and waits.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exits on SIGTERM from the parent alone; a signal handler could not see who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
