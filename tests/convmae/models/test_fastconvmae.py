"""FastConvMAE: each of its complementary masks is a ConvMAE, for one pass of convolutions."""

import math

import numpy as np
import pytest
import torch
from golden import fill

import convmae
import convmae_kernels as ck
from convmae.models import ConvMAE, FastConvMAE
from convmae.models.fastconvmae import complementary_masks, fitting_ratios
from tests.support.paths import GOLDEN

SIZES = {
    "embed_dim": (8, 12, 16),
    "depth": (2, 2, 2),
    "num_heads": 2,
    "mlp_ratio": (4, 4, 4),
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}


def fast_and_plain(img_size=(32, 64), **overrides):
    """A FastConvMAE off its initial values, and the ConvMAE of the same parameters; in float64."""
    fast = FastConvMAE(**SIZES, img_size=img_size, **overrides).double()
    with torch.no_grad():
        for p in fast.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    plain = ConvMAE(**fast.config).double()
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def inputs(model, batch=3):
    images = torch.randn(batch, 3, *model.img_size, dtype=model.pos_embed.dtype)
    return images, torch.rand(batch, model.num_patches)


def group_masks(noise, grid, groups):
    """The masks of ConvMAE that the groups stand for, written out."""
    order, keep = noise.argsort(1), noise.shape[1] // groups
    for g in range(groups):
        visible = torch.zeros(noise.shape, dtype=torch.bool)
        visible.scatter_(1, order[:, g * keep : (g + 1) * keep], True)
        yield ck.BlockMask.from_visible(visible.view(-1, *grid))


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(a, b, rel):
    assert a.shape == b.shape
    assert (a - b).norm() <= rel * b.norm() + 1e-300


# -- the official code ----------------------------------------------------------------------------


def test_golden():
    golden = np.load(GOLDEN / "fastconvmae_base.npz")
    seed = int(golden["seed"])
    model = convmae.create_model("fastconvmae_convvit_base_patch16", norm_pix_loss=True)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "pos_embed" not in name:
                tensor.copy_(torch.from_numpy(fill.recipe(name, tuple(tensor.shape), seed)))
    images, noise = (torch.from_numpy(f(1, seed=seed)) for f in (fill.images, fill.noise))
    with torch.no_grad():
        pred = model(images, 0.75, noise, return_pred=True).pred
    assert pred.shape == (4, 196, 768)
    np.testing.assert_allclose(pred[:, ::9, ::13], golden["pred"], rtol=0, atol=2e-5)
    loss = model(images, 0.75, noise).loss
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    found = gradients(model, loss)
    for name, key in (("blocks1.0.attn", "grad_norm_dw"), ("blocks3.5.attn.qkv", "grad_norm_qkv")):
        norm = found[f"{name}.weight"].double().norm().item()
        assert norm == pytest.approx(float(golden[key]), rel=1e-4)


# -- each group is a ConvMAE ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("img_size", "mask_ratio", "groups", "norm_pix_loss"),
    [
        ((32, 64), 0.75, 4, True),
        ((32, 64), 0.5, 2, False),
        ((32, 64), 0.875, 8, True),
        ((48, 64), 0.66, 3, False),
        ((32, 32), 0.0, 1, True),
    ],
)
def test_groups_equal_convmae(img_size, mask_ratio, groups, norm_pix_loss):
    fast, plain = fast_and_plain(img_size, norm_pix_loss=norm_pix_loss)
    images, noise = inputs(fast)
    output = fast(images, mask_ratio, noise, return_pred=True)
    masks = list(group_masks(noise, fast.grid, groups))
    alone = [plain(images, mask=mask, return_pred=True) for mask in masks]
    assert_close(output.pred, torch.cat([one.pred for one in alone]), 1e-12)
    assert torch.equal(output.mask, torch.cat([one.mask for one in alone]))
    loss, expected = fast(images, mask_ratio, noise).loss, sum(one.loss for one in alone) / groups
    assert_close(output.loss, expected, 1e-12)
    assert_close(loss, expected, 1e-12)
    wanted = gradients(plain, expected)
    assert wanted.keys() == {n for n, p in plain.named_parameters() if p.requires_grad}
    for value in (loss, output.loss):
        found = gradients(fast, value)
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            assert_close(grad, wanted[name], 1e-10)


