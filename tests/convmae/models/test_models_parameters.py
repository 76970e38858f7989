"""Parameters of the models: names, shapes, counts, initialisation; models by name."""

import json
import math
import subprocess
import sys

import pytest
import torch

import convmae
from convmae.models import ConvMAE, ConvViT, FastConvMAE
from convmae.models.layers import sincos_pos_embed
from convmae.models.registry import MODELS

ENCODER = {"embed_dim": (8, 12, 16), "depth": (2, 2, 2), "num_heads": 2, "mlp_ratio": (4, 4, 4)}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}


def norm_shapes(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def layer_shapes(name, *weight):
    return {f"{name}.weight": weight, f"{name}.bias": (weight[0],)}


def conv_block_shapes(name, dim):
    return {
        **norm_shapes(f"{name}.norm1", dim),
        **layer_shapes(f"{name}.conv1", dim, dim, 1, 1),
        **layer_shapes(f"{name}.conv2", dim, dim, 1, 1),
        **layer_shapes(f"{name}.attn", dim, 1, 5, 5),
        **norm_shapes(f"{name}.norm2", dim),
        **layer_shapes(f"{name}.mlp.fc1", 4 * dim, dim, 1, 1),
        **layer_shapes(f"{name}.mlp.fc2", dim, 4 * dim, 1, 1),
    }


def block_shapes(name, dim):
    return {
        **norm_shapes(f"{name}.norm1", dim),
        **layer_shapes(f"{name}.attn.qkv", 3 * dim, dim),
        **layer_shapes(f"{name}.attn.proj", dim, dim),
        **norm_shapes(f"{name}.norm2", dim),
        **layer_shapes(f"{name}.mlp.fc1", 4 * dim, dim),
        **layer_shapes(f"{name}.mlp.fc2", dim, 4 * dim),
    }


def official_base_shapes():
    """Names and shapes of the official pretraining checkpoint, in its order."""
    shapes = {
        "pos_embed": (1, 196, 768),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 196, 512),
    }
    for i, (dim, in_dim, k) in enumerate([(256, 3, 4), (384, 256, 2), (768, 384, 2)], 1):
        shapes |= layer_shapes(f"patch_embed{i}.proj", dim, in_dim, k, k)
        shapes |= norm_shapes(f"patch_embed{i}.norm", dim)
    shapes |= layer_shapes("patch_embed4", 768, 768)
    shapes |= layer_shapes("stage1_output_decode", 768, 256, 4, 4)
    shapes |= layer_shapes("stage2_output_decode", 768, 384, 2, 2)
    for stage, dim in ((1, 256), (2, 384)):
        for i in range(2):
            shapes |= conv_block_shapes(f"blocks{stage}.{i}", dim)
    for i in range(11):
        shapes |= block_shapes(f"blocks3.{i}", 768)
    shapes |= norm_shapes("norm", 768) | layer_shapes("decoder_embed", 512, 768)
    for i in range(8):
        shapes |= block_shapes(f"decoder_blocks.{i}", 512)
    return shapes | norm_shapes("decoder_norm", 512) | layer_shapes("decoder_pred", 768, 512)


def on_meta(name, **overrides):
    with torch.device("meta"):
        return convmae.create_model(name, **overrides)


def test_state_dict_of_base_is_the_official_one():
    model = on_meta("convmae_base")
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(found.items()) == list(official_base_shapes().items())
    assert len(found) == 313
    assert sum(p.numel() for p in model.parameters()) == 115_041_408
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 114_790_528


def test_classifier_takes_the_pretrained_encoder():
    pretrained = official_base_shapes()
    model = on_meta("convvit_base")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    new = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert shapes.keys() - pretrained.keys() == new
    assert len(pretrained.keys() - shapes.keys()) == 110
    assert all(shapes[name] == pretrained[name] for name in shapes.keys() - new)
    assert model.pos_embed.requires_grad and model.no_weight_decay() == {"pos_embed"}


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 22.33), ("base", 85.37), ("large", 273.38), ("huge", 680.74)]
)
def test_sizes(size, millions):
    count = sum(p.numel() for p in on_meta(f"convvit_{size}").parameters())
    assert round(count / 1e6, 2) == millions
    assert (
        on_meta(f"convmae_{size}").config["embed_dim"][2]
        == MODELS[f"convvit_{size}"][1]["embed_dim"][2]
    )


def test_epsilons():
    model = ConvMAE(**ENCODER, **DECODER)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    stages12 = ("patch_embed", "blocks1.", "blocks2.")
    assert eps == {name: 1e-5 if name.startswith(stages12) else 1e-6 for name in eps}
    assert len(eps) == 3 + 4 + 4 + 4 + 1 + 4 + 1


