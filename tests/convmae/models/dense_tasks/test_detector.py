"""The detector: its losses against plain formulas, its parts, what it takes and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchvision")

from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou

from convmae.models.dense_tasks.detector import Detector, place_detections
from convmae.models.dense_tasks.rcnn.masks import crop_masks, paste_masks
from convmae.models.dense_tasks.rcnn.pooling import RegionPooling
from convmae.models.dense_tasks.rcnn.proposals import Anchors
from tests.support.detection import rectangles, small_detector
from tests.support.small_backbone import SmallBackbone

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def nothing(size=64):
    """The target of a picture without any object."""
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, size, size, dtype=torch.bool),
    }


# -- learning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """A detector that has learned two pictures by heart, its pictures, targets and losses."""
    model = small_detector()
    images, targets = rectangles()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, images, targets, losses


def test_it_learns_rectangles(learned):
    model, images, targets, losses = learned
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        found = model.eval()(images)
    for detection, target in zip(found, targets):
        assert (detection["scores"].diff() <= 0).all()
        overlap = box_iou(target["boxes"], detection["boxes"])
        overlap[target["labels"][:, None] != detection["labels"]] = 0
        overlap[:, detection["scores"] < 0.3] = 0
        best, index = overlap.max(dim=1)
        assert (best > 0.6).all()
        masks = detection["masks"][index, 0]
        both, either = masks & target["masks"], masks | target["masks"]
        assert (both.sum((1, 2)) / either.sum((1, 2)) > 0.6).all()


def test_what_is_found_in_a_picture_does_not_depend_on_its_batch(learned):
    model, images, _, _ = learned
    model.eval()
    lone, pair = model([images[1]])[0], model(images)[1]
    assert len(lone["scores"])
    for key, value in lone.items():
        torch.testing.assert_close(pair[key].float(), value.float(), atol=1e-3, rtol=1e-4)


def test_nothing_is_found_in_the_padding(learned):
    model, images, targets, _ = learned
    model.eval()
    wide = F.pad(images[1], (0, 64, 0, 0))
    wide[:, :, 64:] = wide[:, :, :64]  # the same objects again, beyond the picture's border
    seen, cut = model([wide])[0], model([wide], image_sizes=[(64, 64)])[0]
    assert (seen["boxes"][:, 2] > 64).any()
    assert len(cut["boxes"])
    assert (cut["boxes"][:, 2] <= 64).all()
    assert cut["masks"].shape[2:] == (64, 64)


# -- losses -------------------------------------------------------------------------------------


def test_losses_of_proposals_are_those_of_the_formulas():
    network = small_detector(rpn_batch_size_per_image=8).rpn
    torch.manual_seed(1)
    logits, deltas, wanted = torch.randn(2 * 20, 1), torch.randn(40, 4), torch.randn(40, 4)
    labels = torch.zeros(40)
    labels[[3, 25, 26]] = 1.0
    labels[[7, 30]] = -1.0
    parts = [part.clone() for part in labels.split(20)]
    torch.manual_seed(2)
    positive, negative = network.fg_bg_sampler(parts)
    chosen = torch.cat(positive).bool() | torch.cat(negative).bool()
    assert int(chosen.sum()) == 16
    p = torch.sigmoid(logits[:, 0])
    entropy = -(labels * p.log() + (1 - labels) * (1 - p).log())[chosen].sum() / 16
    distance = (deltas - wanted).abs()[labels == 1].sum() / 16
    torch.manual_seed(2)
    found = network.compute_loss(logits, deltas, parts, list(wanted.split(20)))
    torch.testing.assert_close(torch.stack(found), torch.stack([entropy, distance]))


def test_the_divisor_of_the_losses_of_proposals_is_what_should_be_sampled():
    network = small_detector(rpn_batch_size_per_image=64).rpn
    labels = torch.tensor([1.0, 0.0, 0.0])
    logits, deltas = torch.zeros(3, 1), torch.full((3, 4), 0.5)
    entropy, distance = network.compute_loss(logits, deltas, [labels], [torch.zeros(3, 4)])
    torch.testing.assert_close(entropy, torch.tensor(3 * math.log(2) / 64))
    torch.testing.assert_close(distance, torch.tensor(4 * 0.5 / 64))


def test_losses_of_regions_are_those_of_the_formulas():
    """Of fixed outputs: cross-entropy with the background last, L1 of the offsets in the class."""
    model = small_detector(num_classes=3, box_batch_size_per_image=16, masks=False)
    heads = model.roi_heads
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
    targets = [{"boxes": boxes, "labels": torch.tensor([2, 0])}]
    proposals = torch.tensor([[2.0, 0, 20, 20], [40, 0, 60, 20], [0, 40, 20, 64]])
    outputs = {}

    def box_outputs(features, regions):
        torch.manual_seed(3)
        outputs["regions"] = regions[0]
        outputs["logits"] = torch.randn(len(regions[0]), 4)
        outputs["deltas"] = torch.randn(len(regions[0]), 12)
        return outputs["logits"], outputs["deltas"]

    heads.box_outputs = box_outputs
    losses = heads.losses([], [proposals], [(64, 64)], targets)
    regions = outputs["regions"]
    assert len(regions) == 5  # two of the truth are added to the three
    overlap, best = box_iou(regions, boxes).max(dim=1)
    is_object = overlap >= 0.5
    assert int(is_object.sum()) == 3
    classes = torch.where(is_object, targets[0]["labels"][best], 3)
    entropy = -outputs["logits"].log_softmax(1)[torch.arange(5), classes].mean()
    torch.testing.assert_close(losses["loss_classifier"], entropy)
    total = 0.0
    for row in torch.where(is_object)[0].tolist():
        x1, y1, x2, y2 = regions[row].tolist()
        u1, v1, u2, v2 = boxes[best[row]].tolist()
        w, h = x2 - x1, y2 - y1
        wanted = torch.tensor(
            [
                10 * ((u1 + u2) / 2 - (x1 + x2) / 2) / w,
                10 * ((v1 + v2) / 2 - (y1 + y2) / 2) / h,
                5 * math.log((u2 - u1) / w),
                5 * math.log((v2 - v1) / h),
            ]
        )
        start = 4 * int(classes[row])
        total += float((outputs["deltas"][row, start : start + 4] - wanted).abs().sum())
    assert float(losses["loss_box_reg"]) == pytest.approx(total / 5, rel=1e-5)


def test_the_background_is_the_last_class_of_the_box_head():
    model = small_detector(num_classes=2).eval()
    images, _ = rectangles()
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        for layer in (predictor.cls_score, predictor.bbox_pred):
            layer.weight.zero_()
        predictor.cls_score.bias.copy_(torch.tensor([0.0, 0.0, 20.0]))
        assert all(len(found["boxes"]) == 0 for found in model(images))
        # Boxes of the second class are a quarter as wide and high as proposals, which 64 limits.
        predictor.bbox_pred.bias[6:] = -5 * math.log(4)
        sides = []
        for label in range(2):
            predictor.cls_score.bias.copy_(20 * F.one_hot(torch.tensor(label), 3).float())
            found = model(images)
            assert all((detection["labels"] == label).all() for detection in found)
            boxes = torch.cat([detection["boxes"] for detection in found])
            sides.append(float((boxes[:, 2:] - boxes[:, :2]).max()))
    assert sides[0] > 32
    assert sides[1] < 16.01


# -- pictures without objects -------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_a_batch_without_any_object_can_be_learned_from(norm):
    model = small_detector(norm=norm)
    images, _ = rectangles()
    losses = model(images, [nothing(), nothing()])
    assert set(losses) == LOSSES
    torch.stack(list(losses.values())).sum().backward()
    values = {key: float(loss.detach()) for key, loss in losses.items()}
    assert values["loss_mask"] == values["loss_box_reg"] == values["loss_rpn_box_reg"] == 0.0
    assert values["loss_classifier"] > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # so processes agree on who has gradients
        assert parameter.grad.isfinite().all(), name
    for name, buffer in model.named_buffers():
        assert buffer.isfinite().all(), name


def test_a_picture_without_proposals_gives_its_frame():
    model = small_detector()
    images, targets = rectangles()
    with torch.no_grad():
        model.rpn.head.bbox_pred.bias.fill_(float("nan"))
    losses = model(images, [targets[0], nothing()])
    assert losses["loss_classifier"].isfinite()
    model.eval()
    assert [len(found["boxes"]) for found in model(images)] == [0, 0]


def test_pictures_with_and_without_objects_in_a_batch():
    losses = small_detector()(*rectangles(counts=(0, 2)))
    assert all(loss.isfinite() for loss in losses.values())
    assert float(losses["loss_mask"].detach()) > 0


# -- batches and targets --------------------------------------------------------------------------


def test_pictures_of_other_sizes_are_padded_at_the_bottom_and_on_the_right():
    model = small_detector()
    small, large = torch.ones(3, 40, 70), torch.ones(3, 64, 33)
    batch, sizes = model.batch([small, large])
    assert batch.shape == (2, 3, 64, 96)
    assert sizes == [(40, 70), (64, 33)]
    assert float(batch.sum()) == float(small.sum() + large.sum())
    assert batch[0, :, :40, :70].all()
    assert small_detector(square_pad=128).batch([small])[0].shape == (1, 3, 128, 128)
    found = model.eval()([small, large])
    assert [d["masks"].shape[2:] for d in found] == [(40, 70), (64, 33)]


def test_boxes_that_leave_the_picture_are_clipped():
    model = small_detector()
    images, targets = rectangles(counts=(1,))
    inside = targets[0]
    outside = {key: value.clone() for key, value in inside.items()}
    inside["boxes"][0] = torch.tensor([0.0, 10, 20, 64])
    outside["boxes"][0] = torch.tensor([-30.0, 10, 20, 90])
    far = torch.tensor([[70.0, 0, 90, 20]])
    outside["boxes"] = torch.cat([outside["boxes"], far])
    outside["labels"] = torch.cat([outside["labels"], torch.tensor([1])])
    outside["masks"] = torch.cat([outside["masks"], torch.zeros(1, 64, 64, dtype=torch.bool)])
    results = []
    for target in (inside, outside):
        torch.manual_seed(5)
        results.append(torch.stack(list(model(images, [target]).values())))
    assert torch.equal(results[0], results[1])
    assert len(outside["boxes"]) == 2  # what was given stays


def test_the_same_seed_gives_the_same_step():
    model = small_detector(mask_batch_size_per_image=2)
    images, targets = rectangles()
    model(images, targets)

    def step(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = torch.stack(list(model(images, targets).values())).sum()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        return [loss.detach(), *gradients]

    first, again, other = step(1), step(1), step(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])  # which regions count is drawn


WRONG_TARGETS = [
    ({"boxes": torch.zeros(2, 4)}, r"targets\[0\]\['boxes'\] must be float \[1, 4\] for 1 labels"),
    ({"boxes": torch.zeros(1, 4, dtype=torch.int64)}, "must be float"),
    ({"boxes": torch.tensor([[9.0, 0, 1, 5]])}, r"\[0\] is \[9.0, 0.0, 1.0, 5.0\], expected"),
    ({"boxes": torch.tensor([[0.0, 0, float("nan"), 5]])}, "expected finite"),
    ({"labels": torch.tensor([2])}, r"\['labels'\]\[0\] is 2, expected 0 to 1"),
    ({"labels": torch.tensor([-1])}, "the background has no label"),
    ({"labels": torch.tensor([1.0])}, "must be int64"),
    ({"masks": torch.zeros(1, 32, 64, dtype=torch.bool)}, r"\[1, 64, 64\], got torch.bool"),
    ({"masks": torch.zeros(1, 64, 64)}, "must be bool or uint8"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_TARGETS)
def test_wrong_targets_are_refused(change, message):
    images, targets = rectangles(counts=(1,))
    with pytest.raises(ValueError, match=message):
        small_detector()(images, [targets[0] | change])


def test_missing_targets_are_refused():
    model = small_detector()
    images, targets = rectangles()
    with pytest.raises(ValueError, match="targets are missing"):
        model(images)
    with pytest.raises(ValueError, match="targets are of 1 pictures, but there are 2"):
        model(images, targets[:1])
    del targets[1]["masks"]
    with pytest.raises(ValueError, match=r"targets\[1\] has no 'masks'.*masks=False"):
        model(images, targets)
    assert set(small_detector(masks=False)(images, targets)) == LOSSES - {"loss_mask"}


WRONG_OPTIONS = [
    ({"num_classes": 0}, "num_classes must be a whole number from 1"),
    ({"norm": "none"}, "norm must be one of batch, group, layer"),
    ({"pyramid": "bifpn"}, "pyramid must be one of fpn, simple"),
    ({"anchor_sizes": (8, 16)}, "anchor_sizes must be 5 numbers"),
    ({"anchor_sizes": (8, 16, 32, 64, -1)}, "anchor_sizes must be positive"),
    ({"box_nms_thresh": 1.5}, "box_nms_thresh must be from 0 to 1"),
    ({"box_batch_size_per_image": 2}, "nothing could be learned of objects"),
    ({"rpn_bg_iou_thresh": 0.9}, "must not be larger than rpn_fg_iou_thresh"),
    ({"rpn_convs": 0}, "rpn_convs must be a whole number from 1"),
    ({"width": 32.0}, "width must be a whole number"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_detector(**options)


# -- parts --------------------------------------------------------------------------------------


def test_pooling_takes_the_level_of_a_region_and_is_aligned():
    """On a linear map, bilinear samples are exact: features are the mean of what they cover."""
    strides = (4, 8, 16, 32)
    maps = []
    for stride in strides:
        centres = torch.arange(256 // stride) * stride + stride / 2
        maps.append((centres + 1000 * stride).expand(1, 1, len(centres), -1).contiguous())
    regions = torch.tensor(
        [[32.0, 40, 60, 75], [64, 64, 175, 175], [64, 64, 176, 176], [16, 16, 240, 240]]
    )
    pooling = RegionPooling(strides, 7)
    assert pooling.levels(regions).tolist() == [0, 0, 1, 2]
    assert pooling.levels(torch.tensor([[0.0, 0, 5000, 5000], [1, 1, 2, 2]])).tolist() == [3, 0]
    assert pooling(maps, [regions[:0]]).shape == (0, 1, 7, 7)
    found = pooling([x.expand(2, -1, -1, -1) for x in maps], [regions[:1], regions[1:]])
    for row, stride in enumerate((4, 4, 8, 16)):
        x1, _, x2, _ = regions[row].tolist()
        wanted = x1 + (torch.arange(7) + 0.5) * (x2 - x1) / 7 + 1000 * stride
        torch.testing.assert_close(found[row, 0], wanted.expand(7, -1), atol=0.02, rtol=1e-6)
    assert RegionPooling(strides, 7, canonical_size=56).levels(regions).tolist() == [1, 2, 3, 3]


def test_pooling_differs_from_torchvisions_default():
    torch.manual_seed(0)
    maps = {str(i): torch.randn(1, 2, 64 // 2**i, 64 // 2**i) for i in range(4)}
    regions = [torch.tensor([[32.0, 40, 60, 75]])]
    theirs = MultiScaleRoIAlign(list(maps), 7, 2)(maps, regions, [(256, 256)])
    ours = RegionPooling((4, 8, 16, 32), 7)(list(maps.values()), regions)
    assert (theirs - ours).abs().max() > 0.1


def test_anchors_are_not_rounded_and_have_the_strides_of_the_maps():
    anchors = Anchors((32, 64), (0.5, 1.0, 2.0), (4, 8))
    maps = [torch.zeros(1, 1, 25, 13), torch.zeros(1, 1, 13, 7)]  # of 100 x 52 pixels
    (found,) = anchors(ImageList(torch.zeros(1, 3, 100, 52), [(100, 52)]), maps)
    assert len(found) == 3 * (25 * 13 + 13 * 7)
    wide = torch.tensor([-22.627417, -11.313708, 22.627417, 11.313708])
    torch.testing.assert_close(found[0], wide)
    torch.testing.assert_close(found[3 * (2 * 13 + 5)], wide + torch.tensor([20.0, 8, 20, 8]))
    last = found[3 * (25 * 13 + 13 * 7) - 2]  # square, of the last position
    torch.testing.assert_close(last, torch.tensor([48.0 - 32, 96 - 32, 48 + 32, 96 + 32]))
    halves = [x.bfloat16() for x in maps]
    assert anchors(ImageList(torch.zeros(1, 3, 100, 52), [(100, 52)]), halves)[0].equal(found)


def test_masks_are_cropped_to_boxes_and_pasted_back():
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[1, 8:36, 10:24] = 1  # the left half of the second box
    boxes = torch.tensor([[0.0, 0, 64, 64], [10, 8, 38, 36]])
    cropped = crop_masks(masks, torch.tensor([0, 1]), boxes, 28)
    assert not cropped[0].any()
    assert torch.equal(cropped[1], (torch.arange(28) < 14).float().expand(28, -1))
    pasted = paste_masks(cropped[:, None], boxes, (64, 64))
    assert torch.equal(pasted[:, 0], masks.bool())
    beyond = torch.tensor([[50.0, -10, 90, 20]])
    assert int(paste_masks(torch.ones(1, 1, 28, 28), beyond, (64, 64)).sum()) == 14 * 20
    assert paste_masks(torch.ones(0, 1, 28, 28), beyond[:0], (5, 7)).shape == (0, 1, 5, 7)


def test_detections_are_placed_in_the_pictures_as_they_were():
    found = {
        "boxes": torch.tensor([[10.0, 10, 20, 30], [90, 5, 99, 9], [0, 0, 100, 50]]),
        "labels": torch.tensor([1, 0, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "mask_probabilities": torch.ones(3, 1, 28, 28),
    }
    (own,) = place_detections([found], [(33, 80)], [(100, 240)])  # of 33.33 rows
    torch.testing.assert_close(own["boxes"][0], torch.tensor([30, 1000 / 33, 60, 3000 / 33]))
    assert own["labels"].tolist() == [1, 1]  # the second is in the padding
    assert own["masks"].shape == (2, 1, 100, 240)
    assert own["masks"][1, 0, 1:-1, 1:-1].all()
    (one,) = place_detections([found], [(33, 80)], [(100, 240)], one_scale=True)
    torch.testing.assert_close(one["boxes"][0], torch.tensor([30.0, 30, 60, 90]))


def test_half_precision_keeps_boxes_in_float32():
    model = small_detector().eval()
    images, targets = rectangles()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
        losses = model.train()(images, targets)
    assert all(d["boxes"].dtype == torch.float32 for d in found)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_recipes_can_tell_what_is_decayed_and_how_deep_it_is():
    model = small_detector(norm="batch")
    undecayed = model.no_weight_decay()
    names = dict(model.named_parameters())
    assert undecayed <= names.keys()
    assert "backbone.stages.0.bias" in undecayed
    assert "pyramid.inner_blocks.0.1.weight" in undecayed
    assert "roi_heads.box_head.0.1.bias" in undecayed
    assert "rpn.head.cls_logits.bias" not in undecayed
    layers = model.layer_ids()
    assert layers.keys() == names.keys()
    assert layers["backbone.stages.1.weight"] == 1
    assert layers["roi_heads.box_predictor.cls_score.weight"] == model.num_layers - 1 == 4


def test_the_configuration_makes_the_same_detector():
    model = small_detector(masks=False, width=16)
    again = Detector(SmallBackbone(), **model.config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
