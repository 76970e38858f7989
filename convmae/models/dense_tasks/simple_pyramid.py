"""Maps of five scales from one of stride 16: the pyramid of ViTDet."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.dense_tasks.backbone import crop_map
from convmae.models.layers import TOKEN_EPS
from convmae.models.trunk import check_positive

if TYPE_CHECKING:
    from convmae.models.dense_tasks.backbone import ConvViTBackbone


class ChannelNorm(nn.Module):
    """`layer_norm` over the channels of a map `[N, C, h, w]`, at every position.

    Its own class, as the official recipe decays its parameters, unlike those of LayerNorms.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, h, w] -> [N, C, h, w]`."""
        y = x.permute(0, 2, 3, 1)
        y = F.layer_norm(y, self.weight.shape, self.weight, self.bias, TOKEN_EPS)
        return y.permute(0, 3, 1, 2)


class NormedConv2d(nn.Conv2d):
    """`norm(conv2d(x))`, without a bias; the norm is `ChannelNorm`, in the name `norm`.

    Args:
        in_channels: of the input.
        channels: of the output.
        kernel_size: odd; sides stay as they are.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, h, w] -> [N, channels, h, w]`."""
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Maps `p2` ... `p6` of strides 4, 8, 16, 32, 64, each made of the one map of a backbone.

    `p2`: two transposed convolutions; `p3`: one; `p5`: `max_pool2d(x, 2)`, in which a row or column
    that is left over makes one of its own; then in all a 1 x 1 and a 3 x 3 convolution, each with a
    LayerNorm over channels, and no activation. `p6` is every second position of `p5`. Keys are the
    official ones without `backbone.`.

    Args:
        net: a backbone of one map of stride 16.
        width: channels of the maps.

    Attributes:
        channels, strides, in_chans, num_layers: as of the backbones.

    Raises:
        ValueError: the backbone has other maps, or the width is no positive number.
    """

    strides = (4, 8, 16, 32, 64)

    def __init__(self, net: ConvViTBackbone, width: int = 256) -> None:
        super().__init__()
        if tuple(net.strides) != (16,):
            raise ValueError(
                f"net must be a backbone of one map of stride 16 (kind vitdet), got strides "
                f"{list(net.strides)}"
            )
        self.net = net
        self.channels = (check_positive("width", width),) * len(self.strides)
        (dim,) = net.channels
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)

        def last(channels: int) -> tuple[nn.Module, nn.Module]:
            return NormedConv2d(channels, width, 1), NormedConv2d(width, width, 3)

        self.simfp_2 = nn.Sequential(
            *(up(dim, dim // 2), ChannelNorm(dim // 2), nn.GELU(), up(dim // 2, dim // 4)),
            *last(dim // 4),
        )
        self.simfp_3 = nn.Sequential(up(dim, dim // 2), *last(dim // 2))
        self.simfp_4 = nn.Sequential(*last(dim))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), *last(dim))

    @property
    def in_chans(self) -> int:
        """Channels of the pictures."""
        return self.net.in_chans

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps `[N, width, ceil(H / stride), ceil(W / stride)]`, finest first.

        Args:
            images: floating `[N, in_chans, H, W]`, normalised; sides of 32 pixels at least.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        (x,) = self.net(images)
        height, width = images.shape[2:]
        branches = (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)
        maps = [branch(x) for branch in branches]
        maps.append(maps[3][:, :, ::2, ::2])
        return [
            crop_map(x, height, width, stride) for x, stride in zip(maps, self.strides, strict=True)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the backbone; the pyramid keeps what is inside it."""
        self.net.set_grad_checkpointing(enable)

    @property
    def num_layers(self) -> int:
        """Of the backbone."""
        return self.net.num_layers

    def layer_ids(self) -> dict[str, int]:
        """As of the backbone; the pyramid is in the last layer."""
        of_net = self.net.layer_ids()
        return {
            name: of_net.get(name.removeprefix("net."), self.num_layers - 1)
            for name, _ in self.named_parameters()
        }

    def no_weight_decay(self) -> set[str]:
        """As of the backbone; all of the pyramid is decayed, its norms too."""
        return {f"net.{name}" for name in self.net.no_weight_decay()}
