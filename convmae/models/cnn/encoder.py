"""The maps of a convolutional network at several scales, whatever network it is."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae_kernels import BlockMask, Packed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_STRIDE = 32
LIST, INTERMEDIATES, HOOKS = "list", "intermediates", "hooks"


@dataclass(frozen=True)
class FeatureMaps:
    """Where a network has its maps, finest first, and what they are.

    Attributes:
        kind: `LIST`: the network returns them; `INTERMEDIATES`: its `forward_intermediates` does,
            as in timm; `HOOKS`: some of its modules give them.
        places: which of them are used, as indices into what the network gives.
        modules: with `HOOKS`, the names of the modules.
        channels: of each map that is used.
        strides: pixels of the picture to a position of each map, a side.
    """

    kind: str
    places: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    @property
    def stride(self) -> int:
        """Of the coarsest map."""
        return self.strides[-1]

    def coarsest(self) -> FeatureMaps:
        """The coarsest map alone."""
        last = {key: getattr(self, key)[-1:] for key in ("places", "channels", "strides")}
        return replace(self, **last)

    def read(self, network: Any, x: Any) -> list[Any]:
        """The maps of `x`, a `Packed` or a tensor `[B, C, H, W]`, finest first."""
        if self.kind == INTERMEDIATES:
            return list(
                network.forward_intermediates(
                    x, indices=list(self.places), stop_early=True, intermediates_only=True
                )
            )
        found = self.read_all(network, x)
        return [found[place] for place in self.places]

    def read_all(self, network: Any, x: Any) -> list[Any]:
        """Every map that the network gives, used or not."""
        if self.kind == INTERMEDIATES:
            return list(network.forward_intermediates(x, intermediates_only=True))
        if self.kind == HOOKS:
            return _read_by_hooks(network, self.modules, x)
        output = network(x)
        if isinstance(output, dict):
            output = list(output.values())
        return list(output) if isinstance(output, list | tuple) else [output]


def _read_by_hooks(network: nn.Module, names: Sequence[str], x: Any) -> list[Any]:
    """What modules give while the network runs."""
    found: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found[name] = output

    with ExitStack() as stack:
        for name in names:
            handle = network.get_submodule(name).register_forward_hook(partial(keep, name))
            stack.callback(handle.remove)
        getattr(network, "forward_features", network)(x)
    return [found[name] for name in names]


def find_maps(
    network: nn.Module, img_size: tuple[int, int], in_chans: int, min_stride: int | None = None
) -> FeatureMaps:
    """The maps of a network: of each stride the last one.

    The network runs once, on tensors without data where it can: no buffer and no random number
    generator is touched.

    Args:
        network: a network of timm, whole or `features_only`, or a module that returns a list, tuple
            or dict of maps `[B, C, H, W]`, finest first.
        img_size: `(height, width)` of the pictures.
        in_chans: their channels.
        min_stride: finer maps are not used. By default 4 for networks of timm, where there is a
            coarser one, and 2 for a module of one's own.

    Raises:
        TypeError: `network` is not a module.
        ValueError: it cannot run, its maps do not divide the picture into squares of a power of
            two of pixels, are not finest first, or have strides above 32.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(network).__name__}")
    info = getattr(network, "feature_info", None)
    maps = FeatureMaps(LIST)
    if isinstance(info, list) and hasattr(network, "forward_intermediates"):
        maps = FeatureMaps(INTERMEDIATES)
    elif isinstance(info, list):
        maps = FeatureMaps(HOOKS, modules=tuple(str(entry["module"]) for entry in info))
    found = _dry_run(maps, network, img_size, in_chans)
    strides = [_stride(x, img_size, network) for x in found]
    if sorted(strides) != strides:
        raise ValueError(
            f"encoder must return its maps finest first, got strides {strides}; expected for "
            "example [4, 8, 16, 32]"
        )
    finest = max(min_stride or (2 if info is None else 4), 2)  # a map of stride 1 is a picture
    last = {stride: place for place, stride in enumerate(strides)}
    used = {s: place for s, place in last.items() if s >= finest} or {strides[-1]: len(strides) - 1}
    return replace(
        maps,
        places=tuple(used.values()),
        channels=tuple(int(found[place].shape[1]) for place in used.values()),
        strides=tuple(used),
    )


