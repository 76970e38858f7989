"""Detectors by name, on all kinds of backbones; programs and ONNX files of them."""

import json

import pytest
import torch

pytest.importorskip("torchvision")

import convmae
from convmae.models.dense_tasks.rcnn.fixed_detector import FixedDetector
from tests.support.detection import SIZES, rectangles, small_detector
from tests.support.onnx_files import check_plain, run_onnx

KINDS = [
    ("convvit_tiny", {"kind": "detection", "window_size": 2, "img_size": 64, "norm": "batch"}),
    ("convvit_tiny", {"kind": "vitdet", "window_size": 2, "img_size": 64, "norm": "layer"}),
    ("timm:resnet18", {}),
]


@pytest.mark.parametrize(("name", "options"), KINDS, ids=["detection", "vitdet", "timm"])
def test_detectors_by_name_learn_and_detect(name, options):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = convmae.create_detector(name, num_classes=2, **(SIZES | options))
    assert isinstance(model, convmae.Detector)
    images, targets = rectangles(counts=(1,))
    losses = model([images[0, :, :50]], [t | {"masks": t["masks"][:, :50]} for t in targets])
    torch.stack(list(losses.values())).sum().backward()
    unused = {f"backbone.{name}" for name in getattr(model.trunk, "unused_parameters", ())}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and key not in unused:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    with torch.no_grad():
        (found,) = model.eval()([images[0, :, :50]])
    assert found["masks"].shape[2:] == (50, 64)
    config = json.loads(json.dumps(model.config))
    again = convmae.create_model(f"detect:{name}", **config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())


def test_what_a_kind_has_if_nothing_else_is_said():
    with torch.device("meta"):
        own = convmae.create_model("detect:convvit_tiny", num_classes=3, img_size=128)
        plain = convmae.create_model("detect:convvit_tiny", num_classes=3, kind="vitdet")
    assert (own.config["pyramid"], own.config["norm"], own.config["square_pad"]) == (
        *("fpn", "batch"),
        None,
    )
    assert (plain.config["pyramid"], plain.config["norm"], plain.config["square_pad"]) == (
        *("simple", "layer"),
        1024,
    )
    assert own.config["img_size"] == 128
    assert own.trunk is own.backbone
    assert plain.trunk is plain.backbone.net


def test_names_of_detectors():
    assert "detect:convvit_tiny" in convmae.list_models("detect:*")
    with pytest.raises(ValueError, match="there is no backbone 'convvit_tinny'"):
        convmae.create_model("detect:convvit_tinny", num_classes=2)
    with pytest.raises(TypeError, match="has no argument 'anchor_size'; did you mean anchor_sizes"):
        convmae.create_detector("convvit_tiny", num_classes=2, anchor_size=(8,))
    with pytest.raises(ValueError, match="pyramid must be"):
        convmae.create_detector("convvit_tiny", num_classes=2, kind="vitdet", pyramid="fpn")


# -- programs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy():
    """A detector that finds much in any picture, and a picture."""
    model = small_detector(box_score_thresh=0.3, box_detections_per_img=60).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.normal_(0, 0.5)
        model.rpn.head.bbox_pred.weight.normal_(0, 0.1)
    return model, rectangles(counts=(2,))[0]


def assert_same(rows, found):
    """Rows of `FixedDetector`, of one picture, and a detection of `Detector.detect`."""
    count = len(found["scores"])
    assert count > 10
    torch.testing.assert_close(rows["boxes"][0, :count], found["boxes"], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(rows["scores"][0, :count], found["scores"], atol=1e-4, rtol=0)
    assert torch.equal(rows["labels"][0, :count], found["labels"])
    masks = found["mask_probabilities"][:, 0]
    torch.testing.assert_close(rows["mask_probabilities"][0, :count], masks, atol=1e-4, rtol=0)
    assert (rows["labels"][0, count:] == -1).all()
    assert not rows["scores"][0, count:].any()
    assert not rows["boxes"][0, count:].any()


@torch.no_grad()
@pytest.mark.thorough
def test_a_program_and_an_onnx_file_detect_the_same(busy, tmp_path):
    model, picture = busy
    fixed = FixedDetector(model)
    program = torch.export.export(fixed, (picture,))
    other = picture.flip(2)
    for given in (picture, other):
        (found,) = model.detect(given)
        assert_same(fixed(given), found)
        assert_same(program.module()(given), found)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = tmp_path / "detector.onnx"
    names = ["boxes", "labels", "scores", "mask_probabilities"]
    torch.onnx.export(program, (), path, dynamo=True, output_names=names, verbose=False)
    check_plain(path)
    rows = dict(zip(names, map(torch.from_numpy, run_onnx(path, other))))
    assert_same(rows, model.detect(other)[0])


@torch.no_grad()
def test_a_program_of_boxes_alone_where_little_is_found():
    model = small_detector(masks=False, box_score_thresh=0.99).eval()
    rows = FixedDetector(model)(rectangles()[0])
    assert set(rows) == {"boxes", "labels", "scores"}
    assert rows["boxes"].shape == (2, 100, 4)
    assert (rows["labels"] == -1).all()


def test_detecting_in_training_is_refused():
    with pytest.raises(ValueError, match=r"detect is for evaluation.*\.eval"):
        small_detector().detect(rectangles()[0])


def test_wrong_pictures_are_refused():
    model = small_detector().eval()
    with pytest.raises(ValueError, match="images are empty"):
        model([])
    with pytest.raises(ValueError, match="with equal C"):
        model([torch.zeros(3, 64, 64), torch.zeros(1, 64, 64)])
    with pytest.raises(ValueError, match=r"image_sizes are \[\(65, 64\)\]"):
        model(torch.zeros(1, 3, 64, 64), image_sizes=[(65, 64)])
