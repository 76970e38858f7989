"""Masked pretraining of any convolutional network of timm in a loop of one's own.

The network, unmodified, sees the visible blocks of 32 x 32 pixels only; SparK's decoder predicts
the hidden ones. `convmae pretrain --model timm:resnet50` has all that a long run needs besides.

    python examples/masked_pretrain_cnn.py --model resnet50 --data_path my_pictures --steps 10000
"""

from __future__ import annotations

import argparse
import time

import timm
import torch

from convmae import SparK
from convmae.data import PretrainTransform, normalise, open_source


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a convolutional network of timm")
    parser.add_argument("--data_path", default="demo", help="a folder of pictures, or demo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--img_size", type=int, default=96, help="side in pixels; 32 divides it")
    parser.add_argument("--mask_ratio", type=float, default=0.6, help="share of hidden blocks")
    parser.add_argument("--decoder_width", type=int, default=128, help="768 in SparK's paper")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, after the warm-up")
    parser.add_argument("--output", help="the encoder's state dict for timm is written here")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = timm.create_model(args.model, num_classes=0)
    try:
        model = SparK(
            network,
            img_size=args.img_size,
            mask_ratio=args.mask_ratio,
            decoder_width=args.decoder_width,
        ).to(device)
    except ValueError as error:
        parser.error(str(error))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.04)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    transform = PretrainTransform(model.img_size, min_crop=0.67)
    source = open_source(args.data_path)
    losses, start = [], time.perf_counter()
    for step, batch in enumerate(source.batches(transform, args.batch_size, 0, args.steps)):
        loss = model(normalise(batch.images.to(device))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == args.steps - 1:
            rate = (step + 1) * args.batch_size / (time.perf_counter() - start)
            print(f"step {step + 1}/{args.steps}  loss {losses[-1]:.4f}  {rate:.1f} images/s")
    if args.output:
        torch.save(network.state_dict(), args.output)
        print(f"wrote {args.output}")
    return losses


if __name__ == "__main__":
    main()
