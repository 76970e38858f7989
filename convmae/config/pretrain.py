"""The options of `convmae pretrain`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from convmae.config.checks import (
    TIMM,
    check_choice,
    check_mask_ratio,
    check_number,
    check_patches,
    check_text,
)
from convmae.config.errors import OptionError
from convmae.config.run import ListedRunConfig

METHODS = ("auto", "mae", "spark", "fcmae")
OPTIMIZERS = ("adamw", "lamb", "sgd")
ROUNDINGS = ("floor", "round")
DENSIFY_NORMS = ("auto", "bn", "ln", "none")
# What a method sets where the option is not given: the published values of each.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "mae": {"mask_ratio": 0.75, "norm_pix_loss": False},
    "spark": {
        "mask_ratio": 0.6,
        "mask_rounding": "round",
        "norm_pix_loss": True,
        "decoder_width": 768,
        "densify_norm": "auto",
        "drop_path": 0.0,
    },
    "fcmae": {
        "mask_ratio": 0.6,
        "mask_rounding": "floor",
        "norm_pix_loss": True,
        "decoder_width": 512,
        "drop_path": 0.0,
    },
}
# Of these, a method takes the ones that it sets; and the size of a block, which the network sets.
OF_METHODS = ("mask_size", "mask_rounding", "decoder_width", "densify_norm", "drop_path")
BETAS = (0.9, 0.95)


@dataclass
class PretrainConfig(ListedRunConfig):
    """Pretrain a ConvMAE, or a convolutional network of timm: hide most of each picture, learn to
    paint the rest.

    The defaults are those of the official script of ConvMAE. Published recipes are in recipes/.

    Other names of flags: -b (--batch_size), -j or --workers (--num_workers), --data (--data_path),
    --img_size (--input_size).
    """

    model: str = "convmae_base"
    """Which model: convmae_tiny (for CPUs), convmae_small, _base, _large, _huge; or a fastconvmae_
    of these sizes, which shows every patch once, in complementary masks; or timm:NAME, a
    convolutional network of timm, such as timm:resnet50 or timm:convnext_tiny."""
    method: Literal["auto", "mae", "spark", "fcmae"] = "auto"
    """How: mae is ConvMAE's. For networks of timm, fcmae paints from the coarsest map by a light
    decoder, and gains most from skipping what is hidden; spark from the maps of all scales, by a
    decoder that mostly costs more than the network. auto is mae, and fcmae for networks of timm."""
    init: str | None = None
    """Weights to start from: a run's folder, a .safetensors file or an official .pth, pretrained or
    finetuned; what it lacks, such as a decoder, is fresh. By default all is random. A run that
    --resume goes on with does not read it."""
    mask_ratio: float | None = None
    """Share of the patches that is hidden; by default 0.75, and 0.6 for spark and fcmae."""
    mask_size: int | None = None
    """Side of a patch in pixels, for networks of timm: a multiple of the network's stride that
    divides --input_size, the stride itself by default. ConvMAE's is always 16."""
    mask_rounding: Literal["floor", "round"] | None = None
    """Whether the number of patches that stay visible is rounded down, as fcmae does by default, or
    to the nearest number, as spark does; of 49 patches 0.4 are 19 or 20."""
    norm_pix_loss: bool | None = None
    """Predict patches normalised by their own mean and deviation: better features, as published. By
    default no, and yes for spark and fcmae."""
    decoder_width: int | None = None
    """Channels of the decoder: for spark of its coarsest map, 768 by default, of which a half costs
    a quarter; for fcmae 512 by default."""
    densify_norm: Literal["auto", "bn", "ln", "none"] | None = None
    """For spark, the norm of each map before the hidden positions are filled in: BatchNorm,
    LayerNorm or none; auto is that of the network's own norms."""
    drop_path: float | None = None
    """Stochastic depth of the last block of a network of timm; 0 by default."""
    opt: Literal["adamw", "lamb", "sgd"] = "adamw"
    """The optimizer: lamb is made for batches of thousands; sgd has Nesterov's momentum of 0.9."""
    opt_betas: tuple[float, float] | None = None
    """The two decays of the running means of adamw and lamb; 0.9 and 0.95 by default."""
    cuda_graph: bool = False
    """Capture the whole step, optimizer included, as a CUDA graph, and replay it: for batches so
    small that a GPU waits for launches. A run that cannot says why and goes on without."""
    epochs: int = 400
    """Passes over the pictures; an epoch of the demo is 64 crops of each of its 8 photographs."""

    @property
    def of_timm(self) -> bool:
        """Whether the model is a network of timm."""
        return isinstance(self.model, str) and self.model.startswith(TIMM)

    @property
    def size_unit(self) -> int:
        """1 for networks of timm, as only the network tells its stride."""
        return 1 if self.of_timm else super().size_unit

    @property
    def share_hidden(self) -> float:
        """`mask_ratio`, or that of the method."""
        given = self.mask_ratio
        return self.filled().mask_ratio or 0.0 if given is None else given

    @property
    def betas(self) -> tuple[float, float]:
        """`opt_betas`, or those of all methods."""
        return BETAS if self.opt_betas is None else self.opt_betas

    def filled(self) -> PretrainConfig:
        """The options with the method, and with what the method sets where it was not given.

        Raises:
            OptionError: there is no such method, or the model is of another.
        """
        check_text("model", self.model)
        check_choice("method", self.method, METHODS)
        method = self.method
        if method == "auto":
            method = "fcmae" if self.of_timm else "mae"
        if (method == "mae") == self.of_timm:
            fitting = "spark or fcmae" if self.of_timm else "mae"
            raise OptionError(
                f"--method {method} cannot pretrain --model {self.model!r}: expected {fitting}"
                + ("" if self.of_timm else f" (a network of timm is {TIMM}NAME)")
            )
        values = METHOD_DEFAULTS[method]
        absent = {name: v for name, v in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, method=method, **absent)

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        filled = self.filled()
        super().validate()
        if self.init is not None:
            check_text("init", self.init)
        self.check_adapting("init")
        check_mask_ratio(self.share_hidden)
        filled._check_of_methods()
        self._check_optimizer()
        if not self.of_timm:
            check_patches(self.share_hidden, *self.size)

    def _check_of_methods(self) -> None:
        """Checks what only some methods take; of options that are filled."""
        known = METHOD_DEFAULTS[self.method]
        for name in OF_METHODS:
            value = getattr(self, name)
            takes = name in known or (name == "mask_size" and self.of_timm)
            if value is not None and not takes:
                raise OptionError(
                    f"--{name} {value} means nothing to --method {self.method} (--model "
                    f"{self.model!r}); leave it out"
                )
        for name in ("mask_size", "decoder_width"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, above=0)
        if self.of_timm:
            check_choice("mask_rounding", self.mask_rounding, ROUNDINGS)
            check_number("drop_path", self.drop_path, at_least=0, below=1)
        if self.densify_norm is not None:
            check_choice("densify_norm", self.densify_norm, DENSIFY_NORMS)

    def _check_optimizer(self) -> None:
        check_choice("opt", self.opt, OPTIMIZERS)
        if self.opt_betas is None:
            return
        if self.opt == "sgd":
            raise OptionError("--opt_betas mean nothing to --opt sgd; leave them out")
        if not isinstance(self.opt_betas, list | tuple) or len(self.opt_betas) != 2:
            raise OptionError(f"--opt_betas must be two numbers, got {self.opt_betas!r}")
        for beta in self.opt_betas:
            check_number("opt_betas", beta, at_least=0, below=1)
