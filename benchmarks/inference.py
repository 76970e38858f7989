"""`python -m benchmarks.inference`: images/s of predict and embed beside evaluate, and kills.

Pictures are generated, the model has random weights. The three commands run in turn, each in a
process of its own, `--rounds` times; the table has the medians of the images/s that they say
themselves (loading processes included, Python's start not) and of the seconds of the whole process.
Then predict and embed are killed (`kill -9`) at `--kills` moments and started again each time: the
files must have the bytes of those of the runs before.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

CLASSES = 10
COMMANDS = {"evaluate": "", "predict": "predicted.csv", "embed": "embedded.npy"}


def make_pictures(folder: Path, count: int, size: int) -> None:
    """JPEG files of `size` pixels in class folders, with a train and a val split that are one."""
    from PIL import Image

    rng = random.Random(0)
    for number in range(count):
        path = folder / "val" / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    (folder / "train").symlink_to("val")


def make_model(folder: Path, name: str, img_size: int) -> None:
    """A classifier of random weights."""
    from convmae.data import IMAGENET
    from convmae.models import create_model
    from convmae.weights.checkpoint import save_weights

    torch.manual_seed(0)
    model = create_model(name, img_size=img_size, num_classes=CLASSES)
    classes = [f"class{number}" for number in range(CLASSES)]
    save_weights(folder, model, name, pictures=IMAGENET, classes=classes)


def command(name: str, folder: Path, options: Sequence[str], output: str = "") -> list[str]:
    """`convmae NAME` on the pictures and the model in `folder`."""
    common = ["--checkpoint", str(folder / "model"), "--data_path", str(folder / "data")]
    typed = [sys.executable, "-m", "convmae", name, *common, *options]
    if output:
        typed += ["--split", "val", "--output", str(folder / output)]
    return typed


def measure(name: str, folder: Path, options: Sequence[str]) -> tuple[float, float]:
    """Images/s that a command says, and the seconds of its process.

    Raises:
        RuntimeError: it failed.
    """
    output = COMMANDS[name]
    extra = ["--overwrite"] if output else []
    began = time.perf_counter()
    done = subprocess.run(
        [*command(name, folder, options, output), *extra], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    said = re.search(r"([\d.]+) images/s\s*$", done.stdout)
    if done.returncode or said is None:
        raise RuntimeError(f"{name} failed:\n{done.stdout}{done.stderr}")
    return float(said[1]), seconds


def kill_and_resume(
    name: str, folder: Path, options: Sequence[str], kills: int, seconds: float
) -> tuple[int, bool]:
    """Kills a command at random moments; how often it was, and whether the file is the same."""
    output = COMMANDS[name]
    killed_output = f"killed-{output}"
    typed = [*command(name, folder, options, killed_output), "--save_every", "0.5"]
    rng = random.Random(1)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            typed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            # Each of these runs goes on where the one before was.
            process.wait(timeout=rng.uniform(0.3, 0.9) * seconds)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    if not (folder / killed_output).exists():
        subprocess.run(typed, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = [output] if name == "predict" else [output, output.replace(".npy", ".csv")]
    same = all(
        (folder / file).read_bytes() == (folder / f"killed-{file}").read_bytes() for file in files
    )
    return killed, same


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="Images/s of predict and embed beside evaluate; and the same after kills.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--pictures", type=int, default=10_000, help="how many are generated")
    add("--picture_size", type=int, default=64, help="their side in pixels")
    add("--model", default="convvit_tiny", help="the classifier")
    add("--img_size", type=int, default=64, help="the side that it sees")
    add("--batch_size", type=int, default=64, help="pictures in a batch")
    add("--num_workers", type=int, default=None, help="loading processes; the usual if absent")
    add("--device", default="auto", help="where")
    add("--amp", default="auto", help="arithmetic")
    add("--rounds", type=int, default=3, help="runs of each command")
    add("--kills", type=int, default=3, help="of predict, and of embed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where a killed run came to another file."""
    args = _parser().parse_args(arguments)
    options = ["--batch_size", str(args.batch_size), "--device", args.device, "--amp", args.amp]
    if args.num_workers is not None:
        options += ["--num_workers", str(args.num_workers)]
    with tempfile.TemporaryDirectory(prefix="convmae-benchmark-") as temporary:
        folder = Path(temporary)
        print(f"generating {args.pictures} pictures ...", file=sys.stderr, flush=True)
        make_pictures(folder / "data", args.pictures, args.picture_size)
        make_model(folder / "model", args.model, args.img_size)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for number in range(args.rounds):
            for name in COMMANDS:
                print(f"round {number + 1}: {name} ...", file=sys.stderr, flush=True)
                results[name].append(measure(name, folder, options))
        usual = statistics.median(speed for speed, _ in results["evaluate"])
        print("| command | images/s | of evaluate's | least to most | process, s |")
        print("|---|--:|--:|--:|--:|")
        for name, found in results.items():
            speeds = sorted(speed for speed, _ in found)
            middle, seconds = (statistics.median(column) for column in zip(*found))
            print(
                f"| {name} | {middle:.1f} | {middle / usual:.2f} | {speeds[0]:.1f} to "
                f"{speeds[-1]:.1f} | {seconds:.1f} |"
            )
        good = True
        for name in ("predict", "embed"):
            seconds = statistics.median(seconds for _, seconds in results[name])
            killed, same = kill_and_resume(name, folder, options, args.kills, seconds)
            good = good and same
            what = "the same bytes" if same else "OTHER BYTES"
            print(f"{name}: killed {killed} times, then finished: {what}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
