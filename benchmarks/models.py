"""Training steps of the packed and of the dense model, with the same parameters."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import convmae
from benchmarks.runner import CapturedGraph
from convmae.models import ConvMAE, DenseConvMAE
from convmae.models.image_model import ConvMAEOutput, patch_statistics
from convmae.models.layers import Block, sincos_pos_embed
from convmae.models.tokens import take_tokens
from convmae_kernels import BlockMask, gather_visible, scatter_visible

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.setting import Setting

LEARNING_RATE = 1.5e-4


class MAE(nn.Module):
    """MAE with a ViT-B/16, as published (He et al., 2021): what ConvMAE's convolutions cost.

    Every patch is embedded, then a quarter is kept; 12 blocks of width 768, a decoder of 8 blocks
    of width 512; patches are normalised for the loss.
    """

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.grid = (img_size // 16, img_size // 16)
        length = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Conv2d(3, 768, 16, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 768))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.register_buffer("pos_embed", sincos_pos_embed(768, self.grid))
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(512, self.grid))
        self.blocks = nn.Sequential(*(Block(768, 12, 4) for _ in range(12)))
        self.norm = nn.LayerNorm(768, eps=1e-6)
        self.decoder_embed = nn.Linear(768, 512)
        self.decoder_blocks = nn.Sequential(*(Block(512, 16, 4) for _ in range(8)))
        self.decoder_norm = nn.LayerNorm(512, eps=1e-6)
        self.decoder_pred = nn.Linear(512, 16 * 16 * 3)
        self.length = length

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> ConvMAEOutput:
        """The loss and MAE's mask, 1 = removed."""
        keep = int(self.length * (1 - mask_ratio))
        ids_restore = noise.argsort(dim=1).argsort(dim=1)
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed  # [N, L, 768]
        x = take_tokens(x, noise.argsort(dim=1)[:, :keep])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x), x], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        hidden = self.mask_token.expand(len(x), self.length - keep, -1).to(x)
        tokens = take_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)
        x = torch.cat([x[:, :1], tokens + self.decoder_pos_embed], dim=1)
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:].float()
        gh, gw = self.grid
        patches = images.unflatten(3, (gw, 16)).unflatten(2, (gh, 16)).permute(0, 2, 4, 3, 5, 1)
        target = patches.reshape(len(x), self.length, -1).float()
        mean, deviation = patch_statistics(target)
        mask = (ids_restore >= keep).float()
        error = (pred - (target - mean) / deviation).square().mean(dim=2)
        return ConvMAEOutput((error * mask).sum() / mask.sum(), mask, None)


@cache
def parameters(name: str) -> dict[str, nn.Parameter]:
    """The parameters of a pretraining model by name, without their numbers (on "meta").

    Raises:
        ValueError: `convmae.create_model` has no such model, or it is not one for pretraining.
    """
    with torch.device("meta"):
        model = convmae.create_model(name)
    if not isinstance(model, convmae.ConvMAE):
        raise ValueError(
            f"{name} is a {type(model).__name__}, but the benchmark needs a model to pretrain: "
            f"{', '.join(convmae.list_models('convmae_*'))}"
        )
    return dict(model.named_parameters())


def widths(name: str) -> tuple[int, ...]:
    """Channels of the three stages of a model."""
    known = parameters(name)
    return tuple(known[f"patch_embed{stage}.proj.weight"].shape[0] for stage in (1, 2, 3))


def build_mae(setting: Setting) -> MAE:
    """MAE ViT-B for the setting's images."""
    torch.manual_seed(0)
    return MAE(setting.img_size).to(setting.device)


def build(setting: Setting, contender: str) -> ConvMAE:
    """The model of a contender, "packed" or "dense"; both have the same parameters."""
    torch.manual_seed(0)
    model = convmae.create_model(setting.model, img_size=setting.img_size, norm_pix_loss=True)
    assert isinstance(model, ConvMAE)  # `parameters` has seen to it
    if contender == "dense":
        dense = DenseConvMAE(**model.config)
        dense.load_state_dict(model.state_dict())
        model = dense
    return model.to(setting.device)


