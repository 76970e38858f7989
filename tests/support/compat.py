"""Runs the tests that depend on torch under another torch: `make compat TORCH=2.11.0`.

Makes a virtual environment for that torch in `.venv-compat`, with the Triton and the torchvision
that belong to it, and with the versions of `constraints.txt` of all else; builds the compiled
library if it is older than its sources, else takes it as it is, since one library serves every
torch; runs `SUITES`, and ends with a line for each.

`make compat WHEEL=dist/convmae-....whl TORCH=2.11.0` tests a wheel as users get it: installed into
an environment of its own, with no compiler to be found and no source of the package beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "convmae_kernels" / "_C.so"

# Not here: finetuning, crashes, processes and the command line; the emulator of CUDA kernels, which
# has no torch; what needs a GPU.
SUITES = {
    "kernels": (
        "convmae_kernels/test_block_mask.py",
        "convmae_kernels/ops/test_cast_together.py",
        "convmae_kernels/test_determinism.py",
        "convmae_kernels/packed/test_equivalence.py",
        "convmae_kernels/ops/test_gather_scatter.py",
        "convmae_kernels/ops/test_gather_windows.py",
        "project/test_imports.py",
        "convmae_kernels/test_instruction_sets.py",
        "convmae_kernels/ops/test_masked_conv2d.py",
        "convmae_kernels/ops/test_masked_conv_transpose2d.py",
        "convmae_kernels/test_nn.py",
        "convmae_kernels/functional/test_norm.py",
        "convmae_kernels/packed/test_packed.py",
        "convmae_kernels/packed/test_packed_errors.py",
        "convmae_kernels/packed/test_packed_functions.py",
        "convmae_kernels/packed/test_packed_networks.py",
        "convmae_kernels/functional/test_pooling.py",
        "convmae_kernels/test_sync_batch_norm.py",
        "convmae_kernels/test_testing.py",
        "convmae_kernels/functional/test_window_conv2d.py",
        "convmae_kernels/test_zorder.py",
    ),
    "models": (
        "convmae_kernels/test_device_waits.py",
        "convmae/models/test_fastconvmae.py",
        "convmae/models/test_golden.py",
        "convmae/models/test_models.py",
        "convmae/models/test_models_errors.py",
        "convmae/models/test_models_parameters.py",
        "convmae/models/test_models_step.py",
        "convmae/models/test_timm.py",
    ),
    "data": (
        "convmae/data/test_data.py",
        "convmae/data/test_data_addresses.py",
        "convmae/data/test_data_shards.py",
        "convmae/data/test_data_sources.py",
        "convmae/data/test_data_transforms.py",
        "convmae/training/test_training_data.py",
    ),
    "compile": (
        "convmae_kernels/test_compiled_networks.py",
        "convmae_kernels/test_recording.py",
        "convmae_kernels/test_transforms.py",
        "convmae/models/test_export.py",
    ),
    "ahead of time": (
        "convmae_kernels/triton/test_triton_compile.py",
        "convmae_kernels/triton/test_triton_kernels.py",
        "convmae_kernels/triton/test_triton_tuning.py",
    ),
    "gpu rehearsal": ("benchmarks/test_budget.py", "benchmarks/test_gpu_rehearsal.py"),
}

# Of these, what a wheel can pass: `test_imports.py` reads the source of the packages.
NEEDS_SOURCE = ("project/test_imports.py",)
# Suites whose folders are not searched for modules: `tests/convmae_kernels/triton` would pass for
# Triton where that is not installed.
NOT_SEARCHED = ("kernels", "compile")
COMPILERS = ("c++", "g++", "gcc", "cc", "clang++", "clang", "nvcc", "ninja")
COMPILER_VARIABLES = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")

PACKAGES = (
    *("torchvision", "numpy", "timm"),
    *("pillow", "pyyaml", "safetensors", "webdataset"),
    *("matplotlib", "scikit-image", "tensorboard", "torchmetrics", "tqdm"),
    *("onnx", "onnxscript", "onnxruntime"),
    *("pytest", "pytest-xdist", "hypothesis"),
    *("setuptools", "wheel", "ninja"),
)
FOR_BUILDS = ("setuptools", "wheel", "ninja")
# Packages whose versions each torch chooses itself.
OF_TORCH = re.compile(r"(torch|torchvision|triton|setuptools|nvidia-.*|cuda-.*)==")

DESCRIBE = """
import importlib.metadata, platform, numpy, torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return "none"
cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""
print(f"torch {torch.__version__}{cuda}, Python {platform.python_version()}", end=", ")
print(f"Triton {version('triton')}, numpy {numpy.__version__}", end=", ")
print(f"torchvision {version('torchvision')}")
"""
DESCRIBE_INSTALLED = """
import convmae_kernels
print(convmae_kernels.__file__)
print(convmae_kernels.info()["cpu"])
"""


class CompatError(Exception):
    """What was found and what is expected, in one line."""


@dataclass
class Result:
    """What became of one suite."""

    name: str
    counts: Counter[str]  # of passed, skipped and failed
    reasons: Counter[str]  # of skipped tests
    exit_code: int
    seconds: float

    @property
    def good(self) -> bool:
        """Nothing failed, and something ran, or everything said why it was skipped."""
        no_tests_ran = self.exit_code == 5 and self.counts["skipped"] > 0
        return (self.exit_code == 0 or no_tests_ran) and self.counts["failed"] == 0

    def __str__(self) -> str:
        numbers = ", ".join(f"{self.counts[k]} {k}" for k in ("passed", "skipped", "failed"))
        end = "ok" if self.counts["passed"] else "nothing ran"
        if not self.good:
            end = f"FAILED (exit code {self.exit_code} of pytest)"
        return f"{self.name:14} {numbers}, {self.seconds:.0f} s: {end}"


def oldest_torch() -> str:
    """The version in `torch>=...` of pyproject.toml."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found.group(1)


