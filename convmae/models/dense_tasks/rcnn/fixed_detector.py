"""A detector that gives as many rows for every picture, so that programs of it can be exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms

if TYPE_CHECKING:
    from convmae.models.dense_tasks.detector import Detector

CANDIDATES = 1000  # detections of a picture, the most likely, that are compared with each other
SMALLEST = 1e-2  # side of a detection in pixels, as in torchvision
NONE = -1.0  # score of what is no proposal and no detection


class FixedDetector(nn.Module):
    """`Detector.detect` for `torch.export` and ONNX: pictures of one size, outputs of one shape.

    What is found is the same, as long as a picture has no more than `CANDIDATES` detections above
    the least score before those that overlap are dropped.

    Args:
        detector: whose modules it shares, in evaluation.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Detections of normalised pictures `[N, C, H, W]`, the most likely first.

        Returns:
            With `D = box_detections_per_img`: boxes `[N, D, 4]`, labels `[N, D]`, scores `[N, D]`,
            and, where there is a mask head, `mask_probabilities` `[N, D, 28, 28]`. Rows behind the
            last detection have label -1, score 0 and an empty box.
        """
        model = self.detector
        batch, sizes = model.batch(images)
        maps = model.feature_maps(batch)
        regions, real = self._proposals(batch, maps, sizes)
        heads = model.roi_heads
        logits, deltas = heads.box_outputs(maps, regions)
        counts = [len(r) for r in regions]
        outputs = zip(logits.split(counts), deltas.split(counts), regions, real, sizes)
        found = [self._detections(*of_picture) for of_picture in outputs]
        boxes, labels, scores = (torch.stack(part) for part in zip(*found))
        result = {"boxes": boxes, "labels": labels, "scores": scores}
        if model.masks:
            masks = heads.mask_outputs(maps, list(boxes)).sigmoid()
            rows = torch.arange(len(masks), device=masks.device)
            chosen = masks[rows, labels.flatten().clamp(min=0)]
            result["mask_probabilities"] = chosen.unflatten(0, labels.shape)
        return result

    def _proposals(
        self, images: Tensor, maps: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each picture as many boxes `[P, 4]`, and which of them are proposals."""
        rpn = self.detector.rpn
        logits, deltas = rpn.head(maps)
        anchors = rpn.anchor_generator(ImageList(images, sizes), maps)
        counts = [x.shape[1] * x.shape[2] * x.shape[3] for x in logits]
        flat, offsets = concat_box_prediction_layers(logits, deltas)
        flat = flat.reshape(len(images), -1)
        decoded = rpn.box_coder.decode(offsets, anchors).reshape(len(images), -1, 4)
        top = rpn._get_top_n_idx(flat, counts)
        levels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)]).to(flat.device)
        regions, real = [], []
        for score, boxes, index, size in zip(flat.sigmoid(), decoded, top, sizes):
            boxes = clip_boxes_to_image(boxes[index], size)
            score = _unless_small(score[index], boxes, rpn.min_size)
            most = min(rpn.post_nms_top_n(), len(score))
            kept = _suppress(boxes, score, levels[index], rpn.nms_thresh, most)
            regions.append(boxes[kept[0]])
            real.append(kept[1])
        return regions, real

    def _detections(
        self, logits: Tensor, deltas: Tensor, regions: Tensor, real: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes `[D, 4]`, labels `[D]` and scores `[D]` of a picture."""
        heads, classes = self.detector.roi_heads, self.detector.num_classes
        boxes = heads.box_coder.decode(deltas, [regions]).reshape(-1, 4)
        boxes = clip_boxes_to_image(boxes, size)
        score = logits.softmax(1)[:, :classes]
        score = torch.where(real[:, None], score, NONE).flatten()
        score = _unless_small(score, boxes, SMALLEST)
        most = heads.detections_per_img
        score, index = score.topk(min(CANDIDATES, len(score)))
        boxes, labels = boxes[index], index % classes
        rows, real = _suppress(boxes, score, labels, heads.nms_thresh, most)
        score = score[rows]
        real = real & (score > heads.score_thresh)
        return (
            torch.where(real[:, None], boxes[rows], 0.0),
            torch.where(real, labels[rows], -1),
            torch.where(real, score, 0.0),
        )


def _unless_small(score: Tensor, boxes: Tensor, side: float) -> Tensor:
    """The scores, `NONE` for boxes with a smaller side."""
    return torch.where(((boxes[:, 2:] - boxes[:, :2]) >= side).all(1), score, NONE)


def _suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """`batched_nms(boxes, scores, groups, threshold)[:count]`, filled up with the first row.

    Args:
        boxes: `[R, 4]`.
        scores: `[R]`.
        groups: int64 `[R]`; boxes of different groups do not suppress each other.
        threshold: overlap from which on the less likely is dropped.
        count: rows of the result.

    Returns:
        int64 `[count]`, and bool `[count]`: which of them are kept boxes with a score.
    """
    shifted = boxes + (groups.to(boxes.dtype) * (boxes.max() + 1))[:, None]
    kept = nms(shifted, scores, threshold)
    rows = torch.cat([kept, kept.new_zeros(count)]).narrow(0, 0, count)
    real = torch.arange(count, device=boxes.device) < kept.shape[0]
    return rows, real & (scores[rows] > NONE)
