"""What a training step of ConvMAE computes once, in which dtype, and how it is compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import convmae
import convmae_kernels as ck
from convmae.models import layers
from convmae.models.tokens import _spread, token_rows
from convmae_kernels.ops.support import arithmetic

SMALL = {
    "img_size": 64,
    "embed_dim": (8, 12, 16),
    "depth": (1, 2, 2),
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 3,
    "decoder_num_heads": 2,
    "norm_pix_loss": True,
}


def small(**changes):
    torch.manual_seed(0)
    return convmae.ConvMAE(**(SMALL | changes))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# -- hidden tokens that share a row ---------------------------------------------------------------


def test_spread_and_its_gradient():
    visible = torch.rand(3, 2, 4) < 0.4
    mask = ck.BlockMask.from_visible(visible)
    rows = token_rows(mask)
    x = torch.randn(mask.num_visible + 8, 5, dtype=torch.float64, requires_grad=True)
    y = rows.spread(x)
    own_rows = iter(range(mask.num_visible))
    for n in range(3):
        for token, seen in enumerate(visible[n].flatten().tolist()):
            expected = x[next(own_rows) if seen else mask.num_visible + token]
            assert torch.equal(y[n, token], expected)
    assert torch.autograd.gradcheck(rows.spread, (x,))
    assert torch.autograd.gradgradcheck(rows.spread, (x,))
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(_spread(x, *rows), x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(rows.spread(x), x, grad)[0], wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = rows.spread(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, y)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_decoder_is_that_of_all_tokens(depth, ragged):
    """Against the decoder as published: every token of every picture through every block."""
    model = small(decoder_depth=depth).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    visible = torch.rand(4, 4, 4) < 0.3
    visible[:, 0, 0] = True
    mask = ck.BlockMask.from_visible(visible) if ragged else model.make_mask(images, 0.75)
    latent = model.forward_encoder(images, mask).detach()
    found = model.forward_decoder(latent, mask)

    x = model.mask_token.expand(4, 16, -1).clone()
    kept = mask.visible.flatten(1)
    padding = torch.arange(latent.shape[1]) < kept.sum(1, keepdim=True)
    x[kept] = model.decoder_embed(latent)[padding]
    x = x + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    expected = model.decoder_pred(model.decoder_norm(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(found)
    mine, plain = gradients(model, (found * grad).sum()), None
    mine = {name: value.clone() for name, value in mine.items()}
    plain = gradients(model, (expected * grad).sum())
    assert mine.keys() == plain.keys() and "mask_token" in mine
    for name, value in plain.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-12)


def test_keys_of_hidden_tokens_are_computed_once_a_batch():
    model, rows = small(), []
    first = model.decoder_blocks[0].attn.qkv
    first.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    model(torch.randn(6, 3, 64, 64), mask_ratio=0.75)
    model(torch.randn(1, 3, 64, 64), mask_ratio=0.75)  # 4 + 16 rows would be more than 16 tokens
    assert rows == [6 * 4 + 16, 16]


# -- bfloat16 between the blocks ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_arithmetic_of_a_gpu_is_close_to_float32(dtype, monkeypatch):
    """On a GPU what blocks add to stays in bfloat16; in float16 it is float32 everywhere."""
    monkeypatch.setattr(layers, "FLOAT32_BETWEEN_BLOCKS", frozenset())
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset())
    model, images = small(), torch.randn(4, 3, 64, 64)
    noise, seen = torch.rand(4, 16), []
    wanted = {n: g.clone() for n, g in gradients(model, model(images, noise=noise).loss).items()}
    for block in (*model.blocks3, *model.decoder_blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype):
        loss = model(images, noise=noise).loss
    assert loss.dtype == torch.float32
    assert set(seen) == {dtype if dtype == torch.bfloat16 else torch.float32}
    found = gradients(model, loss)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - value).norm() / value.norm()
        assert error < 0.1, name


def test_on_a_cpu_sums_stay_float32():
    model, seen = small(), []
    for block in (*model.blocks3, *model.decoder_blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 64, 64))
    assert set(seen) == {torch.float32}


# -- compiled block by block ----------------------------------------------------------------------


@pytest.mark.thorough
def test_blocks_share_their_code_and_masks_do_not_matter():
    model = small(depth=(2, 2, 4), decoder_depth=5)
    images, noises = torch.randn(4, 3, 64, 64), [torch.rand(4, 16) for _ in range(3)]
    losses = [model(images, noise=noise).loss for noise in noises]
    wanted = {n: g.clone() for n, g in gradients(model, losses[-1]).items()}
    counter = CompileCounter()
    torch.compiler.reset()
    model.compile_blocks(counter)
    for noise, loss in zip(noises, losses, strict=True):
        found = model(images, noise=noise).loss
        torch.testing.assert_close(found, loss)
        # 3 patch embeddings, a block of each stage, and the decoder's first, middle and last one
        assert counter.frame_count == 3 + 3 + 3
    for name, value in gradients(model, found).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_rates_of_stochastic_depth_share_code():
    torch.manual_seed(0)
    shape = {k: SMALL[k] for k in ("img_size", "embed_dim", "num_heads")}
    model = convmae.ConvViT(**shape, depth=(3, 3, 8), drop_path_rate=0.5, num_classes=2)
    counter = CompileCounter()
    torch.compiler.reset()
    model.train().compile_blocks(counter)
    images = torch.randn(64, 3, 64, 64)
    model(images).sum().backward()
    assert counter.frame_count == 3 + 4  # the very first block has no stochastic depth

    drop = layers.DropPath(0.25)
    compiled = torch.compile(drop, backend="eager", fullgraph=True)
    scale = compiled(torch.ones(4000, 1, 1)).flatten()
    assert sorted(set(scale.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert (scale > 0).float().mean() == pytest.approx(0.75, abs=0.05)
    assert torch.equal(drop.eval()(scale.view(-1, 1, 1)).flatten(), scale)
    drop.train().rate = 0.0
    assert torch.equal(drop(scale.view(-1, 1, 1)).flatten(), scale)
    drop.rate = 0.5
    assert (compiled(torch.ones(4000, 1, 1)) > 0).float().mean() == pytest.approx(0.5, abs=0.05)
