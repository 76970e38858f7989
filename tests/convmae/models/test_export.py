"""Exported programs, ONNX files and traces of models on whole images."""

import warnings

import numpy as np
import pytest
import torch

import convmae
import convmae_kernels as ck
from convmae.models import ConvMAE, ConvViT
from convmae.models.registry import SIZES
from tests.support.onnx_files import check_plain, export_onnx, run_onnx

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

SMALL = {
    "img_size": (32, 64),
    "embed_dim": (8, 12, 16),
    "depth": (1, 2, 1),
    "num_heads": 2,
    "mlp_ratio": (4, 4, 4),
}
VARIANTS = {
    "averaged": {},
    "token": {"global_pool": False},
    "every token": {"global_pool": ""},
    "five bands": {"in_chans": 5, "img_size": (48, 16)},
    "probe": {"head_norm": True},
    "features": {"num_classes": 0},
}
BATCH = torch.export.Dim("batch", min=1)


def moved(model):
    """The model off its initial values, in eval mode."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def small(dtype=torch.float32, **options):
    return moved(ConvViT(**{"num_classes": 5, **SMALL, **options})).to(dtype)


def images_for(model, batch):
    return torch.randn(batch, model.in_chans, *model.img_size, dtype=model.pos_embed.dtype)


def export(module, images, strict=False):
    """The exported program, once it is certain that it holds no op of ours."""
    program = torch.export.export(module, (images,), dynamic_shapes=({0: BATCH},), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets and not [t for t in targets if "convmae" in t]
    return program


def check(program, module, *batches):
    """The program gives what the module gives, in float64."""
    for images in batches:
        torch.testing.assert_close(program(images), module(images), rtol=1e-12, atol=1e-12)


class WholeEncoder(torch.nn.Module):
    """The encoder of a pretraining model, where nothing is hidden."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        mask = ck.BlockMask.full(images.shape[0], self.model.grid, images.device)
        return self.model.forward_encoder(images, mask)


def whole_encoder(dtype):
    options = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    return WholeEncoder(moved(ConvMAE(**SMALL, **options)).to(dtype)).eval()


# -- torch.export ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "strict"), [*((v, False) for v in VARIANTS), ("token", True)])
@pytest.mark.thorough(but_every=7)
def test_an_exported_classifier_serves_every_batch(variant, strict):
    model = small(torch.float64, **VARIANTS[variant])
    program = export(model, images_for(model, 2), strict).module()
    check(program, model, images_for(model, 1), images_for(model, 7))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.thorough(but_every=5)
def test_exports_of_all_sizes(size):
    model = convmae.create_model(f"convvit_{size}", img_size=32, depth=(1, 1, 1), num_classes=3)
    model = model.double().eval()
    check(export(model, images_for(model, 2)).module(), model, images_for(model, 3))


