"""Another revision of this project as a contender, in the same run: `--compare REV`.

Two revisions do not fit into one process. The other one's packages run in a worker process, which
is asked in turn, between two measures of this process. What is measured and how is told by this
revision's `benchmarks` on both sides; only `convmae` and `convmae_kernels` are the other's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.runner import Contender

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from benchmarks.setting import Setting

ROOT = Path(__file__).resolve().parent.parent
TREES = ROOT / "build" / "compare"
CONTENDER = "packed"  # what is measured of the other revision
# Seconds. Idle threads of OpenMP spin for a while before they sleep: the other side waits for that.
PAUSE = 0.02


class RevisionError(RuntimeError):
    """Another revision cannot be had, built or started."""


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode != 0:
        raise RevisionError(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def commit_of(revision: str) -> str:
    """The whole name of the commit that a name, a tag or a short name stands for.

    Raises:
        RevisionError: this is no git repository, or it has no such commit.
    """
    if revision.startswith("-"):
        raise RevisionError(f"compare must be the name of a commit, got {revision!r}")
    try:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    except RevisionError as error:
        raise RevisionError(f"compare must be the name of a commit: {error}") from None


def prepare(commit: str, device: torch.device) -> Path:
    """A folder with that commit's packages, built, and this revision's `benchmarks`.

    It is kept in `build/compare` and found again. For a CPU the code for GPUs is not compiled.

    Raises:
        RevisionError: it cannot be built.
    """
    tree = TREES / f"{commit[:12]}-{device.type}"
    if (tree / "built").exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
        archive.extractall(tree, filter="data")
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    (tree / "benchmarks").symlink_to(ROOT / "benchmarks")
    print(f"building {commit[:12]} in {tree} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(
        command, cwd=tree, env=_building(device), capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        last = "\n".join((built.stderr or built.stdout).strip().splitlines()[-20:])
        raise RevisionError(f"{' '.join(command)} failed in {tree}:\n{last}")
    (tree / "built").touch()
    return tree


def _building(device: torch.device) -> dict[str, str]:
    """The environment of a build; for a CPU one in which no compiler for GPUs is found."""
    environment = dict(os.environ, CONVMAE_REQUIRE_EXT="1")
    folders = environment.get("PATH", "").split(os.pathsep)
    if device.type == "cpu":
        environment.pop("CUDA_HOME", None)
        folders = [folder for folder in folders if not shutil.which("nvcc", path=folder)]
    scripts = str(Path(sys.executable).parent)  # ninja, where it was installed beside Python
    return environment | {"PATH": os.pathsep.join([scripts, *folders])}


class Worker:
    """A process with another revision's packages that measures what it is asked for.

    Raises:
        RevisionError: it does not start.
    """

    def __init__(self, commit: str, tree: Path, threads: int) -> None:
        self.name = f"{CONTENDER} at {commit[:7]}"
        self._results = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(threads)],
            cwd=tree,
            env=dict(os.environ, PYTHONPATH=str(tree)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()
        if Path(self.facts["package"]).resolve().parent.parent != tree.resolve():
            self.close()
            raise RevisionError(
                f"the worker took convmae_kernels from {self.facts['package']}, expected {tree}"
            )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RevisionError(f"{self.name}: its process ended, {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RevisionError(answer["error"])
        return answer

    def _ask(self, **question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        time.sleep(PAUSE)
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def contender(self, case: str, setting: Setting, dtype: torch.dtype) -> Contender:
        """The other revision's way of doing a case, which gives its own measure.

        Raises:
            RevisionError: it has no such case or cannot do it.
        """
        facts = asdict(setting) | {"device": str(setting.device)}
        self._ask(do="build", case=case, setting=facts, dtype=str(dtype)[6:])
        file = Path(self._results.name) / "first.pt"
        file.unlink(missing_ok=True)
        values: list[float] = []

        def run() -> list[Tensor]:
            """What the first call gave: that of all others is not needed."""
            results = None if file.exists() else str(file)
            values.append(self._ask(do="measure", results=results)["value"])
            return torch.load(file, map_location=setting.device) if results else []

        return Contender(self.name, run, lambda results: results, lambda: values[-1])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._results.cleanup()


@contextlib.contextmanager
def workers(revisions: Sequence[str], device: torch.device, threads: int) -> Iterator[list[Worker]]:
    """A worker for every revision, built first, ended at the end.

    Raises:
        RevisionError: one cannot be had, built or started.
    """
    commits = [commit_of(revision) for revision in revisions]
    trees = [prepare(commit, device) for commit in commits]
    with contextlib.ExitStack() as stack:
        started = []
        for commit, tree in zip(commits, trees, strict=True):
            started.append(Worker(commit, tree, threads))
            stack.callback(started[-1].close)
        yield started
