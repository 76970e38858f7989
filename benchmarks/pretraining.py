"""Cases of whole training steps of SparK and FCMAE: skipping hidden blocks, against a mask.

Blocks of 32 pixels, 60 % hidden. The opponent has the same parameters and the same decoder; its
network computes all positions and multiplies by the mask before whatever looks at neighbours, as
SparK's own code does, and its decoder is plain PyTorch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, networks, work
from benchmarks.limits import clock_for
from benchmarks.registry import register
from benchmarks.runner import Comparison, Contender
from convmae.models import FCMAE, SparK
from convmae_kernels.packed import MaskedDense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benchmarks.setting import Setting
    from convmae_kernels import BlockMask

STEPS = {
    "spark/resnet50": (SparK, "resnet50"),
    "spark/convnext_base": (SparK, "convnext_base"),
    "fcmae/convnextv2_tiny": (FCMAE, "convnextv2_tiny"),
    "fcmae/resnet50": (FCMAE, "resnet50"),
}


class DenseSparK(SparK):
    """SparK by dense maps and a mask: the same parameters, the same numbers."""

    def forward_encoder(self, images: Tensor, mask: BlockMask) -> list[Any]:
        return self.maps.read(self.network, MaskedDense(images, mask))

    def forward_decoder(self, maps: Sequence[Any]) -> Tensor:
        levels: list[Tensor | None] = [None] * len(self.dense_decoder.dec)
        for x, stride in zip(maps, self.maps.strides, strict=True):
            level = (self.maps.stride // stride).bit_length() - 1
            normed = self.densify_norms[str(level)](x)
            filled = torch.where(normed.visible(), normed.nchw(), self.mask_tokens[str(level)])
            project = self.densify_projs[str(level)]
            levels[level] = filled if isinstance(project, nn.Identity) else _plain(project, filled)
        x = None
        for block, level_map in zip(self.dense_decoder.dec, levels, strict=True):
            x = level_map if x is None else x if level_map is None else x + level_map
            x = block.conv(block.up_sample(x))
        return self.dense_decoder.proj(x)


def _plain(project: Any, x: Tensor) -> Tensor:
    """A projection as PyTorch's own convolution of the whole map."""
    return conv2d(x, project.weight, project.bias, padding=project.kernel_size[0] // 2)


class DenseFCMAE(FCMAE):
    """FCMAE by dense maps and a mask: the same parameters, the same numbers."""

    def forward_decoder(self, images: Tensor, mask: BlockMask) -> Tensor:
        last = self.maps.read(self.network, MaskedDense(images, mask))[-1]
        x = self.proj(last.masked())
        return self.decoder(torch.where(last.visible(), x, self.mask_token))


DENSE = {SparK: DenseSparK, FCMAE: DenseFCMAE}


def build(name: str, setting: Setting, contender: str) -> Any:
    """The model of a step in training mode, channels-last; both contenders' start alike."""
    import timm

    kind, network = STEPS[name]
    torch.manual_seed(0)
    model = kind if contender == "packed" else DENSE[kind]
    encoder = timm.create_model(network, num_classes=0)
    built = model(encoder, img_size=setting.img_size, mask_ratio=networks.MASK_RATIO)
    return built.to(setting.device, memory_format=torch.channels_last).train()


class Step:
    """Forward under autocast if the dtype is not float32, backward, AdamW (fused).

    Args:
        name: one of `STEPS`.
        setting, dtype, contender: of the benchmark.
    """

    def __init__(self, name: str, setting: Setting, dtype: torch.dtype, contender: str) -> None:
        self.model = build(name, setting, contender)
        self._setting, self._dtype = setting, dtype
        self._optimizer = models.new_optimizer(self.model)
        self._images = models.images(setting).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(setting.batch_size, self.model.num_patches, generator=generator)
        self._noise = noise.to(setting.device)

    def __call__(self, images: int | None = None) -> Tensor:
        """The loss of the first `images` pictures, all if None; the model learns."""
        loss = self.differentiate(images)
        self._optimizer.step()
        return loss

    def differentiate(self, images: int | None = None) -> Tensor:
        """Forward and backward alone; the loss."""
        self._optimizer.zero_grad()
        loss = self.forward(images)
        loss.backward()
        return loss.detach()

    def forward(self, images: int | None = None) -> Tensor:
        """The loss alone."""
        with models.autocast(self._setting, self._dtype):
            return self.model(self._images[:images], noise=self._noise[:images]).loss


def step(setting: Setting, dtype: torch.dtype, step_name: str) -> Comparison:
    """A whole training step on visible blocks, against dense-times-mask and the same decoder."""
    steps = {kind: Step(step_name, setting, dtype, kind) for kind in ("packed", "dense")}
    flops = {kind: count_flops(run) for kind, run in steps.items()}
    contenders = [Contender(kind, run, lambda loss: [loss]) for kind, run in steps.items()]
    parameters = sum(p.numel() for p in steps["packed"].model.parameters())
    counted = work.Work(3 * 4 * parameters, flops["packed"], flops["packed"])
    most = flops["dense"] / flops["packed"]
    notes = [
        f"operations of a step of {step_name}: {flops['packed'] / 1e9:.0f} GFLOP, dense "
        f"{flops['dense'] / 1e9:.0f}: by operations at most {most:.2f}x"
    ]
    return Comparison(contenders, counted, clock_for(setting.device), notes=notes)


def count_flops(run: Step) -> int:
    """Of forward and backward: three times forward.

    PyTorch's counter forgets the groups of a convolution in the backward pass, so that is not
    counted.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.forward()
    return 3 * counter.get_total_flops()


def step_memory(setting: Setting, dtype: torch.dtype, step_name: str) -> Comparison:
    """What a whole training step takes of memory, beside a process that only builds the model.

    Peak of a fresh process. The limit is gradients and AdamW's two moments, in float32.
    """
    parameters = sum(p.numel() for p in build(step_name, setting, "packed").parameters())
    return networks.process_memory(setting, dtype, step_name, 3 * 4 * parameters)


if importlib.util.find_spec("timm") is not None:
    for _name in STEPS:
        register(f"pretrain/{_name}/memory", emulated=False, step_name=_name)(step_memory)
        register(f"pretrain/{_name}", emulated=False, step_name=_name)(step)
