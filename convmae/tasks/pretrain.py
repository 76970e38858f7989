"""`convmae pretrain`: what a step of pretraining computes, and what it paints."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, check_patches, for_option, suggest
from convmae.data import PretrainTransform
from convmae.models import ConvMAE, FastConvMAE, create_model, full_name, list_models
from convmae.models.fastconvmae import complementary_masks
from convmae.records.folder import RunFolder
from convmae.records.pictures import reconstruction_picture
from convmae.seeds import mask_noise
from convmae.tasks.trial import try_step, visible_blocks
from convmae.training.optim import Groups, adamw, decay_groups, lamb, sgd
from convmae.training.run import RunSummary, run_task
from convmae.training.task import Task
from convmae.weights.checkpoint import read_statistics
from convmae.weights.foreign import few
from convmae.weights.pretrained import load_pretrained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.config import PretrainConfig
    from convmae.data import Batch, Source, Statistics
    from convmae.training.state import Run

PREVIEW_IMAGES = 6
# Arguments of a model whose option has another name.
FLAGS = {"img_size": "input_size", "drop_path_rate": "drop_path", "in_chans": "data_path"}


def pretrain(config: PretrainConfig) -> RunSummary:
    """Trains a ConvMAE or a network of timm, and leaves everything in `config.output_dir`.

    The folder then holds `args.yaml` (the options), `environment.json`, `log.txt` (JSON lines),
    `tensorboard/`, `checkpoint/` (`model.safetensors`, `training_state.pt`), `reconstructions/`,
    `loss.png` and `report.html`. The same options give the same run, bit for bit on a CPU,
    interrupted and resumed or not. Ctrl-C and SIGTERM finish the step, save and return.

    Returns:
        A summary of the run.

    Raises:
        OptionError (a ValueError): an option cannot work. Nothing was trained or overwritten.
        convmae.data.DataError (a ValueError): no pictures, or too many of them unreadable.
        TrainingError: too many steps in a row were not finite, or a checkpoint could not be
            written.
    """
    return run_task(config, Pretraining())


def main(config: PretrainConfig) -> int:
    """The command: `pretrain`, and what to see of it; returns the exit status."""
    summary = pretrain(config)
    folder = RunFolder.of(summary.output_dir)
    return summary.report(folder.picture, folder.report)


class Pretraining(Task):
    """Hide most of every picture, learn to paint the rest."""

    command = "pretrain"
    initial_statistics: Statistics | None = None

    def transform(self, config: PretrainConfig) -> Any:
        return PretrainTransform(config.size, config.min_crop, config.hflip)

    def build(self, config: PretrainConfig, source: Source) -> tuple[nn.Module, str, list[str]]:
        if config.of_timm:
            model, notes = self._network(config, source)
        else:
            model, notes = _convmae(config, source), []
        return model, full_name(config.model), notes + self._start(model, config)

    @staticmethod
    def _network(config: PretrainConfig, source: Source) -> tuple[Any, list[str]]:
        """A network of timm with the decoder of its method, tried on pictures without values."""
        options: dict[str, Any] = {
            "method": config.method,
            "img_size": config.size,
            "in_chans": source.channels,
            "mask_ratio": config.share_hidden,
            "mask_rounding": config.mask_rounding,
            "decoder_width": config.decoder_width,
            "norm_pix_loss": config.norm_pix_loss,
        }
        if config.mask_size is not None:
            options["mask_size"] = config.mask_size
        if config.densify_norm is not None:
            options["densify_norm"] = config.densify_norm
        if config.drop_path:
            options["drop_path_rate"] = config.drop_path
        with _refusals(config):
            model: Any = create_model(config.model, **options)
            with torch.device("meta"):
                twin: Any = create_model(config.model, **options)
        side, rounding = model.patch_size, model.mask_rounding
        check_patches(config.share_hidden, *config.size, side, rounding)
        try_step(model, twin, config)
        notes = [
            f"method {config.method}: blocks of {side} x {side} pixels, of which "
            f"{visible_blocks(model)} of {model.num_patches} stay visible"
        ]
        if model.unused_parameters:
            notes.append(
                f"note: no map depends on {few(model.unused_parameters)}: they stay as they were "
                "drawn"
            )
        return model, notes

    def _start(self, model: ConvMAE, config: PretrainConfig) -> list[str]:
        """Puts `config.init` into the model, unless the run goes on; what to tell about it."""
        if config.init is None:
            return []
        if self.resumed is not None:
            with for_option("resume"):
                self.initial_statistics = read_statistics(self.resumed)
            return [
                f"note: --init {config.init!r} is not read: the run goes on from its own weights"
            ]
        with for_option("init"):
            report = load_pretrained(model, config.init, config.adapt_input)
        self.initial_statistics = report.statistics
        return report.lines()

    def statistics(self, config: PretrainConfig) -> Statistics | None:
        return self.initial_statistics

    def groups(self, model: nn.Module, config: PretrainConfig) -> Groups:
        if not config.of_timm:
            return decay_groups(model, config.weight_decay)
        undecayed: set[str] = model.no_weight_decay()  # type: ignore[operator]
        return decay_groups(model, config.weight_decay, undecayed)

    def optimizer(self, groups: Groups, config: PretrainConfig) -> torch.optim.Optimizer:
        if config.opt == "lamb":
            return lamb(groups, config.betas, config.clip_grad)
        if config.opt == "sgd":
            return sgd(groups)
        return adamw(groups, config.betas)

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        return self.captured_loss(run, images, self.inputs(run, batch))

    def inputs(self, run: Run, batch: Batch) -> tuple[Tensor]:
        noise = mask_noise(batch.keys, run.model.num_patches, run.config.seed)
        return (noise.to(run.world.device),)

    def captured_loss(self, run: Run, images: Tensor, inputs: tuple[Tensor]) -> Tensor:
        (noise,) = inputs
        return run.step_model(images, mask_ratio=run.config.share_hidden, noise=noise).loss

    def draw(self, run: Run) -> PILImage.Image | None:
        config = run.config
        images = run.source.preview(PREVIEW_IMAGES, config.size)
        return reconstruction_picture(
            run.model, images, config.share_hidden, config.seed, *run.statistics
        )


def _convmae(config: PretrainConfig, source: Source) -> ConvMAE:
    """The ConvMAE or FastConvMAE that the options name."""
    try:
        model = create_model(
            config.model,
            img_size=config.size,
            in_chans=source.channels,
            norm_pix_loss=config.norm_pix_loss,
        )
    except ValueError as error:
        raise OptionError(f"--model: {error}") from error
    except TypeError:  # a classifier has no norm_pix_loss
        model = None
    if not isinstance(model, ConvMAE):
        known = list_models("*convmae_*")
        like = suggest(config.model.replace("convvit", "convmae"), known)
        raise OptionError(f"--model {config.model!r} has no decoder and cannot be pretrained{like}")
    if isinstance(model, FastConvMAE):
        noise = torch.zeros(1, model.num_patches)
        try:
            complementary_masks(noise, model.grid, config.share_hidden)
        except ValueError as error:
            raise OptionError(f"--mask_ratio: {error}") from error
    return model


@contextmanager
def _refusals(config: PretrainConfig) -> Iterator[None]:
    """Turns what a network of timm is refused for into an `OptionError` that names the option."""
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        message = str(error).removeprefix(f"{config.model}: ")
        argument = message.split(maxsplit=1)[0] if message.strip() else ""
        option = FLAGS.get(argument, argument)
        if option in {field.name for field in dataclasses.fields(config)}:
            raise OptionError(f"--{option}: {message}") from error
        if any(n % 32 for n in config.size) and "a map of" in message:
            message += "; --input_size must be multiples of 32 pixels for most networks"
        raise OptionError(f"--model {config.model!r}: {message}") from error
