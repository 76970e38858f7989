"""Tries a wheel as its users meet it: `python -m release.try_wheel dist/convmae-....whl`.

In an empty virtual environment, outside of the repository and with no compiler on the PATH: puts
`convmae[train]` there from the wheel, pretrains a small model on photographs, draws the first
reconstructed picture, and says how long that took; then runs the commands and the programs of
README.md as they stand there, on a few pictures.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = (  # an epoch of 64 steps
    "convmae pretrain --data_path demo --model convmae_tiny --input_size 96 --batch_size 8 "
    "--epochs 1 --warmup_epochs 0 --output_dir first",
    "convmae reconstruct --checkpoint first --images demo --output first.png",
)
# What README.md leaves open ("...", recipes of days) is given by these options in its place.
SHORT = "--epochs 1 --warmup_epochs 0 --batch_size 2"
TRAININGS = (
    f"convmae pretrain --data_path my_pictures --model convmae_base --output_dir runs/mine {SHORT}",
    "convmae finetune --data_path my_labelled --finetune runs/mine "
    f"--output_dir runs/classifier {SHORT}",
)
MAKE_PICTURES = """
import pathlib, shutil, skimage
source = pathlib.Path(skimage.__file__).parent / "data"
names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
for number, name in enumerate(names):
    folders = ["my_pictures", "new_pictures"] if number < 2 else []
    kind = "odd" if number % 2 else "even"
    folders += [f"my_labelled/train/{kind}", f"my_labelled/val/{kind}"]
    for folder in folders:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder)
"""


def commands(text: str) -> list[str]:
    """The commands of the section "Train" that use what the trainings left."""
    section = text.partition("\n## Train\n")[2].partition("\n## ")[0]
    names = "evaluate|predict|embed|reconstruct"
    lines = re.findall(rf"^    (convmae (?:{names}) [^#\n]*)", section, re.M)
    if len(lines) < 4:
        raise SystemExit(f"README.md has {lines} under Train, expected four commands or more")
    return lines


def programs(text: str) -> str:
    """All programs of a page as one: later ones use the imports of earlier ones."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    if not blocks:
        raise SystemExit("README.md has no program")
    return "\n".join(blocks)


class Trial:
    """Runs commands in a folder, with a PATH that has an environment only, and times them."""

    def __init__(self, folder: Path, scripts: Path) -> None:
        self.folder, self.scripts = folder, scripts
        left_out = ("PYTHONPATH", "CUDA_HOME", "CC", "CXX")
        self.environment = {k: v for k, v in os.environ.items() if k not in left_out}
        self.environment["PATH"] = str(scripts)

    def run(self, *command: str) -> float:
        """Runs a command; returns its seconds.

        Raises:
            SystemExit: it failed; with what it printed.
        """
        begin = time.monotonic()
        done = subprocess.run(
            [self.scripts / command[0], *command[1:]],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - begin
        shown = " ".join(command) if len(command) < 20 else " ".join(command[:20])
        print(f"{seconds:7.1f} s  {shown.partition(chr(10))[0]}", flush=True)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}\nended with exit code {done.returncode}: {shown}")
        return seconds


def main(arguments: list[str]) -> None:
    """Ends with an error if one step fails."""
    parser = argparse.ArgumentParser(prog="python -m release.try_wheel", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--folder", type=Path, help="where to work; removed first, kept at the end")
    options = parser.parse_args(arguments)
    if not options.wheel.is_file() or options.wheel.suffix != ".whl":
        parser.error(f"{options.wheel} is no wheel; expected a file that `make wheel` wrote")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="convmae-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    venv.create(folder / "venv", with_pip=True)
    trial = Trial(folder, folder / "venv" / "bin")
    wheel = options.wheel.resolve().as_uri()
    seconds = trial.run("python", "-m", "pip", "install", "--quiet", f"convmae[train] @ {wheel}")
    seconds += sum(trial.run(*command.split()) for command in FIRST)
    picture = folder / "first.png"
    if not picture.is_file():
        raise SystemExit(f"{picture} is not there")
    print(f"from pip install to the first picture: {seconds:.0f} s; {picture}")
    text = (ROOT / "README.md").read_text()
    trial.run("python", "-c", MAKE_PICTURES)
    for command in (*TRAININGS, *commands(text)):
        trial.run(*command.split())
    (folder / "readme.py").write_text(programs(text))
    trial.run("python", "readme.py")
    print("all commands and programs of README.md ran")


if __name__ == "__main__":
    main(sys.argv[1:])
