"""ConvMAE and ConvViT: parity, what is hidden, masks of all kinds, compilation, pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import convmae
import convmae_kernels as ck
from convmae.models import ConvMAE, ConvViT, DenseConvMAE
from convmae.models.layers import DropPath, attention, linear
from convmae_kernels.ops.support import arithmetic

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

ENCODER = {"embed_dim": (8, 12, 16), "depth": (2, 2, 2), "num_heads": 2, "mlp_ratio": (4, 4, 4)}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}


def randomise(model):
    """Every trainable parameter off its initial value, so that biases and scales count too."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def small(img_size=(32, 64), in_chans=3, **overrides):
    config = {**ENCODER, **DECODER, "img_size": img_size, "in_chans": in_chans, **overrides}
    return randomise(ConvMAE(**config))


def images_for(model, batch=2):
    return torch.randn(batch, model.in_chans, *model.img_size, dtype=model.pos_embed.dtype)


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ragged_mask(grid, batch=4):
    """Some images with many visible blocks, one with a single one, one with all."""
    visible = torch.rand(batch, *grid) < torch.linspace(0.2, 0.8, batch).view(-1, 1, 1)
    visible[:, 0, 1] = True
    visible[1] = False
    visible[1, -1, -1] = True
    visible[2] = True
    mask = ck.BlockMask.from_visible(visible)
    assert mask.visible_per_image is None
    return mask


def assert_close(a, b, rel):
    assert a.shape == b.shape
    assert (a - b).norm() <= rel * b.norm() + 1e-300


# -- the packed model is the dense model ----------------------------------------------------------


@pytest.mark.parametrize(
    ("img_size", "in_chans", "mask_ratio", "norm_pix_loss"),
    [
        (32, 3, 0.75, True),
        (48, 1, 0.3, False),
        ((32, 64), 5, 0.5, True),
        ((64, 48), 3, 0.9, False),
        ((16, 96), 1, 0.6, True),
        ((32, 48), 3, 0.0, True),
    ],
)
def test_packed_equals_dense(img_size, in_chans, mask_ratio, norm_pix_loss):
    packed = small(img_size, in_chans, norm_pix_loss=norm_pix_loss).double()
    dense = DenseConvMAE(**packed.config).double()
    dense.load_state_dict(packed.state_dict())
    images, noise = images_for(packed, 3), torch.rand(3, packed.num_patches)
    mask = packed.make_mask(images, mask_ratio, noise)
    assert_close(packed.forward_encoder(images, mask), dense.forward_encoder(images, mask), 1e-10)
    outputs = [m(images, mask_ratio, noise, return_pred=True) for m in (packed, dense)]
    assert_close(outputs[0].pred, outputs[1].pred, 1e-10)
    assert torch.equal(outputs[0].mask, outputs[1].mask)

    losses = [m(images, mask_ratio, noise).loss for m in (packed, dense)]
    assert_close(losses[0], losses[1], 1e-10)
    assert_close(outputs[0].loss, losses[1], 1e-10)
    found, expected = (gradients(m, loss) for m, loss in zip((packed, dense), losses))
    assert found.keys() == expected.keys()
    assert found.keys() == {n for n, p in packed.named_parameters() if p.requires_grad}
    for name, grad in found.items():
        assert_close(grad, expected[name], 1e-10)


def test_stages_equal_dense_at_visible_positions():
    packed = small().double()
    dense = DenseConvMAE(**packed.config).double()
    dense.load_state_dict(packed.state_dict())
    images = images_for(packed)
    mask = packed.make_mask(images, 0.6)
    x, one, two = packed.forward_stages(images, mask)
    dense_x, dense_one, dense_two = dense.forward_stages(images, mask)
    assert_close(x, ck.gather_visible(dense_x, mask), 1e-12)
    assert_close(one, dense_one.flatten(0, 1)[mask.block_index], 1e-12)
    assert_close(two, dense_two.flatten(0, 1)[mask.block_index], 1e-12)
    assert dense_x.is_contiguous(memory_format=torch.channels_last)