def _dry_run(
    maps: FeatureMaps, network: nn.Module, img_size: tuple[int, int], in_chans: int
) -> list[Tensor]:
    """Every map of a picture, on the meta device; on the network's own where that fails."""
    shape = (1, in_chans, *img_size)
    try:
        with _evaluating(network), torch.no_grad():
            return _call_on_meta(network, maps.read_all, torch.empty(shape, device="meta"))
    except Exception:
        like = next(network.parameters(), torch.empty(0))
        picture = torch.zeros(shape, device=like.device, dtype=like.dtype)
        try:
            with _evaluating(network), torch.no_grad(), torch.random.fork_rng():
                return maps.read_all(network, picture)
        except Exception as error:
            raise ValueError(
                f"encoder {type(network).__name__} cannot take pictures of {in_chans} channels and "
                f"{img_size[0]} x {img_size[1]} pixels: {str(error) or type(error).__name__}"
            ) from error


class _Reader(nn.Module):
    """Calls `read(network, x)`, so that `functional_call` can give the network other tensors."""

    def __init__(self, network: nn.Module, read: Any) -> None:
        super().__init__()
        self.network, self.read = network, read

    def forward(self, x: Any) -> Any:
        return self.read(self.network, x)


def _call_on_meta(network: nn.Module, read: Any, x: Any) -> Any:
    """`read(network, x)` with parameters and buffers of the meta device, which hold no numbers."""
    tensors = {
        f"network.{name}": torch.empty_like(tensor, device="meta")
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    return torch.func.functional_call(_Reader(network, read), tensors, (x,))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """In evaluation mode; each module is in its own mode again behind it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _stride(x: Any, img_size: tuple[int, int], network: nn.Module) -> int:
    """Pixels to a position of a map.

    Raises:
        ValueError: it is no map, or its positions are not squares of a power of two of pixels.
    """
    name = type(network).__name__
    if not isinstance(x, Tensor) or x.dim() != 4:
        found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"encoder {name} gives {found}, expected maps [B, C, H, W] of several scales, finest "
            "first: a network of timm, timm's features_only=True, or a module that returns a list"
        )
    (height, width), (rows, columns) = img_size, x.shape[2:]
    stride = height // max(rows, 1)
    if (rows * stride, columns * stride) != (height, width) or stride & (stride - 1):
        raise ValueError(
            f"encoder {name} makes a map of {rows} x {columns} of {height} x {width} pixels, "
            "expected positions that are squares of 1, 2, 4, 8, 16 or 32 pixels a side (an "
            "img_size that the stride of the network divides, and convolutions that pad)"
        )
    if stride > MAX_STRIDE:
        raise ValueError(
            f"encoder {name} has a stride of {stride}, expected at most {MAX_STRIDE}; leave its "
            "coarsest maps out, with timm's features_only=True and out_indices, or a smaller "
            "output_stride"
        )
    return stride


def check_blocks(
    network: nn.Module, maps: FeatureMaps, grid: tuple[int, int], mask_size: int, in_chans: int
) -> tuple[str, ...]:
    """The names of the network's parameters that no used map depends on.

    The network runs once on packed features without data, which shows what it cannot do on them.

    Raises:
        ValueError: it does something that visible blocks do not have; the message names it.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
    mask = BlockMask.from_ids(ids, grid, check=False)
    packed = Packed(torch.empty(1, mask_size**2, in_chans, device="meta"), mask)
    try:
        return unused_parameters(network, maps, packed)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"encoder {type(network).__name__} cannot run on visible blocks alone: {error}"
        ) from error


def unused_parameters(network: nn.Module, maps: FeatureMaps, x: Any) -> tuple[str, ...]:
    """The names of the network's parameters that no map of `x` depends on.

    Args:
        network: runs once in evaluation, on tensors without data.
        maps: those that are used.
        x: a picture `[B, C, H, W]` on the meta device, or a `Packed` of such features.
    """
    parameters = {
        name: torch.empty_like(p, device="meta", dtype=torch.float32).requires_grad_()
        for name, p in network.named_parameters()
    }
    buffers = {name: torch.empty_like(b, device="meta") for name, b in network.named_buffers()}
    tensors = {f"network.{name}": tensor for name, tensor in (parameters | buffers).items()}
    with _evaluating(network), torch.enable_grad():
        found = torch.func.functional_call(_Reader(network, maps.read), tensors, (x,))
        sums = [(y.features if isinstance(y, Packed) else y).sum() for y in found]
        total = torch.stack(sums).sum()
        given = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return tuple(name for name, grad in zip(parameters, given, strict=True) if grad is None)
