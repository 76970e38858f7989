"""The numbers of the official code, recorded in float32 on weights and pictures from `fill.py`.

Recorded at commit 4c97b4c of Alpha-VL/ConvMAE. Tolerances are those of the recording.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import fill

import convmae
from convmae.models.layers import sincos_pos_embed
from tests.support.paths import GOLDEN


def fill_parameters(model, seed):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "pos_embed" not in name:
                tensor.copy_(torch.from_numpy(fill.recipe(name, tuple(tensor.shape), seed)))


def inputs(seed, batch=2):
    return torch.from_numpy(fill.images(batch, seed=seed)), torch.from_numpy(
        fill.noise(batch, seed=seed)
    )


def train(model, mask_ratio, seed, steps):
    """The losses of `steps` AdamW steps; matrices are decayed, biases and the like are not."""
    groups = {0.05: [], 0.0: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[0.05 if p.dim() >= 2 and not name.endswith(".bias") else 0.0].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        lr=1e-4,
        betas=(0.9, 0.95),
    )
    losses = []
    for step in range(steps):
        images, noise = inputs(seed + 10 + step)
        optimizer.zero_grad()
        loss = model(images, mask_ratio, noise).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module", params=["convmae_base", "convmae_base_pixels"])
def base(request):
    """What the official code recorded, and what this model gives, for ConvMAE-Base."""
    golden = np.load(GOLDEN / f"{request.param}.npz")
    seed, mask_ratio = int(golden["seed"]), float(golden["mask_ratio"])
    model = convmae.create_model(
        "convmae_convvit_base_patch16", norm_pix_loss=bool(golden["norm_pix_loss"])
    )
    fill_parameters(model, seed)
    images, noise = inputs(seed)
    with torch.no_grad():
        mask = model.make_mask(images, mask_ratio, noise)
        latent = model.forward_encoder(images, mask)
        pred = model.forward_decoder(latent, mask)
        every = model.forward_loss(images, pred, mask)
    output = model(images, mask_ratio, noise)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    ours = SimpleNamespace(
        loss=output.loss.item(),
        loss_of_every_token=every.item(),
        mask=output.mask.numpy(),
        pred=pred.numpy(),
        latent=latent.numpy(),
        grad_norms={
            name: p.grad.double().norm().item()
            for name, p in parameters.items()
            if p.grad is not None
        },
        grad_dw=parameters["blocks1.0.attn.weight"].grad[::16].numpy(),
        train_losses=train(model, mask_ratio, seed, len(golden.get("train_losses", ()))),
    )
    return golden, ours


def test_mask(base):
    golden, ours = base
    np.testing.assert_array_equal(ours.mask, golden["mask"])


def test_loss(base):
    golden, ours = base
    assert ours.loss == pytest.approx(float(golden["loss"]), rel=1e-5)
    assert ours.loss_of_every_token == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_pred(base):
    golden, ours = base
    np.testing.assert_allclose(ours.pred[:, ::5, ::11], golden["pred"], rtol=0, atol=2e-5)


def test_latent(base):
    golden, ours = base
    np.testing.assert_allclose(ours.latent[:, ::3, ::7], golden["latent_raster"], rtol=0, atol=2e-5)


def test_gradient_norms(base):
    golden, ours = base
    expected = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist()))
    assert ours.grad_norms == pytest.approx(expected, rel=1e-4)


def test_gradient_of_a_depthwise_weight(base):
    golden, ours = base
    atol = 1e-4 * np.abs(golden["grad_dw"]).max()
    np.testing.assert_allclose(ours.grad_dw, golden["grad_dw"], rtol=0, atol=atol)


def test_train_losses(base):
    golden, ours = base
    if "train_losses" not in golden:
        assert ours.train_losses == []
    else:
        assert ours.train_losses == pytest.approx(golden["train_losses"].tolist(), rel=1e-4)


def test_convvit_logits():
    golden = np.load(GOLDEN / "convvit_base.npz")
    seed = int(golden["seed"])
    model = convmae.create_model("convvit_base_patch16").eval()
    fill_parameters(model, seed)
    with torch.no_grad():
        model.pos_embed.copy_(sincos_pos_embed(768, model.grid))
        logits = model(inputs(seed)[0]).numpy()
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)
