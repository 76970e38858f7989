"""One process or many: joining them, what they agree on, and how a model is spread over them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_unflatten

from convmae.config import OptionError
from convmae.data import DataError, LoadingError
from convmae.training.machine import pick_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

    from convmae.data import Batch


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: what this process computes on.
        strategy: `single`, `ddp` or `fsdp2`.
    """

    rank: int
    size: int
    device: torch.device
    strategy: str

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def parallel(self) -> bool:
        """Whether there are collectives to take part in."""
        return self.strategy != "single"

    def mean(self, *values: float | Tensor) -> list[float]:
        """The mean of each number over all processes, read on the host in one go."""
        shared = torch.stack([torch.as_tensor(v, device=self.device).double() for v in values])
        if self.parallel:
            dist.all_reduce(shared)
            shared /= self.size
        return shared.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process."""
        return [m > 0 for m in self.mean(*map(float, flags))] if self.parallel else list(flags)

    def share(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        if not self.parallel:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in every process, by their ranks."""
        if not self.parallel:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; an error in one process is raised in all, so that none waits for it.

        All processes must have the same number of batches.
        """
        remaining = iter(batches)
        while True:
            batch, error = None, None
            try:
                batch = next(remaining, None)
            except (DataError, LoadingError) as found:
                error = found
            (failed,) = self.any(error is not None)
            if failed:
                raise self._agree(error)
            if batch is None:
                return
            yield batch

    def _agree(self, error: DataError | LoadingError | None) -> DataError | LoadingError:
        """The error of the first process that has one."""
        if not self.parallel:
            assert error is not None
            return error
        mine = None if error is None else (type(error), self.rank, error.with_flags)
        kind, rank, text = next(entry for entry in self.gather(mine) if entry is not None)
        return error if error is not None else kind(f"in process {rank}: {text}")


@contextmanager
def join(device: str, strategy: str) -> Iterator[World]:
    """Joins the processes that torchrun started, if it did; they part at the end.

    Args:
        device: as in `--device`; a process of torchrun takes the GPU of its local rank.
        strategy: as in `--strategy`.

    Raises:
        OptionError: the strategy does not suit the number of processes, or there is no such device.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if strategy == "auto":
        strategy = "ddp" if processes > 1 else "single"
    if strategy == "single" and processes > 1:
        raise OptionError(
            f"--strategy single is for one process, but torchrun started {processes}; use ddp or "
            "fsdp2"
        )
    if strategy != "single" and not launched:
        raise OptionError(
            f"--strategy {strategy} needs processes: torchrun --nproc_per_node N -m convmae ..."
        )
    if device in ("auto", "cuda") and torch.cuda.is_available() and launched:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    picked = pick_device(device)
    if strategy == "single":
        yield World(0, 1, picked, strategy)
        return
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), picked, strategy)
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, world: World) -> nn.Module:
    """What to call in place of `model` in a training step: itself, or its data-parallel wrapper.

    `fsdp2` divides the parameters in place, block by block; `ddp` wraps. In both `model` keeps its
    own parameter names.
    """
    if world.strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    if world.strategy == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in _blocks(model):
            with _tensors_shown(block):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in ("reconstruct", "predict", "detect"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are divided each for itself; the rest is divided as one."""
    # Of a detector, of a segmenter, of others.
    trunk: Any = getattr(model, "trunk", getattr(model, "backbone", model))
    named = [blocks for name, blocks in trunk.named_children() if "blocks" in name]
    if named:
        return [block for blocks in named for block in blocks.children()]
    from convmae.models.cnn.timm_network import blocks_of

    network: Any = getattr(model, "network", model)  # of a model that pretrains one
    return list(blocks_of(network))


@contextmanager
def held_whole(model: nn.Module, world: World) -> Iterator[None]:
    """Every process holds the whole model meanwhile: a call of it waits for no other process.

    Otherwise each call of a model that `fsdp2` divides gathers it, so that all processes must call
    it equally often. For evaluation; every process must enter and leave.
    """
    if world.strategy != "fsdp2":
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    divided = [module for module in model.modules() if isinstance(module, FSDPModule)]
    blocks = [module for module in divided if module is not model]
    for module in divided:
        module.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for module in divided:
            module.reshard()


@contextmanager
def _tensors_shown(block: nn.Module) -> Iterator[None]:
    """Lets what is hooked to a block within see tensors in place of a `Packed` that holds them.

    FSDP2 gathers a block's parameters when a gradient reaches the tensors that the block gave, and
    finds those in lists, but not in a `Packed`.
    """
    forms: list[Any] = []  # of what is open now: innermost last

    def opened(value: Any) -> list[Any]:
        leaves, form = tree_flatten(value)
        forms.append(form)
        return leaves

    def closed(leaves: Any) -> Any:
        return tree_unflatten(list(leaves), forms.pop())

    def open_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(opened((args, kwargs))), {}

    def close_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return closed(args)

    block.register_forward_hook(lambda module, args, output: opened(output))
    yield
    block.register_forward_hook(lambda module, args, output: closed(output))
    block.register_forward_pre_hook(open_input, prepend=True, with_kwargs=True)
    block.register_forward_pre_hook(close_input, with_kwargs=True)


@contextmanager
def gradients(step_model: nn.Module, world: World, exchange: bool) -> Iterator[None]:
    """Gradients of this backward pass are averaged over the processes only if `exchange`."""
    if world.strategy == "fsdp2":
        step_model.set_requires_gradient_sync(exchange)  # type: ignore[operator]
        yield
    elif world.strategy == "ddp" and not exchange:
        with step_model.no_sync():  # type: ignore[operator]
            yield
    else:
        yield


# -- states ---------------------------------------------------------------------------------------


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on the CPU, in the main process; every process must ask for it."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    weights: dict[str, Any] = get_model_state_dict(model, options=_whole())
    return weights


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's whole state by parameter names, on the CPU, in the main process.

    It does not depend on how many processes there are, nor on how the model is spread over them.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=_whole())


def load_whole(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Gives a spread model and its optimizer the whole states, which every process has read.

    The optimizer's own learning rates, decays and other settings stay.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    set_model_state_dict(model, weights, options=options)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
