"""What the heads of a segmenter are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """`relu(batch_norm(conv2d(x)))`, of the same size as `x`; the names are those of mmcv.

    Args:
        in_channels: channels of `x`.
        channels: channels of the output.
        kernel_size: of the convolution, which has no bias; odd.
        activation: whether the ReLU comes last.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, activation: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)
        self.activation = activation
        if not self.conv.weight.is_meta:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W] -> [N, channels, H, W]`.

        A batch that has one value for each channel, as one picture pooled to 1 x 1 has, is
        normalised by the running statistics, which it leaves as they are: it has no variance.
        """
        x = self.conv(x)
        values = x.shape[0] * x.shape[2] * x.shape[3]
        if self.training and values == 1 and not _shares_statistics(self.bn):
            bn = self.bn
            mean, variance = bn.running_mean, bn.running_var
            x = F.batch_norm(x, mean, variance, bn.weight, bn.bias, training=False, eps=bn.eps)
        else:
            x = self.bn(x)
        return F.relu(x) if self.activation else x


def _shares_statistics(norm: nn.Module) -> bool:
    """Whether a BatchNorm was replaced by one that takes the statistics of several processes."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not together or type(norm) is nn.BatchNorm2d:
        return False
    return torch.distributed.get_world_size() > 1


def class_layer(channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer of a head, a 1 x 1 convolution: weights N(0, 0.01), biases 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def resized(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """A map `[N, C, h, w]` at another size, bilinear; corners are not aligned."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
