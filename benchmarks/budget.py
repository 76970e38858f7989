"""What a training step asks of a GPU: launches, bytes and FLOPs, counted without one.

    python -m benchmarks.budget --batch_size 128           # tables by kind of op and by part
    python -m benchmarks.budget --batch_size 128 --apart   # PyTorch's ops around the products
    python -m benchmarks --case budget --batch_size 128 --dtype bfloat16

The step runs eagerly on tensors without numbers, so every machine counts the same; what a GPU does
in another way than a CPU is done here as there (`as_on_a_gpu`; the kernels of Triton alone only
where Triton is installed). An op counts as one launch, one of PyTorch's multi-tensor ops as many as
its lists need, and those of `PARTS_OF` as the two that they are; views and allocations count as
none. Bytes are those of an op's inputs and outputs, and what the first of two launches leaves to
the second, as if caches kept nothing from one op to the next.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import models
from benchmarks.registry import register
from benchmarks.runner import Comparison, Contender
from benchmarks.setting import Setting
from benchmarks.work import Work
from convmae.models import layers
from convmae_kernels.ops.support import arithmetic
from convmae_kernels.ops.support.dispatch import WHY_NOT_TRITON

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = ("packed", "dense", "MAE ViT-B")
# Ops that launch nothing: views, allocations, questions about a tensor.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split"),
    *("split_with_sizes", "unbind", "unsqueeze", "squeeze", "alias", "detach", "as_strided"),
    *("unflatten", "reshape", "_reshape_alias", "unfold", "narrow", "lift_fresh", "set_"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
CLASSES = {
    "cast": {"_to_copy", "_foreach_copy_"},
    "product": {"mm", "addmm", "bmm", "baddbmm"},
    "attention": set(),
    "layer norm": {
        *("native_layer_norm", "native_layer_norm_backward"),
        *("add_layer_norm", "add_layer_norm_grad"),
    },
    "GELU": {"gelu", "gelu_backward", "bias_gelu", "bias_gelu_grad"},
    "add, multiply": {"add", "add_", "mul", "div", "sub"},
    "copy": {"clone", "copy_", "cat", "stack"},
    "sum": {"sum", "mean"},
    "optimizer": {"_fused_adamw_"},
}
# Ops of two launches, the second of which adds up the parts of the first: how many vectors of
# channels a part has, given the op's arguments.
PARTS_OF: dict[str, Callable[..., int]] = {
    "add_layer_norm_grad": lambda grad, grad_total, total, weight, eps, bias: 2 + bias,
    "bias_gelu_grad": lambda grad, x, bias: 1,
}
# PyTorch's multi-tensor kernels: elements of a thread block, thread blocks of a launch, and tensors
# of a launch by the number of lists.
CHUNK, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
PARTS = {
    **dict.fromkeys(("patch_embed1", "blocks1", "stage1_output_decode"), "stage 1"),
    **dict.fromkeys(("patch_embed2", "blocks2", "stage2_output_decode"), "stage 2"),
    **dict.fromkeys(("patch_embed3", "patch_embed4", "blocks3", "norm"), "stage 3"),
    **dict.fromkeys(("patch_embed", "blocks"), "encoder"),
}


@dataclass(frozen=True)
class Op:
    """One op of a step: where it is, what it is, and what it asks of the device."""

    part: str
    phase: str
    kind: str
    name: str
    launches: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Budget:
    """All ops of a step, in order."""

    ops: list[Op]

    @property
    def launches(self) -> int:
        return sum(op.launches for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.ops)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    def table(self, key: Callable[[Op], str]) -> str:
        """Launches, bytes and FLOPs of groups of ops, the largest first."""
        groups: dict[str, list[Op]] = defaultdict(list)
        for op in self.ops:
            groups[key(op)].append(op)
        sums = [(name, Budget(ops)) for name, ops in groups.items()]
        return "\n".join(
            f"  {name:28} {group.launches:6} launches {group.bytes / 1e9:8.2f} GB "
            f"{group.flops / 1e12:8.3f} TFLOP"
            for name, group in sorted(sums, key=lambda pair: -pair[1].bytes)
        )


class _Counter(TorchDispatchMode):
    """Notes every op that runs; `part` and `phase` say where the step is."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.enter("mask and loss", "forward")

    def enter(self, part: str, phase: str) -> None:
        """The ops that come are of this part."""
        self.part, self.phase = part, phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        library, _, name = func._schema.name.partition("::")
        if library in ("aten", "convmae", "convmae_triton") and name not in FREE:
            ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if ins and outs or name in ("_foreach_copy_", "_fused_adamw_", "_foreach_add_"):
                self.ops.append(self._op(func, args, kwargs, out, ins, outs))
        return out

    def _op(self, func, args, kwargs, out, ins, outs) -> Op:
        library, _, name = func._schema.name.partition("::")
        moved = sum(map(_bytes, ins)) + sum(map(_bytes, outs))
        if name == "copy_":
            moved -= _bytes(ins[0])  # written, not read
        elif name == "_fused_adamw_":  # writes all it reads but the gradients
            moved += sum(_bytes(t) for i in (0, 2, 3) for t in args[i])
        kind = next((kind for kind, names in CLASSES.items() if name in names), "other")
        if "attention" in name:
            kind = "attention"
        elif library != "aten" and kind == "other":
            kind = "packed"
        launches = _multi_tensor_launches(args) if name.startswith(("_foreach", "_fused")) else 1
        if name in PARTS_OF:
            launches, moved = 2, moved + _bytes_of_parts(name, args)
        if name == "_fused_adamw_":
            self.enter("optimizer", "step")
        flops = _flops(func, args, kwargs, out)
        return Op(self.part, self.phase, kind, name, launches, moved, flops)


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor; what a dimension repeats counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride else 1
    return elements * t.element_size()


