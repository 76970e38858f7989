"""Triton's kernels compiled ahead of time, for GPUs that need not be there."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from convmae_kernels.triton import (  # noqa: E402
    gather_visible,
    masked_conv2d,
    masked_conv2d_weight_grad,
    scatter_visible,
)

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
    pytest.mark.usefixtures("own_cache"),
]

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
KERNELS = (3, 5, 7)
TYPES = {"bf16": tl.float32, "fp16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, target, pointers, configuration=None, **constants):
    """A kernel compiled for a target, as for aligned tensors and channels that 16 divides."""
    options = dict(configuration.options) if configuration else {}
    warps = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    constants = {**constants, **options}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = [i for i, name in enumerate(names) if name in pointers or name == "channels"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=warps)


def compiled_gather(target, dtype, configuration, side_bits=2):
    pointers = {"images_ptr": f"*{dtype}", "block_index_ptr": "*i64", "packed_ptr": f"*{dtype}"}
    kernel = gather_visible.gather_visible_kernel
    return compiled(kernel, target, pointers, configuration, stride_channel=1, SIDE_BITS=side_bits)


def compiled_scatter(target, dtype, configuration, side_bits=2):
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("packed", "fill", "images")}
    pointers["row_of_block_ptr"] = "*i64"
    kernel = scatter_visible.scatter_visible_kernel
    return compiled(kernel, target, pointers, configuration, SIDE_BITS=side_bits)


def kernel_constants(dtype, kernel, side_bits):
    rows, columns = kernel
    return {
        **{"dilation_rows": 1, "dilation_columns": 1},
        **{"KERNEL_ROWS": rows, "KERNEL_COLUMNS": columns, "ACCUMULATOR": TYPES[dtype]},
        **{"RADIUS": -(-(max(kernel) // 2) >> side_bits), "SIDE_BITS": side_bits},
    }


def compiled_conv(target, dtype, configuration, kernel=(5, 5), side_bits=2):
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "bias", "y")}
    pointers["neighbours_ptr"] = "*i32"
    constants = kernel_constants(dtype, kernel, side_bits)
    function = masked_conv2d.masked_conv2d_kernel
    return compiled(function, target, pointers, configuration, HAS_BIAS=True, **constants)


def compiled_weight_grad(target, dtype, configuration, kernel=(5, 5), side_bits=2):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    pointers = {"grad_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    pointers |= {"neighbours_ptr": "*i32", "parts_ptr": f"*{accumulator}"}
    constants = kernel_constants(dtype, kernel, side_bits)
    constants["LANES"] = masked_conv2d_weight_grad.LANES
    function = masked_conv2d_weight_grad.sum_positions_kernel
    return compiled(function, target, pointers, configuration, **constants)


def compiled_sum_parts(target, dtype, kernel=(5, 5)):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    pointers = {"parts_ptr": f"*{accumulator}", "weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
    return compiled(
        masked_conv2d_weight_grad.sum_parts_kernel,
        target,
        pointers,
        ALL_TAPS=kernel[0] * kernel[1],
        ACCUMULATOR=TYPES[dtype],
        PART_LANES=masked_conv2d_weight_grad.PART_LANES,
        ELEMENTS=masked_conv2d_weight_grad.ELEMENTS,
    )


def resources(kernel, folder):
    """What ptxas gave a kernel: registers, and bytes of stack, shared and local memory."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    done = subprocess.run(
        [CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True
    )
    found = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
    return {name: int(value) for name, value in found}