# -- hidden means hidden --------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("ragged", [False, True])
def test_hidden_pixels_change_no_bit(poison, ragged):
    model = small()
    images = images_for(model, 4)
    mask = ragged_mask(model.grid) if ragged else model.make_mask(images, 0.6)
    poisoned = images.masked_fill(~mask.to_dense(16), poison)
    assert not torch.equal(poisoned, images)
    latents = [model.forward_encoder(x, mask) for x in (images, poisoned)]
    assert torch.equal(*latents)
    assert latents[0].isfinite().all()
    weight = torch.randn_like(latents[0])
    clean, dirty = (gradients(model, (latent * weight).sum()) for latent in latents)
    assert clean.keys() == dirty.keys() and "patch_embed1.proj.weight" in clean
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_gradient_in_the_image_is_zero_where_hidden():
    model = small()
    images = images_for(model).requires_grad_()
    mask = model.make_mask(images, 0.5)
    model.forward_encoder(images, mask).square().sum().backward()
    visible = mask.to_dense(16).expand_as(images)
    assert images.grad[~visible].eq(0).all()
    assert images.grad[visible].ne(0).all()


def test_only_hidden_tokens_reach_the_end_of_the_decoder():
    model = small()
    seen = []
    for layer in (model.decoder_pred, model.decoder_norm, model.decoder_blocks[-1].mlp):
        layer.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    output = model(images_for(model), mask_ratio=0.75)
    assert output.pred is None
    assert seen == [6, 6, 6]  # of 8 patches, 2 are visible
    seen.clear()
    assert model(images_for(model), return_pred=True).pred.shape == (2, 8, 768)
    assert seen == [8, 8, 8]


def test_loss_reads_hidden_patches_only():
    model = small().double()
    images = images_for(model)
    mask = model.make_mask(images, 0.5)
    pred = torch.randn(2, model.num_patches, 768, dtype=torch.float64)
    expected = model.forward_loss(images, pred, mask)
    hidden = ~mask.visible.flatten(1)
    error = (pred - model.patchify(images)).square().mean(2)
    assert_close(expected, error[hidden].mean(), 1e-12)
    assert_close(model.forward_loss(images, pred + 9 * ~hidden.unsqueeze(2), mask), expected, 1e-12)


# -- masks ----------------------------------------------------------------------------------------


def test_nothing_hidden():
    model = small()
    loss = model(images_for(model), mask_ratio=0.0).loss
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad.eq(0).all() for grad in found.values())


def test_one_patch_visible():
    model = small()
    output = model(images_for(model), mask_ratio=0.87)  # int(8 * 0.13) = 1
    assert output.mask.sum(1).tolist() == [7, 7]
    assert all(grad.isfinite().all() for grad in gradients(model, output.loss).values())


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("kind", [ConvMAE, DenseConvMAE])
def test_ragged_mask_equals_single_images(kind, norm_pix_loss):
    model = randomise(
        kind(**ENCODER, **DECODER, img_size=(48, 64), norm_pix_loss=norm_pix_loss)
    ).double()
    images, mask = images_for(model, 4), ragged_mask(model.grid)
    output = model(images, mask=mask, return_pred=True)
    latent = model.forward_encoder(images, mask)
    found = gradients(model, model(images, mask=mask).loss)

    hidden = (~mask.visible).flatten(1).sum(1)
    total = 0.0
    for i in range(4):
        one = ck.BlockMask.from_visible(mask.visible[i : i + 1])
        alone = model(images[i : i + 1], mask=one, return_pred=True)
        latent_alone = model.forward_encoder(images[i : i + 1], one)[0]
        count = latent_alone.shape[0]
        assert_close(latent[i, :count], latent_alone, 1e-12)
        assert latent[i, count:].eq(0).all()
        assert_close(output.pred[i : i + 1], alone.pred, 1e-12)
        total = total + alone.loss * hidden[i]
    expected = total / hidden.sum()
    assert_close(output.loss, expected, 1e-12)
    assert_close(model(images, mask=mask).loss, expected, 1e-12)
    for name, grad in gradients(model, expected).items():
        assert_close(found[name], grad, 1e-10)


