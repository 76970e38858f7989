"""The blocks of any network: compiled one by one, or computed again for gradients."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def network_blocks(network: nn.Module) -> list[nn.Module]:
    """The smallest parts of a network that stand in a sequence and have two layers or more.

    In networks of timm these are the residual blocks; in one without such parts, none.
    """
    found: list[nn.Module] = []

    def search(module: nn.Module, in_sequence: bool) -> bool:
        """Adds the blocks in a module; whether there are any."""
        inside = [search(child, isinstance(module, CONTAINERS)) for child in module.children()]
        if any(inside):
            return True
        layers = sum(isinstance(part, LAYERS) for part in module.modules())
        if not in_sequence or layers < 2 or isinstance(module, CONTAINERS):
            return False
        found.append(module)
        return True

    search(network, False)
    return found


class BlockForward:
    """Takes the place of `block.forward`: compiled, checkpointed, both or neither.

    Args:
        block: the module; its class keeps the `forward` that is called.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.function: Callable[..., Any] = type(block).forward
        self.checkpointed = False

    @staticmethod
    def of(block: nn.Module) -> BlockForward:
        """The one of a block, which it gets if it has none."""
        if not isinstance(block.__dict__.get("forward"), BlockForward):
            block.forward = BlockForward(block)
        forward: BlockForward = block.__dict__["forward"]
        return forward

    def __call__(self, *args: Any) -> Any:
        if not self.checkpointed or not torch.is_grad_enabled():
            return self.function(self.block, *args)
        return checkpoint(
            self.function,
            self.block,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _frozen_statistics(self.block)),
        )


def compile_blocks(blocks: list[nn.Module], backend: str | Callable[..., Any]) -> None:
    """Lets every block run compiled; blocks of the same sizes share their code."""
    compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
    for block in blocks:
        forward = type(block).forward
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, backend=backend)
        BlockForward.of(block).function = compiled[forward]


def checkpoint_blocks(blocks: list[nn.Module], enable: bool) -> None:
    """Whether blocks forget what is inside them and compute it again for gradients."""
    for block in blocks:
        BlockForward.of(block).checkpointed = enable


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Running statistics are not updated: the block runs a second time in the same step.

    Norms write into copies: without statistics they would save fewer tensors than the first time.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(module._buffers) for module in norms]
    for module in norms:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in zip(norms, kept, strict=True):
            module._buffers.update(buffers)
