"""Makes the files of a release in dist/: `make wheel`, see docs/releasing.md.

The source distribution holds the files that are under version control. The wheel is built from
that source distribution, with CPU kernels and with CUDA kernels for `RELEASE_ARCHS`, and auditwheel
gives it its tag; then its content is checked. Besides there are an SBOM (CycloneDX), a table of the
licences of all dependencies, and the SHA-256 of each file.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

from release import sbom

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "release"
# One for each generation since Ampere, and PTX, which drivers compile for GPUs that come later.
RELEASE_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# These come with torch, which has loaded them before it loads the library.
LIBRARIES_OF_TORCH = ("libtorch.so", "libtorch_cpu.so")
LICENCE_OF_CUDA = "LICENSE-NVIDIA-CUDA.txt"
LICENCE_OF_TORCH = "LICENSE-PyTorch.txt"
LICENCES = ("LICENSE", "NOTICE", LICENCE_OF_CUDA, LICENCE_OF_TORCH)
SMALLEST_LIBRARY = 1 << 20  # bytes; one with kernels is larger


CALL_SETUPTOOLS = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)


class ReleaseError(Exception):
    """What was found and what is expected, in one line."""


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> None:
    """Runs a command; its output is shown."""
    print("$", *command, flush=True)
    code = subprocess.run(command, cwd=folder, env=os.environ | environment, check=False).returncode
    if code != 0:
        raise ReleaseError(f"{' '.join(map(str, command))} ended with exit code {code}")


def version() -> str:
    """`convmae_kernels.__version__`, which is the only place that says it."""
    text = (ROOT / "convmae_kernels" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise ReleaseError("convmae_kernels/__init__.py has no line `__version__ = ...`")
    return found[1]


def tracked_files() -> list[str]:
    """The files under version control, that of continuous integration and git's own aside."""
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReleaseError(f"a release is made in a checkout of git: {done.stderr.strip()}")
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [name for name in names if not name.startswith((".ci/", ".git"))]


def make_source_distribution(out: Path) -> Path:
    """Writes convmae-<version>.tar.gz, of tracked files only; returns it.

    Stray files cannot come in, because it is made of a copy in which there are none.
    """
    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    names = tracked_files()
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    run(sys.executable, "-c", CALL_SETUPTOOLS, "build_sdist", out.resolve(), folder=tree)
    file = out / f"convmae-{version()}.tar.gz"
    check_source_distribution(file, names)
    return file


def check_source_distribution(file: Path, names: list[str]) -> None:
    """That an archive holds the files `names` and, beside them, what setuptools writes alone."""
    with tarfile.open(file) as archive:
        found = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    written = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    missing, stray = sorted(set(names) - found), sorted(found - written - set(names))
    if missing or stray:
        raise ReleaseError(
            f"{file.name} lacks {missing or 'nothing'}, and has {stray or 'nothing'} besides: "
            "MANIFEST.in says what it holds"
        )


def unpack(file: Path) -> Path:
    """Unpacks the source distribution below build/release; returns the folder.

    What an earlier build compiled there stays, so that ninja compiles what has changed only.
    """
    folder = WORK / file.name.removesuffix(".tar.gz")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("build/*"):
        if path.name != "ninja":  # setuptools would pack modules that are there no more
            shutil.rmtree(path)
    with tarfile.open(file) as archive:
        archive.extractall(WORK, filter="data")
    return folder


