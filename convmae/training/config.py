"""The options of the commands, their defaults and what they must satisfy. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

PATCH = 16  # pixels a side: one block of the mask
AMP_CHOICES = ("auto", "bfloat16", "float32")


class OptionError(ValueError):
    """An option has a value that cannot work; the message begins with the option's flag."""


@dataclass
class PretrainConfig:
    """Pretrain a ConvMAE on pictures: hide most of each, learn to paint the rest.

    The defaults are those of the official script. Its published recipe is --epochs 1600
    --blr 1.5e-4 --norm_pix_loss with an effective batch of 3072.

    Other names of flags: -b (--batch_size), -j or --workers (--num_workers), --data (--data_path),
    --img_size (--input_size).
    """

    model: str = "convmae_base"
    """Which model: convmae_tiny (for CPUs), convmae_small, _base, _large, _huge."""
    data_path: str = "demo"
    """A folder of pictures, nested or flat, or demo: the photographs inside scikit-image."""
    output_dir: str = "output_dir"
    """Where everything is written: args.yaml, log.txt, checkpoint/, tensorboard/, *.png."""
    resume: str | None = None
    """Go on from a checkpoint or run folder, or auto: from output_dir if a run is there."""
    batch_size: int = 64
    """Pictures in a batch."""
    epochs: int = 400
    """Passes over the pictures; an epoch of the demo is 64 crops of each of its 8 photographs."""
    accum_iter: int = 1
    """Batches whose gradients are added up for one step: the effective batch is larger."""
    input_size: int | tuple[int, int] = 224
    """Crop in pixels, one number or height and width, multiples of 16."""
    mask_ratio: float = 0.75
    """Share of the 16 x 16 pixel patches that is hidden."""
    norm_pix_loss: bool = False
    """Predict patches normalised by their own mean and deviation: better features, as published."""
    weight_decay: float = 0.05
    """AdamW's, for matrices and kernels; vectors and biases have none."""
    lr: float | None = None
    """Peak learning rate; blr * effective batch / 256 if not given."""
    blr: float = 1e-3
    """Base learning rate, for an effective batch of 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the half-cosine."""
    warmup_epochs: float = 40
    """Epochs over which the learning rate rises linearly from 0."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together; not limited if not given."""
    min_crop: float = 0.2
    """Smallest share of a picture's area that a random crop takes."""
    hflip: float = 0.5
    """Share of the crops that is flipped left to right."""
    amp: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic; auto is bfloat16 where the device multiplies it natively, else float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ...; auto is cuda where there is one, else cpu."""
    seed: int = 0
    """Of weights, crops, order and masks: the same seed gives the same run."""
    num_workers: int | None = None
    """Loading processes; by default none for the demo, and up to 8 for a folder."""
    pin_mem: bool = True
    """Page-locked batches where the device is a GPU."""
    save_every: int = 1
    """Epochs between checkpoints; the last is always saved."""
    log_every: int = 20
    """Steps between lines of the log; the last step always gets one."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the run fails; below, others take their place."""

    @property
    def size(self) -> tuple[int, int]:
        """`input_size` as `(H, W)`."""
        return _as_pair(self.input_size)

    @property
    def effective_batch(self) -> int:
        """Pictures that one optimiser step sees: `batch_size * accum_iter`."""
        return self.batch_size * self.accum_iter

    @property
    def peak_lr(self) -> float:
        """`lr`, or `blr * effective_batch / 256`."""
        return self.blr * self.effective_batch / 256 if self.lr is None else self.lr

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        check_mask_ratio(self.mask_ratio)
        self._check_size()
        for name in ("batch_size", "epochs", "accum_iter", "save_every", "log_every"):
            _check_number(name, getattr(self, name), whole=True, above=0)
        for name in ("weight_decay", "min_lr", "warmup_epochs"):
            _check_number(name, getattr(self, name), at_least=0)
        for name in ("blr", "lr"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=0)
        _check_number("seed", self.seed, whole=True, at_least=0)
        if self.num_workers is not None:
            _check_number("num_workers", self.num_workers, whole=True, at_least=0)
        if self.clip_grad is not None:
            _check_number("clip_grad", self.clip_grad, above=0)
        _check_number("min_crop", self.min_crop, above=0, at_most=1)
        _check_number("hflip", self.hflip, at_least=0, at_most=1)
        _check_number("max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        if self.min_lr > self.peak_lr:
            raise OptionError(
                f"--min_lr must not be above the peak learning rate {self.peak_lr:g}, "
                f"got {self.min_lr:g}"
            )
        if self.amp not in AMP_CHOICES:
            raise OptionError(f"--amp must be one of {', '.join(AMP_CHOICES)}, got {self.amp!r}")
        for name in ("model", "data_path", "output_dir"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise OptionError(f"--{name} must not be empty, got {getattr(self, name)!r}")

    def _check_size(self) -> None:
        try:
            height, width = self.size
        except TypeError as error:
            raise OptionError(
                f"--input_size must be one whole number or two, got {self.input_size!r}"
            ) from error
        if height < PATCH or width < PATCH or height % PATCH or width % PATCH:
            raise OptionError(
                f"--input_size must be multiples of {PATCH} pixels, at least {PATCH}, "
                f"got {height} x {width}"
            )
        check_patches(self.mask_ratio, height, width)


@dataclass
class ReconstructConfig:
    """Draw what a checkpoint paints: original, masked, reconstructed, reconstructed + visible."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file."""
    images: tuple[str, ...]
    """Picture files and folders of pictures, or demo."""
    output: str = "reconstruction.png"
    """The picture to write."""
    mask_ratio: float = 0.75
    """Share of the 16 x 16 pixel patches that is hidden."""
    seed: int = 0
    """Of the masks."""
    max_images: int = 16
    """Of more pictures, an even sample of this many is drawn."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    def validate(self) -> None:
        """Checks what can be checked without the checkpoint.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        check_mask_ratio(self.mask_ratio)
        _check_number("seed", self.seed, whole=True, at_least=0)
        _check_number("max_images", self.max_images, whole=True, above=0)
        if not self.images:
            raise OptionError("--images needs at least one file or folder, got none")
        if not self.output.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise OptionError(f"--output must end in .png, .jpg or .webp, got {self.output!r}")


def config_from_mapping(values: dict[str, Any]) -> PretrainConfig:
    """A `PretrainConfig` from option names and values, as an `args.yaml` holds them.

    Raises:
        OptionError: an option that does not exist (with the nearest that does).
    """
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    renamed = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in renamed:
        if name not in known:
            raise OptionError(f"unknown option {name!r} in --config{suggest(name, sorted(known))}")
    size = renamed.get("input_size")
    if isinstance(size, list):
        renamed["input_size"] = tuple(size)
    for name in ("blr", "lr", "min_lr"):  # YAML reads 1e-3 as text
        if isinstance(renamed.get(name), str):
            renamed[name] = _number_from(name, renamed[name])
    return PretrainConfig(**renamed)


def config_to_mapping(config: PretrainConfig) -> dict[str, Any]:
    """The options as plain values that YAML holds."""
    values = dataclasses.asdict(config)
    if isinstance(values["input_size"], tuple):
        values["input_size"] = list(values["input_size"])
    return values


def suggest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or the whole list where nothing is near."""
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; expected one of {', '.join(known)}"


def check_mask_ratio(value: float) -> None:
    """Raises `OptionError` unless `value` is a number in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise OptionError(f"--mask_ratio must be in [0, 1), got {value!r}")


def check_patches(mask_ratio: float, height: int, width: int) -> None:
    """Raises `OptionError` unless a picture of that size has visible and hidden patches."""
    patches = (height // PATCH) * (width // PATCH)
    visible = int(patches * (1 - mask_ratio))
    if visible in (0, patches):
        what = "visible" if visible == 0 else "hidden"
        raise OptionError(
            f"--mask_ratio {mask_ratio:g} leaves no patch {what} of the {patches} of a picture of "
            f"{height} x {width} pixels; expected at least one visible and one hidden"
        )


def _as_pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    values = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(values) == 1:
        values = values * 2
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"expected one whole number or two, got {size!r}")
    return values[0], values[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number_from(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"--{name} must be a number, got {text!r}") from error


def _check_number(
    name: str,
    value: Any,
    whole: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    kind = "a whole number" if whole else "a number"
    limits = [
        f"{text} {limit:g}"
        for text, limit in (("above", above), ("at least", at_least), ("at most", at_most))
        if limit is not None
    ]
    right = (
        _is_number(value)
        and (not whole or isinstance(value, int))
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
    if not right:
        raise OptionError(f"--{name} must be {kind} {' and '.join(limits)}, got {value!r}")
