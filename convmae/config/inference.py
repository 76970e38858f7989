"""The options of the commands that run a trained model over pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import (
    as_pair,
    check_choice,
    check_number,
    check_size,
    check_text,
)
from convmae.config.data import DataConfig, PictureChoice, listed_choice
from convmae.config.errors import OptionError
from convmae.config.run import AMP

PREDICT_FORMATS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl"}
EMBED_FORMATS = {".npz": "npz", ".npy": "npy", ".parquet": "parquet"}


@dataclass
class InferenceConfig(DataConfig):
    """What evaluating, predicting and embedding have in common."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file."""
    data_path: str | tuple[str, ...]
    """The pictures, as in convmae finetune."""
    split: Literal["val", "train"] | None = None
    """Which of its splits."""
    picture_list: str | None = None
    """A text file that names the pictures of --data_path, a folder, to read, one in each line:
    paths in it, or names of files alone, with or without their endings; all if not given."""
    batch_size: int = 64
    """Pictures in a batch of one process."""
    input_size: int | tuple[int, int] | None = None
    """Pixels that the model sees, one number or height and width; those it was trained at if not
    given. Multiples of 16 for a ConvViT, whose position embedding is resampled; networks of timm
    take any size that is not too small."""
    crop_pct: float = 0.875
    """The shorter side is resized to input_size / crop_pct, and the centre cut."""
    amp: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic; auto: bfloat16 where the device multiplies it natively, float16 on older GPUs,
    else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    num_workers: int | None = None
    """Loading processes."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the command fails."""
    output: str | None = None
    """The file to write."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        check_text("checkpoint", self.checkpoint)
        for path in self.paths:
            check_text("data_path", path)
        if not self.paths:
            raise OptionError("--data_path needs at least one file or folder, got none")
        self.check_reading()
        if self.picture_list is not None:
            check_text("picture_list", self.picture_list)
        check_number("batch_size", self.batch_size, whole=True, above=0)
        if self.input_size is not None:
            check_size(self.input_size, unit=1)  # that of the model is known with the model
        check_number("crop_pct", self.crop_pct, above=0, at_most=1)
        check_number("max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        check_choice("amp", self.amp, AMP)
        if self.split is not None:
            check_choice("split", self.split, ("val", "train"))
        if self.num_workers is not None:
            check_number("num_workers", self.num_workers, whole=True, at_least=0)

    @property
    def paths(self) -> tuple[str, ...]:
        """`data_path` as a tuple."""
        many = isinstance(self.data_path, tuple | list)
        return tuple(self.data_path) if many else (self.data_path,)  # type: ignore[return-value]

    @property
    def picture_choice(self) -> PictureChoice | None:
        """Which pictures are read; None for all of them."""
        return listed_choice("picture_list", self.picture_list)

    @property
    def size(self) -> tuple[int, int] | None:
        """`input_size` as `(H, W)`."""
        return None if self.input_size is None else as_pair(self.input_size)


@dataclass
class RowsConfig(InferenceConfig):
    """What commands have in common that write a row for each picture."""

    data_path: str | tuple[str, ...]
    """Pictures, with or without labels: a folder, nested or flat; files; a .txt file with a path
    in each line; .npy arrays, IDX files or shards, as in convmae pretrain."""
    split: Literal["val", "train"] | None = None
    """Only this split of --data_path; if not given, every picture that lies there."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the exit status is 1; all have a row even so."""
    save_every: float = 30.0
    """Seconds after which what was computed is stored beside --output. The same command goes on
    from there after a crash."""
    overwrite: bool = False
    """Write over an output that exists, and begin anew where other options began it."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_number("save_every", self.save_every, at_least=0)
        if self.output is not None:
            check_text("output", self.output)

    @property
    def table_format(self) -> str:
        """The format of the table."""
        raise NotImplementedError


def format_of(output: str | None, given: str | None, formats: dict[str, str]) -> str:
    """The format that `--format` says, else the end of `--output`.

    Raises:
        OptionError: it is none of `formats`, which are by their endings.
    """
    if given is not None:
        check_choice("format", given, tuple(formats.values()))
        return given
    if output is None:
        return next(iter(formats.values()))
    ending = os.path.splitext(output)[1].lower()
    if ending not in formats:
        raise OptionError(
            f"--output {output!r} ends in {ending or 'no format'}; expected {', '.join(formats)}, "
            "or give --format"
        )
    return formats[ending]


@dataclass
class PredictConfig(RowsConfig):
    """Classify pictures: a table of names, classes and probabilities.

    The rows are in the order of the pictures, one for each, and unreadable ones say why.
    """

    output: str | None = None
    """The table to write; printed if not given."""
    format: Literal["csv", "parquet", "jsonl"] | None = None
    """By default what --output ends in; CSV where it is printed."""
    topk: int = 1
    """How many of the best classes a row names, with their probabilities."""
    scores: Literal["none", "probabilities", "logits"] = "none"
    """Columns with the probability or the logit of every class."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_number("topk", self.topk, whole=True, at_least=1)
        check_choice("scores", self.scores, ("none", "probabilities", "logits"))
        if self.output is None and self.table_format == "parquet":
            raise OptionError("--format parquet cannot be printed; give --output FILE.parquet")

    @property
    def table_format(self) -> str:
        """`csv`, `parquet` or `jsonl`."""
        return format_of(self.output, self.format, PREDICT_FORMATS)


@dataclass
class EmbedConfig(RowsConfig):
    """Compute features of pictures with any model: a classifier's, or a pretrained encoder's.

    They are in the order of the pictures, one for each, NaN where one cannot be read.
    """

    output: str | None = None
    """The file to write, .npz, .npy (names beside it in a .csv) or .parquet."""
    format: Literal["npz", "npy", "parquet"] | None = None
    """By default what --output ends in."""
    features: Literal["pooled", "map"] = "pooled"
    """One vector for each picture, or a map [channels, height, width]."""
    pool: Literal["auto", "mean", "token"] = "auto"
    """The mean of all positions, or the top-left token; auto is what a classifier's head sees, and
    of a pretrained ConvMAE the mean."""
    stage: Literal[1, 2, 3, 4] | None = None
    """After which stage: of strides 4, 8 and 16 pixels, and 32 of networks of timm; the last if not
    given."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers that are written."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_choice("features", self.features, ("pooled", "map"))
        check_choice("pool", self.pool, ("auto", "mean", "token"))
        if self.stage is not None:
            check_choice("stage", self.stage, (1, 2, 3, 4))
        check_choice("dtype", self.dtype, ("float32", "float16"))
        if self.output is None:
            raise OptionError("--output is needed: a .npz, .npy or .parquet file")
        if self.features == "map" and self.pool != "auto":
            raise OptionError(f"--pool {self.pool} has no effect on --features map; leave it out")
        if self.pool == "token" and self.stage not in (None, 3):
            raise OptionError(f"--pool token needs --stage 3, the tokens; got --stage {self.stage}")
        format_of(self.output, self.format, EMBED_FORMATS)

    @property
    def table_format(self) -> str:
        """`npz`, `npy` or `parquet`."""
        return format_of(self.output, self.format, EMBED_FORMATS)
