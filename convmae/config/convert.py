"""The options of `convmae convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import (
    check_choice,
    check_number,
    check_size,
    check_statistics,
    check_text,
)

KINDS = ("auto", "convmae", "convvit", "spark", "fcmae", "network")
FORMATS = ("auto", "spark", "timm")
OFFICIAL_SUFFIXES = (".pth", ".pt", ".bin")
SAFETENSORS = ".safetensors"


@dataclass
class ConvertConfig:
    """Convert weights: the official code's files to those of convmae, and back, or to ONNX.

    The direction is decided by the end of --output. Files are read as data alone: one that asks
    for code to be run is refused.
    """

    checkpoint: str
    """A .pth, .pt, .bin or .safetensors file, or a run's folder."""
    output: str
    """To write: a .safetensors file or a folder is ours, .pth, .pt or .bin the official code's,
    .onnx a classifier, a segmenter or an encoder for ONNX runtimes."""
    kind: Literal["auto", "convmae", "convvit", "spark", "fcmae", "network"] = "auto"
    """What to write: a pretraining model (convmae; spark and fcmae of timm's networks), a
    classifier (convvit; network), or what the file holds (auto)."""
    format: Literal["auto", "spark", "timm"] = "auto"
    """Of timm's networks: timm writes a plain timm state dict (.pth or .safetensors), spark a file
    of SparK's official code (.pth). auto: a .safetensors is ours, a .pth SparK's if the model is a
    SparK, else timm's."""
    model: str | None = None
    """A model of the file's size, such as convmae_base, where its shapes are of no known size; or
    the network that a file is of, such as timm:resnet50, where it does not say."""
    num_heads: int | None = None
    """Attention heads of the encoder, where its shapes are of no known size."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder, where its width is of no known size."""
    input_size: int | tuple[int, int] | None = None
    """Pixels, one number or height and width: of other pictures than the file's, whose position
    embedding is then resampled; or the file's own, where they are not square."""
    norm_pix_loss: bool | None = None
    """Whether the loss was of normalised patches; as the file says (or no) if not given."""
    mean: tuple[float, ...] | None = None
    """Mean of every channel that pictures were normalised with; ImageNet's for 3 channels."""
    std: tuple[float, ...] | None = None
    """Deviation of every channel, likewise."""
    key: str | None = None
    """Entry of the file that holds the weights, such as model_ema; found by itself if not given."""
    index_buffers: bool = False
    """Write the index buffers of relative positions into a .pth of a segmenter or detector: up to
    134 MB that the official code computes itself, but asks for where it loads strictly."""
    ignore_digest: bool = False
    """Take a file that was changed on purpose since convmae wrote it, which its digest tells; such
    a change cannot be told from damage."""
    overwrite: bool = False
    """Write over an output that exists."""

    def validate(self) -> None:
        """Checks what can be checked without the files.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        check_text("checkpoint", self.checkpoint)
        check_text("output", self.output)
        check_choice("kind", self.kind, KINDS)
        check_choice("format", self.format, FORMATS)
        for name in ("num_heads", "decoder_num_heads"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, above=0)
        if self.input_size is not None:
            check_size(self.input_size)
        check_statistics(self.mean, self.std)
        if self.key is not None:
            check_text("key", self.key)
        if self.model is not None:
            check_text("model", self.model)
