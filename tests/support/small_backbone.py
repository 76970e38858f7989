"""A small convolutional backbone for the tests of heads."""

from __future__ import annotations

from torch import Tensor, nn


class SmallBackbone(nn.Module):
    """Four maps of strides 4, 8, 16 and 32, of a convolution each."""

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.channels, self.strides = (8, 12, 16, 20), (4, 8, 16, 32)
        self.num_layers = 5
        widths = (in_chans, *self.channels)
        self.stages = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 4 if i == 0 else 2, 4 if i == 0 else 2)
            for i in range(4)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps `[N, C, ceil(H / stride), ceil(W / stride)]`, finest first."""
        height, width = images.shape[2:]
        x = nn.functional.pad(images, (0, -width % 32, 0, -height % 32))
        maps = []
        for stage, stride in zip(self.stages, self.strides):
            x = stage(x).relu()
            maps.append(x[:, :, : -(-height // stride), : -(-width // stride)])
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"stages.0.bias"}

    def layer_ids(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}
