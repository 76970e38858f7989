"""Networks of timm by name."""

import pytest
import torch

import convmae

timm = pytest.importorskip("timm")


def create(name, method="spark", **options):
    given = {"img_size": 64, "decoder_width": 32}
    return convmae.create_model(f"timm:{name}", method=method, **(given | options))


@pytest.mark.parametrize("method", ["spark", "fcmae"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_a_name_gives_the_network(name, method):
    model = create(name, method, in_chans=4)
    plain = timm.create_model(name, num_classes=0, in_chans=4)
    assert model.network.state_dict().keys() == plain.state_dict().keys()
    assert model.maps.strides == ((4, 8, 16, 32) if method == "spark" else (32,))
    assert model.config["method"] == method
    again = convmae.create_model(f"timm:{name}", **model.config)
    assert type(again) is type(model) and again.config == model.config
    again.load_state_dict(model.state_dict())
    images, noise = torch.randn(3, 4, 64, 64), torch.rand(3, 4)
    output = again(images, noise=noise)
    output.loss.backward()
    # Every parameter that is trained gets a gradient, which training on many GPUs needs.
    assert all((p.grad is not None) == p.requires_grad for p in again.parameters())
    torch.testing.assert_close(model(images, noise=noise).loss, output.loss)


def test_maps_are_those_of_features_only():
    for name in ("resnet18", "convnext_atto", "densenet121"):
        model = create(name).eval()
        other = timm.create_model(name, features_only=True)
        assert model.maps.channels == tuple(other.feature_info.channels()[-4:])
        wrapped = convmae.SparK(other, img_size=64, decoder_width=32)
        assert wrapped.maps.channels == model.maps.channels


def test_options_of_the_network():
    rates = [m.drop_prob for m in create("convnext_atto", drop_path_rate=0.2).modules()
             if hasattr(m, "drop_prob")]  # fmt: skip
    assert max(rates) == pytest.approx(0.2)
    model = create("resnet18", output_stride=16)
    assert model.maps.strides == (4, 8, 16) and model.patch_size == 16 and model.grid == (4, 4)
    assert model.maps.channels == (64, 128, 512)  # the last of stride 16
    assert convmae.create_model("timm:resnet18", **model.config).patch_size == 16
    cut = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3))
    assert convmae.SparK(cut, img_size=64, decoder_width=32).patch_size == 16


def test_hooks_read_the_maps_of_a_network_without_forward_intermediates():
    from convmae.models.cnn.encoder import HOOKS, INTERMEDIATES, FeatureMaps

    network = timm.create_model("resnet18", num_classes=0).eval()
    modules = tuple(entry["module"] for entry in network.feature_info)
    images = torch.randn(1, 3, 64, 64)
    by_hooks = FeatureMaps(HOOKS, modules=modules).read_all(network, images)
    for ours, theirs in zip(
        by_hooks, FeatureMaps(INTERMEDIATES).read_all(network, images), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not network.layer1._forward_hooks


def test_list_models():
    assert "timm:resnet50" in convmae.list_models("timm:resnet*")
    assert not any(name.startswith("timm:") for name in convmae.list_models())
    assert convmae.full_name("timm:resnet50") == "timm:resnet50"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5O", {}, r"has no network 'resnet5O'; did you mean timm:resnet50"),
        ("qqqqqqqq", {}, r"has no network 'qqqqqqqq'; timm.list_models"),
        ("hf-hub:timm/resnet18", {}, r"has no network 'hf-hub:timm/resnet18'"),
        ("vit_tiny_patch16_224", {}, r"transformer or has attention .* expected a convolutional"),
        (
            "vit_tiny_patch16_224",
            {"img_size": 224, "method": "fcmae"},
            r"transformer or has attention \(blocks.0.attn is Attention\)",
        ),
        ("swin_tiny_patch4_window7_224", {"img_size": 224}, r"transformer or has attention"),
        ("resnet18", {"img_size": 72}, r"timm:resnet18: .*72 x 72 pixels"),
        ("resnet18", {"mask_size": 16}, r"multiple of the stride 32 .* got 16.*output_stride"),
        ("resnet18", {"method": "mae"}, r"method must be one of spark, fcmae, got 'mae'"),
        ("vgg11", {"drop_path_rate": 0.1}, r"timm:vgg11 cannot be made with drop_path_rate=0.1"),
    ],
)
def test_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)


def test_an_unknown_argument():
    with pytest.raises(TypeError, match="no argument 'decoder_with'; did you mean decoder_width"):
        create("resnet18", decoder_with=32)
    with pytest.raises(TypeError, match="no argument 'decoder_depth'"):
        create("resnet18", decoder_depth=2)