def test_batch_permuted_is_output_permuted():
    model = small().double()
    images, noise = images_for(model, 4), torch.rand(4, model.num_patches)
    order = torch.tensor([2, 0, 3, 1])
    output = model(images, noise=noise, return_pred=True)
    permuted = model(images[order], noise=noise[order], return_pred=True)
    assert_close(permuted.pred, output.pred[order], 1e-12)
    assert_close(permuted.loss, output.loss, 1e-12)
    assert torch.equal(permuted.mask, output.mask[order])


def test_masks_by_noise_by_generator_and_given():
    model = small()
    images, noise = images_for(model), torch.rand(2, 8)
    output = model(images, 0.6, noise)
    smallest = noise.argsort(1)[:, : int(8 * (1 - 0.6))]
    assert torch.equal(output.mask, torch.ones(2, 8).scatter(1, smallest, 0.0))
    mask = ck.BlockMask.from_noise(noise, model.grid, 0.6)
    assert torch.equal(model(images, mask=mask).loss, output.loss)
    draws = [model(images, generator=torch.Generator().manual_seed(s)).mask for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -- compilation and half precision ---------------------------------------------------------------


def test_compiles_without_break_or_recompilation():
    model = small(depth=(1, 1, 1), norm_pix_loss=True)
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    encoder = torch.compile(model.forward_encoder, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            noise = torch.rand(2, model.num_patches)
            loss, expected = compiled(images, noise=noise).loss, model(images, noise=noise).loss
            assert_close(loss, expected, 1e-6)
            found, wanted = gradients(model, loss), gradients(model, expected)
            assert_close(found["blocks1.0.attn.weight"], wanted["blocks1.0.attn.weight"], 1e-5)
            mask = ck.BlockMask.random(2, model.grid, 0.75)
            assert_close(encoder(images, mask), model.forward_encoder(images, mask), 1e-6)


@pytest.mark.thorough
def test_one_graph():
    model = convmae.create_model("convmae_tiny")
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.randn(1, 3, 224, 224), noise=torch.rand(1, 196))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.thorough
def test_ragged_masks_in_one_graph():
    """What differs between masks is a number that the host knows: no graph break, two compiles."""
    model = small(depth=(1, 1, 1)).eval()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    places = torch.arange(model.num_patches)
    for shown in ([1, 3], [2, 5], [4, 3], [1, 6]):
        visible = places < torch.tensor(shown).unsqueeze(1)
        mask = ck.BlockMask.from_visible(visible.view(2, *model.grid))
        images = images_for(model)
        assert_close(compiled(images, mask=mask).loss, model(images, mask=mask).loss, 1e-6)
    assert counter.frame_count <= 2


def test_exports():
    class Encoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images, mask):
            return self.model.forward_encoder(images, mask)

    model = small(depth=(1, 1, 1))
    masks = [ck.BlockMask.random(2, model.grid, 0.75) for _ in range(2)]
    program = torch.export.export(Encoder(model), (images_for(model), masks[0])).module()
    images = images_for(model)
    for mask in masks:
        assert_close(program(images, mask), model.forward_encoder(images, mask), 1e-6)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("ragged", [False, True])
