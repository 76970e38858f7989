"""The options of `convmae pretrain`."""

from __future__ import annotations

from dataclasses import dataclass

from convmae.config.checks import check_mask_ratio, check_patches, check_text
from convmae.config.run import RunConfig


@dataclass
class PretrainConfig(RunConfig):
    """Pretrain a ConvMAE on pictures: hide most of each, learn to paint the rest.

    The defaults are those of the official script. Its published recipe is
    recipes/convmae-base_pretrain_1600e.yaml.

    Other names of flags: -b (--batch_size), -j or --workers (--num_workers), --data (--data_path),
    --img_size (--input_size).
    """

    model: str = "convmae_base"
    """Which model: convmae_tiny (for CPUs), convmae_small, _base, _large, _huge; or a fastconvmae_
    of these sizes, which shows every patch once, in complementary masks."""
    init: str | None = None
    """Weights to start from: a run's folder, a .safetensors file or an official .pth, pretrained or
    finetuned; what it lacks, such as a decoder, is fresh. By default all is random. A run that
    --resume goes on with does not read it."""
    mask_ratio: float = 0.75
    """Share of the 16 x 16 pixel patches that is hidden."""
    norm_pix_loss: bool = False
    """Predict patches normalised by their own mean and deviation: better features, as published."""
    cuda_graph: bool = False
    """Capture the whole step, optimizer included, as a CUDA graph, and replay it: for batches so
    small that a GPU waits for launches. A run that cannot says why and goes on without."""
    epochs: int = 400
    """Passes over the pictures; an epoch of the demo is 64 crops of each of its 8 photographs."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_text("model", self.model)
        if self.init is not None:
            check_text("init", self.init)
        self.check_adapting("init")
        check_mask_ratio(self.mask_ratio)
        check_patches(self.mask_ratio, *self.size)