@pytest.mark.thorough
def test_an_exported_program_can_be_saved(tmp_path):
    model = small(torch.float64)
    torch.export.save(export(model, images_for(model, 2)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    check(loaded, model, images_for(model, 4))


@pytest.mark.parametrize(
    ("indices", "strict"), [((0, 1, 2, 3), False), ((-1, 0), False), ((1,), True)]
)
@pytest.mark.thorough(but_every=3)
def test_exports_of_backbones(indices, strict):
    timm = pytest.importorskip("timm")
    convmae.register_timm()
    net = timm.create_model(
        "convvit_tiny", features_only=True, img_size=(48, 32), in_chans=1, out_indices=indices
    )
    net = moved(net).double()
    images = [torch.randn(n, 1, 48, 32, dtype=torch.float64) for n in (2, 5)]
    check(export(net, images[0], strict).module(), net, images[1])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_encoder_of_whole_images(strict):
    encoder = whole_encoder(torch.float64)
    program = export(encoder, images_for(encoder.model, 2), strict).module()
    check(program, encoder, images_for(encoder.model, 1), images_for(encoder.model, 5))


def test_gradient_checkpointing_is_not_exported():
    model = small(torch.float64)
    model.set_grad_checkpointing()
    check(export(model, images_for(model, 2)).module(), model, images_for(model, 3))


def test_a_pretraining_step_is_exported_with_a_dynamic_batch():
    class Loss(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images, noise):
            return self.model(images, 0.5, noise).loss

    model = whole_encoder(torch.float64).model
    loss = Loss(model)
    arguments = [(images_for(model, n), torch.rand(n, model.num_patches)) for n in (2, 5)]
    program = torch.export.export(loss, arguments[0], dynamic_shapes=({0: BATCH}, {0: BATCH}))
    torch.testing.assert_close(program.module()(*arguments[1]), loss(*arguments[1]))


def test_an_exported_encoder_refuses_masks_of_unknown_numbers():
    class Encoder(WholeEncoder):
        def forward(self, images, visible):
            return self.model.forward_encoder(images, ck.BlockMask.from_visible(visible))

    encoder = Encoder(whole_encoder(torch.float32).model)
    arguments = images_for(encoder.model, 2), torch.rand(2, 2, 4) < 0.9
    with pytest.raises(ValueError, match="mask does not know how many blocks.*an input of the pro"):
        torch.export.export(encoder, arguments)


# -- torch.compile and torch.jit.trace ------------------------------------------------------------


def test_compiled_models_use_our_ops():
    """What `torch.compile` sees is no export, whichever torch it is."""
    seen = set()

    def backend(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = small(torch.float64)
    images = images_for(model, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    check(compiled, model, images)
    assert any("gather_visible" in target for target in seen)
    assert any("masked_conv2d" in target for target in seen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_traced_classifier_serves_every_batch(variant):
    model = small(torch.float64, **VARIANTS[variant])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; shapes that are checked
        traced = torch.jit.trace(model, images_for(model, 2))
    assert not [n for n in traced.inlined_graph.nodes() if n.kind().startswith("convmae::")]
    check(traced, model, images_for(model, 1), images_for(model, 5))


# -- ONNX -----------------------------------------------------------------------------------------


def check_onnx(path, module, *batches):
    """onnxruntime's outputs are as near to float64's as PyTorch's; prints how they differ."""
    expected = [module(images) for images in batches]
    exact = [module.double()(images.double()) for images in batches]
    module.float()
    for images, ours, right in zip(batches, expected, exact, strict=True):
        lists = isinstance(ours, list)
        ours, right = (ours, right) if lists else ([ours], [right])
        for found, own, best in zip(run_onnx(path, images), ours, right, strict=True):
            difference, error = np.abs(found - own.numpy()).max(), (own - best).abs().max().item()
            print(f"batch {len(images)}: {difference:.1e}; PyTorch from float64: {error:.1e}")
            # Sums in another order, of as many numbers: an error like PyTorch's own, and a little.
            limit = 4 * error + 8 * torch.finfo(torch.float32).eps * best.abs().max().item()
            assert np.abs(found - best.numpy()).max() <= limit


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
@pytest.mark.thorough(but_every=5)
def test_onnxruntime_gives_the_logits(tmp_path, variant):
    model = small(**VARIANTS[variant])
    path = export_onnx(model, images_for(model, 2), tmp_path / "model.onnx")
    proto = check_plain(path)
    assert [value.name for value in proto.graph.input] == ["images"]
    check_onnx(path, model, images_for(model, 1), images_for(model, 6))


@pytest.mark.thorough
@torch.no_grad()
def test_onnxruntime_gives_the_maps(tmp_path):
    timm = pytest.importorskip("timm")
    convmae.register_timm()
    net = timm.create_model("convvit_tiny", features_only=True, img_size=(48, 32))
    net = moved(net)
    images = [torch.randn(n, 3, 48, 32) for n in (2, 5, 1)]
    path = export_onnx(net, images[0], tmp_path / "model.onnx")
    check_plain(path)
    check_onnx(path, net, *images[1:])


@pytest.mark.thorough
@torch.no_grad()
def test_onnxruntime_gives_the_latent_of_whole_images(tmp_path):
    encoder = whole_encoder(torch.float32)
    path = export_onnx(encoder, images_for(encoder.model, 2), tmp_path / "model.onnx")
    check_plain(path)
    check_onnx(path, encoder, images_for(encoder.model, 1), images_for(encoder.model, 5))