def check_version(text: str) -> str:
    """Returns `text` if it is a version of torch that this package supports."""
    oldest = oldest_torch()
    wanted = f"expected a version from {oldest} on, e.g. make compat TORCH={oldest}.0"
    if not text:
        raise CompatError(f"TORCH is not given; {wanted}")
    found = re.fullmatch(r"(\d+)\.(\d+)\.\d+(\+\w+)?", text)
    if found is None:
        raise CompatError(f"TORCH={text} is not a version of torch; {wanted}")
    if (int(found[1]), int(found[2])) < tuple(map(int, oldest.split("."))):
        raise CompatError(f"TORCH={text} is too old; {wanted}")
    return text


def constraints(text: str) -> str:
    """The lines of constraints.txt, but those of packages that torch chooses itself."""
    return "".join(line for line in text.splitlines(True) if not OF_TORCH.match(line))


def why_pip_failed(torch: str, output: str, index: str) -> str:
    """One line of what `pip install` printed, and `pip index versions torch`."""
    python = ".".join(platform.python_version_tuple()[:2])
    listed = re.search(r"^Available versions: (.*)$", index, re.MULTILINE)
    versions = listed[1].split(", ") if listed else []
    if versions and torch not in versions:
        oldest = tuple(map(int, oldest_torch().split(".")))
        new = [v for v in versions if tuple(map(int, v.split(".")[:2])) >= oldest]
        expected = f"one of {', '.join(new)}" if new else "another Python: no version is new enough"
        return f"TORCH={torch}: pip has no such torch for Python {python}; expected {expected}"
    reasons = re.findall(
        r"^(?:ERROR: (?!Resolution)|    (?=The user requested|.* depends on))(.*)$",
        output,
        re.MULTILINE,
    )
    reason = "; ".join(reasons) or "it gave no reason"
    return f"TORCH={torch}: pip could not make the environment for Python {python}: {reason}"


