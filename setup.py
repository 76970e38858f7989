"""Builds the compiled kernels, `convmae_kernels/_C.so`, with ninja; metadata is in pyproject.toml.

The library uses LibTorch's stable ABI and no Python C API: one build serves every torch >= 2.11 and
every Python. Without a compiler the package installs all the same, with the reference ops, unless
CONVMAE_REQUIRE_EXT=1 makes that an error.

With nvcc ($CUDA_HOME/bin, or on the PATH) the library has CUDA kernels too, whether this torch has
CUDA or not. TORCH_CUDA_ARCH_LIST says for which GPUs; the default is short, for development, and
releases are built for `RELEASE_ARCHS` of release/build.py. MAX_JOBS says how many files are
compiled at the same time; the default is ninja's.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the library runs on
ISA_FLAGS = {  # by the names in csrc/isa.h
    "Baseline": "",
    "Avx2": "-mavx2 -mfma -mf16c",
    # GCC takes the deliberately undefined operands of its own AVX-512 headers for mistakes.
    "Avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -Wno-uninitialized",
}
REQUIRED = os.environ.get("CONVMAE_REQUIRE_EXT") == "1"
FAILURES = (OSError, subprocess.CalledProcessError, RuntimeError)
X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_torch():
    """The folder of the installed torch, or None; seen from an isolated build too."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in folders if (folder / "include").is_dir()), None)


def number(arch):
    """90 of "9.0", "9.0a" or "9.0+PTX"."""
    return int(re.sub(r"\D", "", arch))


class Cuda:
    """nvcc, and the flags that CUDA takes; `Cuda.find()` is None where there is no nvcc."""

    DEFAULT_ARCHS = ("8.0", "9.0", "10.0")

    def __init__(self, nvcc):
        self.nvcc = nvcc
        dry = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
        text = subprocess.run(dry, capture_output=True, text=True, check=True).stderr
        self.include = self._folders(text, "INCLUDES", "-I", "cuda_runtime_api.h")
        self.library = self._folders(text, "LIBRARIES", "-L", "libcudart_static.a")
        codes = subprocess.run(
            [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
        ).stdout
        known = sorted(map(int, re.findall(r"\bsm_(\d+)\b", codes)))
        defaults = [arch for arch in self.DEFAULT_ARCHS if number(arch) in known]
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
        self.archs = re.split(r"[;,\s]+", asked) if asked else defaults
        if not self.archs:
            raise RuntimeError(
                f"{nvcc} compiles for none of {', '.join(self.DEFAULT_ARCHS)}: set "
                "TORCH_CUDA_ARCH_LIST to the compute capability of your GPU"
            )
        for arch in self.archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise RuntimeError(
                    f"TORCH_CUDA_ARCH_LIST has {arch!r}, expected e.g. 9.0 or 9.0+PTX"
                )
            if number(arch) not in known:
                raise RuntimeError(self._unknown(arch, known))

    def _unknown(self, arch, known):
        """That this nvcc does not compile for an architecture, and what to do."""
        text = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\S+?),", text)
        names = [f"{code // 10}.{code % 10}" for code in known]
        earlier = [name for name in names if number(name) < number(arch)]
        advice = "install an older CUDA toolkit"
        if earlier:
            advice = (
                f'install a newer CUDA toolkit, or set TORCH_CUDA_ARCH_LIST="{earlier[-1]}+PTX", '
                "which the driver compiles for the GPU when the library is loaded"
            )
        return (
            f"TORCH_CUDA_ARCH_LIST asks for {arch}, but {self.nvcc} "
            f"({version[1] if version else 'unknown version'}) compiles for {', '.join(names)} "
            f"only: {advice}"
        )

    @classmethod
    def find(cls):
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
        nvcc = nvcc or shutil.which("nvcc")
        return cls(nvcc) if nvcc else None

    @staticmethod
    def _folders(text, name, flag, file):
        """The folder that holds `file`, of those that nvcc itself would search."""
        line = re.search(rf"^#\$ {name}=(.*)$", text, re.MULTILINE)
        flags = shlex.split(line.group(1)) if line else []
        folders = [Path(item[len(flag) :]) for item in flags if item.startswith(flag)]
        for folder in folders:
            if (folder / file).exists():
                return folder.resolve()
        raise RuntimeError(f"{file} is not where nvcc looks for it: {list(map(str, folders))}")

    def flags(self):
        codes = []
        for arch in self.archs:
            name = arch.removesuffix("+PTX").replace(".", "")
            codes.append(f"-gencode=arch=compute_{name},code=sm_{name}")
            if arch.endswith("+PTX"):
                codes.append(f"-gencode=arch=compute_{name},code=compute_{name}")
        codes.append(f"-DCONVMAE_LEAST_CUDA_ARCH={min(map(number, self.archs))}")
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        return f"-O3 -std=c++20 {host} -I{ROOT / 'csrc'} {' '.join(codes)}"

    def host_flags(self):
        archs = ", ".join(self.archs)
        return f"-DWITH_CUDA '-DCONVMAE_CUDA_ARCHS=\"{archs}\"' -isystem {self.include}"

    def link_flags(self):
        return f"-L{self.library} -lcudart_static -lrt -lpthread -ldl"


