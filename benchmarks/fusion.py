"""What lies around the products and convolutions of a block: op by op, joined, compiled; counted.

    python -m benchmarks.fusion --batch_size 128

Eager ops are counted as in `benchmarks.budget`; "joined" are those on rows (`bias_gelu`,
`add_layer_norm`), "apart" PyTorch's own in their place. For compiled blocks PyTorch's compiler
(inductor) plans its kernels as it would for a CPU, on tensors without numbers, and the plan is
counted: no code is made, and nothing runs. A kernel that it would generate reads its inputs once
and writes its outputs once; for a GPU it plans by the same rules, but may join other kernels.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import budget, models
from benchmarks.setting import Setting
from convmae.models.layers import ConvBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.budget import Op

AROUND = "around"  # the class of what is neither product, attention nor convolution
CLASSES = ("product", "attention", "packed")
WAYS = ("eager, apart", "eager, joined", "compiled, apart")
PARTS = {  # a block of each kind, and in which part of the model it is
    "blocks1": "stage 1",
    "blocks2": "stage 2",
    "blocks3": "stage 3",
    "decoder_blocks": "decoder",
}


def eager(run: Callable[[], Tensor]) -> list[Op]:
    """The ops of a call, forward and backward."""
    counter = budget._Counter()
    with counter:
        y = run()
        counter.phase = "backward"
        y.backward(torch.empty_like(y))
    return [replace(op, kind=op.kind if op.kind in CLASSES else AROUND) for op in counter.ops]


def compiled(module: nn.Module, run: Callable[[], Tensor]) -> list[Op]:
    """The kernels that the compiler plans for a module, in place of its ops."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    found: list[Op] = []

    def plan(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], phase: str) -> Any:
        found.extend(_kernels(graph, inputs, phase))
        (output,) = graph.graph.find_nodes(op="output")
        results = [None if n is None else n.meta["val"] for n in output.args[0]]

        def empty(*_: Any) -> list[Any]:
            return [_empty(result) for result in results]

        return make_boxed_func(empty)

    backend = aot_autograd(
        fw_compiler=partial(plan, phase="forward"),
        bw_compiler=partial(plan, phase="backward"),
        decompositions=select_decomp_table(),
    )
    module.compile(backend=backend, dynamic=False)
    y = run()
    y.backward(torch.empty_like(y))
    torch._dynamo.reset()
    return found


def _empty(like: Any) -> Any:
    if not isinstance(like, Tensor):
        return like
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _kernels(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], phase: str) -> list[Op]:
    """What inductor would make of a graph: its own kernels, and the libraries' that it calls."""
    from torch._inductor.compile_fx import fake_tensor_prop
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    fake = torch._guards.detect_fake_mode(inputs)
    with V.set_fake_mode(fake):
        fake_tensor_prop(graph, inputs)
        post_grad_passes(graph, False)
        lowered = GraphLowering(graph, example_inputs=inputs, shape_env=fake.shape_env)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            lowered._update_scheduler()
            return [op for node in lowered.scheduler.nodes if (op := _op(node, phase)) is not None]


def _op(node: Any, phase: str) -> Op | None:
    moved = int(node.get_read_write_buffers_sizes())
    if moved == 0:  # a place in another kernel's output
        return None
    inner = node.get_nodes()[0].node
    name = str(getattr(inner, "python_kernel_name", None) or "generated")
    kind = AROUND
    if "convmae" in name:
        kind = "packed"
    elif "attention" in name:
        kind = "attention"
    elif name.endswith(("mm", "baddbmm")):
        kind = "product"
    return budget.Op("block", phase, kind, name, 1, moved, 0)


def table(rows: dict[str, tuple[int, list[Op], list[Op], list[Op]]]) -> str:
    """Markdown: by block, how many there are, launches and bytes around and in all, all ways."""
    heads = [f"{way}, {what}" for way in WAYS for what in ("around", "all")]
    lines = [
        "| block | in a model | " + " | ".join(heads) + " |",
        "|---|--:|" + "--:|" * len(heads),
    ]
    for name, (count, *ways) in rows.items():
        cells = []
        for ops in ways:
            for chosen in ([op for op in ops if op.kind == AROUND], ops):
                launches = sum(op.launches for op in chosen)
                cells.append(f"{launches}, {sum(op.bytes for op in chosen) / 1e6:.0f} MB")
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def count_block(
    setting: Setting, name: str, number: int = 0
) -> tuple[int, list[Op], list[Op], list[Op]]:
    """A block of a part of the model under autocast to bfloat16.

    Returns:
        How many blocks the part has; of one of them the ops forward and backward, eager, those of
        them on rows joined, and the kernels compiled of the ops that are not.
    """

    def make() -> tuple[int, nn.Module, Callable[[], Tensor]]:
        model = models.build(setting, "packed")
        blocks = getattr(model, name)
        block, mask = blocks[number], setting.block_mask()
        tokens = setting.grid[0] * setting.grid[1] if name == "decoder_blocks" else None
        if isinstance(block, ConvBlock):
            side = 4 if name == "blocks1" else 2
            shape = (mask.num_visible, side * side, block.conv1.in_channels)
            more: tuple[Any, ...] = (mask,)
        else:
            tokens = tokens or mask.num_visible // setting.batch_size
            shape, more = (setting.batch_size, tokens, block.attn.proj.in_features), ()
        x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return block(x, *more)

        return len(blocks), block, run

    ways = []
    for joined in (False, True):
        with budget.as_on_a_gpu(joined), FakeTensorMode(allow_non_fake_inputs=True):
            _, _, run = make()
            ways.append(eager(run))
    with budget.as_on_a_gpu(joined=False):
        count, block, run = make()
        apart, joined_ops = ways
        return count, apart, joined_ops, compiled(block, run)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=main.__doc__)
    parser.add_argument("--model", default=Setting.model)
    parser.add_argument("--batch_size", "--batch-size", type=int, default=128)
    args = parser.parse_args()
    setting = Setting(args.model, args.batch_size)
    print(table({part: count_block(setting, name) for name, part in PARTS.items()}))


if __name__ == "__main__":
    main()
