"""The options of `convmae finetune`, `convmae linprobe` and `convmae evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import (
    TIMM,
    OptionError,
    check_choice,
    check_number,
    check_text,
)
from convmae.config.data import PictureChoice, listed_choice
from convmae.config.inference import InferenceConfig
from convmae.config.run import ListedRunConfig, RunConfig

MIX_MODES = ("batch", "pair", "elem")
MOST_CLASSES = 1_000_000  # a head of ConvViT-Base has then 768 M weights
FINETUNE_OPTIMIZERS = ("adamw", "lamb")
POOLS = ("avg", "max", "avgmax", "catavgmax")  # timm's names
ERASE_MODES = ("const", "rand", "pixel")


@dataclass
class ClassifyConfig(ListedRunConfig):
    """What finetuning and probing have in common."""

    finetune: str | None = None
    """Pretrained weights: a run's folder, a .safetensors file or an official .pth; by default the
    model starts from random weights."""
    model: str | None = None
    """Which classifier: convvit_tiny, _small, _base, _large, _huge, or timm:NAME, a convolutional
    network of timm; by default what --finetune is of, else convvit_base."""
    nb_classes: int | None = None
    """Classes; by default those of the data. Where more are asked for, the rest have no names."""
    global_pool: bool = True
    """Classify the mean of all tokens; otherwise the top-left one, as the official code can."""
    gp: Literal["avg", "max", "avgmax", "catavgmax"] | None = None
    """How a network of timm pools its last map, as timm's --gp; its own way if not given."""
    val_list: str | None = None
    """A text file that names the pictures of the val split, as --train_list."""
    val_share: float = 0.0
    """Share of the pictures of each class that is kept out of training and evaluated, chosen by
    --seed, where there is no val split; val_list.txt in the run's folder names them."""
    crop_pct: float = 0.875
    """For evaluation the shorter side is resized to input_size / crop_pct, and the centre cut."""
    eval_every: float = 1
    """Epochs between evaluations on the val split; the last is always evaluated."""
    eval_batch_size: int | None = None
    """Pictures in a batch of an evaluation; batch_size if not given."""

    @property
    def size_unit(self) -> int:
        """1 for networks of timm, which take pictures of any size that is not too small."""
        of_timm = isinstance(self.model, str) and self.model.startswith(TIMM)
        return 1 if of_timm else super().size_unit

    @property
    def train_choice(self) -> PictureChoice | None:
        """Which pictures are trained on; None for all of the train split."""
        return self._divided(held_out=False) if self.val_share else super().train_choice

    @property
    def val_choice(self) -> PictureChoice | None:
        """Which pictures are evaluated; None for all of the val split."""
        if self.val_share:
            return self._divided(held_out=True)
        return listed_choice("val_list", self.val_list)

    def _divided(self, held_out: bool) -> PictureChoice:
        option = "val_share" if self.train_list is None else "train_list"
        return PictureChoice(option, self.train_list, self.val_share, self.seed, held_out)

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        if self.nb_classes is not None:
            limits = {"at_least": 2, "at_most": MOST_CLASSES}
            check_number("nb_classes", self.nb_classes, whole=True, **limits)
        if self.eval_batch_size is not None:
            check_number("eval_batch_size", self.eval_batch_size, whole=True, above=0)
        check_number("crop_pct", self.crop_pct, above=0, at_most=1)
        check_number("eval_every", self.eval_every, above=0)
        check_number("val_share", self.val_share, at_least=0, below=1)
        if self.val_list is not None:
            check_text("val_list", self.val_list)
            if self.val_share:
                raise OptionError(
                    f"--val_list {self.val_list} and --val_share {self.val_share:g} both say which "
                    "pictures the val split has; give one of the two"
                )
        if self.gp is not None:
            check_choice("gp", self.gp, POOLS)
        for name in ("finetune", "model"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        self.check_adapting("finetune")


@dataclass
class FinetuneConfig(ClassifyConfig):
    """Finetune a pretrained encoder (or train one from random weights) to classify pictures.

    The defaults are the published recipe, for an effective batch of 1024: AdamW with layer decay,
    mixup, cutmix, RandAugment, random erasing, label smoothing and stochastic depth.
    """

    epochs: int = 100
    """Passes over the pictures."""
    blr: float = 5e-4
    """Base learning rate, for an effective batch of 256."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup_epochs: float = 5
    """Epochs over which the learning rate rises linearly from 0."""
    min_crop: float = 0.08
    """Smallest share of a picture's area that a random crop takes."""
    opt: Literal["adamw", "lamb"] = "adamw"
    """The optimizer; lamb is that of SparK's finetuning of ResNets: every layer's step is adapted,
    and means begin without correction."""
    layer_decay: float = 0.65
    """Every layer learns this many times more slowly than the one after it; all convolution
    stages of a ConvViT count as the first. A network of timm has the layers that timm says, one for
    each block: the deeper it is, the nearer to 1 this should be."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it rises linearly from 0."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """timm's automatic augmentation, or none; 1 or 3 channels of 8 bits."""
    color_jitter: float | None = None
    """Strength of colour jitter, where --aa is none."""
    smoothing: float = 0.1
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross entropy of each class for itself, as in the recipes of ResNets, instead of cross
    entropy of all."""
    reprob: float = 0.25
    """Share of the pictures of which a rectangle is erased."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What it is filled with: 0, one random colour, random pixels."""
    recount: int = 1
    """Rectangles at most."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none."""
    mixup_prob: float = 1.0
    """Share of the batches that are mixed."""
    mixup_switch_prob: float = 0.5
    """Share of the mixed batches that are cut rather than blended, where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One draw a batch, a pair or a picture."""
    model_ema: bool = False
    """Keep a running average of the weights; it is what is evaluated and kept as the best."""
    model_ema_decay: float = 0.9999
    """Its decay a step."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_number("layer_decay", self.layer_decay, above=0, at_most=1)
        for name in ("drop_path", "smoothing"):
            check_number(name, getattr(self, name), at_least=0, below=1)
        for name in ("reprob", "mixup_prob", "mixup_switch_prob"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)
        for name in ("mixup", "cutmix"):
            check_number(name, getattr(self, name), at_least=0)
        check_number("recount", self.recount, whole=True, above=0)
        check_number("model_ema_decay", self.model_ema_decay, above=0, below=1)
        check_choice("opt", self.opt, FINETUNE_OPTIMIZERS)
        check_choice("remode", self.remode, ERASE_MODES)
        check_choice("mixup_mode", self.mixup_mode, MIX_MODES)
        if self.color_jitter is not None:
            check_number("color_jitter", self.color_jitter, at_least=0)
        self._check_together()

    def _check_together(self) -> None:
        if self.mixes and self.batch_size % 2:
            raise OptionError(
                f"--batch_size must be even for --mixup and --cutmix, which pair pictures, got "
                f"{self.batch_size}; or give --mixup 0 --cutmix 0"
            )
        if self.color_jitter and self.auto_augment:
            raise OptionError(
                f"--color_jitter {self.color_jitter:g} has no effect beside --aa {self.aa}; give "
                "--aa none to use it"
            )
        if self.model_ema and self.strategy == "fsdp2":
            raise OptionError(
                "--model_ema keeps a whole copy of the model, which --strategy fsdp2 divides over "
                "the processes; use --strategy ddp"
            )

    @property
    def auto_augment(self) -> str | None:
        """`aa`, None where it says none."""
        return None if self.aa is None or self.aa.lower() in ("none", "") else self.aa

    @property
    def mixes(self) -> bool:
        """Whether pictures are blended or cut together."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixup_prob > 0


@dataclass
class LinprobeConfig(ClassifyConfig):
    """Train a linear classifier on a frozen pretrained encoder.

    The defaults are the published recipe, for an effective batch of 4096: LARS on a BatchNorm
    without affine parameters and a linear layer.
    """

    epochs: int = 90
    """Passes over the pictures."""
    blr: float = 0.1
    """Base learning rate, for an effective batch of 256."""
    warmup_epochs: float = 10
    """Epochs over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Of the linear layer's matrix."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        for name in ("min_crop", "hflip"):
            if getattr(self, name) != getattr(RunConfig, name):
                raise OptionError(
                    f"--{name} {getattr(self, name):g} has no effect in linprobe, whose crops are "
                    "the published ones; leave it out"
                )
        if self.strategy == "fsdp2":
            raise OptionError(
                "--strategy fsdp2 divides what is trained, and linprobe trains one layer; use "
                "--strategy ddp"
            )


@dataclass
class EvaluateConfig(InferenceConfig):
    """Measure the accuracy of a classifier on the val split of a data set."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file of a classifier."""
    data_path: str
    """As in convmae finetune, or class folders without splits, which are read as a whole. Classes
    are matched by name."""
    split: Literal["val", "train"] = "val"
    """Which of its splits."""
    output: str | None = None
    """A JSON file to write the figures to."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_text("data_path", self.data_path)
        check_choice("split", self.split, ("val", "train"))
