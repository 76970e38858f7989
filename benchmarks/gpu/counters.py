"""Stage `counters`: what the hardware counted in six kernels, read with Nsight Compute (`ncu`).

`python -m benchmarks.gpu.counters FILE SECONDS [--stand-in]` writes ncu's tables, CSV, into FILE as
they come; `--run PROBLEMS` is the program that ncu looks into.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import ncu_table

if TYPE_CHECKING:
    from collections.abc import Sequence

# Two runs of ncu, so that the first's counters are there when the second takes too long.
GROUPS = (
    ("forward/side4/256/5x5", "forward/side2/384/5x5", "weight_gradient/side4/256/5x5"),
    ("weight_gradient/side2/384/5x5", "windows_gradient/side8/64/halo1", "gather/side16/3"),
)
SECTIONS = ("SpeedOfLight", "WarpStateStats", "Occupancy")
KERNELS = "regex:masked_conv2d|gather_"


def run(stand_in: bool, names: Sequence[str]) -> None:
    """Launches each problem's kernel once between the profiler's start and stop."""
    from benchmarks.gpu import device as devices
    from benchmarks.gpu import problems

    device = devices.find(stand_in)
    by_name = {f"{p.kernel}/{p.shape}": p for p in problems.TIMED}
    implementation, reason = next(iter(device.implementations().items()))
    if reason is not None:
        sys.exit(f"no kernels to look at: {reason}")
    for name in names:
        problem = replace(by_name[name], batch=device.batches[0])
        mask = problem.mask(device)
        given = problems.arguments(problem, device, mask, seed=0)
        problems.call(problem, implementation, given)
        device.synchronize()
        device.profiler_start()
        problems.call(problem, implementation, given)
        device.synchronize()
        device.profiler_stop()
        print(f"ran {problem.name}", flush=True)


def _run(command: Sequence[str], seconds: float) -> None:
    """Runs ncu; with it ends the program that it looks into.

    Raises:
        RuntimeError: it fails or takes longer; with what ncu says, if it says why.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code, why = process.wait(timeout=seconds), ""
        except subprocess.TimeoutExpired:
            code, why = 1, f"no end after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    if code != 0:
        errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        raise RuntimeError(errors[0] if errors else why or f"ncu ended with exit code {code}")


def main(arguments: Sequence[str]) -> None:
    """Runs the stage, or is the program that ncu looks into."""
    stand_in = ["--stand-in"] if "--stand-in" in arguments else []
    if "--run" in arguments:
        run(bool(stand_in), arguments[arguments.index("--run") + 1].split(","))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `_run` ends ncu
    path, end = Path(arguments[0]), time.monotonic() + float(arguments[1])
    program = shutil.which("ncu")
    if program is None:
        print("skipped: ncu (Nsight Compute) is not on the PATH")
        return
    failures: list[str] = []
    path.write_text("")
    for i, names in enumerate(GROUPS):
        seconds = (end - time.monotonic()) / (len(GROUPS) - i)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.ncu-rep"
            command = [program, "--clock-control", "none", "--profile-from-start", "off"]
            command += ["--target-processes", "all", "--kernel-name", KERNELS]
            command += [word for section in SECTIONS for word in ("--section", section)]
            command += ["--export", str(report), "--force-overwrite", sys.executable, "-m"]
            command += ["benchmarks.gpu.counters", "--run", ",".join(names)]
            command += stand_in
            shown = [program, "--import", str(report), "--page", "raw", "--csv"]
            try:
                _run(command, seconds)
                table = subprocess.run(
                    [*shown, "--print-units", "base"], check=True, capture_output=True, timeout=20
                )
            except (RuntimeError, subprocess.SubprocessError, OSError) as error:
                failures.append(str(error))
                print(f"FAILED {', '.join(names)}: {error}")
                continue
        with path.open("a") as file:
            file.write(table.stdout.decode(errors="replace"))
    counted = ncu_table.read(path.read_text())
    if not counted and failures:
        path.unlink()
        sys.exit(f"no counters: {failures[0]}")
    print(f"{len(counted)} kernels counted, {len(failures)} of {len(GROUPS)} runs failed")
    sys.exit(1 if failures or not counted else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
