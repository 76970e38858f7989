"""Pretraining without masked convolution: every position is computed, and masked later.

    python -m examples.dense_pretrain leaky options.yaml
    python -m examples.dense_pretrain zeroed options.yaml

does what `convmae pretrain --config options.yaml` does, with one thing exchanged. There the encoder
computes visible positions only. Here it computes every position of a map with ordinary convolutions
and norms; what it has at visible positions goes on to the same transformer blocks, decoder and
loss. Weights, pictures, masks, crops and steps are the same.

- `leaky` gives it the whole picture: through the windows of convolutions, what visible positions
  hold depends on hidden pixels, which it then has to predict. It can look them up.
- `zeroed` gives it the picture with zeros for hidden pixels. No hidden pixel reaches the network.
  Hidden positions still get values that windows of visible positions read, and norms over positions
  (BatchNorm) count: the network sees the shape of the mask, and trains on pictures with holes.

`examples/does_it_work.py` compares them. The class `convmae.models.DenseConvMAE` is something else:
it computes densely what `ConvMAE` computes.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import MessageError, OptionError, PretrainConfig, config_from_mapping, read_yaml
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


LEAKY, ZEROED = HIDDEN = ("leaky", "zeroed")


def shown(images: Tensor, mask: BlockMask, hidden: str) -> Tensor:
    """`images` `[N, C, H, W]`, channels-last; with zeros for hidden pixels if `hidden` says so."""
    if hidden == ZEROED:
        visible = mask.to_dense(images.shape[2] // mask.grid[0])
        images = torch.where(visible, images, 0.0)
    return images.contiguous(memory_format=torch.channels_last)


class UnmaskedConvMAE(DenseConvMAE):
    """`ConvMAE` whose stages 1 and 2 are ordinary convolutions of a picture."""

    predicts_every_patch = False  # hidden patches alone, as `ConvMAE` does
    hidden: str

    def forward_stages(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """As in `DenseConvMAE`, without a mask after the first pixels."""
        x = stage1_map(self, shown(images, mask, self.hidden))
        decoded1 = flat_map(conv_map(x, self.stage1_output_decode))
        x = stage2_map(self, x)
        decoded2 = flat_map(conv_map(x, self.stage2_output_decode))
        return x, decoded1, decoded2


class UnmaskedSparK(SparK):
    """`SparK` whose network runs as it is, BatchNorm included, on a picture."""

    hidden: str

    def forward_encoder(self, images: Tensor, mask: BlockMask) -> list[Packed]:
        """The maps of the whole picture, of which visible positions are kept."""
        maps = self.maps.read(self.network, shown(images, mask, self.hidden))
        mask = finer_mask(mask, self.patch_size // self.block_size)
        return [Packed.gather(x, mask) for x in maps]


def unmasked(model: nn.Module, hidden: str) -> ConvMAE | SparK:
    """The model without masked convolution that has the parameters and buffers of `model`.

    Args:
        model: as `convmae pretrain` makes it.
        hidden: what becomes of hidden pixels, one of `HIDDEN`.

    Raises:
        TypeError: `model` is neither a `ConvMAE` nor a `SparK`.
    """
    twin: UnmaskedConvMAE | UnmaskedSparK
    if type(model) is ConvMAE:
        twin = UnmaskedConvMAE(**model.config)
    elif type(model) is SparK:
        of_network = ("method", "drop_path_rate", "output_stride")
        options = {key: value for key, value in model.config.items() if key not in of_network}
        twin = UnmaskedSparK(model.network, **options)
        twin.config = model.config
    else:
        raise TypeError(f"model must be a ConvMAE or a SparK, got {type(model).__name__}")
    twin.hidden = hidden
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


class UnmaskedPretraining(Pretraining):
    """`convmae pretrain`, with the model of `unmasked`."""

    def __init__(self, hidden: str) -> None:
        super().__init__()
        self._hidden = hidden

    def build(self, config: PretrainConfig, source: Source) -> tuple[nn.Module, str, list[str]]:
        model, name, notes = super().build(config, source)
        notes = [*notes, f"note: no masked convolution: hidden pixels are {self._hidden}"]
        return unmasked(model, self._hidden), name, notes


def options_of(file: str) -> Any:
    """The content of a file of options.

    Raises:
        OptionError: it cannot be read; with the file's name.
    """
    try:
        return read_yaml(file)
    except OptionError as error:
        raise OptionError(f"options {file!r} cannot be used: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status, which is that of `convmae pretrain`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("hidden", choices=HIDDEN, help="what becomes of hidden pixels")
    parser.add_argument("options", help="a YAML file of options of `convmae pretrain`")
    args = parser.parse_args(arguments)
    try:
        values = options_of(args.options)
        config = config_from_mapping(PretrainConfig, values)
        summary = run_task(config, UnmaskedPretraining(args.hidden))
    except MessageError as error:
        print(f"error: {error.with_flags}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return summary.report(RunFolder.of(summary.output_dir).report)


if __name__ == "__main__":
    raise SystemExit(main())
