"""Masked pretraining of any convolutional network of timm, hidden blocks skipped.

The encoder, unmodified, sees the visible blocks of 32 x 32 pixels only. A small decoder gets its
feature maps, a learnt vector in every hidden position, coarsest first, and predicts
the hidden pixels, each block normalised by its own mean and deviation (as SparK does).

    python examples/masked_pretrain_cnn.py --model resnet50 --data_path my_pictures --steps 10000
"""

from __future__ import annotations

import argparse
import time

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convmae_kernels as ck
from convmae.data import PretrainTransform, normalise, open_source

BLOCK = 32  # pixels


class Decoder(nn.Module):
    """Feature maps of the visible blocks, finest first, to the pixels of all blocks."""

    def __init__(self, channels: list[int], reductions: list[int], width: int) -> None:
        super().__init__()
        self.reductions = reductions
        self.tokens = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in channels)
        self.inputs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6())
            for _ in channels
        )
        self.pixels = nn.Conv2d(width, 3 * reductions[0] ** 2, 1)

    def forward(self, maps: list[ck.Packed]) -> Tensor:
        x: Tensor | None = None
        for i in reversed(range(len(maps))):
            visible = maps[i].mask.to_dense(BLOCK // self.reductions[i])
            level = self.inputs[i](torch.where(visible, maps[i].dense(), self.tokens[i]))
            if x is not None:
                level = level + F.interpolate(x, size=level.shape[2:], mode="nearest")
            x = self.mixes[i](level)
        return F.pixel_shuffle(self.pixels(x), self.reductions[0])


class MaskedPretraining(nn.Module):
    """The encoder on visible blocks, the decoder, and the loss of the hidden blocks."""

    def __init__(self, name: str, width: int = 128) -> None:
        super().__init__()
        encoder = timm.create_model(name, pretrained=False, features_only=True)
        info = encoder.feature_info
        reductions, channels = info.reduction(), info.channels()
        used = [i for i, r in enumerate(reductions) if 4 <= r <= BLOCK]
        self.used = used
        self.encoder = ck.sparsify(encoder)
        self.decoder = Decoder([channels[i] for i in used], [reductions[i] for i in used], width)

    def forward(self, images: Tensor, mask: ck.BlockMask) -> Tensor:
        maps = self.encoder(images, mask)
        predicted = blocks(self.decoder([maps[i] for i in self.used]))
        target = blocks(images)
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        errors = (predicted - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=2)
        hidden = ~mask.visible.flatten(1)
        return (errors * hidden).sum() / hidden.sum()


def blocks(images: Tensor) -> Tensor:
    """`[B, C, gh * 32, gw * 32] -> [B, gh * gw, 32 * 32 * C]`."""
    return F.unfold(images, BLOCK, stride=BLOCK).transpose(1, 2)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a convolutional network of timm")
    parser.add_argument("--data_path", default="demo", help="a folder of pictures, or demo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--img_size", type=int, default=96, help="side in pixels; 32 divides it")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="share of hidden blocks")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, after the warm-up")
    parser.add_argument("--output", help="the encoder's state dict for timm is written here")
    args = parser.parse_args(arguments)
    if args.img_size % BLOCK:
        parser.error(f"--img_size must be a multiple of {BLOCK}, got {args.img_size}")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = PretrainTransform((args.img_size, args.img_size), min_crop=0.5)
    source = open_source(args.data_path)
    model = MaskedPretraining(args.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.04)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    grid = (args.img_size // BLOCK,) * 2
    losses, start = [], time.perf_counter()
    for step, batch in enumerate(source.batches(transform, args.batch_size, 0, args.steps)):
        images = normalise(batch.images.to(device))
        mask = ck.BlockMask.random(args.batch_size, grid, args.mask_ratio, device=device)
        loss = model(images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == args.steps - 1:
            rate = (step + 1) * args.batch_size / (time.perf_counter() - start)
            print(f"step {step + 1}/{args.steps}  loss {losses[-1]:.4f}  {rate:.1f} images/s")
    if args.output:
        torch.save(model.encoder.model.state_dict(), args.output)
        print(f"wrote {args.output}")
    return losses


if __name__ == "__main__":
    main()
