"""ConvViT as users of timm expect it: registry, dense features, layer groups, other classifiers."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import fill

import convmae
from convmae.models import ConvMAE, ConvViT, DenseConvMAE, resample_pos_embed
from convmae.models.layers import DropPath, sincos_pos_embed
from tests.project.test_imports import python
from tests.support.paths import GOLDEN

timm = pytest.importorskip("timm")
timm_optim = pytest.importorskip("timm.optim")
convmae.register_timm()

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

SMALL = {
    "embed_dim": (8, 12, 16),
    "depth": (2, 2, 2),
    "num_heads": 2,
    "mlp_ratio": (4, 4, 4),
    "num_classes": 5,
}


def small(img_size=(32, 64), **overrides):
    """A ConvViT off its initial values, in eval mode."""
    model = ConvViT(**{**SMALL, "img_size": img_size, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def images_for(model, batch=2):
    return torch.randn(batch, model.in_chans, *model.img_size, dtype=model.pos_embed.dtype)


def on_meta(name, **overrides):
    with torch.device("meta"):
        return convmae.create_model(name, **overrides)


# -- dense features -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_features_of_golden_weights():
    """The map of stride 16 is the trunk of the official logits."""
    golden = np.load(GOLDEN / "convvit_base.npz")
    seed = int(golden["seed"])
    net = timm.create_model("convvit_base", features_only=True, out_indices=(2,)).eval()
    values = {
        name: torch.from_numpy(fill.recipe(name, tuple(tensor.shape), seed))
        for name, tensor in on_meta("convvit_base").state_dict().items()
    }
    values["pos_embed"] = sincos_pos_embed(768, (14, 14))
    kept = net.model.state_dict().keys()
    assert values.keys() - kept == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    net.model.load_state_dict({name: values[name] for name in kept})
    with torch.no_grad():
        (x,) = net(torch.from_numpy(fill.images(2, seed=seed)))
    assert x.shape == (2, 768, 14, 14)
    x = x.mean((2, 3))
    x = F.layer_norm(x, (768,), values["fc_norm.weight"], values["fc_norm.bias"], 1e-6)
    logits = F.linear(x, values["head.weight"], values["head.bias"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)


def dense_maps(model, images):
    """The three stages by plain convolutions of whole images, and the last of them pooled."""

    def conv(x, layer, **options):
        return F.conv2d(x, layer.weight, layer.bias, **options)

    def norm(x, layer):
        return layer(x.movedim(1, -1)).movedim(-1, 1)

    x, maps = images, []
    for i in (1, 2, 3):
        embed = getattr(model, f"patch_embed{i}")
        x = F.gelu(norm(conv(x, embed.proj, stride=embed.proj.kernel_size), embed.norm))
        for block in getattr(model, f"blocks{i}") if i < 3 else ():
            y = conv(norm(x, block.norm1), block.conv1)
            y = conv(y, block.attn, padding=2, groups=y.shape[1])
            x = x + conv(y, block.conv2)
            x = x + conv(F.gelu(conv(norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)
        maps.append(x)
    tokens = model.patch_embed4(x.flatten(2).mT) + model.pos_embed
    for block in model.blocks3:
        tokens = block(tokens)
    maps[2] = tokens.mT.unflatten(2, model.grid)
    rows, columns = model.grid
    even = F.pad(maps[2], (0, columns % 2, 0, rows % 2), value=-math.inf)
    return [*maps, even.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))]


@pytest.mark.parametrize("size", [(48, 64), (32, 16)])
def test_maps_equal_those_of_dense_convolutions(size):
    model = small(size).double()
    images = images_for(model)
    maps = model.forward_intermediates(images, intermediates_only=True)
    for found, wanted in zip(maps, dense_maps(model, images), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_features_only(size):
    net = timm.create_model("convvit_tiny", features_only=True, img_size=size)
    maps = net(torch.randn(1, 3, *size))
    channels, strides = net.feature_info.channels(), net.feature_info.reduction()
    assert channels == [64, 128, 256, 256] and strides == [4, 8, 16, 32]
    for x, count, stride in zip(maps, channels, strides, strict=True):
        assert x.shape == (1, count, size[0] // stride, size[1] // stride)
    sum(x.sum() for x in maps).backward()
    assert all(p.grad is not None for p in net.parameters())
    info = on_meta("convvit_base").feature_info
    assert [stage["num_chs"] for stage in info] == [256, 384, 768, 768]


@pytest.mark.parametrize("indices", [(0,), (1,), (2, 0), (-1,), (1, 3)])
def test_features_of_some_stages(indices):
    torch.manual_seed(1)
    full = timm.create_model("convvit_tiny", features_only=True, img_size=32).eval()
    some = timm.create_model("convvit_tiny", features_only=True, img_size=32, out_indices=indices)
    missing, _ = some.eval().load_state_dict(full.state_dict(), strict=False)
    assert not missing
    images = torch.randn(2, 3, 32, 32)
    expected = full(images)
    found = some(images)
    assert some.feature_info.channels() == [full.feature_info.channels()[i] for i in indices]
    for x, i in zip(found, indices, strict=True):
        assert torch.equal(x, expected[i])
    sum(x.sum() for x in found).backward()
    assert all(p.grad is not None for p in some.parameters() if p.requires_grad)
    if indices in ((0,), (1,)):
        with pytest.raises(ValueError, match="stage 3 is asked for.*left . of 3 stages"):
            some.model.forward_features(images)


def test_formats_and_norm_of_intermediates():
    model = small((48, 64))
    images = images_for(model)
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(maps[2], final.transpose(1, 2).unflatten(2, (3, 4)))
    for fmt, change in (
        ("NHWC", lambda x: x.permute(0, 2, 3, 1)),
        ("NLC", lambda x: x.flatten(2).transpose(1, 2)),
    ):
        found = model.forward_intermediates(images, output_fmt=fmt, intermediates_only=True)
        assert all(torch.equal(a, change(b)) for a, b in zip(found, maps, strict=True))
    normed = model.forward_intermediates(images, [0, 2], norm=True, output_fmt="NLC")[1]
    assert torch.equal(normed[1], model.fc_norm(final))
    assert torch.equal(normed[0], maps[0].flatten(2).transpose(1, 2))
    last = model.forward_intermediates(images, 1, intermediates_only=True)
    assert len(last) == 1 and torch.equal(last[0], maps[3])
    token = small((48, 64), global_pool=False)
    final, (x,) = token.forward_intermediates(images, [2], norm=True, output_fmt="NLC")
    assert torch.equal(final, x)


def test_stopping_early_skips_later_stages():
    model, seen = small(), []
    model.blocks3[0].register_forward_hook(lambda *_: seen.append(3))
    model.blocks2[0].register_forward_hook(lambda *_: seen.append(2))
    images, options = images_for(model), {"intermediates_only": True}
    early = model.forward_intermediates(images, [0], stop_early=True, **options)
    assert seen == []
    late = model.forward_intermediates(images, [0], **options)
    assert seen == [2, 3] and torch.equal(early[0], late[0])


@pytest.mark.parametrize("indices", [5, -5, 0, (), (4,), (0, -5)])
def test_bad_indices(indices):
    with pytest.raises(ValueError, match=r"indices must be some of 0 ... 3 \(strides 4, 8, 16, 32"):
        small().forward_intermediates(torch.zeros(1, 3, 32, 64), indices)
    with pytest.raises(ValueError, match="output_fmt must be NCHW, NHWC or NLC, got 'CHW'"):
        small().forward_intermediates(torch.zeros(1, 3, 32, 64), output_fmt="CHW")


@pytest.mark.parametrize("kind", ["hook", "dict", "fx", "list", timm.models.FeatureHookNet])
def test_other_ways_to_take_features_are_refused(kind):
    """Hooks on the stages would see nothing: timm then returns an empty list."""
    with pytest.raises(ValueError, match=r"feature_cls must be 'getter' \(or not given\), got "):
        timm.create_model("convvit_tiny", features_only=True, feature_cls=kind)
    net = timm.create_model("convvit_tiny", features_only=True, feature_cls="getter", img_size=32)
    assert len(net(torch.zeros(1, 3, 32, 32))) == 4


@pytest.mark.parametrize(
    ("indices", "strides"), [((3, 0), [32, 4]), ((-1, 1, 1), [32, 8, 8]), (2, [16, 32])]
)
def test_features_in_any_order(indices, strides):
    options = {"features_only": True, "img_size": 64}
    net = timm.create_model("convvit_tiny", out_indices=indices, **options).eval()
    full = timm.create_model("convvit_tiny", **options).eval()
    full.load_state_dict(net.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    expected = dict(zip([4, 8, 16, 32], full(images), strict=True))
    assert net.feature_info.reduction() == strides
    for found, stride in zip(net(images), strides, strict=True):
        assert torch.equal(found, expected[stride])


def test_options_of_features_that_do_not_fit():
    for indices in (0, 5, -1, (), (4,), (0, -5), "12", (1.5,), 2.5):
        with pytest.raises(ValueError, match="out_indices must be some of 0 ... 3 .*got"):
            timm.create_model("convvit_tiny", features_only=True, out_indices=indices)
    with pytest.raises(ValueError, match=r"output_stride must be 32, got 16: .*out_indices=\(0, 1"):
        timm.create_model("convvit_tiny", features_only=True, output_stride=16)
    net = timm.create_model("convvit_tiny", features_only=True, output_stride=32)
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    for option in ({"out_indices": (1,)}, {"feature_cls": "hook"}):
        with pytest.raises(ValueError, match="is for features_only=True, which is not given"):
            timm.create_model("convvit_tiny", **option)


@torch.no_grad()
def test_maps_may_be_written_into():
    """No map shares its memory with the tokens that come with it."""
    model = small((48, 64))
    final, maps = model.forward_intermediates(images_for(model))
    before = final.clone()
    for x in maps:
        x.zero_()
    assert torch.equal(final, before)


# -- classifiers and sizes ------------------------------------------------------------------------


def test_forward_is_head_of_features():
    for pool, shape in ((True, (2, 5)), ("avg", (2, 5)), ("token", (2, 5)), ("", (2, 8, 5))):
        model = small(global_pool=pool)
        images = images_for(model)
        features = model.forward_features(images)
        assert features.shape == (2, 8, 16) and model(images).shape == shape
        assert torch.equal(model(images), model.forward_head(features))
        before = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.head(before), model(images))
    model = small()
    assert model.embed_dim == model.num_features == model.head_hidden_size == 16
    assert model.config["embed_dim"] == [8, 12, 16] and model.num_classes == 5
    assert small(global_pool="avg").config["global_pool"] is True


def test_reset_classifier():
    model = small().double()
    images = images_for(model)
    old = model.forward_head(model.forward_features(images), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.config["num_classes"] == model.num_classes == 3
    assert 0 < model.head.weight.std() < 0.04 and model.head.bias.eq(0).all()
    model.reset_classifier(0)
    assert torch.equal(model(images), old)
    model.reset_classifier(4, "token")
    assert not hasattr(model, "fc_norm") and model(images).shape == (2, 4)
    again = ConvViT(**model.config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model(images))
    for bad in (2, "max"):
        with pytest.raises(ValueError, match="global_pool must be True or 'avg', False or 'token'"):
            model.reset_classifier(4, bad)
    with pytest.raises(ValueError, match="num_classes must be 0 or a positive number, got -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("new", [(20, 14), (7, 9), (14, 14), (1, 3)])
def test_resample_pos_embed_is_that_of_timm(new):
    from timm.layers import resample_abs_pos_embed

    for old in ((14, 14), (5, 8)):
        embed = torch.randn(1, old[0] * old[1], 24)
        found = resample_pos_embed(embed, old, new)
        expected = resample_abs_pos_embed(embed, list(new), list(old), num_prefix_tokens=0)
        torch.testing.assert_close(found, expected)
        half = resample_pos_embed(embed.half(), old, new)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), found, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"pos_embed must be \[1, 9, D\] for a grid of 3 x 3"):
        resample_pos_embed(embed, (3, 3), new)


def test_set_input_size():
    model = small((32, 64))
    old = model.pos_embed.detach().clone()
    model.set_input_size((48, 32))
    assert model.img_size == (48, 32) and model.grid == (3, 2) and model.num_patches == 6
    assert torch.equal(model.pos_embed, resample_pos_embed(old, (2, 4), (3, 2)))
    assert model.pos_embed.requires_grad and "pos_embed" in dict(model.named_parameters())
    assert model(torch.zeros(1, 3, 48, 32)).shape == (1, 5)
    again = ConvViT(**model.config)
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="img_size must be a positive multiple of 16.*got 40"):
        model.set_input_size(40)
    assert model.img_size == (48, 32)


# -- training -------------------------------------------------------------------------------------


def test_layer_decay_is_the_official_one():
    model = on_meta("convvit_base")
    groups = timm_optim.param_groups_layer_decay(
        model,
        weight_decay=0.05,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=0.65,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    layers, undecayed = {}, set()
    for group in groups:
        layers.setdefault(group["lr_scale"], set()).update(names[id(p)] for p in group["params"])
        if group["weight_decay"] == 0.0:
            undecayed.update(names[id(p)] for p in group["params"])
        else:
            assert group["weight_decay"] == 0.05
    scales = sorted(layers)
    layers = [layers[scale] for scale in scales]
    assert scales == pytest.approx([0.65 ** (12 - i) for i in range(13)])
    assert scales[:2] == pytest.approx([0.005688, 0.008751], abs=5e-7)
    assert scales[11:] == [0.65, 1.0]
    first = ("pos_embed", "patch_embed", "blocks1.", "blocks2.")
    assert layers[0] == {name for name in names.values() if name.startswith(first)}
    assert len(layers[0]) == 71
    for i in range(11):
        assert layers[i + 1] == {n for n in names.values() if n.startswith(f"blocks3.{i}.")}
        assert len(layers[i + 1]) == 12
    assert layers[12] == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    assert undecayed == {name for name, dims in shapes.items() if dims == 1} | {"pos_embed"}


def test_coarse_groups_are_stages():
    from timm.models import group_parameters

    model = on_meta("convvit_base")
    layers = group_parameters(model, model.group_matcher(coarse=True))
    assert [names[-1].split(".")[0] for names in layers.values()] == [
        *("patch_embed4", "blocks1", "blocks2", "blocks3", "fc_norm")
    ]


def test_groups_of_pretraining():
    groups = timm_optim.param_groups_weight_decay(on_meta("convmae_base"), weight_decay=0.05)
    assert {g["weight_decay"]: len(g["params"]) for g in groups} == {0.05: 105, 0.0: 206}


def test_stochastic_depth_of_the_official_recipe():
    model = on_meta("convvit_base", drop_path_rate=0.1)
    blocks = [*model.blocks1, *model.blocks2, *model.blocks3]
    rates = [block.drop_path.rate for block in blocks]
    assert len(rates) == 15 == sum(isinstance(m, DropPath) for m in model.modules())
    assert rates[0] == 0.0 and rates[1] == pytest.approx(0.00714, abs=5e-6) and rates[-1] == 0.1
    assert rates == pytest.approx(np.linspace(0, 0.1, 15).tolist())


@pytest.mark.parametrize("kind", ["convvit", "convmae", "dense", "fastconvmae"])
def test_gradient_checkpointing_changes_no_number(kind):
    if kind == "convvit":
        model = small(drop_path_rate=0.5).train()
        blocks = [*model.blocks1, *model.blocks2, *model.blocks3]
    else:
        name = "convmae_tiny" if kind == "dense" else f"{kind}_tiny"
        model = convmae.create_model(name, img_size=(32, 64))
        if kind == "dense":
            model = DenseConvMAE(**model.config)
        blocks = [*model.blocks1, *model.blocks2, *model.blocks3, *model.decoder_blocks]
    runs = []
    for block in blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(1))
    images = images_for(model, 4)

    def step():
        torch.manual_seed(3)
        runs.clear()
        model.zero_grad()
        output = model(images)
        loss = output.square().mean() if kind == "convvit" else output.loss
        loss.backward()
        return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    (loss, grads), plain = step(), len(runs)
    model.set_grad_checkpointing()
    (again, found), checkpointed = step(), len(runs)
    assert plain == len(blocks) and checkpointed == 2 * plain
    assert torch.equal(loss, again) and all(torch.equal(grads[n], found[n]) for n in grads)
    runs.clear()
    with torch.no_grad():
        model(images)
    assert len(runs) == plain
    model.set_grad_checkpointing(False)
    step()
    assert len(runs) == plain


# -- float32 under autocast -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_under_autocast(dtype):
    """Logits of attention beyond float16 (65504), before and after their scaling by sqrt(d)."""
    config = {k: v for k, v in SMALL.items() if k != "num_classes"}
    model = ConvMAE(**config, img_size=(32, 64), decoder_embed_dim=24, decoder_num_heads=3)
    dims = {16: 8, 24: 8}
    with torch.no_grad():
        for block in [*model.blocks3, *model.decoder_blocks]:
            dim = block.attn.qkv.in_features
            block.attn.qkv.weight[: 2 * dim] *= 400.0  # queries and keys
    logits = []
    for block in [*model.blocks3, *model.decoder_blocks]:

        def remember(attn, args, out):
            x = args[0].float().reshape(-1, *args[0].shape[-2:])  # tokens, or the rows of all
            q, k, _ = attn._heads(F.linear(x, attn.qkv.weight, attn.qkv.bias))
            logits.append((q @ k.mT).abs().max() / dims[attn.qkv.in_features] ** 0.5)

        block.attn.register_forward_hook(remember)
    images, noise = 100 * images_for(model), torch.rand(2, 8)
    with torch.autocast("cpu", dtype):
        output = model(images, noise=noise, return_pred=True)
        loss = model(images, noise=noise).loss
    assert min(logits) > 65504
    assert output.pred.isfinite().all()
    for value in (output.loss, loss):
        assert value.dtype == torch.float32 and value.isfinite() and value > 1000
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_under_autocast_has_float32_statistics(dtype):
    x = (6e4 * torch.rand(8, 64)).to(dtype)  # the variance, 3e8, is no float16
    norm = torch.nn.LayerNorm(64)
    with torch.autocast("cpu", dtype):
        y = norm(x)
    exact = norm(x.float())
    torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


# -- registry -------------------------------------------------------------------------------------


def test_registered_names():
    names = [f"convvit_{size}" for size in ("base", "huge", "large", "small", "tiny")]
    assert timm.list_models("convvit_*") == sorted([*names, "convvit_base_patch16"])
    assert not timm.list_models("convvit_*", pretrained=True)
    for name in (*names, "convvit_base_patch16"):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert model.config == on_meta(name).config
    convmae.register_timm()  # again: nothing happens, timm does not warn


def test_arguments_of_timm(tmp_path):
    options = {"num_classes": 7, "in_chans": 4, "img_size": 32, "drop_path_rate": 0.2}
    model = timm.create_model("convvit_tiny", global_pool="token", drop_rate=0.0, **options)
    expected = {**options, "img_size": [32, 32], "global_pool": False}
    assert expected.items() <= model.config.items()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = timm.create_model(
        "convvit_tiny", global_pool="token", checkpoint_path=tmp_path / "weights.pth", **options
    )
    images = torch.randn(2, 4, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))
    tokens = timm.create_model("convvit_tiny", img_size=32, num_classes=0, global_pool="")
    assert tokens(images[:, :3]).shape == (2, 4, 256)
    data = timm.data.resolve_model_data_config(tokens)
    assert data["interpolation"] == "bicubic" and data["crop_pct"] == 0.875
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
    assert tokens.pretrained_cfg["classifier"] == "head"
    assert tokens.get_submodule(tokens.pretrained_cfg["first_conv"]).weight.shape[1] == 3


def test_no_weights_to_download(tmp_path):
    with pytest.raises(ValueError, match="no weights of convvit_tiny to download.*checkpoint_path"):
        timm.create_model("convvit_tiny", pretrained=True)
    with pytest.raises(ValueError, match="drop_rate must be 0, got 0.1"):
        timm.create_model("convvit_tiny", drop_rate=0.1)
    saved = convmae.create_model("convvit_tiny", img_size=32)
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = timm.create_model(
        "convvit_tiny", pretrained=True, img_size=32, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(model.head.weight, saved.head.weight)


@pytest.mark.thorough
def test_convmae_does_not_import_timm_by_itself():
    lines = python(
        "import sys, convmae; convmae.create_model('convvit_tiny'); print('timm' in sys.modules);"
        "convmae.register_timm(); import timm; print(timm.is_model('convvit_base'))"
    )
    assert lines == ["False", "True"] and "timm" in sys.modules
