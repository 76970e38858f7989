"""Builds the emulator's modules and runs them in a process of their own, under AddressSanitizer."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "simt"

FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CHECKERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    + ["--param", "asan-instrumentation-with-call-threshold=0"],
    "races": ["-fsanitize=thread"],  # hooks.cpp takes the place of its runtime library
}


# The sources of kernels that make up a module; its bindings are in `<name>_module.cpp`.
MODULES = {
    "selftest": ["selftest.cpp"],
    "kernels": [
        "moves.cpp",
        "masked_conv2d.cpp",
        "masked_conv2d_grads.cpp",
        "masked_conv2d_tensor.cpp",
        "masked_conv2d_weight_grad.cpp",
        "strided_conv2d.cpp",
    ],
}


class EmulatorError(RuntimeError):
    """What a kernel did wrong: the emulator's own message, or a sanitizer's report."""


@functools.cache
def why_not() -> str | None:
    """Why the emulator cannot run here; None if it can."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "g++ not found"
    if not Path(_library("libasan.so")).is_absolute():
        return "g++ has no libasan"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None


@functools.cache
def _library(name: str) -> str:
    return _output("g++", f"-print-file-name={name}").strip()


@functools.cache
def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# -- building -----------------------------------------------------------------------------------

_SHARED = r"__shared__\s+(?:(?:__align__|alignas)\(\w+\)\s*)?([\w: ]+?(?:<[^;]*>)?)\s+(\w+)"
_DYNAMIC = re.compile(r"extern\s+" + _SHARED + r"\[\];")
_STATIC = re.compile(_SHARED + r"((?:\[[^\]]+\])*);")


def translate(source: str) -> str:
    """CUDA source whose declarations of shared memory are the macros of simt.h.

    Raises:
        ValueError: a declaration in another form than `__shared__ T name[...];` and
            `extern __shared__ T name[];`, each with an alignment or without.
    """
    code = _DYNAMIC.sub(r"SIMT_DYNAMIC_SHARED(\1, \2);", source)
    code = _STATIC.sub(r"SIMT_SHARED(\2, \1\3);", code)
    for line in code.splitlines():
        if "__shared__" in line.partition("//")[0]:
            raise ValueError(f"cannot translate this declaration of shared memory: {line.strip()}")
    return code


def without(source: str, statement: str, occurrence: int) -> str:
    """The source with one occurrence of a statement replaced by an empty one."""
    parts = source.split(statement)
    if occurrence + 1 >= len(parts):
        raise ValueError(f"{statement} occurs {len(parts) - 1} times only")
    head, tail = statement.join(parts[: occurrence + 1]), statement.join(parts[occurrence + 1 :])
    return head + ";" + tail


class Removed(NamedTuple):
    """A statement that is taken out of a copy of `file`, in the translation unit `unit` alone.

    The unit is compiled with SIMT_REMOVED, so that it can leave out kernels that are not needed.
    """

    unit: str
    file: str
    statement: str
    occurrence: int


def build(name: str, checker: str = "address", removed: Removed | None = None) -> Path:
    """The library of one of `MODULES`; only what has changed is compiled.

    Args:
        name: the module's name.
        checker: "address" looks for accesses outside of arrays, "races" for races on shared memory.
        removed: what to take out, to make a module that must fail.
    """
    import pybind11

    files = {path.name: path for end in ("h", "cuh", "cpp") for path in HERE.glob(f"*.{end}")}
    for path in (*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*h")):
        files[str(path.relative_to(ROOT / "csrc"))] = path
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    check, define = CHECKERS[checker], f"-DSIMT_CHECK_{checker.upper()}"
    units = {
        **{unit: ["-O2", define] for unit in ("scheduler.cpp", "hooks.cpp")},
        "device_memory.cpp": ["-O2"],
        f"{name}_module.cpp": ["-O0", *python],
    } | {unit: ["-O1", "-g1", *check] for unit in MODULES[name]}
    if removed is not None:
        units[removed.unit].append("-DSIMT_REMOVED")
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda u: _compile(u, units[u], files, removed), units))
    link = ["g++", "-shared", *(check if checker == "address" else [])]
    command = [*link, *map(str, objects), "-o", f"simt_{name}.so"]
    return _cached(f"simt_{name}.so", command, {}) / f"simt_{name}.so"


def _compile(unit, flags, files, removed):
    """The object file of a source, with those files that it includes."""
    texts: dict[str, str] = {}
    wanted = [unit]
    while wanted:
        file = wanted.pop()
        if file in texts or file not in files:
            continue
        text = files[file].read_text()
        if removed is not None and (removed.unit, removed.file) == (unit, files[file].name):
            text = without(text, removed.statement, removed.occurrence)
        texts[file] = (
            f'#line 1 "{files[file]}"\n{translate(text) if file.endswith("cuh") else text}'
        )
        wanted += re.findall(r'^#include "(.*)"', text, re.MULTILINE)
    command = ["g++", *FLAGS, *flags, "-I.", "-c", unit, "-o", "unit.o"]
    return _cached(unit, command, texts) / "unit.o"


def _cached(name: str, command: list[str], texts: dict[str, str]) -> Path:
    """The folder in which the command has run on these files, once for all."""
    key = repr((command, texts, _output("g++", "--version")))
    folder = BUILD / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for file, text in texts.items():
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(text)
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[:4000]}")
            (folder / "done").touch()
    return folder


# -- running ------------------------------------------------------------------------------------


@functools.cache
def module(name: str, checker: str = "address", removed: Removed | None = None) -> Emulator:
    """The running emulator of a module, built on first use; see `build`."""
    return Emulator(build(name, checker, removed), checker)


class Emulator:
    """A module of kernels in a process of its own: `emulator.call("block_sum", ...)`.

    A sanitizer's report ends that process; its text is then the error, and the next call starts
    another one.
    """

    def __init__(self, library: Path, checker: str = "address") -> None:
        self.library, self.checker = library, checker
        self.process: subprocess.Popen | None = None
        self.report = tempfile.TemporaryFile()  # noqa: SIM115

    def call(self, function: str, *arguments: Any) -> Any:
        """`function(*arguments)`, of numbers, lists and NumPy arrays.

        Raises:
            EmulatorError: the kernel did something that is wrong or undefined.
        """
        process = self._start()
        try:
            pickle.dump((function, arguments), process.stdin)
            process.stdin.flush()
            right, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.close()
            self.report.seek(0)
            text = self.report.read().decode(errors="replace")
            raise EmulatorError(f"the emulator ended with code {code}:\n{text}") from None
        if not right:
            raise EmulatorError(value)
        return value

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
        self.process = None

    def _start(self) -> subprocess.Popen:
        if self.process is None:
            self.report.seek(0)
            self.report.truncate()
            environment = os.environ | {
                "PYTHONMALLOC": "malloc",
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "OMP_NUM_THREADS": "1",
            }
            if self.checker == "address":
                # The sanitizer looks for the C++ library's functions when it is loaded.
                environment["LD_PRELOAD"] = f"{_library('libasan.so')} {_library('libstdc++.so')}"
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(self.library)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.report,
                env=environment,
            )
        return self.process
