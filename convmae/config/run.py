"""The options that every training command has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from convmae.config.checks import (
    ADAPT_INPUT,
    PATCH,
    OptionError,
    as_pair,
    check_choice,
    check_number,
    check_size,
    check_statistics,
    check_text,
)
from convmae.config.data import DataConfig

AMP = ("auto", "bfloat16", "float16", "float32")
STRATEGIES = ("auto", "single", "ddp", "fsdp2")
SCHEDULES = ("cosine", "linear", "constant")
AnyRun = TypeVar("AnyRun", bound="RunConfig")


@dataclass
class RunConfig(DataConfig):
    """What pretraining, finetuning and probing have in common."""

    data_path: str = "demo"
    """Pictures: a folder, nested or flat, or class folders; .npy arrays; WebDataset shards; IDX
    files (MNIST's format); or demo, the photographs inside scikit-image."""
    output_dir: str = "output_dir"
    """Where everything is written: args.yaml, log.txt, checkpoint/, tensorboard/, report.html."""
    resume: str | None = None
    """Go on from a checkpoint or run folder, or auto: from output_dir if a run is there."""
    allow_changed_data: bool = False
    """Go on with --resume although files were added to --data_path, removed or changed in size."""
    batch_size: int = 64
    """Pictures in a batch of one process."""
    epochs: int = 100
    """Passes over the pictures; an epoch of the demo is 64 crops of each of its 8 photographs."""
    steps: int | None = None
    """Optimizer steps of the whole run, in place of --epochs."""
    accum_iter: int = 1
    """Batches whose gradients are added up for one step: the effective batch is larger."""
    input_size: int | tuple[int, int] = 224
    """Crop in pixels, one number or height and width, multiples of 16; of a network of timm,
    multiples of its stride, mostly 32."""
    max_samples: int | None = None
    """Train on this many of the pictures, evenly over their classes, chosen by --seed."""
    mean: tuple[float, ...] | None = None
    """Mean of every channel, full scale being 1; by default the checkpoint's, else ImageNet's for
    3 channels of 8 bits, else measured on up to 1,000 pictures. convmae stats measures it."""
    std: tuple[float, ...] | None = None
    """Deviation of every channel, as --mean."""
    weight_decay: float = 0.05
    """For matrices and kernels; vectors and biases have none."""
    weight_decay_end: float | None = None
    """Weight decay of the last step, which --weight_decay goes to along half a cosine over all
    steps; by default it stays."""
    lr: float | None = None
    """Peak learning rate; blr * effective batch / 256 if not given."""
    blr: float = 1e-3
    """Base learning rate, for an effective batch of 256."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_epochs: float = 40
    """Epochs over which the learning rate rises linearly from --warmup_lr."""
    warmup_lr: float = 0.0
    """Learning rate of the first step, where there is a warm-up."""
    sched: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes after the warm-up."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together; not limited if not given."""
    sync_bn: bool | None = None
    """Let BatchNorms take mean and variance over the batches of all processes, as if they were one;
    by default yes where there are several. Means nothing to a model without BatchNorm."""
    min_crop: float = 0.2
    """Smallest share of a picture's area that a random crop takes."""
    hflip: float = 0.5
    """Share of the crops that is flipped left to right."""
    amp: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic; float16 scales the loss. auto: bfloat16 where the device multiplies it natively,
    float16 on older GPUs, else float32."""
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    """Of several processes (torchrun): ddp copies the model to each, fsdp2 divides it over them.
    auto is ddp where torchrun started more than one process."""
    grad_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass: less memory, more time."""
    torchcompile: str | None = None
    """blocks compiles every patch embedding and block for itself, by inductor: a part of the time
    that the whole model takes, which the name of a backend of torch.compile, such as inductor,
    compiles. Not compiled by default."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ...; auto is cuda where there is one, else cpu."""
    seed: int = 0
    """Of weights, crops, order and masks: the same seed gives the same run."""
    num_workers: int | None = None
    """Loading processes; by default none for pictures in memory, and up to 8 for files."""
    pin_mem: bool = True
    """Page-locked batches where the device is a GPU."""
    save_every: float = 1
    """Epochs between checkpoints, fractions allowed; the last is always saved."""
    log_every: int = 20
    """Steps between lines of the log; the last step always gets one."""
    log_wandb: bool = False
    """Log to Weights & Biases as well."""
    wandb_project: str = "convmae"
    """Its project."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the run fails; below, others take their place."""
    max_nonfinite: int = 10
    """Steps in a row whose loss or gradient is not finite, each skipped, before the run stops."""
    adapt_input: Literal["auto", "sum", "repeat", "fresh"] = "auto"
    """How weights to start from are fitted to pictures of another number of channels: every channel
    gets the sum over the channels of the first convolution / their number (sum), they are repeated
    and scaled (repeat, as timm does), or drawn anew (fresh); auto is sum for grey pictures, else
    repeat."""

    @property
    def size(self) -> tuple[int, int]:
        """`input_size` as `(H, W)`."""
        return as_pair(self.input_size)

    def effective_batch(self, processes: int = 1) -> int:
        """Pictures that one optimizer step sees: `batch_size * accum_iter * processes`."""
        return self.batch_size * self.accum_iter * processes

    def peak_lr(self, processes: int = 1) -> float:
        """`lr`, or `blr * effective_batch / 256`."""
        return self.blr * self.effective_batch(processes) / 256 if self.lr is None else self.lr

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps

    @property
    def length(self) -> str:
        """The option that says how long the run is, and its value."""
        return f"--epochs {self.epochs}" if self.steps is None else f"--steps {self.steps}"

    @property
    def size_unit(self) -> int:
        """Pixels that must divide `input_size`, as far as the options alone tell."""
        return PATCH

    @property
    def schedules(self) -> tuple[str, ...]:
        """What `sched` may be."""
        return SCHEDULES

    def filled(self: AnyRun) -> AnyRun:
        """The options with those that depend on others given values; what a run notes down."""
        return self

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        for name in ("data_path", "output_dir", "wandb_project", "device"):
            check_text(name, getattr(self, name))
        self.check_reading()
        check_size(self.input_size, self.size_unit)
        for name in ("batch_size", "epochs", "accum_iter", "log_every", "max_nonfinite"):
            check_number(name, getattr(self, name), whole=True, above=0)
        for name in ("weight_decay", "weight_decay_end", "min_lr", "warmup_epochs", "warmup_lr"):
            if name != "weight_decay_end" or self.weight_decay_end is not None:
                check_number(name, getattr(self, name), at_least=0)
        for name in ("blr", "lr", "clip_grad", "save_every"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        check_number("seed", self.seed, whole=True, at_least=0)
        if self.num_workers is not None:
            check_number("num_workers", self.num_workers, whole=True, at_least=0)
        for name in ("max_samples", "steps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, above=0)
        check_number("min_crop", self.min_crop, above=0, at_most=1)
        check_number("hflip", self.hflip, at_least=0, at_most=1)
        check_number("max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        check_choice("amp", self.amp, AMP)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("sched", self.sched, self.schedules)
        check_choice("adapt_input", self.adapt_input, ADAPT_INPUT)
        check_statistics(self.mean, self.std)
        if self.warmup_lr > 0 and self.warmup_epochs == 0:
            raise OptionError(
                f"--warmup_lr {self.warmup_lr:g} has no effect with --warmup_epochs 0; leave it out"
            )
        if self.amp == "float16" and self.strategy == "fsdp2":
            raise OptionError(
                "--amp float16 cannot scale gradients that --strategy fsdp2 divides over the "
                "processes; use --amp bfloat16, or --strategy ddp"
            )

    def check_adapting(self, option: str) -> None:
        """Raises `OptionError` where `adapt_input` is given without weights to start from."""
        if self.adapt_input != "auto" and getattr(self, option) is None:
            raise OptionError(
                f"--adapt_input {self.adapt_input} has no effect without --{option}; leave it out"
            )

    def check_rates(self, processes: int) -> None:
        """Raises `OptionError` where the learning rate would begin or end above its peak."""
        peak = self.peak_lr(processes)
        for name in ("warmup_lr", "min_lr"):
            rate = getattr(self, name)
            if rate > peak:
                raise OptionError(
                    f"--{name} must not be above the peak learning rate {peak:g}, got {rate:g}"
                )
