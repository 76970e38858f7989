"""Networks of timm by name: `timm:resnet50`."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from convmae.models.cnn.masked_cnn import MaskedCNN

PREFIX = "timm:"
METHODS = ("spark", "fcmae")


def is_timm_name(name: str) -> bool:
    """Whether a name is one of timm's networks, by its prefix."""
    return name.startswith(PREFIX)


def timm_name(name: str) -> str:
    """`name` without its prefix.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no such network.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is a network of timm, which is not installed: pip install timm", name="timm"
        ) from error
    own = name.removeprefix(PREFIX)
    if timm.is_model(own):
        return own
    close = difflib.get_close_matches(own, timm.list_models(), n=3, cutoff=0.5)
    hint = " or ".join(PREFIX + other for other in close)
    raise ValueError(
        f"timm {timm.__version__} has no network {own!r}; "
        + (f"did you mean {hint}?" if close else "timm.list_models() has all names")
    )


def list_networks(pattern: str) -> list[str]:
    """The names of timm's networks, with the prefix, that match a shell pattern; sorted."""
    import timm

    return sorted(fnmatch.filter((PREFIX + name for name in timm.list_models()), pattern))


def create_network(
    name: str, in_chans: int = 3, drop_path_rate: float = 0.0, output_stride: int | None = None
) -> nn.Module:
    """`timm.create_model(name, num_classes=0)`, with fresh parameters.

    Args:
        name: with the prefix.
        in_chans: channels of the pictures.
        drop_path_rate: rate of stochastic depth of the last block.
        output_stride: stride of the coarsest map, where the network can be dilated to have less.

    Raises:
        ValueError: timm has no such network, or it has no such option.
    """
    import timm

    own = timm_name(name)
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        return timm.create_model(own, pretrained=False, num_classes=0, in_chans=in_chans, **options)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(
            f"{name} cannot be made with {given or 'in_chans=' + repr(in_chans)}: {error}"
        ) from error


def create_pretraining_model(name: str, method: str, **options: Any) -> MaskedCNN:
    """`SparK` or `FCMAE` of a network of timm.

    Args:
        name: with the prefix.
        method: "spark" or "fcmae".
        **options: arguments of the method's class, and of `create_network`.

    Raises:
        ValueError: there is no such network or method, or a size does not fit.
        TypeError: there is no such argument.
    """
    from convmae.models.cnn.fcmae import FCMAE
    from convmae.models.cnn.spark import SparK

    classes: dict[str, type[MaskedCNN]] = {"spark": SparK, "fcmae": FCMAE}
    if method not in classes:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    timm_name(name)
    of_network = [p for p in inspect.signature(create_network).parameters if p != "name"]
    of_method = [p for p in inspect.signature(classes[method]).parameters if p != "encoder"]
    check_arguments(f"{name} with method {method!r}", options, [*of_network, *of_method])
    network_options = {key: options[key] for key in of_network if key in options}
    network = create_network(name, **network_options)
    kept = {key: value for key, value in options.items() if key in of_method}
    try:
        model = classes[method](network, **kept)
    except ValueError as error:
        raise ValueError(f"{name}: {_attention(network)}{error}") from error
    defaults = {"drop_path_rate": 0.0, "output_stride": None}
    model.config = {"method": method} | model.config | defaults | network_options
    for parameter_name in model.unused_parameters:
        network.get_parameter(parameter_name).requires_grad_(False)
    return model


def _attention(network: nn.Module) -> str:
    """What to say of a network with attention, that cannot run on visible blocks; else nothing."""
    for path, module in network.named_modules():
        kind = type(module).__name__
        if "Attention" in kind:
            return (
                f"this is a transformer or has attention ({path} is {kind}); expected a "
                "convolutional network such as timm:resnet50 (convmae_base and its like are "
                "transformers that can be pretrained). "
            )
    return ""


def check_arguments(name: str, options: dict[str, Any], known: list[str]) -> None:
    """Every option is an argument.

    Raises:
        TypeError: one is not; the message suggests another.
    """
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise TypeError(f"{name} has no argument {key!r}; {hint}It takes {', '.join(known)}")
