"""The same input gives the same bits: again, with another number of threads, among other calls."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.testing import implementations, random_tensor

all_impls = pytest.mark.parametrize("impl", implementations())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BATCH, KEEP = 3, 66  # 198 blocks: enough for two threads, whose border is inside an image


def problem(dtype, channels, side, kernel=5, seed=0):
    """A mask, and everything that the three ops and their gradients start from."""
    torch.manual_seed(seed)
    mask = ck.BlockMask.random(BATCH, (14, 14), 0.66)
    assert mask.num_visible == BATCH * KEEP
    packed, dense = (BATCH * KEEP, side * side, channels), (BATCH, channels, 14 * side, 14 * side)
    shapes = (dense, packed, dense, packed, (channels, 1, kernel, kernel), (channels,))
    return mask, [random_tensor(shape, dtype) for shape in shapes]


def everything(mask, tensors, impl):
    """Outputs, first and second derivatives of every op."""
    images, grad, grad_dense, x, weight, bias = tensors
    images, x, weight, bias = (t.detach().requires_grad_() for t in (images, x, weight, bias))
    gathered = ck.gather_visible(images, mask, impl=impl)
    scattered = ck.scatter_visible(x, mask, impl=impl)
    y = ck.masked_conv2d(x, weight, bias, mask, groups=x.shape[2], impl=impl)
    leaves = (x, weight, bias)
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, weight))
    return [
        gathered,
        *torch.autograd.grad(gathered, images, grad),
        scattered,
        *torch.autograd.grad(scattered, x, grad_dense),
        y,
        *first,
        *second,
    ]


def assert_same_bits(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"result {i} differs in {(a != b).sum()} of {a.numel()} values"


@all_impls
@dtypes
@pytest.mark.parametrize(("channels", "side"), [(64, 4), (33, 2)])
def test_threads_change_no_bit(impl, dtype, channels, side, threads):
    kernel = 5 if impl == "cpu" else 3  # plain PyTorch starts many threads for every tap
    mask, tensors = problem(dtype, channels, side, kernel)
    threads(1)
    expected = everything(mask, tensors, impl)
    for number in (2, 2, 2, 2):  # a race shows now and then only
        threads(number)
        assert torch.get_num_threads() == number
        assert_same_bits(everything(mask, tensors, impl), expected)


@all_impls
def test_the_same_seed_gives_the_same_bits(impl):
    expected = everything(*problem(torch.float32, 16, 4), impl)
    assert_same_bits(everything(*problem(torch.float32, 16, 4), impl), expected)


@all_impls
def test_calls_from_several_python_threads(impl):
    problems = [problem(torch.float32, 8, 2, seed=seed) for seed in range(6)]
    expected = [everything(*p, impl) for p in problems]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda p: everything(*p, impl), problems))
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


@all_impls
def test_memory_that_was_not_written_is_not_returned(impl, poisoned_empty):
    assert torch.empty(2).isnan().all()
    # What compiled kernels allocate comes through the dispatcher, as this does.
    assert torch.ops.aten.empty.memory_format([2]).isnan().all()
    assert torch.ops.aten.new_empty(torch.zeros(1).bfloat16(), [2]).isnan().all()
    assert all(t.isfinite().all() for t in everything(*problem(torch.float32, 16, 4), impl))
