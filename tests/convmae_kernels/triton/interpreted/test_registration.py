"""`impl="triton"` as an operator of PyTorch: derivatives, compile, and that only Triton runs."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import convmae_kernels as ck
from convmae_kernels.ops import add_layer_norm, bias_gelu
from convmae_kernels.testing import make_mask, random_tensor

pytestmark = [pytest.mark.usefixtures("few_programs"), pytest.mark.thorough(but_every=17)]
OPS = torch.ops.convmae_triton
NAMES = (
    "add_layer_norm",
    "add_layer_norm_grad",
    "bias_gelu",
    "bias_gelu_grad",
    "gather_visible",
    "gather_windows",
    "gather_windows_grad",
    "masked_conv2d",
    "masked_conv2d_grads",
    "masked_conv2d_weight_grad",
    "scatter_visible",
    "strided_conv2d",
    "strided_conv2d_input_grad",
    "strided_conv2d_weight_grad",
)


def samples(requires_grad):
    """Arguments of every op, by its name."""
    mask = make_mask("equal")

    def tensor(*shape):
        return random_tensor(shape).requires_grad_(requires_grad)

    x, grad, table = tensor(8, 4, 3), tensor(8, 4, 3), mask.neighbours(1)
    one, taps, shape = tensor(8, 1, 3), tensor(3, 1, 3, 2), (2, [1, 0], [1, 1])
    return {
        "add_layer_norm": (x, grad, None, tensor(3), tensor(3), 1e-5),
        "add_layer_norm_grad": (grad, None, x, tensor(3), 1e-5, False),
        "bias_gelu": (x, tensor(3)),
        "bias_gelu_grad": (grad, x, tensor(3)),
        "gather_visible": (tensor(2, 3, 6, 8), mask.block_index, 3, 4),
        "scatter_visible": (x, mask.block_index, 2, 3, 4, 0.5),
        "gather_windows": (x, table, [1, 2, 0, -1], 0.5),
        "gather_windows_grad": (tensor(8, 5, 1, 3), table, [1, 2, 0, -1]),
        "masked_conv2d": (x, tensor(3, 1, 3, 3), tensor(3), table, [1, 1]),
        "masked_conv2d_grads": (grad, x, tensor(3, 1, 3, 3), table, [1, 1]),
        "masked_conv2d_weight_grad": (grad, x, table, [3, 3], [1, 1]),
        "strided_conv2d": (x, taps, tensor(3), table, *shape),
        "strided_conv2d_input_grad": (one, taps, table, *shape),
        "strided_conv2d_weight_grad": (one, x, table, [3, 2], *shape),
    }


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, requires_grad):
    opcheck(getattr(OPS, name).default, samples(requires_grad)[name])


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_those_of_the_other_library(name):
    ours, other = (str(getattr(ops, name).default._schema) for ops in (OPS, torch.ops.convmae))
    assert ours == other.replace("convmae::", "convmae_triton::")


class Recorder(TorchDispatchMode):
    """The names of the ops of this package that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("convmae"):
            self.names.append(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


def three_orders(impl):
    """Runs all ops and three derivatives; returns what they gave and the ops that ran."""
    torch.manual_seed(0)
    mask = make_mask("equal")
    shapes = ((2, 3, 6, 8), (3, 1, 3, 3), (3,))
    leaves = [random_tensor(shape, torch.float64).requires_grad_() for shape in shapes]
    images, weight, bias = leaves
    with Recorder() as recorder:
        x = ck.gather_visible(images, mask, impl=impl)
        y = ck.masked_conv2d(x, weight, bias, mask, groups=3, impl=impl)
        results = [
            ck.scatter_visible(y, mask, impl=impl),
            ck.gather_windows(y, mask, (1, 0, 2, -1), impl=impl),
            ck.masked_conv2d(y, weight, bias, mask, 2, groups=3, impl=impl),
            bias_gelu(y, bias, impl=impl),
            *add_layer_norm(x, y, bias, bias, 0.1, bias, impl=impl),
        ]
        for _ in range(3):
            loss = sum(r.sin().sum() for r in results)
            results = torch.autograd.grad(loss, leaves, create_graph=True)
    return results, recorder.names


def test_only_triton_runs_in_derivatives_of_every_order():
    found, names = three_orders("triton")
    expected, others = three_orders("auto")
    assert {name.partition(".")[0] for name in names} == {"convmae_triton"}
    assert {name.partition(".")[0] for name in others} == {"convmae"}
    assert {name.partition(".")[2] for name in names} == set(NAMES)
    torch.testing.assert_close(found, expected)


def test_derivatives_in_float64():
    mask = make_mask("corner")
    shapes = ((3, 4, 1), (1, 1, 3, 1), (1,))
    inputs = [random_tensor(shape, torch.float64).requires_grad_() for shape in shapes]

    def conv(x, weight, bias):
        return ck.masked_conv2d(x, weight, bias, mask, groups=1, impl="triton")

    assert torch.autograd.gradcheck(conv, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, inputs, fast_mode=True)


def test_compiled():
    def model(images, weight, mask):
        x = ck.gather_visible(images, mask, impl="triton")
        y = ck.masked_conv2d(x, weight, None, mask, groups=3, impl="triton")
        return ck.scatter_visible(y.relu(), mask, impl="triton")

    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    weight = random_tensor((3, 1, 3, 3)).requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            mask = ck.BlockMask.random(2, (3, 4), 0.5)
            images = random_tensor((2, 3, 6, 8)).requires_grad_()
            results = []
            for f in (model, function):
                y = f(images, weight, mask)
                results.append((y, *torch.autograd.grad(y.square().sum(), (images, weight))))
            torch.testing.assert_close(*results)


def test_transforms_are_refused():
    mask = make_mask("equal")
    x = random_tensor((8, 4, 3))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: torch.func"):
        torch.func.jvp(lambda x: ck.scatter_visible(x, mask, impl="triton"), (x,), (x,))


def test_other_devices_have_no_triton():
    mask = make_mask("equal").to("meta")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: the tensor is on meta"):
        ck.gather_visible(torch.zeros(2, 3, 6, 8, device="meta"), mask, impl="triton")