def licence_of(package: str) -> str:
    """The text of the licence that an installed package brings."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if re.fullmatch(r"licen[cs]e(\.txt)?", file.name, re.IGNORECASE):
            return file.read_text()
    raise ReleaseError(
        f"{package} is not installed, or has no licence: the wheel must hold its text"
    )


def licence_of_cuda(asked: str | None) -> str:
    """The licence of the CUDA toolkit, whose runtime is linked into the library."""
    if asked is not None:
        return Path(asked).read_text()
    nvcc = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which(
        "nvcc"
    )
    if nvcc is None:
        raise ReleaseError("nvcc is not on the PATH nor in CUDA_HOME: a release has CUDA kernels")
    beside = Path(nvcc).resolve().parents[1] / "EULA.txt"  # where NVIDIA's installer puts it
    return beside.read_text() if beside.is_file() else licence_of("nvidia-cuda-runtime")


def build_wheel(folder: Path, archs: str) -> Path:
    """Builds the wheel of an unpacked source distribution, with the tag of this machine."""
    raw = WORK / "wheel"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    run(
        *(sys.executable, "-c", CALL_SETUPTOOLS, "build_wheel", raw.resolve()),
        folder=folder,
        TORCH_CUDA_ARCH_LIST=archs,
        CONVMAE_REQUIRE_EXT="1",
    )
    (wheel,) = raw.glob("*.whl")
    return wheel


def repair(wheel: Path) -> Path:
    """Lets auditwheel find the oldest Linux that a wheel runs on; returns a wheel with its tag.

    Nothing is put into it: torch's libraries are left out, and others of no system are not used.
    """
    excluded = [word for name in LIBRARIES_OF_TORCH for word in ("--exclude", name)]
    out = wheel.parent / "repaired"
    command = [sys.executable, "-m", "auditwheel", "repair", "--strip", *excluded]
    run(*command, "--wheel-dir", out, wheel)
    (repaired,) = out.glob("*.whl")
    return repaired


def check_wheel(wheel: Path, source: Path) -> None:
    """That a wheel has its tag, modules, library and licences, and nothing besides.

    Args:
        wheel: the file.
        source: the unpacked source distribution that it was built from.

    Raises:
        ReleaseError: it does not.
    """
    if not re.fullmatch(r"convmae-[^-]+-py3-none-manylinux_[\w.]+\.whl", wheel.name):
        raise ReleaseError(f"{wheel.name} has another tag, expected py3-none-manylinux_...")
    packages = [source / "convmae", source / "convmae_kernels"]
    files = [f for package in packages for f in package.rglob("*") if f.is_file()]
    expected = {f.relative_to(source).as_posix() for f in files if "__pycache__" not in f.parts}
    expected.add("convmae_kernels/_C.so")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if info.file_size}
        (info,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = {name for name in archive.namelist() if not name.endswith("/")}
        described = email.message_from_bytes(archive.read(info))
    folder = info.removesuffix("METADATA")
    expected |= {f"{folder}{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt")}
    expected |= {f"{folder}entry_points.txt"}
    expected |= {f"{folder}licenses/{name}" for name in LICENCES}
    empty = {name for name in found & expected if name not in sizes}
    empty -= {name for name in empty if (source / name).is_file()}
    missing, stray = sorted(expected - found), sorted(found - expected)
    if missing or stray or empty:
        raise ReleaseError(
            f"{wheel.name} lacks {missing or 'nothing'}, has {stray or 'nothing'} besides, "
            f"and {sorted(empty) or 'nothing'} is empty"
        )
    if sizes["convmae_kernels/_C.so"] < SMALLEST_LIBRARY:
        raise ReleaseError(f"{wheel.name}: convmae_kernels/_C.so is too small to have kernels")
    if described["Version"] != version():
        raise ReleaseError(f"{wheel.name} says version {described['Version']}, not {version()}")


def digests(folder: Path) -> str:
    """A line `<SHA-256>  <name>` for each file, as sha256sum -c reads them."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)


def main(arguments: list[str]) -> int:
    """Returns 0, or 1 with a line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m release.build", description=__doc__)
    parser.add_argument(
        "--archs", default=RELEASE_ARCHS, help=f"GPUs; a release has the default, {RELEASE_ARCHS}"
    )
    parser.add_argument("--cuda_licence", metavar="FILE", help="that of the CUDA toolkit")
    options = parser.parse_args(arguments)
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    try:
        licences = {
            LICENCE_OF_CUDA: licence_of_cuda(options.cuda_licence),
            LICENCE_OF_TORCH: licence_of("torch"),
        }
        source = make_source_distribution(out)
        folder = unpack(source)
        for name, text in licences.items():
            (folder / name).write_text(text)
        wheel = repair(build_wheel(folder, options.archs))
        check_wheel(wheel, folder)
        for old in out.glob("convmae-*.whl"):
            old.unlink()
        wheel = Path(shutil.copy2(wheel, out))
        sbom.write(ROOT, out, version())
    except (ReleaseError, sbom.SbomError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    (out / "SHA256SUMS").write_text(digests(out))
    for file in (source, wheel):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
