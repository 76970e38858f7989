"""What a long run on many GPUs takes, reckoned from measured parts: hours, bytes, cores.

    python -m benchmarks.scale                                  # ImageNet-1K, 1600 epochs
    python -m benchmarks.scale --gpus 8 64 --network 12.5 --storage 2 --cores 32

Nothing is run but, with `--measure`, the input pipeline of this machine. The time of a step is one
that a GPU was measured with (`--card`) or given (`--step_ms`); the rest are stated assumptions.
That several GPUs keep the rate of one, as far as their network and their pictures allow, is a
prediction. `docs/scale.md` explains the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from convmae import create_model
from convmae.data.open import open_source
from convmae.data.picture import ChosenPicture
from convmae.data.source import PhotoSource
from convmae.data.transforms import PretrainTransform

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results"
CARDS = ("h100", "h200")
STEPS = {"eager": "packed", "compiled": "packed compiled", "graph": "packed graph"}
JPEG_SIZE, JPEG_QUALITY = (500, 375), 98  # about what a picture of ImageNet-1K has


@dataclass(frozen=True)
class Run:
    """A training, and what it runs on.

    Attributes:
        step_seconds: of one GPU for a batch of its own, without waiting.
        batch_size: of one GPU.
        pictures: of an epoch.
        epochs: of the run.
        picture_bytes: of a stored picture, on average.
        gradient_bytes: that are added up over all GPUs in a step.
        checkpoint_bytes: of weights and state of the optimizer.
        gpus_per_machine: GPUs that share cores, storage and network.
        cores: of a machine.
        pictures_per_core: that a core reads and crops in a second.
        storage: bytes that a machine reads in a second.
        network: bytes that a machine sends, and receives, in a second.
    """

    step_seconds: float
    batch_size: int
    pictures: int
    epochs: int
    picture_bytes: float
    gradient_bytes: float
    checkpoint_bytes: float
    gpus_per_machine: int
    cores: int
    pictures_per_core: float
    storage: float
    network: float


@dataclass(frozen=True)
class Cost:
    """What a run takes on a number of GPUs.

    Attributes:
        gpus: that train.
        rates: pictures in a second that each part could serve at most, by its name.
        exchange_seconds: of the gradients of a step, through the network of a machine.
        hours: of the run, at the lowest rate.
        cores_needed: of a machine, for the GPUs not to wait for pictures.
        read_bytes: that a machine reads in a second then.
    """

    gpus: int
    rates: dict[str, float]
    exchange_seconds: float
    hours: float
    cores_needed: float
    read_bytes: float

    @property
    def limited_by(self) -> str:
        """The part that the others wait for."""
        return min(self.rates, key=lambda name: self.rates[name])

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours


def cost(run: Run, gpus: int) -> Cost:
    """The cost of a run on `gpus` GPUs, in machines of `run.gpus_per_machine`.

    Gradients go round in a ring of machines while the backward pass still computes, so that only an
    exchange that takes longer than a step is waited for.

    Raises:
        ValueError: `gpus` is not positive, or is no multiple of the GPUs of a machine.
    """
    of_machine = min(gpus, run.gpus_per_machine)
    if gpus < 1 or gpus % of_machine:
        raise ValueError(
            f"gpus must be up to {run.gpus_per_machine}, or a multiple of it, got {gpus}"
        )
    machines = gpus // of_machine
    batch = gpus * run.batch_size
    exchange = 2 * (machines - 1) / machines * run.gradient_bytes / run.network
    computed = batch / run.step_seconds
    rates = {
        "GPUs": computed,
        "cores": machines * run.cores * run.pictures_per_core,
        "storage": machines * run.storage / run.picture_bytes,
    }
    if machines > 1:
        rates["network"] = batch / exchange
    return Cost(
        gpus=gpus,
        rates=rates,
        exchange_seconds=exchange,
        hours=run.pictures * run.epochs / min(rates.values()) / 3600,
        cores_needed=computed / machines / run.pictures_per_core,
        read_bytes=computed / machines * run.picture_bytes,
    )


def table(run: Run, counts: Sequence[int]) -> str:
    """A row for each number of GPUs, in Markdown."""
    lines = [
        "| GPUs | pictures/s | hours | GPU-hours | limited by | cores a machine | read, MB/s "
        "a machine | exchange / step, ms |",
        "|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for gpus in counts:
        found = cost(run, gpus)
        lines.append(
            f"| {gpus} | {min(found.rates.values()):,.0f} | {found.hours:.1f} "
            f"| {found.gpu_hours:,.0f} | {found.limited_by} | {found.cores_needed:.0f} of "
            f"{run.cores} | {found.read_bytes / 1e6:,.0f} | "
            f"{1e3 * found.exchange_seconds:.1f} / {1e3 * run.step_seconds:.1f} |"
        )
    return "\n".join(lines)


def measured_step(card: str, way: str) -> tuple[float, int]:
    """Seconds of a step of `STEPS`, as measured on a card, and its batch size."""
    content = json.loads((RESULTS / f"{card}-steps.json").read_text())
    for row in content["rows"]:
        if (row["case"], row["contender"]) == ("step", STEPS[way]):
            return row["median"] / 1e3, content["setting"]["batch_size"]
    raise ValueError(f"{card}-steps.json has no step that is {way}")


def pictures_per_core(size: int, count: int = 200) -> tuple[float, float]:
    """Pictures that one core reads, crops and resizes in a second, and the bytes of one.

    They are photographs of scikit-image as JPEG files of the usual size of ImageNet-1K's.
    """
    from PIL import Image
    from skimage import data

    photographs = (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    with tempfile.TemporaryDirectory() as folder:
        for i, photograph in enumerate(photographs):
            picture = Image.fromarray(photograph).resize(JPEG_SIZE)
            picture.save(Path(folder) / f"{i}.jpg", quality=JPEG_QUALITY)
        sizes = [file.stat().st_size for file in Path(folder).iterdir()]
        source = open_source(folder, split=None)
        assert isinstance(source, PhotoSource)
        transform, threads = PretrainTransform((size, size)), torch.get_num_threads()
        torch.set_num_threads(1)
        transform(ChosenPicture(source.photos, 0))
        start = time.perf_counter()
        for i in range(count):
            transform(ChosenPicture(source.photos, i % len(photographs)))
        seconds = time.perf_counter() - start
        torch.set_num_threads(threads)
    return count / seconds, sum(sizes) / len(sizes)


def positive(text: str) -> float:
    """A number above 0, of the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def positive_integer(text: str) -> int:
    """An integer above 0, of the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    number = positive(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}")
    return int(number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the assumptions and a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    add = parser.add_argument
    add("--card", choices=CARDS, default="h100", help="whose measured step is taken")
    add("--step", choices=STEPS, default="compiled", help="which of its steps; graph: of one GPU")
    add("--step_ms", type=positive, help="in place of the measured one; with --batch_size")
    add("--batch_size", type=positive_integer, help="of one GPU")
    add("--gpus", type=positive_integer, nargs="+", default=[1, 8, 16, 32, 64])
    add("--gpus_per_machine", type=positive_integer, default=8)
    add("--pictures", type=positive_integer, default=1_281_167, help="of an epoch; ImageNet-1K's")
    add("--epochs", type=positive_integer, default=1600)
    add("--model", default="convmae_base", help="whose gradients and state are counted")
    add("--picture_kb", type=positive, default=110, help="of a stored picture; ImageNet-1K's")
    add("--cores", type=positive_integer, default=96, help="of a machine")
    add("--pictures_per_core", type=positive, default=190, help="a second")
    add("--measure", action="store_true", help="measure these on this machine")
    add("--storage", type=positive, default=5, help="GB/s that a machine reads")
    add("--network", type=positive, default=25, help="GB/s that a machine sends, and receives")
    options = parser.parse_args(arguments)
    if (options.step_ms is None) != (options.batch_size is None):
        parser.error("--step_ms and --batch_size belong together: the time is that of the batch")
    if options.step == "graph" and max(options.gpus) > 1 and options.step_ms is None:
        parser.error("--step graph: a step captured in a CUDA graph trains on one GPU, --gpus 1")
    seconds, batch_size = measured_step(options.card, options.step)
    origin = f"{options.step}, measured on one {options.card.upper()}"
    if options.step_ms is not None:
        seconds, batch_size, origin = options.step_ms / 1e3, options.batch_size, "given"
    per_core, core_origin = options.pictures_per_core, "assumed"
    if options.measure:
        per_core, size = pictures_per_core(224)
        core_origin = f"measured on this machine, of {size / 1e3:.0f} kB"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(options.model).parameters())
    run = Run(
        step_seconds=seconds,
        batch_size=batch_size,
        pictures=options.pictures,
        epochs=options.epochs,
        picture_bytes=1e3 * options.picture_kb,
        gradient_bytes=4 * parameters,
        checkpoint_bytes=3 * 4 * parameters,
        gpus_per_machine=options.gpus_per_machine,
        cores=options.cores,
        pictures_per_core=per_core,
        storage=1e9 * options.storage,
        network=1e9 * options.network,
    )
    try:
        rows = table(run, options.gpus)
    except ValueError as error:
        parser.error(f"--{error}")
    print(
        f"{options.model}, {parameters / 1e6:.1f} M parameters; {run.pictures:,} pictures, "
        f"{run.epochs} epochs\n"
        f"step of {batch_size}: {1e3 * seconds:.1f} ms ({origin})\n"
        f"a core: {per_core:.0f} pictures/s ({core_origin}); a machine: {run.gpus_per_machine} "
        f"GPUs, {run.cores} cores, {options.storage:g} GB/s of storage, {options.network:g} GB/s "
        f"of network\ndata {run.pictures * run.picture_bytes / 1e9:.0f} GB, a checkpoint "
        f"{run.checkpoint_bytes / 1e9:.2f} GB\n\n{rows}"
    )


if __name__ == "__main__":
    main()