def test_autocast(dtype, rel, ragged, monkeypatch):
    model = small(norm_pix_loss=True)
    images = images_for(model, 4)
    mask = ragged_mask(model.grid) if ragged else model.make_mask(images, 0.6)
    expected = model(images, mask=mask, return_pred=True)
    wanted = gradients(model, expected.loss)
    monkeypatch.delattr(F, "scaled_dot_product_attention")  # slow on a CPU in half precision
    with torch.autocast("cpu", dtype):
        output = model(images, mask=mask, return_pred=True)
        loss = model(images, mask=mask).loss
    assert output.loss.dtype == loss.dtype == torch.float32
    assert output.pred.dtype == dtype
    assert_close(output.pred.float(), expected.pred, rel)
    assert_close(loss, expected.loss, rel / 4)
    for name, grad in gradients(model, loss).items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
        if name == "patch_embed1.proj.weight":
            assert_close(grad, wanted[name], 3 * rel)


def test_model_in_bfloat16():
    model = small()
    images = images_for(model)
    noise = torch.rand(2, 8)
    expected = model(images, noise=noise).loss
    loss = model.bfloat16()(images.bfloat16(), noise=noise).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 2e-2)


@pytest.mark.parametrize(
    ("dtype", "rel"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_attention(dtype, rel, padded):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (4, 5, 5))
    padding = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool() if padded else None
    scores = q.double() @ k.double().mT / math.sqrt(8)
    if padded:
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
    y = attention(q, k, v, padding)
    assert y.dtype == dtype
    assert_close(y.double(), scores.softmax(-1) @ v.double(), rel)


def test_attention_in_float16_does_not_overflow():
    q = torch.full((1, 1, 2, 64), 40.0, dtype=torch.float16)  # q @ k.T is 102400 > 65504
    v = torch.randn(1, 1, 2, 64, dtype=torch.float16)
    assert_close(attention(q, q, v).float(), v.float().mean(2, keepdim=True).expand(v.shape), 2e-3)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_slow_half_types_are_float32(dtype, mixed, monkeypatch):
    x, weight, bias = torch.randn(5, 40), torch.randn(6, 40), torch.randn(6)
    x = x.to(dtype)
    if not mixed:
        weight, bias = weight.to(dtype), bias.to(dtype)
    exact = F.linear(x.float(), weight.float(), bias.float())
    with torch.autocast("cpu", dtype, enabled=mixed):
        monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset())
        plain = linear(x, weight, bias)
        assert torch.equal(plain, F.linear(x, weight, bias))
        monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset([dtype]))
        wide = linear(x, weight, bias)
    assert wide.dtype == plain.dtype == dtype
    assert torch.equal(wide, exact.to(dtype))


