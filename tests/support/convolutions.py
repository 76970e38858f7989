"""Convolutions of any channels, groups, stride and padding: cases, and how both ways run them."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import convmae_kernels as ck
from convmae_kernels.testing import implementations, make_mask, random_tensor, value_and_grads


class Case(NamedTuple):
    """A convolution, and how it is computed."""

    path: str
    side: int
    channels: tuple[int, int]  # C_in, C_out
    kernel: tuple[int, int]
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: str | tuple[int, int] = "same"

    @property
    def numbers(self):
        """The padding in positions."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        named = {
            "same": tuple(span // 2 if span >= self.stride else 0 for span in spans),
            "valid": (0, 0),
        }
        return named.get(self.padding, self.padding)


CASES = [
    Case("linear", 1, (3, 5), (1, 1)),
    Case("linear", 4, (5, 2), (1, 1), padding="valid"),
    Case("linear", 8, (4, 3), (1, 1), stride=4, dilation=(2, 1)),
    Case("linear", 2, (3, 7), (2, 2), stride=2),
    Case("linear", 8, (3, 4), (4, 4), stride=4, padding=(0, 0)),
    Case("linear", 32, (2, 3), (16, 16), stride=16, padding="valid"),
    Case("depthwise", 2, (6, 6), (5, 5), groups=6),
    Case("strided", 4, (6, 6), (3, 3), stride=2, groups=6),
    Case("strided", 8, (5, 5), (7, 3), stride=4, dilation=(1, 2), groups=5),
    Case("strided", 32, (2, 2), (3, 3), stride=2, groups=2),
    Case("product", 1, (3, 5), (3, 3)),
    Case("product", 1, (2, 3), (5, 3), dilation=(2, 1)),
    Case("product", 2, (4, 3), (3, 7)),
    Case("product", 4, (3, 2), (3, 3), padding=(1, 1)),
    Case("product", 4, (3, 4), (3, 3), stride=2),
    Case("product", 4, (3, 4), (4, 4), stride=4, padding=(1, 1)),  # not patches: it looks around
    Case("product", 4, (3, 4), (4, 4), stride=4, padding=(0, 1)),
    Case("product", 4, (2, 3), (4, 2), stride=2),
    Case("product", 8, (2, 3), (7, 7), stride=4, padding=(3, 2)),
    Case("product", 8, (2, 3), (2, 3), stride=4, padding="valid"),  # smaller than its stride
    Case("product", 2, (1, 2), (17, 17)),
    Case("product", 32, (2, 3), (11, 11), stride=8),
    Case("convolution", 8, (3, 4), (3, 3)),
    Case("convolution", 8, (3, 4), (3, 5), dilation=(3, 2)),
    Case("convolution", 16, (3, 2), (4, 4), stride=2),
    Case("convolution", 32, (3, 2), (5, 5), stride=4),
    Case("convolution", 32, (2, 2), (3, 3)),
    Case("groups", 4, (6, 4), (3, 3), groups=2),
    Case("groups", 1, (4, 4), (3, 1), groups=2),
    Case("groups", 2, (3, 6), (5, 5), groups=3),  # two outputs for each channel
    Case("groups", 2, (3, 3), (17, 1), groups=3),  # depthwise, but a long kernel
    Case("strided", 4, (3, 3), (4, 4), stride=2, groups=3),  # an even kernel
    Case("strided", 8, (3, 3), (7, 7), stride=4, groups=3, padding=(2, 2)),  # off its centre
    Case("groups", 4, (4, 2), (2, 2), stride=2, groups=2),
    Case("groups", 4, (6, 2), (1, 1), stride=2, groups=2),
    Case("depthwise", 4, (1, 1), (1, 1)),  # of one channel
    Case("groups", 1, (30, 40), (3, 3), groups=5),  # vectors and what is left of them
    Case("groups", 2, (63, 21), (3, 3), stride=2, groups=7),  # groups that do not fill the last
    Case("groups", 4, (6, 150), (3, 3), groups=2),  # many vectors of a group
    Case("groups", 16, (8, 4), (5, 3), stride=2, dilation=(2, 1), groups=4),
]
ONE_OF_EACH = [CASES[i] for i in (2, 4, 7, 12, 14, 22, 24, 27, 37)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def impls_of(case):
    """What `impl` may name for a case: a matrix product has no kernels to choose from."""
    return ("reference", "auto") if case.path == "linear" else implementations()


def with_impls(cases):
    """Parametrises a test by cases and what `impl` may name for each."""
    return pytest.mark.parametrize(
        ("case", "impl"),
        [
            pytest.param(case, impl, id=f"{case}-{impl}")
            for case in cases
            for impl in impls_of(case)
        ],
    )


def mask_for(case, name="ragged"):
    """A small mask for large blocks."""
    return make_mask("corner" if case.side >= 16 and name != "none" else name)


def make_inputs(case, mask, dtype=torch.float64, layout="contiguous"):
    """x, weight, bias and the gradient of the output."""
    c_in, c_out = case.channels
    shapes = (
        (mask.num_visible, case.side**2, c_in),
        (c_out, c_in // case.groups, *case.kernel),
        (c_out,),
        (mask.num_visible, (case.side // case.stride) ** 2, c_out),
    )
    return [random_tensor(shape, dtype, layout) for shape in shapes]


def convolve(case, mask, x, weight, bias, impl="auto"):
    return ck.masked_conv2d(
        x,
        weight,
        bias,
        mask,
        case.stride,
        case.dilation,
        case.groups,
        padding=case.padding,
        impl=impl,
    )


def convolve_dense(case, mask, x, weight, bias):
    """`gather(conv2d(scatter(x)))` by PyTorch.

    Of a contiguous map: of channels-last ones with few channels, oneDNN's gradient of a strided
    1 x 1 convolution writes beyond its memory (uxlfoundation/oneDNN#6035).
    """
    dense = ck.scatter_visible(x, mask, impl="reference").contiguous()
    y = F.conv2d(dense, weight, bias, case.stride, case.numbers, case.dilation, case.groups)
    return ck.gather_visible(y, mask, impl="reference")


def run(case, mask, inputs, impl="auto"):
    *arguments, grad = inputs
    return value_and_grads(lambda *xs: convolve(case, mask, *xs, impl=impl), arguments, grad)


def run_dense(case, mask, inputs):
    *arguments, grad = inputs
    return value_and_grads(lambda *xs: convolve_dense(case, mask, *xs), arguments, grad)