def _bytes_of_parts(name: str, args: Any) -> int:
    """The sums of parts that the first launch of an op writes, and the second reads."""
    from convmae_kernels.triton import add_layer_norm_grad, bias_gelu_grad

    grad = args[0]
    channels, accumulated = grad.shape[-1], max(4, grad.element_size())
    rows = grad.numel() // channels
    if name == "add_layer_norm_grad":
        _, parts = add_layer_norm_grad.split(rows)
    else:
        _, parts = bias_gelu_grad.split(rows, channels)
    return 2 * parts * PARTS_OF[name](*args) * channels * accumulated


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func._schema.name
    if "flash_attention_for_cpu" in name:
        shapes = [t.shape for t in args if isinstance(t, Tensor)]
        backward = "backward" in name
        return sdpa_backward_flop_count(*shapes[:4]) if backward else sdpa_flop_count(*shapes[:3])
    if name == "aten::convolution_backward":  # PyTorch's own count forgets the groups
        grad, _, weight, *_, wanted = args
        return 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def _multi_tensor_launches(args: Any) -> int:
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    chunks = sum(-(-t.numel() // CHUNK) for t in lists[0])
    tensors = TENSORS[min(len(lists), 5)]
    return max(-(-len(lists[0]) // tensors), -(-chunks // BLOCKS))


# -- a step as on a GPU ---------------------------------------------------------------------------


@contextmanager
def as_on_a_gpu(joined: bool = True) -> Iterator[None]:
    """What CUDA does and a CPU does not: fused attention in every dtype, under autocast layer norms
    in float32, unless they take care of their dtype themselves, and, if `joined`, ops on rows."""
    plain = torch.nn.functional.layer_norm

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        if not torch.is_autocast_enabled("cpu"):
            return plain(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return plain(x.float(), shape, weight, bias, eps)

    def attention(q, k, v, key_padding=None):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    with (
        mock.patch.object(torch.nn.functional, "layer_norm", layer_norm),
        mock.patch.object(layers, "attention", attention),
        mock.patch.object(layers, "FLOAT32_BETWEEN_BLOCKS", frozenset()),
        mock.patch.object(layers, "has_row_kernels", lambda x: joined and WHY_NOT_TRITON is None),
        mock.patch.object(arithmetic, "SLOW_ON_CPU", frozenset()),
        mock.patch.object(nn.Module, "to", lambda module, *_: module),  # fake tensors cannot move
    ):
        yield


def follow(model: nn.Module, enter: Callable[[str, str], None]) -> None:
    """Calls `enter(part, phase)` when a step enters a part of the model, forward or backward."""

    def hook(part: str, phase: str) -> Callable[..., None]:
        return lambda *_: enter(part, phase)

    for name, module in model.named_modules():
        top = name.split(".")[0]
        if next(module.children(), None) is None and name:
            part = PARTS.get(top, "decoder" if top.startswith("decoder") else "mask and loss")
            module.register_forward_pre_hook(hook(part, "forward"))
            module.register_full_backward_pre_hook(hook(part, "backward"))


@cache
def count_step(setting: Setting, dtype: torch.dtype, kind: str, joined: bool = True) -> Budget:
    """The ops of one training step (mask, forward, backward, fused AdamW), which computes nothing.

    Args:
        setting: model and sizes; the device is not looked at.
        dtype: autocast's; float32 for none.
        kind: one of `KINDS`.
        joined: with the ops on rows; else with PyTorch's in their place.
    """
    setting = replace(setting, device=torch.device("cpu"))
    with as_on_a_gpu(joined), FakeTensorMode(allow_non_fake_inputs=True):
        model = models.build_mae(setting) if kind == KINDS[2] else models.build(setting, kind)
        step = models.training_step(model, setting, dtype)
        size = (3, setting.img_size, setting.img_size)
        pixels = torch.empty(setting.batch_size, *size)
        noise = torch.empty(setting.batch_size, setting.grid[0] * setting.grid[1])
        step(pixels, noise)  # the optimizer makes its state
        counter = _Counter()
        follow(model, counter.enter)
        with counter:
            step(pixels, noise)
    return Budget(counter.ops)


# -- the benchmark's cases, and the tables --------------------------------------------------------

QUANTITIES = {
    "launches": ("launches", 1.0),
    "bytes": ("GB", 1e9),
    "flops": ("TFLOP", 1e12),
}


@register("budget/flops", quantity="flops")
@register("budget/bytes", quantity="bytes")
@register("budget/launches", quantity="launches")
def budget(setting: Setting, dtype: torch.dtype, quantity: str) -> Comparison:
    """What a training step asks of a GPU, counted without one: packed, dense, and MAE's ViT-B."""
    unit, scale = QUANTITIES[quantity]

    def read(run: Callable[[], Budget]) -> tuple[float, Budget]:
        counted = run()
        return getattr(counted, quantity) / scale, counted

    contenders = [
        Contender(kind, partial(count_step, setting, dtype, kind), lambda counted: [])
        for kind in KINDS
    ]
    return Comparison(contenders, Work(0), read, unit=unit, max_rounds=1, warm_up=False)


def main() -> None:
    """Prints the budget of a step of each contender, by kind of op and by part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget", description=main.__doc__)
    parser.add_argument("--model", default=Setting.model)
    parser.add_argument("--batch_size", "--batch-size", type=int, default=128)
    parser.add_argument("--img_size", "--img-size", type=int, default=Setting.img_size)
    parser.add_argument("--mask_ratio", "--mask-ratio", type=float, default=Setting.mask_ratio)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--apart", action="store_true", help="PyTorch's ops in place of those on rows"
    )
    parser.add_argument("--contender", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    try:
        setting = Setting(args.model, args.batch_size, args.img_size, args.mask_ratio)
        models.parameters(args.model)
    except ValueError as error:
        parser.error(str(error))
    for kind in args.contender:
        found = count_step(setting, getattr(torch, args.dtype), kind, not args.apart)
        print(
            f"{kind}: {args.model}, batch {args.batch_size}, {args.dtype}: {found.launches} "
            f"launches, {found.bytes / 1e9:.1f} GB, {found.flops / 1e12:.2f} TFLOP",
            found.table(lambda op: op.kind),
            found.table(lambda op: f"{op.part}, {op.phase}"),
            found.table(lambda op: f"{op.kind}: {op.name}"),
            sep="\n\n",
        )


if __name__ == "__main__":
    main()
