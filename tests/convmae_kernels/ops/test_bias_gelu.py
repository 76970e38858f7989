"""`bias_gelu` without Triton: the reference, its derivatives, what is recorded of it, errors."""

import pytest
import torch
from torch.nn.functional import gelu

from convmae_kernels.ops import bias_gelu
from convmae_kernels.testing import DTYPES, random_tensor
from tests.support.rows import check_bias_gelu


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(impl, dtype):
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    check_bias_gelu(impl, (3, 2, 33), dtype, vectors, "sliced")


def test_derivatives():
    inputs = [random_tensor(shape, torch.float64).requires_grad_() for shape in ((3, 4), (4,))]
    assert torch.autograd.gradcheck(bias_gelu, inputs)
    assert torch.autograd.gradgradcheck(bias_gelu, inputs)
    x, bias = inputs
    _, tangent = torch.func.jvp(bias_gelu, (x, bias), (x, bias))
    _, expected = torch.func.jvp(lambda x, b: gelu(x + b), (x, bias), (x, bias))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and takes sizes for constants
def test_recorded_programs_have_plain_ops():
    traced = torch.jit.trace(bias_gelu, (torch.zeros(2, 3), torch.zeros(3)))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::gelu" in kinds
    assert not [kind for kind in kinds if kind.startswith("convmae")]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1)), TypeError, "x must be a tensor, got list"),
        ((torch.zeros(3), torch.zeros(3)), ValueError, r"x must be \[..., C\].*got \[3\]"),
        ((torch.zeros(2, 3).long(), torch.zeros(3)), TypeError, "x must be float32.*int64"),
        ((torch.zeros(2, 3), torch.zeros(2)), ValueError, r"bias must be \[3\], got \[2\]"),
        ((torch.zeros(2, 3), torch.zeros(3, device="meta")), ValueError, "bias is on meta"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(*arguments)


def test_named_implementations_that_cannot_run():
    x, bias = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: bias_gelu has kernels in Tri"):
        bias_gelu(x, bias, impl="cuda")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        bias_gelu(x.to("meta"), bias.to("meta"), impl="triton")