def autocast(setting: Setting, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a dtype; none for float32."""
    return torch.autocast(setting.device.type, dtype, enabled=dtype != torch.float32)


def images(setting: Setting, batch_size: int | None = None) -> Tensor:
    """Noise in the shape of a batch of pictures."""
    return setting.randn(batch_size or setting.batch_size, 3, setting.img_size, setting.img_size)


def training_step(
    model: nn.Module,
    setting: Setting,
    dtype: torch.dtype,
    compiled: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function `(images, noise) -> loss` that makes the mask and does one whole step.

    Forward under autocast if `dtype` is not float32, backward, AdamW (fused).
    """
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = optimizer or new_optimizer(model)

    def step(pixels: Tensor, noise: Tensor) -> Tensor:
        optimizer.zero_grad()
        with autocast(setting, dtype):
            loss = forward(pixels, mask_ratio=setting.mask_ratio, noise=noise).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def joined(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`step` with the ops on rows around the products, in place of PyTorch's."""

    # Here, as an older revision, which `--compare` imports this with, has none.
    from convmae_kernels.ops.support.rows import joining_rows

    def run(*arguments: Tensor) -> Tensor:
        with joining_rows():
            return step(*arguments)

    return run


def new_optimizer(model: nn.Module, capturable: bool = False) -> torch.optim.Optimizer:
    """AdamW over what is trained, fused; `capturable` by a CUDA graph."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return torch.optim.AdamW(trained, LEARNING_RATE, fused=True, capturable=capturable)


class CapturedStep:
    """`training_step` as one CUDA graph of the batch that it is first called with.

    With the ops on rows, as `convmae pretrain --cuda_graph` captures it; `is_joined=False` without.

    What the steps before the capture changed is taken back, so that the first replay is the first
    step.
    """

    def __init__(
        self, model: nn.Module, setting: Setting, dtype: torch.dtype, is_joined: bool = True
    ) -> None:
        self._model, self._optimizer = model, new_optimizer(model, capturable=True)
        step = training_step(model, setting, dtype, optimizer=self._optimizer)
        self._step = joined(step) if is_joined else step
        self._captured: CapturedGraph | None = None

    def __call__(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The loss."""
        if self._captured is None:
            weights = [p.detach().clone() for p in self._model.parameters()]
            self._captured = CapturedGraph(lambda: self._step(pixels, noise))
            self._captured.capture()
            with torch.no_grad():
                for parameter, weight in zip(self._model.parameters(), weights, strict=True):
                    parameter.copy_(weight)
                for state in self._optimizer.state.values():
                    for value in state.values():
                        value.zero_()
        return self._captured()


def stages_pass(
    model: ConvMAE, setting: Setting, dtype: torch.dtype, mask: BlockMask, compiled: bool = False
) -> Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]]:
    """A function `(images, grads) -> outputs`: `forward_stages` forward and backward.

    `grads` are the gradients of the outputs, in their dtypes.
    """
    forward = model.forward_stages
    if compiled:
        forward = torch.compile(forward, dynamic=False)

    def run(pixels: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        model.zero_grad()
        with autocast(setting, dtype):
            outputs = forward(pixels, mask)
        torch.autograd.backward(outputs, grads)
        return tuple(y.detach() for y in outputs)

    return run


def stages_grads(
    model: ConvMAE, setting: Setting, dtype: torch.dtype, mask: BlockMask
) -> list[Tensor]:
    """Gradients of the outputs of `forward_stages`: noise at visible positions, else zero."""
    one = BlockMask.from_visible(mask.visible[:1])
    with autocast(setting, dtype), torch.no_grad():
        outputs = model.forward_stages(images(setting, 1), one)
    _, channels, width = widths(setting.model)
    shapes = [(4, channels), (width,), (width,)]
    grads = []
    for seed, (shape, y) in enumerate(zip(shapes, outputs, strict=True), start=3):
        grad = setting.randn(mask.num_visible, *shape, seed=seed).to(y.dtype)
        grads.append(unpack(grad, mask) if isinstance(model, DenseConvMAE) else grad)
    return grads


def unpack(x: Tensor, mask: BlockMask) -> Tensor:
    """`[T, 4, C] -> [N, C, 2*gh, 2*gw]` or `[T, D] -> [N, L, D]`, zero at hidden positions."""
    if x.dim() == 3:
        return scatter_visible(x, mask)
    dense = x.new_zeros(mask.num_blocks, x.shape[1])
    return dense.index_copy(0, mask.block_index, x).view(mask.batch_size, -1, x.shape[1])


def pack(x: Tensor, mask: BlockMask) -> Tensor:
    """The inverse of `unpack`."""
    if x.dim() == 4:
        return gather_visible(x, mask)
    return x.flatten(0, 1).index_select(0, mask.block_index)


def gradient_norms(model: nn.Module) -> Tensor:
    """The norm of every parameter's gradient, float32 `[number of parameters with one]`."""
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
