"""The options of `convmae segment train`, `evaluate` and `predict`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import TIMM, as_pair, check_choice, check_number, check_text
from convmae.config.data import DataConfig
from convmae.config.errors import OptionError
from convmae.config.label_maps import LabelMapConfig
from convmae.config.run import AMP, RunConfig

HEADS = ("upernet", "light")
LOSSES = ("ce", "ce+dice")
MEANS = ("all", "labelled")
METRICS = ("classes", "small-targets")


@dataclass
class SegmentTrainConfig(LabelMapConfig, RunConfig):
    """Train a segmenter, which tells the class of every pixel, on pictures with label maps.

    The defaults are the published recipe for ADE20K, 160,000 steps of 16 pictures: UperNet with an
    auxiliary head, AdamW with layer decay, a learning rate that falls along a line.
    """

    data_path: str = "data"
    """A folder of pictures and label maps, in one of these ways: images/training,
    annotations/training and the like (ADE20K); train/images, train/masks; or images and masks, with
    lists of names (VOC, IRSTD-1K, MFNet). Extensions of picture and label map may differ."""
    init: str | None = None
    """Weights to start from: a run's folder, a .safetensors file, or an official .pth; by default
    the model starts from random weights."""
    model: str | None = None
    """Which backbone: convvit_tiny, _small, _base, _large, _huge, or timm:NAME, a convolutional
    network of timm; by default what --init is of, else convvit_base."""
    head: Literal["upernet", "light"] = "upernet"
    """UperNet as published, or a light head for CPUs."""
    head_width: int | None = None
    """Channels of the head; by default 768, or what the backbone has if that is less, and 64 of the
    light head."""
    aux_width: int | None = None
    """Channels of the auxiliary head, 0 for none; by default 256 or what the backbone has if that
    is less, and none beside the light head."""
    dropout: float = 0.1
    """Share of the channels that are dropped before the last layer of a head."""
    loss: Literal["ce", "ce+dice"] = "ce"
    """Cross entropy, or with a Dice loss added: for targets that are small."""
    class_weights: tuple[float, ...] | None = None
    """Factors of the classes in the cross entropy; by default 1."""
    mean_over: Literal["all", "labelled"] = "all"
    """The cross entropy is a mean over all pixels, ignored ones as 0 (as published), or over the
    labelled ones."""
    epochs: int = 127
    """Passes over the pictures; of ADE20K 127 are the 160,000 steps of the published recipe."""
    batch_size: int = 16
    """Pictures in a batch of one process."""
    input_size: int | tuple[int, int] = 512
    """Crop in pixels, one number or height and width, multiples of 16; pictures are predicted by
    windows of this size."""
    blr: float = 1.6e-3
    """Base learning rate, for an effective batch of 256: 1e-4 for the published 16."""
    warmup_epochs: float = 1.2
    """Epochs over which the learning rate rises linearly from 0; of ADE20K 1.2 are 1,500 steps."""
    sched: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate goes after the warm-up."""
    layer_decay: float = 0.75
    """Every block learns at this share of the rate of the block after it."""
    drop_path: float = 0.2
    """Stochastic depth: rate of the last block."""
    short_side: int | None = None
    """Pixels that the short side of pictures is resized to before --scale, and for evaluation (the
    long side becomes four times that at most); by default the shorter of --input_size, 0 keeps
    pictures as large as they are."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random factor by which a picture is resized for training."""
    most_of_one_class: float = 0.75
    """Crops in which one class has a larger share of the labelled pixels are drawn again, up to ten
    times."""
    distort: bool = True
    """Change brightness, contrast, saturation and hue of 8-bit pictures of 3 channels."""
    metrics: Literal["classes", "small-targets"] = "classes"
    """IoU and accuracy of classes; or of small targets (all classes but 0) IoU, nIoU, Pd and Fa,
    as in infrared target detection. Which decides what the best weights are: mIoU or IoU."""
    eval_every: float = 1
    """Epochs between evaluations on the val split; the last is always evaluated."""
    eval_batch_size: int = 1
    """Pictures in a batch of an evaluation; more need pictures of one size."""

    def __post_init__(self) -> None:
        self.scale = tuple(self.scale)  # type: ignore[assignment]

    @property
    def size_unit(self) -> int:
        """1 for networks of timm, which take pictures of any size that is not too small."""
        of_timm = isinstance(self.model, str) and self.model.startswith(TIMM)
        return 1 if of_timm else super().size_unit

    @property
    def short(self) -> int | None:
        """`short_side`, or its default; None where pictures are not resized."""
        short = min(self.size) if self.short_side is None else self.short_side
        return short or None

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        self.check_label_maps()
        for name in ("init", "model"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for name, choices in (("head", HEADS), ("loss", LOSSES), ("mean_over", MEANS)):
            check_choice(name, getattr(self, name), choices)
        check_choice("metrics", self.metrics, METRICS)
        for name, least in (("head_width", 1), ("aux_width", 0), ("short_side", 0)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, at_least=least)
        for weight in self.class_weights or ():
            check_number("class_weights", weight, at_least=0)
        check_number("layer_decay", self.layer_decay, above=0, at_most=1)
        for name in ("drop_path", "dropout"):
            check_number(name, getattr(self, name), at_least=0, below=1)
        check_number("most_of_one_class", self.most_of_one_class, above=0, at_most=1)
        check_number("eval_every", self.eval_every, above=0)
        check_number("eval_batch_size", self.eval_batch_size, whole=True, above=0)
        for value in self.scale:
            check_number("scale", value, above=0)
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            words = " ".join(f"{value:g}" for value in self.scale)
            raise OptionError(f"--scale must be the smaller factor and the larger, got {words}")
        if self.min_crop != RunConfig.min_crop:
            raise OptionError(
                f"--min_crop {self.min_crop:g} has no effect on segment train, whose crops have "
                "the size --input_size; --scale says how large pictures are then"
            )
        self.check_adapting("init")


@dataclass
class SegmentInferenceConfig(DataConfig):
    """What evaluating and predicting with a segmenter have in common."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file."""
    data_path: str
    """The pictures."""
    window: int | tuple[int, int] | None = None
    """Pixels of the windows that pictures are seen through, one number or height and width; by
    default the size that the model was trained with."""
    stride: int | tuple[int, int] | None = None
    """Pixels from one window to the next; two thirds of a window by default."""
    short_side: int | None = None
    """Pixels that the short side of pictures is resized to, as in training; by default as the run
    of the checkpoint was told, 0 keeps pictures as large as they are."""
    batch_size: int = 1
    """Pictures in a batch of one process; more need pictures of one size."""
    amp: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic; auto: bfloat16 where the device multiplies it natively, float16 on older GPUs,
    else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    num_workers: int | None = None
    """Loading processes."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the command fails."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        for name in ("checkpoint", "data_path"):
            check_text(name, getattr(self, name))
        self.check_reading()
        for name in ("window", "stride"):
            _check_pair(name, getattr(self, name))
        if self.stride is not None and self.window is not None:
            strides, windows = as_pair(self.stride), as_pair(self.window)
            if any(step > side for step, side in zip(strides, windows)):
                raise OptionError(
                    f"--stride {_words(strides)} is larger than --window {_words(windows)}, which "
                    "leaves pixels out"
                )
        if self.short_side is not None:
            check_number("short_side", self.short_side, whole=True, at_least=0)
        check_number("batch_size", self.batch_size, whole=True, above=0)
        check_number("max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        check_choice("amp", self.amp, AMP)
        if self.num_workers is not None:
            check_number("num_workers", self.num_workers, whole=True, at_least=0)


def _check_pair(name: str, value: int | tuple[int, int] | None) -> None:
    """Raises `OptionError` unless `value` is one or two positive whole numbers."""
    if value is None:
        return
    try:
        pair = as_pair(value)
    except TypeError as error:
        raise OptionError(f"--{name} must be one whole number or two, got {value!r}") from error
    for number in pair:
        check_number(name, number, whole=True, above=0)


def _words(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


@dataclass
class SegmentEvaluateConfig(LabelMapConfig, SegmentInferenceConfig):
    """Measure IoU and accuracy of a segmenter on the val split of a data set.

    What label maps mean, and where they lie, is as the run of the checkpoint was told, if its
    folder is there and no option says otherwise.
    """

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file of a segmenter."""
    data_path: str
    """As in convmae segment train; where nothing divides the pictures, all of them."""
    split: Literal["val", "train"] = "val"
    """Which of its splits."""
    metrics: Literal["classes", "small-targets"] | None = None
    """IoU and accuracy of classes; or of small targets (all classes but 0) IoU, nIoU, Pd and Fa, as
    in infrared target detection; by default as the run was told, else classes."""
    output: str | None = None
    """A JSON file to write the figures to."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        self.check_label_maps()
        check_choice("split", self.split, ("val", "train"))
        if self.metrics is not None:
            check_choice("metrics", self.metrics, METRICS)
        if self.nb_classes is not None:
            raise OptionError(
                f"--nb_classes {self.nb_classes} has no effect here: the checkpoint has its "
                "classes; leave it out"
            )


@dataclass
class SegmentPredictConfig(SegmentInferenceConfig):
    """Predict label maps of pictures: index PNGs of the same names, and overlays to look at."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file of a segmenter."""
    data_path: str
    """A picture, or a folder of pictures of any size, nested or flat."""
    output_dir: str = "predicted"
    """The folder to write: label_maps/NAME.png and overlays/NAME.png."""
    second_images: str | None = None
    """The folder, a path, of a second picture of the same name for each: for a model of pairs."""
    second_chans: int | None = None
    """Channels of a second picture; by default 1, which reads 8-bit pictures as grey."""
    overlays: bool = True
    """Write pictures with the classes drawn over them as well."""
    overwrite: bool = False
    """Write into a folder that holds predictions already."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_text("output_dir", self.output_dir)
        if self.second_chans is not None:
            check_number("second_chans", self.second_chans, whole=True, above=0)
