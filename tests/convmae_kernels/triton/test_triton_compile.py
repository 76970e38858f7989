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
    accumulation,
    add_layer_norm,
    add_layer_norm_grad,
    bias_gelu,
    bias_gelu_grad,
    gather_visible,
    gather_windows,
    gather_windows_grad,
    grouped_conv2d,
    grouped_conv2d_weight_grad,
    masked_conv2d,
    masked_conv2d_grads,
    masked_conv2d_weight_grad,
    scatter_visible,
    strided_conv2d,
    strided_conv2d_input_grad,
    strided_conv2d_weight_grad,
)

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.thorough(but_every=5),
]

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
KERNELS = (3, 5, 7)
DEPTHS = {"bf16": 64, "fp16": 64, "fp32": 32, "fp64": 16}  # of products, see `depth`
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
    even = {*pointers, "channels", "inputs", "outputs"} - {*constants}
    aligned = [i for i, name in enumerate(names) if name in even]
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


def window_constants(dtype, halo, side_bits):
    top, bottom, left, right = halo
    side = 1 << side_bits
    rows, columns = top + side + bottom, left + side + right
    return {
        **{"RADIUS": max(0, -(-max(halo) >> side_bits)), "SIDE_BITS": side_bits},
        **{"ROWS": rows, "COLUMNS": columns, "ACCUMULATOR": TYPES[dtype]},
    }


def compiled_windows(target, dtype, configuration, halo=(1, 1, 1, 1), side_bits=2):
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "fill", "windows")}
    pointers["neighbours_ptr"] = "*i32"
    constants = window_constants(dtype, halo, side_bits)
    constants.pop("ACCUMULATOR")
    return compiled(
        gather_windows.gather_windows_kernel, target, pointers, configuration, **constants
    )


def compiled_windows_grad(target, dtype, configuration, halo=(1, 1, 1, 1), side_bits=2):
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("windows", "grad")}
    pointers["neighbours_ptr"] = "*i32"
    constants = window_constants(dtype, halo, side_bits)
    constants.pop("ROWS")
    constants.pop("COLUMNS")
    return compiled(
        gather_windows_grad.gather_windows_grad_kernel,
        target,
        pointers,
        configuration,
        **constants,
    )


def kernel_constants(dtype, kernel, side_bits, **more):
    rows, columns = kernel
    return {
        **{"dilation_rows": 1, "dilation_columns": 1},
        **{"KERNEL_ROWS": rows, "KERNEL_COLUMNS": columns, "ACCUMULATOR": TYPES[dtype]},
        **{"RADIUS": -(-(max(kernel) // 2) >> side_bits), "SIDE_BITS": side_bits},
        **more,
    }


def compiled_conv(target, dtype, configuration, kernel=(5, 5), side_bits=2, stride_bits=0):
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "bias", "y")}
    pointers["neighbours_ptr"] = "*i32"
    constants = kernel_constants(dtype, kernel, side_bits, STRIDE_BITS=stride_bits)
    constants |= {"PADDING_ROWS": kernel[0] // 2, "PADDING_COLUMNS": kernel[1] // 2}
    function = strided_conv2d.strided_conv2d_kernel
    return compiled(function, target, pointers, configuration, HAS_BIAS=True, **constants)


def compiled_weight_grad(target, dtype, configuration, kernel=(5, 5), side_bits=2, stride_bits=0):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    pointers = {"grad_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    pointers |= {"neighbours_ptr": "*i32", "parts_ptr": f"*{accumulator}"}
    constants = kernel_constants(dtype, kernel, side_bits, STRIDE_BITS=stride_bits)
    constants |= {"PADDING_ROWS": kernel[0] // 2, "PADDING_COLUMNS": kernel[1] // 2}
    constants["LANES"] = masked_conv2d_weight_grad.LANES
    function = masked_conv2d_weight_grad.sum_positions_kernel
    return compiled(function, target, pointers, configuration, **constants)


def compiled_grads(target, dtype, configuration, kernel=(5, 5), side_bits=2):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("grad", "x", "weight", "grad_x")}
    pointers |= {"neighbours_ptr": "*i32", "parts_ptr": f"*{accumulator}"}
    constants = kernel_constants(dtype, kernel, side_bits)
    constants["LANES"] = masked_conv2d_grads.LANES
    constants["ROWS"] = triton.next_power_of_2(kernel[0])
    function = masked_conv2d_grads.masked_conv2d_grads_kernel
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
        LANES=accumulation.PART_LANES,
        ELEMENTS=masked_conv2d_weight_grad.ELEMENTS,
    )


def compiled_strided(target, dtype, kernel=(3, 3), side_bits=3, stride_bits=1):
    """The first configurations of what a convolution with a stride and its gradients run."""
    shape = kernel, side_bits, stride_bits
    yield compiled_conv(target, dtype, strided_conv2d.CONFIGURATIONS[0], *shape)
    yield compiled_weight_grad(target, dtype, strided_conv2d_weight_grad.CONFIGURATIONS[0], *shape)
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("grad", "weight", "x")}
    yield compiled(
        strided_conv2d_input_grad.strided_conv2d_input_grad_kernel,
        target,
        {**pointers, "neighbours_ptr": "*i32"},
        strided_conv2d_input_grad.CONFIGURATIONS[0],
        **kernel_constants(dtype, kernel, side_bits, STRIDE_BITS=stride_bits),
    )


def compiled_products(target, dtype, configuration, is_grad=False, stride_bits=0):
    """Of `grouped_conv2d` or its input gradient, on blocks of side 4 and many channels."""
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "bias", "y")}
    pointers["neighbours_ptr"] = "*i32"
    constants = kernel_constants(dtype, (3, 3), side_bits=2)
    constants |= {"STRIDE_BITS": stride_bits, "HAS_BIAS": not is_grad, "IS_GRAD": is_grad}
    constants["INPUTS"] = DEPTHS[dtype]
    function = grouped_conv2d.sum_taps_kernel
    return compiled(function, target, pointers, configuration, **constants)


