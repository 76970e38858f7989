"""What networks of timm are here besides their own classes: the same object with more methods.

Its state dict is timm's own, without a prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CLASSES: dict[tuple[type[TimmNetwork], type[nn.Module]], type[TimmNetwork]] = {}


class TimmNetwork(nn.Module):
    """What subclasses add to a network of timm, by `give_methods`.

    Attributes:
        name: `timm:` and timm's name.
        in_chans: channels of the pictures.
    """

    name: str
    in_chans: int

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks forget what is inside them and compute it again for gradients.

        Raises:
            ValueError: timm has not got that for this network.
        """
        try:
            getattr(super(), "set_grad_checkpointing")(enable)  # noqa: B009 (of timm's class)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"{self.name} cannot compute activations again (grad_checkpointing): timm does not "
                "have it for this network; leave it out, or take smaller batches"
            ) from error

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` of every block, each for itself, in place; see `blocks_of`.

        Args:
            backend: as in `torch.compile`.
        """
        for block in blocks_of(self):
            block.compile(backend=backend, dynamic=False)

    def __reduce__(self) -> Any:
        return _restore, type(self).__bases__, self.__getstate__()


def give_methods(network: nn.Module, mixin: type[TimmNetwork]) -> None:
    """Makes a network of timm an instance of `mixin` too, in place."""
    network.__class__ = _class_of(mixin, type(network))


def _restore(mixin: type[TimmNetwork], of_timm: type[nn.Module]) -> nn.Module:
    """An empty network, for `pickle` and `copy`, as Python makes the class while it runs."""
    made = _class_of(mixin, of_timm)
    return made.__new__(made)


def _class_of(mixin: type[TimmNetwork], of_timm: type[nn.Module]) -> type[TimmNetwork]:
    """A class of timm's network that has the methods of `mixin` too."""
    if (mixin, of_timm) not in _CLASSES:
        made = type(of_timm.__name__, (mixin, of_timm), {"__module__": __name__})
        _CLASSES[mixin, of_timm] = made
    return _CLASSES[mixin, of_timm]


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a network, such as the residual blocks of a ResNet, in its order.

    A module with two or more convolutions or linear layers is one, unless several such modules lie
    in it side by side, directly or in a `Sequential` or the like: then each of these is looked at.
    """
    parts = [part for part in _parts(network) if _layers(part) > 1]
    for part in parts:
        inner = [p for p in _parts(part) if _layers(p) > 1]
        if len(inner) > 1:
            yield from blocks_of(part)
        else:
            yield part


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, those of containers in their place."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from _parts(child)
        else:
            yield child


def _layers(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())
