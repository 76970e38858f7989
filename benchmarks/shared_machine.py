"""Images a second of `convmae pretrain` on an idle machine and beside busy neighbours.

    python -m benchmarks.shared_machine --json shared.json

Idle threads of GNU's OpenMP spin for a while before they sleep. That saves the time of waking them
on an idle machine; on a shared one they take the cores from those that they wait for. Every setting
below is measured alone and beside `--busy` processes that compute all the time, in turn, `--rounds`
times; a figure is the median over the rounds of the median of a run's log, whose first line, with
the warm-up, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.records.log import read_log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# `convmae` sets a spin count where neither variable is set: OpenMP's own default has to be asked
# for by a run that does not go through the command line, so it is given in its own words here.
SETTINGS: dict[str, dict[str, str]] = {
    "convmae": {},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "spin 0": {"GOMP_SPINCOUNT": "0"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "active": {"OMP_WAIT_POLICY": "active"},
}
BASELINE = "OpenMP's default"
SPINNING = "while True: pass"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that compute all the time, one core each."""
    neighbours = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def images_per_second(setting: dict[str, str], given: argparse.Namespace) -> float:
    """The median of a run of the demo's photographs, its first line of the log left out."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convmae", "pretrain", "--data_path", "demo"]
        command += ["--model", given.model, "--batch_size", str(given.batch_size)]
        command += ["--input_size", str(given.img_size), "--epochs", "1", "--warmup_epochs", "0"]
        command += ["--max_samples", "8", "--log_every", "2", "--save_every", "100"]
        command += ["--num_workers", "0", "--amp", given.amp, "--output_dir", folder]
        done = subprocess.run(
            command,
            env=clean | {"OMP_NUM_THREADS": str(given.threads)} | setting,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        rates = [entry["images_per_s"] for entry in read_log(folder) if "images_per_s" in entry]
    return statistics.median(rates[1:] or rates)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All settings, alone and beside neighbours, in turn; rates and medians by setting."""
    chosen = {name: SETTINGS[name] for name in given.setting or SETTINGS}
    rates: dict[str, dict[str, list[float]]] = {name: {"idle": [], "shared": []} for name in chosen}
    for number in range(given.rounds):
        for where, neighbours in (("idle", 0), ("shared", given.busy)):
            for name, setting in chosen.items():
                with busy(neighbours):
                    rates[name][where].append(images_per_second(setting, given))
                print(f"round {number + 1}  {where:7} {name:18} {rates[name][where][-1]:8.2f}")
    medians = {
        name: {where: statistics.median(values) for where, values in both.items()}
        for name, both in rates.items()
    }
    baseline = medians.get(BASELINE)
    return {
        "options": {k: v for k, v in vars(given).items() if k not in ("json", "setting")},
        "cores": os.cpu_count(),
        "images_per_s": rates,
        "median": medians,
        "times_as_fast": None
        if baseline is None
        else {
            name: {where: both[where] / baseline[where] for where in both}
            for name, both in medians.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_machine",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="convmae_tiny")
    add("--batch_size", type=int, default=16)
    add("--img_size", type=int, default=96)
    add("--amp", default="float32")
    add("--threads", type=int, default=os.cpu_count(), help="of the training")
    add("--busy", type=int, default=2, help="busy processes beside it")
    add("--rounds", type=int, default=5)
    add("--setting", nargs="+", choices=SETTINGS, help="all if absent")
    add("--json", metavar="FILE", help="write the results here")
    given = parser.parse_args(arguments)
    results = measure(given)
    print(f"\n{'setting':18} {'idle':>8} {'shared':>8} {'against the default':>24}   (images/s)")
    for name, both in results["median"].items():
        ratios = (results["times_as_fast"] or {}).get(name)
        against = "" if ratios is None else f"{ratios['idle']:12.2f} {ratios['shared']:12.2f}"
        print(f"{name:18} {both['idle']:8.2f} {both['shared']:8.2f} {against}")
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
