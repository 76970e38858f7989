"""A GPU that the compiled library has no code for: it is said, and other kernels run."""

import subprocess
import sys

import pytest
import torch

from convmae_kernels.ops.support import dispatch

needs_cuda_kernels = pytest.mark.skipif(
    dispatch.CUDA_ARCHITECTURES == "", reason="the library was built without nvcc"
)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # later, of the same major version
        ("8.6", (8, 0), False),
        ("8.0, 9.0", (10, 0), False),
        ("8.0, 9.0+PTX", (10, 3), True),  # the driver compiles it
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("12.0", (1, 2), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_library_has_code_for(architectures, capability, runs):
    assert dispatch.has_code(architectures, capability) is runs


# A process with a GPU that is too old for the library. Kernels for GPUs are called with tensors of
# the CPU, past the dispatcher's choice by device.
PROGRAM = """
import sys, types, warnings
import torch
import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.ops.support import dispatch

mode = sys.argv[1]
capabilities = {"old": [(7, 5)], "fits": [(9, 0)], "both": [(9, 0), (7, 5)]}[mode]
dispatch.CUDA_ARCHITECTURES = sys.modules["convmae_kernels.info"].CUDA_ARCHITECTURES = "8.0, 9.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: len(capabilities)
torch.cuda.get_device_name = lambda i=0: "Card"
torch.cuda.get_device_capability = lambda i=0: capabilities[i]
torch.cuda.init = dispatch._look_at_gpus  # CUDA starts
ran = []

def triton_kernel(name):
    ran.append(name)
    return getattr(reference, name)

dispatch._import_triton_kernel = triton_kernel
on_gpu = types.SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print("cuda:", dispatch.why_not("cuda", on_gpu))
print("auto:", dispatch.why_not("auto", on_gpu))
print("info:", ck.info()["cuda"])
print("said: " + "; ".join(str(warning.message) for warning in said))

mask = ck.BlockMask.random(2, (3, 4), 0.5)
x, table = torch.randn(mask.num_visible, 16, 8), mask.neighbours(1)
weight, grad, halo = torch.randn(8, 1, 5, 5), torch.randn(mask.num_visible, 6, 6, 8), [1] * 4
images = torch.randn(2, 8, 12, 16)
calls = {
    "neighbour_table": (mask.visible, mask.block_index, 1),
    "gather_visible": (images, mask.block_index, 3, 4),
    "scatter_visible": (x, mask.block_index, 2, 3, 4, 0.5),
    "gather_windows": (x, table, halo, 0.5),
    "gather_windows_grad": (grad, table, halo),
    "masked_conv2d": (x, weight, None, table, [1, 1]),
    "masked_conv2d_weight_grad": (x, x, table, [5, 5], [1, 1]),
    "masked_conv2d_grads": (x, x, weight, table, [1, 1]),
    "strided_conv2d": (x, weight, None, table, 2, [2, 2], [1, 1]),
    "strided_conv2d_input_grad": (x[:, :4], weight, table, 2, [2, 2], [1, 1]),
    "strided_conv2d_weight_grad": (x[:, :4], x, table, [5, 5], 2, [2, 2], [1, 1]),
}
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name, arguments in calls.items():
    op = getattr(torch.ops.convmae, name).default
    try:
        found = op.redispatch(cuda, *arguments)
    except RuntimeError as error:
        print("raised:", name)
        continue
    expected = getattr(reference, name)(*arguments)
    both = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in both), name
    print("equal:", name)
print("triton:", *ran)
"""


def run(mode):
    """What the process says, by the first word of its lines."""
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(": ")
        said.setdefault(word, []).append(rest)
    return said


MISSING = (
    "the compiled library has kernels for compute capability 8.0, 9.0 only, and cuda:0 (Card) has "
    '7.5; install again from source with TORCH_CUDA_ARCH_LIST="7.5"'
)
OPS = [
    *("neighbour_table", "gather_visible", "scatter_visible", "gather_windows"),
    *("gather_windows_grad", "masked_conv2d", "masked_conv2d_weight_grad", "masked_conv2d_grads"),
    *("strided_conv2d", "strided_conv2d_input_grad", "strided_conv2d_weight_grad"),
]


@needs_cuda_kernels
@pytest.mark.thorough
def test_another_card_than_the_library_was_compiled_for():
    said = run("old")
    assert said["cuda"] == [MISSING]
    assert said["auto"] == ["None"]
    assert said["info"] == [f"no: {MISSING}"]
    (warning,) = said["said"]
    has_triton = dispatch.WHY_NOT_TRITON is None
    other = "Triton's kernels run" if has_triton else "the slow reference ops run"
    assert warning == f"convmae_kernels: {other} on GPUs in place of the compiled ones: {MISSING}."
    assert said["equal"] == OPS and "raised" not in said
    # The table has no kernel of Triton's.
    assert said["triton"] == ([" ".join(OPS[1:])] if has_triton else [""])


@needs_cuda_kernels
def test_a_card_that_fits_runs_the_compiled_kernels():
    said = run("fits")
    assert said["cuda"] == ["None"] and said["said"] == [""]
    assert said["info"] == ["yes, compiled for compute capability 8.0, 9.0"]
    assert said["raised"] == OPS  # they are asked, and refuse tensors of the CPU


@needs_cuda_kernels
@pytest.mark.thorough
def test_one_of_two_cards_that_does_not_fit_decides_for_both():
    said = run("both")
    (reason,) = said["cuda"]
    assert "and cuda:1 (Card) has 7.5" in reason
    assert reason.endswith(", or hide that GPU with CUDA_VISIBLE_DEVICES")
    assert said["equal"] == OPS


@needs_cuda_kernels
def test_whether_cuda_kernels_run_can_be_asked_while_compiling():
    def function(x):
        return x + (1 if dispatch.why_not_cuda() is None else 2)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    expected = 1 if dispatch.why_not_cuda() is None else 2
    assert compiled(torch.zeros(1)).item() == expected
