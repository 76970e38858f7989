"""`convmae pretrain`: what a step of pretraining computes, and what it paints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, for_option, suggest
from convmae.data import PretrainTransform
from convmae.models import ConvMAE, FastConvMAE, create_model, full_name, list_models
from convmae.models.fastconvmae import complementary_masks
from convmae.records.folder import RunFolder
from convmae.records.pictures import reconstruction_picture
from convmae.seeds import mask_noise
from convmae.training.optim import Groups, adamw, decay_groups
from convmae.training.run import RunSummary, run_task
from convmae.training.task import Task
from convmae.weights.checkpoint import read_statistics
from convmae.weights.pretrained import load_pretrained

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.config import PretrainConfig
    from convmae.data import Batch, Source, Statistics
    from convmae.training.state import Run

PREVIEW_IMAGES = 6
BETAS = (0.9, 0.95)


def pretrain(config: PretrainConfig) -> RunSummary:
    """Trains a ConvMAE as `config` says, and leaves everything in `config.output_dir`.

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
            raise OptionError(
                f"--model {config.model!r} has no decoder and cannot be pretrained{like}"
            )
        if isinstance(model, FastConvMAE):
            noise = torch.zeros(1, model.num_patches)
            try:
                complementary_masks(noise, model.grid, config.mask_ratio)
            except ValueError as error:
                raise OptionError(f"--mask_ratio: {error}") from error
        return model, full_name(config.model), self._start(model, config)

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
        return decay_groups(model, config.weight_decay)

    def optimizer(self, groups: Groups, config: PretrainConfig) -> torch.optim.Optimizer:
        return adamw(groups, BETAS)

    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        return self.captured_loss(run, images, self.inputs(run, batch))

    def inputs(self, run: Run, batch: Batch) -> tuple[Tensor]:
        noise = mask_noise(batch.keys, run.model.num_patches, run.config.seed)
        return (noise.to(run.world.device),)

    def captured_loss(self, run: Run, images: Tensor, inputs: tuple[Tensor]) -> Tensor:
        (noise,) = inputs
        return run.step_model(images, mask_ratio=run.config.mask_ratio, noise=noise).loss

    def draw(self, run: Run) -> PILImage.Image | None:
        config = run.config
        images = run.source.preview(PREVIEW_IMAGES, config.size)
        return reconstruction_picture(
            run.model, images, config.mask_ratio, config.seed, *run.statistics
        )
