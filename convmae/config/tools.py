"""The options of the commands that do not train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import (
    OptionError,
    check_mask_ratio,
    check_number,
    check_statistics,
    check_text,
)
from convmae.config.data import DataConfig, PictureChoice, listed_choice


@dataclass
class ReconstructConfig(DataConfig):
    """Draw what a checkpoint paints: original, masked, reconstructed, reconstructed + visible."""

    checkpoint: str
    """A run's folder, a checkpoint folder, or a file of any weights with a decoder: .safetensors,
    or the official code's .pth."""
    images: tuple[str, ...]
    """Picture files and folders of pictures, or demo."""
    output: str = "reconstruction.png"
    """The picture to write."""
    mask_ratio: float | None = None
    """Share of the patches that is hidden; by default what a network of timm was trained with, and
    0.75 for a ConvMAE."""
    seed: int = 0
    """Of the masks."""
    max_images: int = 16
    """Of more pictures, an even sample of this many is drawn."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the exit status is 1; of pictures that are given by
    name, none may be unreadable. The others are drawn in any case."""
    norm_pix_loss: bool | None = None
    """Whether --checkpoint was trained to predict normalised patches, where it does not tell."""
    mean: tuple[float, ...] | None = None
    """Mean of every channel to normalise with; by default the checkpoint's, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Deviation of every channel, as --mean."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    def validate(self) -> None:
        """Checks what can be checked without the checkpoint.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        self.check_reading()
        if self.mask_ratio is not None:
            check_mask_ratio(self.mask_ratio)
        check_number("seed", self.seed, whole=True, at_least=0)
        check_number("max_images", self.max_images, whole=True, above=0)
        check_number("max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        check_statistics(self.mean, self.std)
        if not self.images:
            raise OptionError("--images needs at least one file or folder, got none")
        if not self.output.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise OptionError(f"--output must end in .png, .jpg or .webp, got {self.output!r}")


@dataclass
class StatsConfig(DataConfig):
    """Measure the mean and deviation of every channel, for --mean and --std."""

    data_path: str
    """As in convmae pretrain."""
    split: Literal["train", "val"] = "train"
    """Which of its splits."""
    picture_list: str | None = None
    """A text file that names the pictures to measure on, as in convmae evaluate."""
    max_samples: int | None = None
    """Measure on this many pictures, chosen by --seed; on all if not given."""
    seed: int = 0
    """Of that choice."""
    num_workers: int | None = None
    """Loading processes."""
    output: str | None = None
    """A YAML file to write them to, that --config takes."""

    @property
    def picture_choice(self) -> PictureChoice | None:
        """Which pictures are measured; None for all of them."""
        return listed_choice("picture_list", self.picture_list)

    def validate(self) -> None:
        """Checks what can be checked without the data.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        self.check_reading()
        check_text("data_path", self.data_path)
        check_number("seed", self.seed, whole=True, at_least=0)
        if self.picture_list is not None:
            check_text("picture_list", self.picture_list)
        if self.max_samples is not None:
            check_number("max_samples", self.max_samples, whole=True, above=0)
        if self.num_workers is not None:
            check_number("num_workers", self.num_workers, whole=True, at_least=0)


@dataclass
class InfoConfig:
    """Tell versions, devices, what runs the operators here, and the models with their sizes."""