def compiled_products_grad(target, dtype, configuration):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    pointers = {"grad_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    pointers |= {"neighbours_ptr": "*i32", "parts_ptr": f"*{accumulator}"}
    constants = kernel_constants(dtype, (3, 3), side_bits=2)
    constants |= {"STRIDE_BITS": 0, "POSITIONS": DEPTHS[dtype]}
    function = grouped_conv2d_weight_grad.sum_positions_kernel
    return compiled(function, target, pointers, configuration, **constants)


def row_kernels(target, dtype, channels, choice):
    """What runs on rows of features: a configuration of each kernel, and the sum of their parts."""
    vector = "fp64" if dtype == "fp64" else "fp32"
    columns = triton.next_power_of_2(channels)
    rows = add_layer_norm_grad.rows_of_step(columns, TYPES[dtype])
    numbers = {"ACCUMULATOR": TYPES[dtype]}
    norm = {**numbers, "EPS": 1e-6, "HAS_BRANCH_BIAS": True, "COLUMNS": columns}
    for module, function, constants in (
        (add_layer_norm, add_layer_norm.add_layer_norm_kernel, norm),
        (
            add_layer_norm_grad,
            add_layer_norm_grad.add_layer_norm_grad_kernel,
            {**norm, "HAS_GRAD_TOTAL": True, "ROWS": rows},
        ),
        (bias_gelu, bias_gelu.bias_gelu_kernel, numbers),
        (
            bias_gelu_grad,
            bias_gelu_grad.bias_gelu_grad_kernel,
            {**numbers, "LANES": bias_gelu_grad.LANES},
        ),
    ):
        vectors = ("weight_ptr", "bias_ptr", "branch_bias_ptr", "parts_ptr")
        pointers = {
            name: f"*{vector if name in vectors else dtype}"
            for name in function.arg_names
            if name.endswith("_ptr")
        }
        found = module.CONFIGURATIONS[choice % len(module.CONFIGURATIONS)]
        yield compiled(function, target, pointers, found, **constants)
    pointers = {f"{name}_ptr": f"*{vector}" for name in ("parts", "first", "second", "third")}
    sizes = {"LANES": accumulation.PART_LANES, "ELEMENTS": accumulation.ELEMENTS}
    yield compiled(accumulation.add_parts_kernel, target, pointers, VECTORS=3, **numbers, **sizes)


def resources(kernel, folder):
    """What ptxas gave a kernel: registers, and bytes of stack, shared and local memory."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    done = subprocess.run(
        [CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout + done.stderr))
    assert set(found) == {"REG", "STACK", "SHARED", "LOCAL"}, done.stdout + done.stderr
    return {name: int(value) for name, value in found.items()}


def compiled_convolutions(target, dtype, kernel, side_bits=2):
    """Every configuration of the kernels that a convolution and its gradients run."""
    for configuration in masked_conv2d.CONFIGURATIONS:
        yield compiled_conv(target, dtype, configuration, kernel, side_bits)
    for configuration in masked_conv2d_weight_grad.CONFIGURATIONS:
        yield compiled_weight_grad(target, dtype, configuration, kernel, side_bits)
    yield compiled_sum_parts(target, dtype, kernel)


def assert_in_registers(kernel, folder):
    used = resources(kernel, folder)
    assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{kernel.metadata.name} spills: {used}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.thorough(but_every=7)
def test_convolutions_stay_in_registers(architecture, kernel, tmp_path):
    target = GPUTarget("cuda", architecture, 32)
    for found in compiled_convolutions(target, "bf16", (kernel, kernel)):
        assert_in_registers(found, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "dtype", "kernel", "configurations"),
    [(80, "bf16", 7, slice(1)), (90, "bf16", 5, slice(1, 2)), (100, "fp64", 3, slice(2, None))],
)
def test_all_gradients_stay_in_registers(architecture, dtype, kernel, configurations, tmp_path):
    target = GPUTarget("cuda", architecture, 32)
    for configuration in masked_conv2d_grads.CONFIGURATIONS[configurations]:
        found = compiled_grads(target, dtype, configuration, (kernel, kernel))
        assert_in_registers(found, tmp_path)
        assert "atom" not in found.asm["ptx"]


PRODUCTS = {(80, "bf16"): "mma.sync", (90, "bf16"): "wgmma", (100, "bf16"): "tcgen05.mma"}


@pytest.mark.parametrize(
    ("architecture", "dtype", "configuration"),
    [(80, "bf16", 5), (90, "bf16", 0), (100, "bf16", 1), (90, "fp32", 0)],
)
def test_products_stay_in_registers(architecture, dtype, configuration, tmp_path):
    target = GPUTarget("cuda", architecture, 32)
    grads = grouped_conv2d_weight_grad.OF_MANY_CHANNELS
    for found in (
        compiled_products(
            target,
            dtype,
            grouped_conv2d.CONFIGURATIONS[configuration],
            is_grad=architecture == 90,
            stride_bits=architecture == 80,
        ),
        compiled_products_grad(target, dtype, grads[configuration % 4]),
    ):
        assert_in_registers(found, tmp_path)
        assert PRODUCTS.get((architecture, dtype), "fma.rn.f32") in found.asm["ptx"]
        assert "cp.async" in found.asm["ptx"]  # while others are multiplied
        assert ".tf32" not in found.asm["ptx"]
        assert "atom" not in found.asm["ptx"]


def test_sums_of_parts_stay_in_registers(tmp_path):
    target, module = GPUTarget("cuda", 80, 32), grouped_conv2d_weight_grad
    pointers = {"grad_ptr": "*bf16", "parts_ptr": "*fp32", "result_ptr": "*bf16"}
    sizes = {"LANES": module.LANES, "CHANNELS": module.CHANNELS}
    for kernel, constants in (
        (module.sum_grads_kernel, sizes),
        (module.sum_parts_kernel, {"ELEMENTS": module.ELEMENTS, "taps": 1}),
    ):
        found = compiled(kernel, target, pointers, ACCUMULATOR=tl.float32, **constants)
        assert_in_registers(found, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "dtype", "channels", "choice"),
    [
        (90, "bf16", 768, 1),
        pytest.param(80, "fp64", 384, 2, marks=pytest.mark.thorough),
        pytest.param(100, "bf16", 256, 0, marks=pytest.mark.thorough),
    ],
)
def test_rows_stay_in_registers(architecture, dtype, channels, choice, tmp_path):
    for found in row_kernels(GPUTarget("cuda", architecture, 32), dtype, channels, choice):
        assert_in_registers(found, tmp_path)
        assert "atom" not in found.asm["ptx"]
        if channels == 768 and "add_parts" not in found.metadata.name:
            assert "ld.global.v4.b32" in found.asm["ptx"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64"])
@pytest.mark.thorough(but_every=5)
def test_other_dtypes_stay_in_registers(dtype, tmp_path):
    for found in compiled_convolutions(GPUTarget("cuda", 90, 32), dtype, (5, 5)):
        assert_in_registers(found, tmp_path)


def test_strided_convolutions(tmp_path):
    """They stay in registers and read 16 bytes at a time."""
    target = GPUTarget("cuda", 90, 32)
    for found in compiled_strided(target, "bf16"):
        assert_in_registers(found, tmp_path)
        assert "ld.global.v4.b32" in found.asm["ptx"]
    for found in compiled_strided(target, "fp64", (2, 5), side_bits=0, stride_bits=0):
        assert_in_registers(found, tmp_path)


@pytest.mark.parametrize(
    ("kernel", "side_bits"), [((15, 15), 0), ((15, 15), 5), ((1, 1), 1), ((3, 9), 3)]
)
@pytest.mark.thorough(but_every=3)
def test_other_kernels_and_sides(kernel, side_bits, tmp_path):
    target = GPUTarget("cuda", 80, 32)
    for module, compile_it in (
        (masked_conv2d, compiled_conv),
        (masked_conv2d_weight_grad, compiled_weight_grad),
    ):
        found = compile_it(target, "bf16", module.CONFIGURATIONS[0], kernel, side_bits)
        assert_in_registers(found, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thorough(but_every=5)
def test_gather_and_scatter_stay_in_registers(architecture, tmp_path):
    target = GPUTarget("cuda", architecture, 32)
    for dtype in ("bf16", "fp32"):
        for configuration in gather_visible.CONFIGURATIONS:
            assert_in_registers(compiled_gather(target, dtype, configuration), tmp_path)
        for configuration in scatter_visible.CONFIGURATIONS:
            assert_in_registers(compiled_scatter(target, dtype, configuration), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(80, "bf16"), (90, "bf16"), (100, "bf16"), (90, "fp32"), (90, "fp16"), (90, "fp64")],
)
def test_windows_stay_in_registers(architecture, dtype, tmp_path):
    target = GPUTarget("cuda", architecture, 32)
    for configuration in gather_windows.CONFIGURATIONS:
        assert_in_registers(compiled_windows(target, dtype, configuration), tmp_path)
    for configuration in gather_windows_grad.CONFIGURATIONS:
        assert_in_registers(compiled_windows_grad(target, dtype, configuration), tmp_path)


@pytest.mark.parametrize(
    ("halo", "side_bits"),
    [((100, 100, 100, 100), 0), ((33, 0, 3, 1), 5), ((0, 0, 0, 0), 3), ((-2, -1, 0, -3), 2)],
)
def test_other_halos_and_sides(halo, side_bits, tmp_path):
    target = GPUTarget("cuda", 80, 32)
    for module, compile_it in (
        (gather_windows, compiled_windows),
        (gather_windows_grad, compiled_windows_grad),
    ):
        found = compile_it(target, "bf16", module.CONFIGURATIONS[0], halo, side_bits)
        assert_in_registers(found, tmp_path)


def test_a_kernel_that_spills_is_noticed(tmp_path):
    huge = masked_conv2d.Configuration("huge", {"POSITIONS": 32, "CHANNELS": 128}, num_warps=4)
    kernel = compiled_conv(GPUTarget("cuda", 90, 32), "fp64", huge, (5, 5))
    with pytest.raises(AssertionError, match="strided_conv2d_kernel spills"):
        assert_in_registers(kernel, tmp_path)


def test_global_loads_are_16_bytes_wide():
    target = GPUTarget("cuda", 90, 32)
    for kernel in (
        compiled_conv(target, "bf16", masked_conv2d.CONFIGURATIONS[0]),
        compiled_weight_grad(target, "bf16", masked_conv2d_weight_grad.CONFIGURATIONS[0]),
        compiled_scatter(target, "bf16", scatter_visible.CONFIGURATIONS[0]),
        compiled_windows(target, "bf16", gather_windows.CONFIGURATIONS[0]),
        compiled_windows_grad(target, "bf16", gather_windows_grad.CONFIGURATIONS[0]),
    ):
        assert "ld.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.skipif("amd" not in triton.backends.backends, reason="this triton is NVIDIA's only")
@pytest.mark.parametrize("architecture", ["gfx90a", "gfx942"])
def test_for_amd(architecture):
    target = GPUTarget("hip", architecture, 64)
    kernels = [
        compiled_gather(target, "bf16", gather_visible.CONFIGURATIONS[0]),
        compiled_scatter(target, "bf16", scatter_visible.CONFIGURATIONS[0]),
        compiled_conv(target, "bf16", masked_conv2d.CONFIGURATIONS[0]),
        compiled_weight_grad(target, "bf16", masked_conv2d_weight_grad.CONFIGURATIONS[0]),
        compiled_sum_parts(target, "bf16"),
        compiled_windows(target, "bf16", gather_windows.CONFIGURATIONS[0]),
        compiled_windows_grad(target, "bf16", gather_windows_grad.CONFIGURATIONS[0]),
        compiled_products(target, "bf16", grouped_conv2d.CONFIGURATIONS[0]),
    ]
    for kernel in kernels:
        assert f"amdgcn-amd-amdhsa--{architecture}" in kernel.asm["amdgcn"]
        assert len(kernel.asm["hsaco"]) > 0