def make_environment(torch: str, for_wheel: bool = False) -> Path:
    """Makes the environment of a torch, unless it is there; returns its Python.

    One for wheels is an environment apart, without what compiles.
    """
    name = f"torch{torch}-python{'.'.join(platform.python_version_tuple()[:2])}"
    folder = ROOT / ".venv-compat" / (f"wheel-{name}" if for_wheel else name)
    python = folder / "bin" / "python"
    packages = [name for name in PACKAGES if not (for_wheel and name in FOR_BUILDS)]
    requirements = [f"torch=={torch}", *packages]
    kept = constraints((ROOT / "constraints.txt").read_text())
    installed, wanted = folder / "installed", "\n".join(requirements) + "\n" + kept
    if installed.is_file() and installed.read_text() == wanted:
        return python
    print(f"making {folder.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    (folder / "constraints.txt").write_text(kept)
    code, output = pip(python, "install", "-c", folder / "constraints.txt", *requirements)
    if code != 0:
        _, index = pip(python, "index", "versions", "torch")
        shutil.rmtree(folder)
        raise CompatError(why_pip_failed(torch, output, index))
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode != 0:
        print("torchvision does not load beside this torch: removed, and timm, which needs it")
        pip(python, "uninstall", "--yes", "torchvision", "timm")
    installed.write_text(wanted)
    return python


def pip(python: Path, *arguments: str | Path) -> tuple[int, str]:
    """Runs pip; returns its exit code and what it printed."""
    done = subprocess.run(
        [python, "-m", "pip", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def make_library(python: Path, environment: dict[str, str]) -> None:
    """Builds the compiled library with this torch, if it is older than one of its sources."""
    sources = [ROOT / "setup.py", *(f for f in (ROOT / "csrc").rglob("*.*") if f.is_file())]
    name = LIBRARY.relative_to(ROOT)
    if LIBRARY.is_file() and LIBRARY.stat().st_mtime >= max(f.stat().st_mtime for f in sources):
        print(f"{name} is newer than its sources: taken as it is", flush=True)
        return
    print(f"building {name}", flush=True)
    command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        raise CompatError(f"{name} could not be built; pytest did not run")
    LIBRARY.touch()


def without_compilers(python: Path) -> dict[str, str]:
    """The environment variables of a machine that has a Python and nothing that compiles."""
    environment = {k: v for k, v in os.environ.items() if k not in COMPILER_VARIABLES}
    environment["PATH"] = str(python.parent)
    found = [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    if found:
        raise CompatError(f"{python.parent} has {', '.join(found)}, expected no compiler there")
    return environment


def install_wheel(python: Path, wheel: Path, environment: dict[str, str]) -> Path:
    """Installs a wheel; returns a folder that has the tests and no source of the packages."""
    if not wheel.is_file() or wheel.suffix != ".whl":
        raise CompatError(f"WHEEL={wheel} is no wheel; expected a file that `make wheel` wrote")
    pip(python, "uninstall", "--yes", "convmae")
    command = [python, "-m", "pip", "install", "--no-index", wheel.resolve()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompatError(f"WHEEL={wheel} could not be installed: {done.stderr.strip()}")
    folder = python.parents[1] / "tests-alone"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy2(ROOT / "pyproject.toml", folder)  # pytest's settings
    command = [python, "-c", DESCRIBE_INSTALLED]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or [done.stderr.strip(), ""]
    installed = Path(lines[0]).is_relative_to(python.parents[1]) and lines[-1].startswith("yes")
    if done.returncode != 0 or not installed:
        raise CompatError(f"WHEEL={wheel} does not work: {lines[0]}: {lines[-1]}")
    print(f"{lines[0]}: compiled kernels: {lines[-1]}", flush=True)
    return folder


def run_suite(
    python: Path,
    name: str,
    files: list[Path],
    workers: int,
    environment: dict[str, str],
    folder: Path | None = None,
) -> Result:
    """Runs all tests in the files of a suite, in the repository or in another folder."""
    report = python.parents[1] / f"{name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    imports = ["--import-mode=importlib"] if name in NOT_SEARCHED else []
    many = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-p", "no:xdist"]
    begin = time.monotonic()
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-q", "--thorough", *imports, *many),
            *(f"--junitxml={report}", *files),
        ],
        cwd=folder or ROOT,
        env=environment,
        check=False,
    )
    counts, reasons = read_report(report) if report.is_file() else (Counter(), Counter())
    return Result(name, counts, reasons, done.returncode, time.monotonic() - begin)


def read_report(file: Path) -> tuple[Counter[str], Counter[str]]:
    """The numbers of tests that passed, were skipped and failed, and why they were skipped.

    A file that is skipped as a whole counts as one test.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(file).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        elif skipped is not None:
            counts["skipped"] += 1
            whole_file = re.search(r"Skipped: (.*?)['\"]\)$", skipped.text or "")
            if skipped.get("message") == "collection skipped" and whole_file is not None:
                name = case.get("name", "").rpartition(".")[2]
                reasons[f"all of {name}.py: {whole_file[1]}"] += 1
            else:
                reasons[skipped.get("message", "")] += 1
        else:
            counts["passed"] += 1
    return counts, reasons


def processor() -> str:
    """The name of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def main(arguments: list[str]) -> int:
    """Returns 0 if every suite passed, 1 if one failed, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="compat", description=__doc__)
    parser.add_argument("torch", help="a version of torch, e.g. 2.11.0 or 2.13.0+cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="all, or kernels for a wheel")
    parser.add_argument("--wheel", type=Path, help="what to test in place of this checkout")
    options = parser.parse_args(arguments)
    folder = ROOT
    try:
        torch = check_version(options.torch)
        if options.wheel is not None:
            python = make_environment(torch, for_wheel=True)
            environment = without_compilers(python)
            folder = install_wheel(python, options.wheel, environment)
        else:
            python = make_environment(torch)
            path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path, "CONVMAE_REQUIRE_EXT": "1"}
            make_library(python, environment)
    except CompatError as error:
        print(f"compat: {error}", file=sys.stderr)
        return 2
    left_out = NEEDS_SOURCE if options.wheel is not None else ()
    results = []
    for name in options.suite or (["kernels"] if options.wheel is not None else list(SUITES)):
        print(f"== {name}", flush=True)
        files = [folder / "tests" / file for file in SUITES[name] if file not in left_out]
        results.append(run_suite(python, name, files, options.workers, environment, folder))
    described = subprocess.run([python, "-c", DESCRIBE], capture_output=True, text=True, check=True)
    print(f"\n{described.stdout.strip()}; {processor()}, {time.strftime('%Y-%m-%d')}")
    for result in results:
        print(result)
        for reason, number in result.reasons.most_common():
            print(f"{'':14} {number} skipped: {reason}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