@pytest.mark.parametrize("slow", [frozenset(), frozenset([torch.bfloat16, torch.float16])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_any_cpu(dtype, slow, monkeypatch):
    """With half products and without: close to float32, gradients too, packed and dense alike."""
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", slow)
    model = small()
    dense = DenseConvMAE(**model.config)
    dense.load_state_dict(model.state_dict())
    images, noise = images_for(model), torch.rand(2, 8)
    expected = gradients(model, model(images, noise=noise).loss)
    for one in (model, dense):
        with torch.autocast("cpu", dtype):
            loss = one(images, noise=noise).loss
        for name, grad in gradients(one, loss).items():
            assert_close(grad, expected[name], 0.1 if dtype == torch.bfloat16 else 0.02)


# -- pictures -------------------------------------------------------------------------------------


def test_patchify_and_back():
    model = small((32, 48), 5)
    images = images_for(model)
    patches = model.patchify(images)
    assert patches.shape == (2, 6, 16 * 16 * 5)
    assert torch.equal(model.unpatchify(patches), images)
    row, column, channel = 3, 7, 2
    expected = images[:, channel, 16 + row, 32 + column]  # of patch 5, in row 1 and column 2
    assert torch.equal(patches[:, 5, (row * 16 + column) * 5 + channel], expected)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruct(norm_pix_loss):
    model = small(norm_pix_loss=norm_pix_loss)
    images, noise = images_for(model), torch.rand(2, 8)
    result = model.reconstruct(images, 0.6, noise)
    hidden = model.make_mask(images, 0.6, noise).to_dense(16).logical_not().expand_as(images)
    assert torch.equal(result.mask, model(images, 0.6, noise).mask)
    assert torch.equal(result.masked, images.masked_fill(hidden, 0.0))
    assert torch.equal(result.pasted, torch.where(hidden, result.reconstruction, images))
    assert not torch.isclose(result.reconstruction, images).all()
    if not norm_pix_loss:
        pred = model(images, 0.6, noise, return_pred=True).pred
        assert torch.equal(result.reconstruction, model.unpatchify(pred))


def test_perfect_prediction_with_norm_pix_loss_is_the_image(monkeypatch):
    model = small(norm_pix_loss=True)
    images = 3 * images_for(model) + 7
    patches = model.patchify(images)
    perfect = (patches - patches.mean(2, keepdim=True)) / patches.std(2, keepdim=True)
    monkeypatch.setattr(model, "forward_decoder", lambda latent, mask, hidden: perfect)
    assert model(images, return_pred=True).loss < 1e-10
    torch.testing.assert_close(model.reconstruct(images).reconstruction, images)


# -- the classifier -------------------------------------------------------------------------------


def test_classifier_heads():
    images = torch.randn(2, 3, 32, 48)
    model = randomise(ConvViT(**ENCODER, img_size=(32, 48), num_classes=7))
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 6, 16)
    pooled = F.layer_norm(tokens.mean(1), (16,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    torch.testing.assert_close(model(images), model.head(pooled))

    token = randomise(ConvViT(**ENCODER, img_size=(32, 48), num_classes=7, global_pool=False))
    assert not hasattr(token, "fc_norm")
    first = token.forward_features(images)[:, 0]
    torch.testing.assert_close(token(images), token.head(first))
    first = (first - token.norm.bias) / token.norm.weight
    torch.testing.assert_close(first.mean(1), torch.zeros(2), atol=1e-5, rtol=0)

    features = ConvViT(**ENCODER, img_size=(32, 48), num_classes=0)
    assert features(images).shape == (2, 16)


def test_classifier_encodes_as_the_pretraining_model():
    pretrained = small(img_size=(32, 48)).double()
    model = ConvViT(**ENCODER, img_size=(32, 48)).double()
    model.load_state_dict(pretrained.state_dict(), strict=False)
    images = images_for(pretrained)
    mask = ck.BlockMask.full(2, (2, 3))
    _, one, two = pretrained.embed(images, mask)
    tokens = model.forward_features(images) + (one + two).view(2, 6, 16)
    assert_close(pretrained.norm(tokens), pretrained.forward_encoder(images, mask), 1e-12)


def test_drop_path_rates_rise_linearly():
    model = ConvViT(**{**ENCODER, "depth": (2, 2, 11)}, drop_path_rate=0.1)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 15))
    images = torch.randn(2, 3, 224, 224)
    model.eval()
    assert torch.equal(model(images), model(images))


def test_drop_path_drops_whole_images():
    mask = ragged_mask((4, 4))
    x = torch.ones(mask.num_visible, 4, 3)
    layer = DropPath(0.5)
    image = mask.block_index // 16
    drawn = []
    for _ in range(100):
        y = layer(x, mask)
        per_image = torch.stack([y[image == i].flatten()[0] for i in range(4)])
        assert torch.equal(y, per_image[image].view(-1, 1, 1).expand_as(y))
        drawn.append(per_image)
    drawn = torch.stack(drawn)
    assert set(drawn.unique().tolist()) == {0.0, 2.0}
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.2)
    assert layer(torch.ones(50, 2, 3)).unique(dim=0).shape[0] == 2
    assert layer.eval()(x, mask) is x


def test_tiny_trains():
    model = convmae.create_model("convmae_tiny", img_size=32)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    images = torch.randn(4, 3, 1, 1).expand(-1, -1, 32, 32)
    losses = []
    for _ in range(20):
        loss = model(images, mask_ratio=0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