def assert_uniform(tensor, bound):
    assert tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_initialisation_of_convmae():
    config = {**ENCODER, **DECODER, "embed_dim": (64, 96, 128), "decoder_embed_dim": 96}
    model = ConvMAE(**config, img_size=(32, 64))
    parameters = dict(model.named_parameters())
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    assert frozen == {"pos_embed", "decoder_pos_embed"}
    assert torch.equal(parameters["pos_embed"], sincos_pos_embed(128, (2, 4)))
    assert torch.equal(parameters["decoder_pos_embed"], sincos_pos_embed(96, (2, 4)))
    assert parameters["mask_token"].std().item() == pytest.approx(0.02, rel=0.3)
    assert parameters["mask_token"].abs().max() > 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert_uniform(module.weight, math.sqrt(6 / sum(module.weight.shape)))
            assert module.bias.eq(0).all()
        elif isinstance(module, torch.nn.LayerNorm):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
        elif isinstance(module, torch.nn.Conv2d):
            default = 1 / math.sqrt(module.weight[0].numel())  # of torch.nn.Conv2d
            xavier = math.sqrt(6 / (96 * 4 + 128))
            assert_uniform(module.weight, xavier if name == "patch_embed3.proj" else default)
            assert 0 < module.bias.abs().max() <= default


def test_initialisation_of_convvit():
    model = ConvViT(**{**ENCODER, "embed_dim": (16, 24, 128)}, num_classes=50)
    assert_near_normal = [model.pos_embed, model.head.weight, model.blocks3[0].attn.qkv.weight]
    for tensor in assert_near_normal:
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
        assert tensor.abs().max() > 0.04
    assert model.head.bias.eq(0).all() and model.pos_embed.requires_grad
    assert_uniform(model.patch_embed3.proj.weight, 1 / math.sqrt(24 * 4))


def test_sincos_values():
    embed = sincos_pos_embed(768, (2, 14))[0]
    wave = torch.tensor([0.8415, 0.8153, 0.7886])
    torch.testing.assert_close(embed[1, :3], wave, atol=1e-4, rtol=0)  # row 0, column 1
    assert embed[1, 384:387].eq(0).all() and embed[1, 576:768].eq(1).all()
    torch.testing.assert_close(embed[14, 384:387], wave, atol=1e-4, rtol=0)  # row 1, column 0
    assert embed[14, :192].eq(0).all() and embed[14, 192:384].eq(1).all()


def test_registry():
    sizes = ("base", "huge", "large", "small", "tiny")
    for kind in ("convmae", "convvit", "fastconvmae"):
        assert convmae.list_models(f"{kind}_*") == [f"{kind}_{size}" for size in sizes]
    assert convmae.list_models() == sorted(MODELS)
    for alias in ("convmae_convvit_base_patch16", "convmae_convvit_base_patch16_dec512d8b"):
        assert on_meta(alias).config == on_meta("convmae_base").config
        assert type(on_meta(alias)) is ConvMAE
        fast = on_meta(f"fast{alias}")
        assert type(fast) is FastConvMAE and fast.config == on_meta("fastconvmae_base").config
    assert on_meta("convvit_base_patch16").config == on_meta("convvit_base").config


@pytest.mark.parametrize("name", ["convmae_tiny", "convvit_tiny", "fastconvmae_tiny"])
def test_config_rebuilds_the_model(name):
    model = on_meta(name, img_size=(64, 32), in_chans=2, depth=(1, 1, 1))
    assert model.grid == (4, 2) and model.img_size == (64, 32) and model.patch_size == 16
    config = json.loads(json.dumps(model.config))
    assert config == model.config
    again = on_meta(name, **config)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1] and again.config == config


@pytest.mark.thorough
def test_import_is_lazy():
    code = (
        "import sys, convmae; assert 'create_model' in dir(convmae);"
        "assert not {'torch', 'numpy'} & set(sys.modules);"
        "import torch; before = set(sys.modules); convmae.list_models();"
        "extras = {'torchvision', 'timm', 'tyro', 'tensorboard', 'PIL', 'matplotlib', 'skimage'};"
        "assert not extras & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        _ = convmae.create_modle


@pytest.mark.parametrize("name", ["convmae_tiny", "convvit_tiny"])
def test_a_model_without_memory_has_the_same_parameters(name):
    """Names, shapes, and which of them are trained."""
    with torch.device("meta"):
        empty = convmae.create_model(name)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert describe_parameters(empty) == describe_parameters(convmae.create_model(name))


def describe_parameters(model):
    return [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.thorough
def test_counting_parameters_does_not_need_the_compiler():
    code = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        "from convmae.commands.info import model_sizes\nsizes = dict(model_sizes())\n"
        "print(sizes['convmae_tiny'], sizes['convvit_tiny'])\n"
        "print({'torch._dynamo', 'torch._inductor', 'sympy', 'timm'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sizes, heavy = done.stdout.splitlines()
    counts = [
        sum(parameter.numel() for parameter in convmae.create_model(name).parameters())
        for name in ("convmae_tiny", "convvit_tiny")
    ]
    assert sizes.split() == [str(count) for count in counts]
    assert heavy == "set()"
