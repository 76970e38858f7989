"""The CUDA kernels as compiled, on any machine: no spills, wide accesses, a portable library."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convmae_kernels.ops.support.dispatch import LIBRARY_FILE, WHY_NOT_COMPILED
from docs import kernel_report

COMPILED = WHY_NOT_COMPILED is None
ARCHS = torch.ops.convmae.cuda_architectures().split(", ") if COMPILED else [""]
KERNELS = {
    f"masked_conv2d{op}_tiles<{dtype}, {side}, {kernel}>"
    for op in ("", "_weight_grad", "_grads")
    for dtype in ("float", "bfloat16", "half")
    for side in (2, 4)
    for kernel in (3, 5, 7)
    if (op, side, kernel) != ("_grads", 4, 7) or dtype == "float"  # too few registers
}
TENSOR = {f"masked_conv2d_tensor<{dtype}>" for dtype in ("bfloat16", "half")}
SYSTEM = {"libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64", "libstdc++"}
OLD_GLIBC = {"librt", "libpthread", "libdl"}

needs_cuda_kernels = pytest.mark.skipif(ARCHS == [""], reason="the library was built without nvcc")
needs_cuobjdump = pytest.mark.skipif(
    kernel_report.find_tool("cuobjdump") is None,
    reason="there is no cuobjdump, neither on the PATH nor in Triton",
)


def sm(arch):
    return "sm_" + arch.removesuffix("+PTX").replace(".", "")


def output(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool}")
    command = [tool, *arguments, str(LIBRARY_FILE)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels():
    return kernel_report.kernels()


@needs_cuda_kernels
@needs_cuobjdump
def test_the_library_holds_the_architectures_that_it_names():
    elves = set(re.findall(r"\.(sm_\w+)\.cubin", kernel_report.cuobjdump("--list-elf")))
    assert elves == {sm(arch) for arch in ARCHS}
    ptx = set(re.findall(r"\.(sm_\w+)\.ptx", kernel_report.cuobjdump("--list-ptx")))
    assert ptx == {sm(arch) for arch in ARCHS if arch.endswith("+PTX")}


@needs_cuda_kernels
@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(kernels, arch):
    compiled = {kernel.name: kernel for kernel in kernels if kernel.arch == sm(arch)}
    assert set(compiled) >= KERNELS | TENSOR
    spilling = {name for name, kernel in compiled.items() if kernel.stack or kernel.local}
    assert not spilling


@needs_cuda_kernels
@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.thorough(but_every=5)  # the same sources, by the same compiler
def test_global_memory_is_read_sixteen_bytes_at_a_time(kernels, arch):
    """Features on their way to shared memory, and whole rows of channels that are moved."""
    code = kernel_report.instructions(sm(arch))
    wide = {
        kernel.name: " ".join(code[kernel.symbol]) for kernel in kernels if kernel.arch == sm(arch)
    }
    for name in KERNELS:
        assert re.search(r"LDGSTS\.E\S*\.128", wide[name]), name
    moves = [
        f"{op}_rows<16 bytes>" for op in ("gather_visible", "scatter_visible", "gather_windows")
    ]
    sums = ("float, 4", "bfloat16, 8", "half, 8", "double, 2")
    for name in (*moves, *(f"gather_windows_grad_rows<{kind}>" for kind in sums)):
        assert re.search(r"LDG\.E\S*\.128", wide[name]), name
        assert re.search(r"STG\.E\S*\.128", wide[name]), name


@pytest.mark.skipif("9.0" not in ARCHS, reason="there are no kernels for sm_90")
@needs_cuobjdump
def test_an_h100_holds_as_many_warps_of_the_weight_gradient_as_planned(kernels):
    """Shared memory bounds them, as `reducing_warps_held` of tile_memory.h supposes, and nothing
    else: registers do not."""
    found = [k for k in kernels if k.arch == "sm_90" and "weight_grad_tiles" in k.symbol]
    assert len(found) == 18
    for kernel in found:
        by_shared_memory = kernel_report.SHARED_BYTES // kernel.shared * (kernel.threads // 32)
        assert kernel.resident_warps == by_shared_memory, kernel.name


@pytest.mark.skipif(not COMPILED, reason=f"there is no compiled library: {WHY_NOT_COMPILED}")
def test_the_library_needs_the_stable_abi_and_nothing_else_of_torch():
    undefined = {}
    for line in output("nm", "-D", "--undefined-only").splitlines():
        kind, symbol = line.split()[-2:]
        undefined[symbol.partition("@")[0]] = kind
    shims = {name for name in undefined if name.startswith(("aoti_torch_", "torch_"))}
    assert "torch_library_impl" in shims
    cuda = {name for name in undefined if "_cuda_" in name or name.startswith(("cuda", "__cuda"))}
    assert cuda <= {"aoti_torch_get_current_cuda_stream"}
    assert all(undefined[name] == "w" for name in cuda)
    of_torch = re.compile(r"_Z\w*?(3c10|2at|5torch|4aoti|6caffe2)")
    assert not {name for name in undefined if of_torch.match(name)}


@pytest.mark.skipif(not COMPILED, reason=f"there is no compiled library: {WHY_NOT_COMPILED}")
def test_the_library_loads_where_there_is_no_cuda():
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\.so", output("readelf", "-d"))
    assert set(needed) - SYSTEM - OLD_GLIBC == {"libtorch", "libtorch_cpu"}


NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-code*) echo "{codes}" ;;
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  *) echo "#$ INCLUDES=-I{folder}" >&2; echo "#$ LIBRARIES=-L{folder}" >&2 ;;
esac
"""


def write_nvcc(folder, version, codes):
    """A CUDA_HOME whose nvcc says what it compiles for, and compiles nothing."""
    for name in ("cuda_runtime_api.h", "libcudart_static.a"):
        (folder / name).touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    names = "\n".join(f"sm_{code}" for code in codes)
    nvcc.write_text(NVCC.format(codes=names, version=version, folder=folder))
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            "9.0;12.0",
            "TORCH_CUDA_ARCH_LIST asks for 12.0, but NVCC (12.4) compiles for 8.0, 9.0, 10.3 only: "
            'install a newer CUDA toolkit, or set TORCH_CUDA_ARCH_LIST="10.3+PTX", which the '
            "driver compiles for the GPU when the library is loaded",
        ),
        (
            "7.0",
            "TORCH_CUDA_ARCH_LIST asks for 7.0, but NVCC (12.4) compiles for 8.0, 9.0, 10.3 only: "
            "install an older CUDA toolkit",
        ),
        ("9", "TORCH_CUDA_ARCH_LIST has '9', expected e.g. 9.0 or 9.0+PTX"),
    ],
)
def test_an_nvcc_that_does_not_know_the_gpu_says_so(asked, expected, tmp_path):
    home = write_nvcc(tmp_path, "12.4", (103, 80, 90))
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=Path(kernel_report.__file__).parents[1],
        env=os.environ
        | {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": asked, "CONVMAE_REQUIRE_EXT": "1"},
        capture_output=True,
        text=True,
    )
    message = expected.replace("NVCC", str(home / "bin" / "nvcc"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"error: {message}"
    assert "Traceback" not in done.stderr


@needs_cuda_kernels
def test_named_architectures_are_shown():
    from convmae_kernels import info

    assert ", ".join(ARCHS) in info()["cuda"]
