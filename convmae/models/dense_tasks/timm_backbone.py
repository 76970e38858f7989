"""Networks of timm as backbones: their maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.models.cnn.encoder import FeatureMaps, find_maps, unused_parameters
from convmae.models.cnn.names import create_network
from convmae.models.cnn.timm_network import TimmNetwork, give_methods
from convmae.models.dense_tasks.backbone import check_least_side, crop_map, pad_images
from convmae.models.image_model import check_pictures

if TYPE_CHECKING:
    from torch import Tensor

STRIDES = (4, 8, 16, 32)
TRIAL_SIDE = 64  # pixels of the picture on which a network shows its maps


class TimmBackbone(TimmNetwork):
    """A network of timm that gives maps of strides 4, 8, 16, 32: see `create_timm_backbone`.

    Pictures are padded with zeros at the bottom and at the right to sides that 32 divides, and the
    maps are cut to `ceil(side / stride)`. Keys are timm's.

    Attributes:
        channels: of each map.
        strides: pixels of the picture to a position of each map, a side.
        num_layers: number of layers for layer decay, see `layer_ids`.
        unused_parameters: names of those that no map depends on; they do not learn.
    """

    feature_maps: FeatureMaps
    unused_parameters: tuple[str, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each map."""
        return self.feature_maps.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the picture to a position of each map, a side."""
        return self.feature_maps.strides

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps `[N, C, ceil(H / stride), ceil(W / stride)]`, finest first.

        Args:
            images: floating `[N, in_chans, H, W]`, normalised; sides of 32 pixels at least.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        check_pictures(images, self.in_chans, next(self.parameters()), check_least_side)
        height, width = images.shape[2:]
        maps = self.feature_maps.read(self, pad_images(images, STRIDES[-1]))
        return [
            crop_map(x, height, width, stride) for x, stride in zip(maps, self.strides, strict=True)
        ]

    def layer_ids(self) -> dict[str, int]:
        """The layer of each parameter by its name, from 0, for layer decay.

        They are those of timm's `group_matcher`; where a network has none, all are in the last
        layer. A parameter of layer `i` learns at `decay ** (num_layers - 1 - i)` of the full rate;
        the heads of a model are in the last layer.
        """
        from timm.models import group_parameters

        matcher = getattr(self, "group_matcher", None)
        if matcher is None:
            return {name: 0 for name, _ in self.named_parameters()}
        return dict(group_parameters(self, matcher(coarse=False), reverse=True))

    @property
    def num_layers(self) -> int:
        """The layers of the network that its maps need, and one for all that is behind them."""
        ids = {i for name, i in self.layer_ids().items() if name not in self.unused_parameters}
        return max(ids) + 1 + hasattr(self, "group_matcher")

    def no_weight_decay(self) -> set[str]:
        """Names of all parameters that are not decayed: vectors, and what timm says."""
        of_timm: Any = getattr(super(), "no_weight_decay", set)
        return set(of_timm()) | {name for name, p in self.named_parameters() if p.dim() <= 1}


def create_timm_backbone(name: str, in_chans: int = 3, drop_path_rate: float = 0.0) -> TimmBackbone:
    """`timm.create_model(name, num_classes=0)`, fresh, that gives maps of strides 4, 8, 16, 32.

    Args:
        name: `timm:` and timm's name.
        in_chans: channels of the pictures.
        drop_path_rate: rate of stochastic depth of the last block, where the network has some.

    Raises:
        ValueError: there is no such network, or it has other maps.
    """
    network: Any = create_network(name, in_chans, drop_path_rate)
    size = (TRIAL_SIDE, TRIAL_SIDE)
    try:
        maps = find_maps(network, size, in_chans)
    except ValueError as error:
        raise ValueError(f"{name} cannot be a backbone: {error}") from error
    if maps.strides != STRIDES:
        raise ValueError(
            f"{name} has maps of strides {list(maps.strides)}, expected {list(STRIDES)}: a network "
            "of convolutions in stages, such as timm:resnet50 or timm:convnext_tiny"
        )
    picture = torch.empty(1, in_chans, *size, device="meta")
    network.unused_parameters = unused_parameters(network, maps, picture)
    for parameter in network.unused_parameters:
        network.get_parameter(parameter).requires_grad_(False)
    give_methods(network, TimmBackbone)
    network.name, network.in_chans, network.feature_maps = name, in_chans, maps
    return network
