"""What the heads of a segmenter are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor, nn

from convmae.models.dense_tasks.batch_norm import batch_norm


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
        """`[N, in_channels, H, W] -> [N, channels, H, W]`."""
        x = batch_norm(self.bn, self.conv(x))
        return F.relu(x) if self.activation else x


def class_layer(channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer of a head, a 1 x 1 convolution: weights N(0, 0.01), biases 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def resized(x: Tensor, size: tuple[int, int] | Size) -> Tensor:
    """A map `[N, C, h, w]` at another size, bilinear; corners are not aligned."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
