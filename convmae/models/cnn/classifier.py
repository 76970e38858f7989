"""timm's networks as classifiers: timm's own modules, with what training and commands ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae.models.cnn.names import PREFIX, timm_name
from convmae.models.cnn.timm_network import TimmNetwork, give_methods
from convmae.models.layers import TOKEN_EPS

if TYPE_CHECKING:
    from collections.abc import Sequence

POOLS = ("avg", "max", "avgmax", "catavgmax")  # timm's names


class TimmClassifier(TimmNetwork):
    """What a network of timm is besides its own class: see `create_classifier`.

    Attributes:
        config: `convmae.create_model(name, **config)` is the same architecture.
        name: `timm:` and timm's name.
        img_size: `(height, width)` of the pictures that it is used on; it takes any others.
        in_chans: channels of the pictures.
        num_classes: width of the output; 0 for pooled features.
    """

    config: dict[str, Any]
    img_size: tuple[int, int]
    num_classes: int
    features_stay = False  # whether only the classifier learns
    if TYPE_CHECKING:  # methods of timm's classes
        get_classifier: Any
        forward_features: Any
        forward_head: Any
        forward_intermediates: Any

    @property
    def head_prefix(self) -> str:
        """What the names of the classifier's tensors begin with, such as `fc.`; else empty."""
        return _name_of(self, self.get_classifier()) + "." if self.num_classes else ""

    @property
    def head_linear(self) -> nn.Module:
        """The layer that tells classes apart: linear, or a convolution of 1 x 1 on pooled maps."""
        head = self.get_classifier()
        return head[-1] if isinstance(head, nn.Sequential) else head

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes pictures of another height and width from now on; no weight depends on it."""
        self.img_size = _pair(img_size)
        self.config["img_size"] = list(self.img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay, besides one-dimensional ones."""
        of_timm = getattr(super(), "no_weight_decay", None)
        return set() if of_timm is None else set(of_timm())

    def freeze_features(self) -> None:
        """Only the classifier learns; the rest stays, running statistics of BatchNorms included."""
        self.requires_grad_(False)
        self.head_linear.requires_grad_(True)
        self.features_stay = True
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmClassifier:
        """As `torch.nn.Module` has it; features that stay are always computed as in evaluation."""
        super().train(mode)
        if self.features_stay:
            head = set(self.get_classifier().modules())
            for module in self.modules():
                if module is not self and module not in head:
                    module.training = False
        return self

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Maps `[N, C, h, w]` at several scales, finest first: outputs of timm's stages.

        Raises:
            ValueError: timm has none of this network.
        """
        if not hasattr(self, "forward_intermediates"):
            raise ValueError(f"timm does not give maps of {self.name} at several scales")
        return self.forward_intermediates(images, intermediates_only=True)


def create_classifier(
    name: str,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: bool | str = True,
    drop_path_rate: float = 0.0,
    head_norm: bool = False,
    output_stride: int | None = None,
) -> Any:
    """`timm.create_model(name, num_classes=..., in_chans=...)`, fresh, and a `TimmClassifier`.

    Its state dict is timm's own, so that `timm.create_model(NAME, checkpoint_path=...)` reads it.

    Args:
        name: `timm:` and timm's name.
        img_size: height and width of the pictures, one number for squares.
        in_chans: channels of the pictures.
        num_classes: width of the output; 0 for pooled features.
        global_pool: how maps are pooled, one of `POOLS`; True for what the network has in timm.
        drop_path_rate: stochastic depth of the last block, where the network has some.
        head_norm: a BatchNorm without parameters before the classifier, as linear probes have; the
            names of the two are then those of the classifier with `.0` and `.1`.
        output_stride: stride of the last map, where the network can be dilated to have less.

    Raises:
        ValueError: there is no such network, it is none of convolutions, or an argument does not
            fit it; the message names it.
    """
    for key, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key} must be a whole number from {least}, got {value!r}")
    if global_pool is not True and global_pool not in POOLS:
        raise ValueError(
            f"global_pool must be True, what {name} has in timm, or one of {', '.join(POOLS)}, "
            f"got {global_pool!r}"
        )
    if not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if global_pool is not True:
        given["global_pool"] = global_pool
    if drop_path_rate:
        given["drop_path_rate"] = drop_path_rate
    if output_stride is not None:
        given["output_stride"] = output_stride
    bare = timm_name(name)
    _check_maps(bare, given)
    model = _create(bare, given)
    give_methods(model, TimmClassifier)
    model.name = PREFIX + bare
    model.in_chans, model.num_classes = in_chans, num_classes
    model.img_size = _pair(img_size)
    model.config = {
        "img_size": list(model.img_size),
        "in_chans": in_chans,
        "num_classes": num_classes,
        "global_pool": global_pool,
        "drop_path_rate": drop_path_rate,
        "head_norm": head_norm,
    }
    if output_stride is not None:
        model.config["output_stride"] = output_stride
    if num_classes:
        _check_head(model)
        if head_norm:
            _add_norm(model)
    return model


def _create(bare: str, given: dict[str, Any]) -> Any:
    """timm's network.

    Raises:
        ValueError: an argument does not fit it.
    """
    import timm

    try:
        return timm.create_model(bare, pretrained=False, **given)
    except (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(_refusal(PREFIX + bare, given, error)) from error


def _check_maps(bare: str, given: dict[str, Any]) -> None:
    """Raises `ValueError` unless the features of a network are maps, as those of convolutions.

    It runs once on tensors without data.
    """
    with torch.device("meta"):
        model = _create(bare, given).eval()
        height, width = (getattr(model, "pretrained_cfg", None) or {})["input_size"][1:]
        found = model.forward_features(torch.empty(1, given["in_chans"], height, width))
    is_map = isinstance(found, Tensor) and found.dim() == 4 and found.shape[2] == found.shape[3]
    if not is_map:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{PREFIX}{bare} gives {shape} of {height} x {width} pixels, expected maps "
            "[N, C, h, w]: a convolutional network, such as timm:resnet50; convvit_base is a "
            "hybrid of convolutions and a transformer"
        )


def has_drop_path(name: str) -> bool:
    """Whether a network of timm takes a rate of stochastic depth; True if there is no such network.

    Args:
        name: with or without `timm:`.
    """
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name.removeprefix(PREFIX), num_classes=0, drop_path_rate=0.1)
    except TypeError as error:
        return "drop_path_rate" not in str(error)
    except (RuntimeError, ValueError, AssertionError):  # `create_classifier` says what is wrong
        return True
    return True


def _pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(
            f"img_size must be a positive whole number, or (height, width), got {img_size!r}"
        )
    return pair[0], pair[1]


def _refusal(name: str, given: dict[str, Any], error: Exception) -> str:
    """Why timm could not build a network, in words."""
    words = str(error).strip().splitlines()
    reason = words[0] if words else type(error).__name__
    for key in given:
        if isinstance(error, TypeError) and f"'{key}'" in reason:
            what = "no stochastic depth" if key == "drop_path_rate" else f"no {key}"
            return f"{name} has {what} in timm, got {key} {given[key]!r}; leave it out"
    said = ", ".join(f"{key} {value!r}" for key, value in given.items())
    return f"timm cannot build {name} with {said}: {reason}"


def _check_head(model: Any) -> None:
    """Raises `ValueError` unless one linear layer or convolution is the classifier."""
    if not hasattr(model, "get_classifier"):
        raise ValueError(f"{model.name} has no classifier that timm can tell (get_classifier)")
    head = model.get_classifier()
    if not isinstance(head, nn.Linear | nn.Conv2d):
        found = type(head).__name__
        raise ValueError(
            f"{model.name} has a {found} as its classifier; expected one linear layer or one "
            "convolution"
        )


def _add_norm(model: Any) -> None:
    """Puts a BatchNorm without parameters before the classifier."""
    head = model.get_classifier()
    norm: nn.Module
    if isinstance(head, nn.Conv2d):
        norm = nn.BatchNorm2d(head.in_channels, eps=TOKEN_EPS, affine=False)
    else:
        norm = nn.BatchNorm1d(head.in_features, eps=TOKEN_EPS, affine=False)
    parent, _, last = _name_of(model, head).rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Sequential(norm, head))


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)
