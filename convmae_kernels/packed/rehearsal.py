"""A run of a network without values, which finds what it cannot do before anything is computed."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # of counters and profilers

from convmae_kernels.block_mask import BlockMask
from convmae_kernels.packed.packed import Packed
from convmae_kernels.zorder import BLOCK_SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae_kernels.packed.map_like import Refusal

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def rehearse(model: nn.Module, shape: Sequence[int], mask: BlockMask) -> None:
    """Runs a copy of the model on `Packed` of the meta device: shapes alone.

    The model, its buffers and the random numbers of PyTorch and Python stay as they are. The copy
    has no hooks. Where no copy can be made, or where it fails for want of values, nothing is said:
    the model itself will run.

    Args:
        model: takes a map `[B, C, H, W]`.
        shape: of the images.
        mask: the visible blocks.

    Raises:
        NotImplementedError, TypeError, ValueError: packed features do not have an operation of the
            model, or not with its arguments and these sizes; names operation, module and reason.
    """
    batch, channels, height, width = shape
    gh, gw = mask.grid
    side = height // gh
    if (height, width) != (gh * side, gw * side) or side not in BLOCK_SIZES:
        return  # `gather_visible` says so
    try:
        actor = _without_values(model)
    except Exception:  # whatever a model may hold that cannot be copied
        return
    if actor is None:
        return
    numbers = random.getstate()
    try:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
            where = torch.device("meta")
            visible = torch.empty(batch, gh, gw, dtype=torch.bool, device=where)
            index = torch.empty(mask.num_visible, dtype=torch.int64, device=where)
            equal = mask.visible_per_image
            shadow = BlockMask(visible, index, equal, mask._extremes)
            features = torch.empty(mask.num_visible, side * side, channels, device=where)
            actor(Packed(features, shadow))
    except (NotImplementedError, TypeError, ValueError) as error:
        refusal: Refusal | None = getattr(error, "refusal", None)
        if refusal is None or "meta" in refusal.why:
            return  # of the model's own, or for want of values
        raise type(error)(
            f"{refusal}; found before anything was computed, for images of {height} x {width} and "
            f"a grid of {gh} x {gw} blocks"
        ) from None
    except Exception:
        return
    finally:
        random.setstate(numbers)


def _without_values(model: nn.Module) -> nn.Module | None:
    """A copy of the model whose tensors have no values; None where it would talk to others."""
    memo: dict[int, object] = {}
    for module in model.modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        tensors += [(n, v) for n, v in vars(module).items() if isinstance(v, Tensor)]
        for _, tensor in tensors:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _shape_alone(tensor)
    actor = copy.deepcopy(model, memo)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for module in actor.modules():
        for name in HOOKS:
            if hooks := module.__dict__.get(name):
                hooks.clear()
        if distributed and isinstance(module, nn.SyncBatchNorm):
            if module.running_mean is None:
                return None
            module.eval()
    return actor


def _shape_alone(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
