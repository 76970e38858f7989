"""The numbers and names of the published detectors, which are detectron2's.

Recorded with the official code of ConvMAE's detector (Alpha-VL/ConvMAE at 4c97b4c), on weights,
pictures and boxes of `fill_dense.py`: the whole Mask R-CNN of the base model on 256 x 256 pixels,
with windows of 4 patches.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchvision")

from golden.dense import fill_dense
from torchvision.models.detection.image_list import ImageList

from convmae.models.dense_tasks.detector import create_detector
from convmae.models.dense_tasks.official_names import is_computed, official_names, own_names
from tests.support.paths import GOLDEN

CLASSES, SIZE, WINDOW, DIM, GRID = 80, 256, 4, 768, 14
LISTS = {
    "detection": "keys_convvitdet_base_mask_rcnn_1024.json",
    "vitdet": "keys_vitdet_base_mask_rcnn.json",
}


def blank_detector(kind, **options):
    with torch.device("meta"):
        return create_detector("convvit_base", CLASSES, kind=kind, **options)


@pytest.mark.parametrize("kind", LISTS)
def test_names_and_shapes_are_the_official_ones(kind):
    listed = json.loads((GOLDEN / "dense" / LISTS[kind]).read_text())
    state = blank_detector(kind).state_dict()
    names = official_names(state, kind)
    known = {name for name in listed if not is_computed(name)}
    assert set(names.values()) == known
    assert len(names) == len(known)  # one to one
    for name, official in names.items():
        assert list(state[name].shape) == listed[official][0], name
    assert own_names(listed, kind) == {official: name for name, official in names.items()}


def test_names_that_are_none_of_a_detector_are_refused():
    with pytest.raises(ValueError, match=r"decoder_pred.weight is no name of a tensor"):
        official_names(["decoder_pred.weight"], "detection")
    with pytest.raises(ValueError, match="kind must be one of detection, vitdet, got 'segment'"):
        own_names([], "segment")
    assert own_names(["optimizer.state", "roi_heads.box_head.fc1.bias"], "vitdet") == {
        "roi_heads.box_head.fc1.bias": "roi_heads.box_head.1.bias"
    }


def official_positions(grid):
    """The pretraining's table, bicubic to a grid, as the official loader has it."""
    table = torch.from_numpy(fill_dense.sincos(DIM, GRID, GRID)).unflatten(1, (GRID, GRID))
    table = F.interpolate(table.permute(0, 3, 1, 2), (grid, grid), mode="bicubic")
    return table.flatten(2).transpose(1, 2).contiguous()


@torch.no_grad()
def test_a_whole_mask_rcnn_is_that_of_the_official_code():
    recorded = np.load(GOLDEN / "dense" / "convvitdet_base_256_window4.npz")
    model = blank_detector("detection", img_size=SIZE, window_size=WINDOW)
    seed = int(recorded["seed"])
    state = {}
    for name, official in official_names(model.state_dict(), "detection").items():
        value = fill_dense.value(official, tuple(model.state_dict()[name].shape), seed)
        state[name] = (
            torch.zeros((), dtype=torch.int64) if value is None else torch.from_numpy(value)
        )
    state["backbone.pos_embed"] = official_positions(SIZE // 16)
    model.load_state_dict(state, assign=True)
    model.eval()

    def compare(name, found):
        """To 2e-5 of the largest value, and 1e-5 of the norm of all values."""
        wanted = torch.from_numpy(recorded[name])
        if f"{name}.norm" in recorded:
            norm = float(found.double().norm())
            assert norm == pytest.approx(float(recorded[f"{name}.norm"]), rel=1e-5), name
            found = found[tuple(slice(None, None, int(n)) for n in recorded[f"{name}.step"])]
        torch.testing.assert_close(
            found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()), msg=lambda m: name + m
        )

    images = torch.from_numpy(fill_dense.picture(SIZE, SIZE, seed))
    maps = model.feature_maps(images)
    for level, x in enumerate(maps, start=2):
        compare(f"p{level}", x)
    for level, (logits, deltas) in enumerate(zip(*model.rpn.head(maps)), start=2):
        compare(f"rpn_logits.p{level}", logits)
        compare(f"rpn_deltas.p{level}", deltas)
    heads, boxes = model.roi_heads, [torch.from_numpy(recorded["boxes"])]
    pooled = heads.box_roi_pool(maps, boxes)
    compare("box_pooled", pooled)
    compare("box_features", heads.box_head(pooled))
    scores, deltas = heads.box_outputs(maps, boxes)
    compare("box_scores", scores)
    compare("box_deltas", deltas)
    compare("mask_pooled", heads.mask_roi_pool(maps, boxes))
    compare("mask_logits", heads.mask_outputs(maps, boxes))
    generator = model.rpn.anchor_generator
    (anchors,) = generator(ImageList(images, [(SIZE, SIZE)]), maps)
    for level, cells in enumerate(generator.cell_anchors):
        compare(f"cell_anchors.{level}", cells)
    counts = recorded["anchor_counts"]
    assert len(anchors) == counts.sum()
    compare("first_anchors_p3", anchors[counts[0] : counts[0] + 9])