def test_every_patch_is_visible_once():
    noise = torch.rand(3, 12)
    mask = complementary_masks(noise, (3, 4), 0.75)
    assert mask.visible_per_image == 3 and mask.batch_size == 12 and mask.num_visible == 3 * 12
    assert mask.visible.view(4, 3, 3, 4).sum(0).eq(1).all()
    made = ck.BlockMask.from_visible(mask.visible)
    assert torch.equal(made.block_index, mask.block_index)
    first = ck.BlockMask.from_noise(noise, (3, 4), 0.75)
    assert torch.equal(mask.visible[:3], first.visible)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_patch_reaches_its_own_group_only(poison):
    fast, _ = fast_and_plain()
    images, noise = inputs(fast, 2)
    masks = fast.make_masks(images, 0.75, noise)
    clean = fast.forward_encoder(images, masks)
    order = noise.argsort(1)
    for group in range(4):
        patch = int(order[1, 2 * group])
        row, column = 16 * (patch // 4), 16 * (patch % 4)
        poisoned = images.clone()
        poisoned[1, :, row + 3, column + 5] = poison
        same = (fast.forward_encoder(poisoned, masks) == clean).all(2).all(1)
        assert same.tolist() == [row != 2 * group + 1 for row in range(8)]


def test_gradient_in_a_patch_is_that_of_its_group():
    fast, _ = fast_and_plain()
    images, noise = inputs(fast, 2)
    masks = fast.make_masks(images, 0.5, noise)
    images.requires_grad_()
    latent = fast.forward_encoder(images, masks)
    (grad,) = torch.autograd.grad(latent[:2].square().sum(), images)  # of group 0
    visible = masks.to_dense(16)[:2].expand_as(images)
    assert grad[~visible].eq(0).all() and grad[visible].ne(0).all()


def test_convolutions_see_each_position_once():
    fast, _ = fast_and_plain()
    rows = []
    for stage in (fast.blocks1, fast.blocks2):
        stage[0].attn.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:2]))
    fast(inputs(fast)[0])
    assert rows == [(3 * 8, 16), (3 * 8, 4)]


def test_state_dicts_fit_both_ways():
    models = [convmae.create_model(name, img_size=32) for name in ("convmae_tiny",) * 2]
    fast = convmae.create_model("fastconvmae_tiny", img_size=32)
    fast.load_state_dict(models[0].state_dict())
    models[1].load_state_dict(fast.state_dict())
    pairs = zip(models[0].state_dict().values(), models[1].state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


# -- the rest of ConvMAE --------------------------------------------------------------------------


def test_what_takes_one_mask_for_each_image_is_convmae():
    fast, plain = fast_and_plain(norm_pix_loss=True)
    images, noise = inputs(fast)
    for ratio in (0.75, 0.4):  # 0.4 cuts into no equal groups
        for a, b in zip(
            fast.reconstruct(images, ratio, noise), plain.reconstruct(images, ratio, noise)
        ):
            assert torch.equal(a, b)
        mask = fast.make_mask(images, ratio, noise)
        assert torch.equal(fast.forward_encoder(images, mask), plain.forward_encoder(images, mask))
    first = fast(images, 0.75, noise).mask[:3]
    assert torch.equal(fast.reconstruct(images, 0.75, noise).mask, first)


@pytest.mark.thorough
def test_compiles_without_break():
    fast = FastConvMAE(**SIZES, img_size=(32, 64))
    images, noise = inputs(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(images, noise=noise).loss, fast(images, noise=noise).loss
    assert_close(found, wanted, 1e-6)
    name = "blocks1.0.attn.weight"
    assert_close(gradients(fast, found)[name], gradients(fast, wanted)[name], 1e-5)


def test_drawn_noise_follows_the_generator():
    fast, _ = fast_and_plain()
    images, _ = inputs(fast)
    draws = [fast(images, generator=torch.Generator().manual_seed(s)).mask for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mask": ck.BlockMask.full(2, (2, 4))}, ValueError, "FastConvMAE takes noise, not mask"),
        ({"mask_ratio": 0.6}, ValueError, "mask_ratio = 0.6 leaves groups of 3 of 8.*0.5, 0.75,"),
        ({"mask_ratio": 0.9}, ValueError, "mask_ratio = 0.9 leaves groups of 0 of 8 patches"),
        ({"mask_ratio": 1.0}, ValueError, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"noise": torch.rand(2, 9)}, ValueError, r"noise must be \[2, 8\].*got \[2, 9\]"),
        ({"noise": torch.ones(2, 8).int()}, TypeError, "noise must be a floating.*int32"),
        ({"noise": [0.5]}, TypeError, "noise must be a floating tensor, got list"),
        ({"noise": torch.rand(2, 8, device="meta")}, ValueError, "mask is on meta"),
    ],
)
def test_bad_arguments(arguments, error, match):
    fast = FastConvMAE(**SIZES, img_size=(32, 64))
    with pytest.raises(error, match=match):
        fast(torch.zeros(2, 3, 32, 64), **arguments)


def test_masks_of_another_batch():
    fast = FastConvMAE(**SIZES, img_size=(32, 64))
    mask = ck.BlockMask.random(3, (2, 4), 0.5)
    with pytest.raises(ValueError, match="for a batch of 3, expected a multiple of the 2 images"):
        fast.forward_encoder(torch.zeros(2, 3, 32, 64), mask)


@pytest.mark.parametrize("length", [2, 7, 12, 64, 196, 256, 1024])
def test_ratios_that_errors_recommend_work(length):
    ratios = fitting_ratios(length, most=20)
    keeps = [int(length * (1 - ratio)) for ratio in ratios]
    assert all(length % keep == 0 for keep in keeps) and 0.5 in ratios or length % 2
    assert keeps == [k for k in range(length - 1, 0, -1) if length % k == 0][:20]
