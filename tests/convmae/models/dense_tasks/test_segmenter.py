"""The segmenter around a small backbone: heads, losses, windows, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convmae.models.dense_tasks.segmentation_losses import dice_loss, pixel_cross_entropy
from convmae.models.dense_tasks.segmenter import Segmenter
from convmae.models.dense_tasks.sliding_windows import by_windows, window_starts
from tests.support.small_backbone import SmallBackbone

CLASSES = 4


def small(**options: Any) -> Segmenter:
    """A segmenter whose statistics and biases are not those of a fresh one."""
    given = {"head_width": 12, "aux_width": 6, **options}
    model = Segmenter(SmallBackbone(), CLASSES, **given)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def labels_of(*shape: int) -> Tensor:
    labels = torch.randint(0, CLASSES, shape)
    labels[..., :5] = 255
    return labels


# -- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["upernet", "light"])
@torch.no_grad()
def test_logits_are_a_quarter_of_the_picture(head: str) -> None:
    model = small(head=head)
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, CLASSES, 16, 24)
    assert model(torch.randn(1, 3, 65, 33)).shape == (1, CLASSES, 17, 9)
    assert model.predict(torch.randn(2, 3, 65, 33)).shape == (2, CLASSES, 65, 33)


@torch.no_grad()
def test_the_light_head_adds_all_maps() -> None:
    """Written out for one picture: the head has no other parts."""
    model = small(head="light")
    head, images = model.decode_head, torch.randn(1, 3, 64, 64)
    total = torch.zeros(1, 12, 16, 16)
    for x, lateral in zip(model.backbone(images), head.lateral_convs):
        y = lateral.bn(lateral.conv(x))
        total += F.interpolate(y, size=(16, 16), mode="bilinear", align_corners=False)
    x = head.fusion.bn(head.fusion.conv(total.relu())).relu()
    torch.testing.assert_close(model(images), head.conv_seg(x))


def test_default_widths_are_the_official_ones_or_those_of_the_maps() -> None:
    options = Segmenter(SmallBackbone(), CLASSES).head_options
    assert (options["head_width"], options["aux_width"]) == (20, 16)
    model = Segmenter(SmallBackbone(), CLASSES, head="light")
    assert (model.head_options["head_width"], model.auxiliary_head) == (64, None)


def test_one_picture_can_be_trained_on() -> None:
    """The pooling to 1 x 1 leaves a value a channel: its running statistics stay and are used."""
    model = small().train()
    pooled = model.decode_head.psp_modules
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = torch.randn(2, 3, 64, 64), labels_of(2, 64, 64)
    sum(model.losses(images[:1], labels[:1]).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert pooled[0][1].conv.weight.grad.abs().sum() > 0
    after = model.state_dict()
    for part, stays in (("psp_modules.0.1", True), ("psp_modules.1.1", False)):
        for name in ("running_mean", "num_batches_tracked"):
            key = f"decode_head.{part}.bn.{name}"
            assert torch.equal(before[key], after[key]) == stays, key
    model.losses(images, labels)
    assert pooled[0][1].bn.num_batches_tracked == before[
        "decode_head.psp_modules.0.1.bn.num_batches_tracked"
    ].add(1)


# -- losses -------------------------------------------------------------------------------------


def test_cross_entropy_is_a_mean_over_all_pixels_or_the_labelled() -> None:
    logits = torch.randn(2, CLASSES, 6, 8, dtype=torch.float64)
    labels = labels_of(2, 6, 8)
    each = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=255)
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0])
    valid = labels != 255
    assert valid.sum() == 36 and pixel_cross_entropy(logits, labels).dtype == torch.float32
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), each.sum() / 96)
    found = pixel_cross_entropy(logits, labels, mean_over="labelled")
    torch.testing.assert_close(found, each.sum() / 36)
    weighted = (each[valid] * weights[labels[valid]]).sum() / 96
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, weights), weighted)


def test_nothing_is_labelled() -> None:
    logits = torch.randn(1, CLASSES, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), 255)
    for mean_over in ("all", "labelled"):
        assert pixel_cross_entropy(logits, labels, mean_over=mean_over) == 0
    assert dice_loss(logits, labels) == 0
    dice_loss(logits, labels).backward()
    assert logits.grad is not None and not logits.grad.any()


def test_dice_by_hand() -> None:
    """Shares of two classes in four pixels, of which the last is ignored; class 2 is in none."""
    shares = torch.tensor([[0.9, 0.2, 0.4, 0.5], [0.1, 0.7, 0.6, 0.5], [1e-9, 0.1, 1e-9, 1e-9]])
    shares = shares / shares.sum(0)
    labels = torch.tensor([0, 1, 1, 255]).view(1, 1, 4)
    first = 2 * shares[0, 0] / (shares[0, :3].sum() + 1)
    second = 2 * shares[1, 1:3].sum() / (shares[1, :3].sum() + 2)
    found = dice_loss(shares.log().view(1, 3, 1, 4), labels)
    torch.testing.assert_close(found, 1 - (first + second) / 2)


def test_losses_are_of_logits_at_the_size_of_the_labels() -> None:
    weights = (1.0, 0.5, 2.0, 1.0)
    model = small(loss="ce+dice", class_weights=weights, mean_over="labelled")
    images, labels = torch.randn(2, 3, 64, 96), labels_of(2, 64, 96)
    found = model.losses(images, labels)
    maps = model.backbone(images)
    expected = {}
    for name, factor, logits in (
        ("decode", 1.0, model.decode_head(maps)),
        ("auxiliary", 0.4, model.auxiliary_head(maps[2])),
    ):
        logits = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
        entropy = pixel_cross_entropy(logits, labels, torch.tensor(weights), "labelled")
        expected[f"loss_{name}"] = factor * entropy
        expected[f"loss_{name}_dice"] = factor * dice_loss(logits, labels)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(images, labels), expected)
    assert list(small(aux_width=0).losses(images, labels)) == ["loss_decode"]


# -- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
        (10, 4, 4, [0, 4, 6]),
    ],
)
def test_windows_begin_where_the_official_code_has_them(
    size: int, window: int, stride: int, starts: list[int]
) -> None:
    assert window_starts(size, window, stride) == starts
    assert len(starts) == max(size - window + stride - 1, 0) // stride + 1


def test_logits_of_windows_are_averaged() -> None:
    """Logits that tell where in its window a pixel is: the mean over windows, by hand."""
    images = torch.randn(1, 1, 3, 5)
    place = torch.arange(6.0).view(1, 1, 2, 3)
    found = by_windows(lambda x: x + place, images, (2, 3), (1, 2))
    rows = torch.tensor([0.0, 1.5, 3.0]).view(3, 1)  # row 1 is row 1 of one window, 0 of another
    columns = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    torch.testing.assert_close(found, images + rows + columns)


@torch.no_grad()
def test_small_pictures_are_padded_and_large_ones_seen_through_windows() -> None:
    model = small()
    images = torch.randn(2, 3, 40, 100)
    found = model.predict(images, window=64, stride=48)
    padded = F.pad(images, (0, 0, 0, 24))
    parts = [model.predict(padded[..., start : start + 64]) for start in (0, 36)]
    expected = torch.zeros(2, CLASSES, 64, 100)
    expected[..., :64] += parts[0]
    expected[..., 36:] += parts[1]
    expected[..., 36:64] /= 2
    torch.testing.assert_close(found, expected[:, :, :40])
    torch.testing.assert_close(
        model.predict(images, window=(64, 96)), model.predict(images, (64, 96), (42, 64))
    )
    whole = F.interpolate(model(padded), size=(64, 100), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.predict(padded), whole)


# -- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number from 2 .* to 255, .* got 1"),
        ({"num_classes": 256}, "num_classes must be"),
        ({"head": "unet"}, "head must be one of upernet, light, got 'unet'"),
        ({"head_width": 0}, "head_width must be a whole number from 1, got 0"),
        ({"aux_width": -1}, "aux_width must be a whole number from 0, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"loss": "dice"}, r"loss must be one of ce, ce\+dice, got 'dice'"),
        ({"mean_over": "some"}, "mean_over must be one of all, labelled, got 'some'"),
        ({"class_weights": (1.0, 2.0)}, r"class_weights must be 4 finite .* got \[1.0, 2.0\]"),
        ({"class_weights": (1.0, 2.0, -1.0, 0.0)}, "class_weights must be 4 finite"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(SmallBackbone(), **{"num_classes": CLASSES, **options})


def test_inputs_that_do_not_fit() -> None:
    model, images = small(), torch.randn(1, 3, 64, 64)
    with pytest.raises(TypeError, match=r"images must be floating, got torch.uint8"):
        model(images.byte())
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\] .* got \[1, 1, 64, 64\]"):
        model(images[:, :1])
    with pytest.raises(ValueError, match=r"labels must be int64 \[1, 64, 64\] .* \[1, 16, 16\]"):
        model.losses(images, labels_of(1, 16, 16))
    with pytest.raises(ValueError, match="labels hold 4, expected 0 to 3, or 255"):
        model.losses(images, torch.full((1, 64, 64), 4))
    with pytest.raises(ValueError, match="stride 65 is larger than window 64"):
        model.predict(images, window=64, stride=65)
    with pytest.raises(ValueError, match="stride 8 is of windows, but window is None"):
        model.predict(images, stride=8)
    with pytest.raises(ValueError, match=r"window must be .* got \(64, 0\)"):
        model.predict(images, window=(64, 0))


# -- training ----------------------------------------------------------------


def test_layers_and_decay() -> None:
    model = small()
    ids = model.layer_ids()
    assert ids.keys() == dict(model.named_parameters()).keys()
    assert ids["backbone.stages.1.weight"] == 1
    assert {i for name, i in ids.items() if not name.startswith("backbone.")} == {4}
    undecayed = model.no_weight_decay()
    assert {n for n in undecayed if n.startswith("backbone.")} == {"backbone.stages.0.bias"}
    assert {"decode_head.conv_seg.bias", "auxiliary_head.convs.0.bn.weight"} <= undecayed
    assert "decode_head.conv_seg.weight" not in undecayed