def ninja_file(torch, build, library, cuda):
    """The text of build.ninja: every source, the per-instruction-set ones once for each."""
    flags = (
        "-O2 -std=c++20 -ffp-contract=fast -fPIC -fvisibility=hidden -Wall -Wextra "
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} "
        f"-fmacro-prefix-map={ROOT}/= "  # errors name csrc/..., wherever the library was built
        f"-I{ROOT / 'csrc'} -isystem {torch / 'include'} {cuda.host_flags() if cuda else ''}"
    )
    link = (
        f"-shared -Wl,--exclude-libs,ALL -L{torch / 'lib'} "
        "-Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu "
        f"{cuda.link_flags() if cuda else ''}"
    )
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {flags} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in -o $out {link} {os.environ.get('LDFLAGS', '')}",
    ]
    if cuda:
        lines += [
            "rule nvcc",
            f"  command = {cuda.nvcc} {cuda.flags()} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []

    def compile_source(source, name, isa=""):
        objects.append(build / f"{name}.o")
        lines.append(f"build {objects[-1]}: compile {source}\n  isa = {isa}")

    if cuda:  # first, because they take the longest
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"), reverse=True):
            objects.append(build / f"cuda_{source.stem}.o")
            lines.append(f"build {objects[-1]}: nvcc {source}")
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile_source(source, source.stem)
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if "CONVMAE_ISA" not in source.read_text():
            compile_source(source, f"cpu_{source.stem}")
            continue
        for isa in ISA_FLAGS if X86 else ("Baseline",):
            compile_source(source, f"{isa}_{source.stem}", f"-DCONVMAE_ISA={isa} {ISA_FLAGS[isa]}")
    lines.append(f"build {library}: link {' '.join(map(str, objects))}")
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    """Compiles with ninja in build/ninja, which survives, so that a second build is incremental."""

    def run(self):
        try:
            self.compile()
        except FAILURES as error:
            if REQUIRED:
                raise SystemExit(f"error: {error}") from None
            print(
                f"WARNING: convmae_kernels installs WITHOUT its compiled CPU kernels ({error}). "
                "It works, with slower reference ops in plain PyTorch. "
                "For the fast ones install a C++20 compiler and install again.",
                file=sys.stderr,
            )

    def compile(self):
        torch = find_torch()
        if torch is None:
            raise RuntimeError("torch is not installed")
        if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
            raise RuntimeError(f"no C++ compiler: {os.environ.get('CXX', 'c++')} not found")
        if shutil.which("ninja") is None:
            raise RuntimeError("ninja not found")
        build = ROOT / "build" / "ninja"
        build.mkdir(parents=True, exist_ok=True)
        library = build / "_C.so"
        try:
            self.run_ninja(build, ninja_file(torch, build, library, Cuda.find()))
        except FAILURES as error:
            if REQUIRED:
                raise
            print(
                f"WARNING: building again WITHOUT CUDA kernels, after a failure ({error}).",
                file=sys.stderr,
            )
            self.run_ninja(build, ninja_file(torch, build, library, None))
        package = ROOT if self.inplace else Path(self.build_lib)
        (package / "convmae_kernels").mkdir(parents=True, exist_ok=True)
        target = package / "convmae_kernels" / "_C.so"
        shutil.copy2(library, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)  # a process may have the old one loaded

    @staticmethod
    def run_ninja(build, text):
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not re.fullmatch("[1-9][0-9]*", jobs):
            raise RuntimeError(f"MAX_JOBS is {jobs!r}, expected a number of processes from 1 on")
        (build / "build.ninja").write_text(text)
        command = ["ninja", "-C", str(build), *(["-j", jobs] if jobs else [])]
        subprocess.run(command, check=True)


class Wheel(bdist_wheel):
    """Tagged for any Python: the library has no Python in it."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("convmae_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    # Headers and libraries of any torch >= 2.11 do: the one that is installed, if there is one.
    setup_requires=[] if find_torch() else ["torch>=2.11"],
)
