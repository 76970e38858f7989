"""Pretraining without masked convolution: hidden pixels are zero, and all else is computed densely.

    python -m examples.zeroed_pretrain options.yaml

does what `convmae pretrain --config options.yaml` does, with one thing exchanged. There the encoder
computes visible positions only. Here it gets the whole picture with zeros for hidden pixels, and
computes every position with ordinary convolutions and norms; what it computed at visible positions
goes on to the same transformer blocks, decoder and loss. Weights, pictures, masks, crops and steps
are the same. No hidden pixel reaches the network in either way. Here, though, hidden positions get
values that windows of visible positions read, and norms over positions (BatchNorm) count: the
network sees the shape of the mask, and trains on pictures with holes.

`examples/does_it_work.py` compares the two. The class `convmae.models.DenseConvMAE` is something
else: it computes densely what `ConvMAE` computes.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import MessageError, PretrainConfig, config_from_mapping, read_yaml
from convmae.models import ConvMAE, DenseConvMAE, SparK
from convmae.models.cnn.masked_cnn import finer_mask
from convmae.models.maps import conv_map, flat_map, stage1_map, stage2_map
from convmae.records.folder import RunFolder
from convmae.tasks.pretrain import Pretraining
from convmae.training.run import run_task
from convmae_kernels import Packed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convmae.data import Source
    from convmae_kernels import BlockMask


def without_hidden(images: Tensor, mask: BlockMask) -> Tensor:
    """`images` `[N, C, H, W]` with zeros for hidden pixels, channels-last."""
    visible = mask.to_dense(images.shape[2] // mask.grid[0])
    return torch.where(visible, images, 0.0).contiguous(memory_format=torch.channels_last)


class ZeroedConvMAE(DenseConvMAE):
    """`ConvMAE` whose stages 1 and 2 are ordinary convolutions of a picture with holes."""

    predicts_every_patch = False  # hidden patches alone, as `ConvMAE` does

    def forward_stages(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """As in `DenseConvMAE`, without a mask after the first pixels."""
        x = stage1_map(self, without_hidden(images, mask))
        decoded1 = flat_map(conv_map(x, self.stage1_output_decode))
        x = stage2_map(self, x)
        decoded2 = flat_map(conv_map(x, self.stage2_output_decode))
        return x, decoded1, decoded2


class ZeroedSparK(SparK):
    """`SparK` whose network runs as it is, BatchNorm included, on a picture with holes."""

    def forward_encoder(self, images: Tensor, mask: BlockMask) -> list[Packed]:
        """The maps of the whole picture, of which visible positions are kept."""
        maps = self.maps.read(self.network, without_hidden(images, mask))
        mask = finer_mask(mask, self.patch_size // self.block_size)
        return [Packed.gather(x, mask) for x in maps]


def zeroed(model: nn.Module) -> ConvMAE | SparK:
    """The model with zeroed pictures that has the parameters and buffers of `model`.

    Raises:
        TypeError: `model` is neither a `ConvMAE` nor a `SparK`.
    """
    if type(model) is ConvMAE:
        twin: ConvMAE | SparK = ZeroedConvMAE(**model.config)
    elif type(model) is SparK:
        of_network = ("method", "drop_path_rate", "output_stride")
        options = {key: value for key, value in model.config.items() if key not in of_network}
        twin = ZeroedSparK(model.network, **options)
        twin.config = model.config
    else:
        raise TypeError(f"model must be a ConvMAE or a SparK, got {type(model).__name__}")
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


class ZeroedPretraining(Pretraining):
    """`convmae pretrain`, with the model of `zeroed`."""

    def build(self, config: PretrainConfig, source: Source) -> tuple[nn.Module, str, list[str]]:
        model, name, notes = super().build(config, source)
        notes = [*notes, "note: no masked convolution: hidden pixels are zero, all is computed"]
        return zeroed(model), name, notes


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status, which is that of `convmae pretrain`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("options", help="a YAML file of options of `convmae pretrain`")
    args = parser.parse_args(arguments)
    try:
        values: Any = read_yaml(args.options)
        config = config_from_mapping(PretrainConfig, values)
        summary = run_task(config, ZeroedPretraining())
    except MessageError as error:
        print(f"error: {error.with_flags}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return summary.report(RunFolder.of(summary.output_dir).report)


if __name__ == "__main__":
    raise SystemExit(main())
