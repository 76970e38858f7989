"""Stage `build`: the compiled kernels for this card alone, unless a library that fits is there.

Without them the other stages go on with Triton's kernels, and say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
ASK = (
    "from convmae_kernels.ops.support.dispatch import why_not_cuda as why; "
    "print('why not:', why() or '')"
)


def why_not_cuda() -> str:
    """Why the library that is there now has no CUDA kernels for the card; "" if it has."""
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("why not:")]
    if not answers:
        return "the package cannot be imported: " + _last_line(done.stderr)
    return answers[-1].removeprefix("why not:").strip()


def build(capability: str) -> str:
    """Compiles for GPUs of a compute capability; returns why it failed, or ""."""
    settings = {"TORCH_CUDA_ARCH_LIST": capability, "CONVMAE_REQUIRE_EXT": "1"} | os.environ
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=settings, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr, flush=True)
    if done.returncode != 0:
        return _last_line(done.stderr) or f"exit code {done.returncode}"
    return why_not_cuda()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def main(arguments: Sequence[str]) -> None:
    """Runs the stage, for `CAPABILITY [--stand-in]`."""
    if "--stand-in" in arguments:
        print("nothing is built in a rehearsal")
        return
    reason = why_not_cuda()
    if not reason:
        print("the library that is there has kernels for this card")
        return
    print(f"builds, since {reason}", flush=True)
    reason = build(arguments[0])
    if reason:
        sys.exit(f"goes on with Triton's kernels: {reason}")
    print(f"built for compute capability {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
