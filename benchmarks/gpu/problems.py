"""The kernels with their arguments: what is checked, what is timed, and PyTorch's way of each.

A problem is a call of one op, so one kernel (of gradients of weights and biases two: shares, then
their sum), on random arguments. Its opponent is plain PyTorch, eager: in channels-last, on the
dense map with hidden positions zero, or by indexing; for rows, the same ops one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, fold, gelu, layer_norm, pad

from benchmarks import work
from benchmarks.cases import plain_gather, plain_scatter
from convmae_kernels import BlockMask
from convmae_kernels.ops import reference
from convmae_kernels.zorder import rows_from_zorder, rows_to_zorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.device import Device

Arguments = tuple[Any, ...]
OPS = {
    "forward": "masked_conv2d",
    "input_gradient": "masked_conv2d",
    "weight_gradient": "masked_conv2d_weight_grad",
    "gather": "gather_visible",
    "scatter": "scatter_visible",
    "windows": "gather_windows",
    "windows_gradient": "gather_windows_grad",
    "table": "neighbour_table",
    "gelu": "bias_gelu",
    "gelu_gradient": "bias_gelu_grad",
    "norm": "add_layer_norm",
    "norm_gradient": "add_layer_norm_grad",
}
PASSES = {"gelu": 2, "gelu_gradient": 3, "norm": 4, "norm_gradient": 4}  # of kernels on rows
EPS = 1e-6
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Problem:
    """A kernel and the sizes that it works on.

    Attributes:
        kernel: a key of `OPS`.
        side: of a block, in positions.
        channels: of the features; 0 where there are none.
        kernel_side: rows and columns of the convolution's kernel.
        halo: of windows, on every side.
        ratio: share of hidden blocks.
        dilation: of the kernel.
        batch, dtype: of the arguments.
    """

    kernel: str
    side: int
    channels: int
    kernel_side: tuple[int, int] = (5, 5)
    halo: int = 1
    ratio: float = 0.75
    dilation: int = 1
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def shape(self) -> str:
        """The sizes but for the batch, in a word: "side4/256/5x5"."""
        if self.kernel == "table":
            return "radius1"
        parts = [f"side{self.side}", str(self.channels)]
        if OPS[self.kernel].startswith("masked_conv2d"):
            parts.append("x".join(map(str, self.kernel_side)))
        if self.kernel.startswith("windows"):
            parts.append(f"halo{self.halo}")
        if self.dilation > 1:
            parts.append(f"dilation{self.dilation}")
        return "/".join(parts)

    @property
    def name(self) -> str:
        """All of it: "forward/side4/256/5x5/128/bfloat16"."""
        return f"{self.kernel}/{self.shape}/{self.batch}/{self.dtype}"

    def mask(self, device: Device) -> BlockMask:
        """The mask, the same for all sets of arguments."""
        grid = device.grid(self.side)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(self.batch, grid * grid, generator=generator)
        return BlockMask.from_noise(noise.to(device.where), (grid, grid), self.ratio)


def _depthwise(side: int, channels: int, **options: Any) -> list[Problem]:
    kernels = ("forward", "input_gradient", "weight_gradient")
    return [Problem(kernel, side, channels, **options) for kernel in kernels]


# ConvMAE-Base: stage 1, stage 2, pixels. The first stage of a ConvNeXt-T: 7x7 on side 8, 60 %
# hidden. The windows of the first 3x3 of a ResNet-50. The tokens of stage 3.
TIMED = [
    *_depthwise(4, 256),
    *_depthwise(2, 384),
    *_depthwise(8, 96, kernel_side=(7, 7), ratio=0.6),
    Problem("gather", 16, 3),
    Problem("gather", 4, 256),
    Problem("gather", 2, 384),
    Problem("scatter", 4, 256),
    Problem("scatter", 2, 384),
    Problem("windows", 8, 64, ratio=0.6),
    Problem("windows", 4, 256),
    Problem("windows_gradient", 8, 64, ratio=0.6),
    Problem("windows_gradient", 4, 256),
    Problem("table", 1, 0),
    Problem("gelu", 1, 3072),
    Problem("gelu_gradient", 1, 3072),
    Problem("norm", 1, 768),
    Problem("norm_gradient", 1, 768),
]
# A few at odd sizes, which take other ways through the kernels: channels that fill no word, kernels
# without a specialised kernel, blocks of one position.
ODD = [
    *_depthwise(4, 37),
    *_depthwise(1, 40, kernel_side=(3, 3)),
    *_depthwise(2, 24, kernel_side=(1, 7)),
    *_depthwise(16, 24, kernel_side=(3, 3), dilation=2),
    Problem("gather", 1, 255),
    Problem("scatter", 8, 7),
    *(Problem(kernel, 2, channels) for kernel, channels in zip(PASSES, (37, 24, 33, 40))),
]


def timed(device: Device) -> list[Problem]:
    """What is timed, the most important first."""
    dtypes = ("bfloat16", "float32")
    sizes = [(batch, dtype) for batch in device.batches for dtype in dtypes]
    return [
        replace(problem, batch=batch, dtype=dtype)
        for batch, dtype in sizes
        for problem in TIMED
        if problem.kernel != "table" or dtype == dtypes[0]  # it has no floating numbers
    ]


def checked(device: Device) -> list[Problem]:
    """What is compared with float64: every kernel in bfloat16, the odd ones in other dtypes."""
    rest = ("float32", "float16", "float64")
    chosen = list(TIMED) + [
        replace(problem, dtype=rest[i % len(rest)]) for i, problem in enumerate(ODD)
    ]
    return [replace(problem, batch=device.check_batch) for problem in chosen]


def arguments(problem: Problem, device: Device, mask: BlockMask, seed: int) -> Arguments:
    """Random arguments of the problem's op."""
    generator = torch.Generator(device.where).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device.where)
        return (scale * values).to(DTYPES[problem.dtype])

    side, channels, (gh, gw) = problem.side, problem.channels, mask.grid
    rows, columns = problem.kernel_side
    packed = (mask.num_visible, side * side, channels)
    radius = -(-(max(rows, columns) // 2 * problem.dilation) // side)
    dilation = [problem.dilation] * 2
    if problem.kernel in ("forward", "input_gradient"):
        weight = randn(channels, 1, rows, columns, scale=(rows * columns) ** -0.5)
        bias = randn(channels) if problem.kernel == "forward" else None
        return randn(*packed), weight, bias, mask.neighbours(radius), dilation
    if problem.kernel == "weight_gradient":
        table = mask.neighbours(radius)
        return randn(*packed), randn(*packed), table, [rows, columns], dilation
    if problem.kernel == "gather":
        images = randn(mask.batch_size, channels, gh * side, gw * side)
        if channels > 3:  # features; pixels come as a loader makes them
            images = images.contiguous(memory_format=torch.channels_last)
        return images, mask.block_index, gh, gw
    if problem.kernel == "scatter":
        return randn(*packed), mask.block_index, mask.batch_size, gh, gw, 0.0
    if problem.kernel in PASSES:
        wide = torch.float64 if problem.dtype == "float64" else torch.float32
        vectors = [randn(channels).to(wide) for _ in range(3)]
        if problem.kernel == "gelu":
            return randn(*packed), vectors[0]
        if problem.kernel == "gelu_gradient":
            return randn(*packed), randn(*packed), vectors[0]
        if problem.kernel == "norm":
            return randn(*packed), randn(*packed), *vectors, EPS
        return randn(*packed), randn(*packed), randn(*packed), vectors[0], EPS, True
    halo = [problem.halo] * 4
    table = mask.neighbours(-(-problem.halo // side))
    if problem.kernel == "windows":
        return randn(*packed), table, halo, 0.0
    if problem.kernel == "windows_gradient":
        width = side + 2 * problem.halo
        return randn(mask.num_visible, width, width, channels), table, halo
    return mask.visible.clone(), mask.block_index.clone(), 1


def call(problem: Problem, implementation: str, given: Arguments) -> Sequence[Tensor]:
    """The results of an implementation, or of "reference"."""
    name = OPS[problem.kernel]
    if implementation == "reference":
        found = getattr(reference, name)(*given)
    else:
        library = torch.ops.convmae_triton if implementation == "triton" else torch.ops.convmae
        found = getattr(library, name)(*given)
    return found if isinstance(found, tuple) else (found,)


def bytes_moved(problem: Problem, mask: BlockMask) -> int:
    """The bytes that must move, see docs/kernels.md."""
    dtype, side, channels = DTYPES[problem.dtype], problem.side, problem.channels
    if problem.kernel == "table":
        return mask.num_visible * (8 + 4 * 9)
    packed = work.packed_bytes(mask, side, channels, dtype)
    if problem.kernel in PASSES:
        return PASSES[problem.kernel] * packed
    if problem.kernel == "scatter":
        return packed + work.dense_bytes(mask, side, channels, dtype)
    if problem.kernel.startswith("windows"):
        width = side + 2 * problem.halo
        windows = packed // side**2 * width**2
        if problem.kernel == "windows":
            return packed + windows
        ones = torch.ones(mask.num_visible, side * side, 1, device=mask.device)
        table, halo = mask.neighbours(-(-problem.halo // side)), [problem.halo] * 4
        visible = reference.gather_windows(ones, table, halo, 0.0).mean().item()
        return packed + round(visible * windows)
    return 2 * packed


# -- PyTorch's way --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opponent:
    """PyTorch's way: its own arguments, and its result in the form of the op's."""

    run: Callable[..., Tensor | tuple[Tensor | None, ...]]
    prepare: Callable[[Arguments], Arguments]
    result: Callable[[Any], Sequence[Tensor]]


def opponent(problem: Problem, mask: BlockMask) -> Opponent:
    """Plain PyTorch, eager. Multiplying by the mask is not part of it: the maps are given so."""
    index = mask.visible.nonzero().unbind(1)
    if problem.kernel in ("forward", "input_gradient", "weight_gradient"):
        return _dense_convolution(problem, mask)
    if problem.kernel == "gather":
        return Opponent(
            lambda images: plain_gather(images, index, problem.side),
            lambda given: given[:1],
            lambda y: [rows_to_zorder(y)],
        )
    if problem.kernel == "scatter":
        shape = (mask.batch_size, problem.channels, *(g * problem.side for g in mask.grid))
        return Opponent(
            lambda rows: plain_scatter(rows, index, shape),
            lambda given: (rows_from_zorder(given[0]).contiguous(),),
            lambda y: [y],
        )
    if problem.kernel == "windows":
        return _plain_windows(problem, mask, index)
    if problem.kernel == "windows_gradient":
        return _plain_windows_gradient(problem, mask, index)
    if problem.kernel in PASSES:
        return _plain_rows(problem)
    return Opponent(reference.neighbour_table, lambda given: given, lambda table: [table])


def _dense_convolution(problem: Problem, mask: BlockMask) -> Opponent:
    channels, spread = problem.channels, [problem.dilation] * 2
    padding = [problem.dilation * (k // 2) for k in problem.kernel_side]
    gh, gw = mask.grid

    def dense(x: Tensor) -> Tensor:
        return reference.scatter_visible(x, mask.block_index, mask.batch_size, gh, gw, 0.0)

    def packed(y: Tensor) -> list[Tensor]:
        return [reference.gather_visible(y, mask.block_index, gh, gw)]

    if problem.kernel == "forward":
        return Opponent(
            lambda x, w, b: conv2d(x, w, b, 1, padding, spread, channels),
            lambda given: (dense(given[0]), given[1], given[2]),
            packed,
        )
    wanted = [problem.kernel == "input_gradient", *[problem.kernel == "weight_gradient"] * 2]

    def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, [channels], [1, 1], padding, spread, False, [0, 0], channels, wanted
        )

    if problem.kernel == "input_gradient":
        # The op is given the flipped kernel, PyTorch the kernel itself.
        return Opponent(
            gradients,
            lambda given: (
                dense(given[0]),
                dense(torch.zeros_like(given[0])),
                given[1].flip(2, 3).contiguous(),
            ),
            lambda found: packed(found[0]),
        )
    return Opponent(
        gradients,
        lambda given: (
            dense(given[0]),
            dense(given[1]),
            given[0].new_zeros(channels, 1, *problem.kernel_side),
        ),
        lambda found: list(found[1:]),
    )


def _plain_windows(problem: Problem, mask: BlockMask, index: Sequence[Tensor]) -> Opponent:
    side, halo, (gh, gw) = problem.side, problem.halo, mask.grid
    width = side + 2 * halo

    def windows(x: Tensor) -> Tensor:  # [B, H, W, C]
        x = pad(x, (0, 0, halo, halo, halo, halo))
        all_windows = x.unfold(1, width, side).unfold(2, width, side)  # [B, gh, gw, C, w, w]
        return all_windows.permute(0, 1, 2, 4, 5, 3)[tuple(index)]

    def prepare(given: Arguments) -> Arguments:
        dense = reference.scatter_visible(given[0], mask.block_index, mask.batch_size, gh, gw, 0.0)
        return (dense.permute(0, 2, 3, 1).contiguous(),)

    return Opponent(windows, prepare, lambda y: [y])


def _plain_windows_gradient(problem: Problem, mask: BlockMask, index: Sequence[Tensor]) -> Opponent:
    side, halo, (gh, gw) = problem.side, problem.halo, mask.grid
    width, batch, channels = side + 2 * halo, mask.batch_size, problem.channels
    size = (gh * side + 2 * halo, gw * side + 2 * halo)

    def gradient(grad: Tensor) -> Tensor:  # [T, w, w, C]
        windows = grad.new_zeros(batch, gh, gw, width, width, channels)
        windows[tuple(index)] = grad
        columns = windows.permute(0, 5, 3, 4, 1, 2).reshape(batch, -1, gh * gw)
        y = fold(columns, size, (width, width), stride=side)
        return y[:, :, halo:-halo, halo:-halo]

    def result(y: Tensor) -> list[Tensor]:
        return [reference.gather_visible(y, mask.block_index, gh, gw)]

    return Opponent(gradient, lambda given: given[:1], result)


def _plain_rows(problem: Problem) -> Opponent:
    """An op for each step. The bias of a product is there already: the product adds it."""
    shape = [problem.channels]

    def sums(grad: Tensor) -> Tensor:
        return grad.flatten(0, -2).sum(0)

    def gelu_gradient(grad: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        grad_z = torch.ops.aten.gelu_backward(grad, z)
        return grad_z, sums(grad_z)

    def norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        total = x + branch
        return total, layer_norm(total, shape, weight, bias, EPS)

    def norm_gradient(grad: Tensor, of_total: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        total, mean, scale, weight = saved
        own, *vectors = torch.ops.aten.native_layer_norm_backward(
            grad, total, shape, mean, scale, weight, weight, [True] * 3
        )
        own = own + of_total
        return own, *vectors, sums(own)

    def prepare_norm_gradient(given: Arguments) -> Arguments:
        grad, of_total, total, weight, *_ = given
        weight = weight.to(total.dtype)
        _, *statistics = torch.native_layer_norm(total, shape, weight, weight, EPS)
        return grad, of_total, total, *statistics, weight

    def added(x: Tensor, bias: Tensor) -> Tensor:
        return (x + bias).to(x.dtype)

    run, prepare = {
        "gelu": (gelu, lambda given: (added(*given),)),
        "gelu_gradient": (gelu_gradient, lambda given: (given[0], added(*given[1:]))),
        "norm": (
            norm,
            lambda given: (
                given[0],
                added(given[1], given[2]),
                *(vector.to(given[0].dtype) for vector in given[3:5]),
            ),
        ),
        "norm_gradient": (norm_gradient, prepare_norm_gradient),
    }[problem.kernel]
    return Opponent(run, prepare, lambda y: y if isinstance(y, tuple) else [y])


def sets_of(problem: Problem, mask: BlockMask, device: Device) -> int:
    """How many sets of arguments to rotate: four, or more until they are four times the L2."""
    return min(64, max(4, math.ceil(4 * device.l2_bytes / bytes_moved(problem, mask))))
