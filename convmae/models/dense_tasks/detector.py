"""A detector: boxes, classes and masks of the objects in pictures."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.cnn.names import check_arguments, is_timm_name
from convmae.models.dense_tasks.targets import clip_targets
from convmae.models.task_names import DETECT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Target = dict[str, Tensor]
    Sizes = list[tuple[int, int]]

PYRAMIDS = ("fpn", "simple")
PAD_MULTIPLE = 32  # heights and widths of batches are padded to multiples of it
LEVELS_WITHOUT_REGIONS = 1  # the coarsest map of the pyramid only proposes


class Detector(nn.Module):
    """Mask R-CNN, or Faster R-CNN without masks, on a backbone, as ConvMAE's authors have it.

    A pyramid of maps from the backbone; a network that proposes boxes; and heads that tell of each
    proposal its class, its box and its mask. The parts are torchvision's. Defaults are those of the
    published detectors; names of options are torchvision's, where it has them.

    What is drawn in training, which anchors and regions count for the losses, comes from PyTorch's
    default generator of the device: seeded before a step, it gives the same step again, to the bit
    on a CPU; on a GPU gradients of RoIAlign are added up in any order.

    Args:
        backbone: maps `[N, C, h, w]` of pictures, finest first; see `create_backbone`.
        num_classes: classes, without the background.
        masks: whether there is a mask head.
        pyramid: "fpn" of maps of several strides; "simple", of one map of stride 16.
        width: channels of the pyramid and of the heads.
        norm: of pyramid and heads: "batch", "group" or "layer"; the simple pyramid has LayerNorms.
        anchor_sizes: side of the square anchor of each map of the pyramid, in pixels.
        aspect_ratios: height / width of the anchors at each position.
        rpn_convs: 3x3 convolutions of the proposing network.
        rpn_pre_nms_top_n_train: proposals of each map before suppression, in training.
        rpn_pre_nms_top_n_test: the same in evaluation.
        rpn_post_nms_top_n_train: proposals of a picture after suppression, in training.
        rpn_post_nms_top_n_test: the same in evaluation.
        rpn_nms_thresh: overlap (IoU) from which on the less likely of two proposals is dropped.
        rpn_fg_iou_thresh: overlap from which on an anchor is one of an object.
        rpn_bg_iou_thresh: overlap below which an anchor is one of the background.
        rpn_batch_size_per_image: anchors of a picture that count for the losses.
        rpn_positive_fraction: largest share of objects among them.
        canonical_size: side in pixels of a region that takes its features from the map of stride
            16; half that side takes the next finer map, and so on.
        box_convs: 3x3 convolutions of the box head.
        box_features: features of a region behind them.
        box_fg_iou_thresh: overlap from which on a region is one of an object.
        box_batch_size_per_image: regions of a picture that count for the losses.
        box_positive_fraction: largest share of objects among them.
        box_score_thresh: a detection has a higher score.
        box_nms_thresh: overlap from which on the less likely of two of a class is dropped.
        box_detections_per_img: most detections of a picture.
        mask_convs: 3x3 convolutions of the mask head.
        mask_batch_size_per_image: most regions of a picture that the mask head is trained on; None
            for all that have an object.
        square_pad: side in pixels of the square that batches are padded to, at least; None for
            the size of the pictures.

    Attributes:
        config: the arguments but `backbone`, as plain values; of a model of `create_detector`, all
            of its own.
        strides: pixels of the picture to a position of each map of the pyramid, a side.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        masks: bool = True,
        pyramid: str = "fpn",
        width: int = 256,
        norm: str = "batch",
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rpn_convs: int = 2,
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        canonical_size: float = 224.0,
        box_convs: int = 4,
        box_features: int = 1024,
        box_fg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        mask_convs: int = 4,
        mask_batch_size_per_image: int | None = None,
        square_pad: int | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in _ARGUMENTS}
        super().__init__()
        _check(given)
        self.config: dict[str, Any] = {key: _plain(value) for key, value in given.items()}
        self.num_classes, self.masks, self.square_pad = num_classes, masks, square_pad
        self.in_chans: int = backbone.in_chans  # type: ignore[assignment]
        self.backbone, self.pyramid, self.strides = _with_pyramid(backbone, pyramid, width, norm)
        if len(anchor_sizes) != len(self.strides):
            raise ValueError(
                f"anchor_sizes must be {len(self.strides)} numbers, one for each map of the "
                f"pyramid (strides {self.strides}), got {list(anchor_sizes)}"
            )
        self.rpn: Any = _proposal_network(self.config, self.strides)
        self.roi_heads: Any = _region_heads(self.config, self.strides)

    def forward(
        self,
        images: Tensor | list[Tensor],
        targets: list[Target] | None = None,
        image_sizes: Sizes | None = None,
    ) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            images: normalised, `[N, C, H, W]`, or a list of `[C, H_n, W_n]`, which are padded with
                zeros at the bottom and on the right.
            targets: in training, of each picture a dictionary of boxes float `[n, 4]`, corners
                x, y, x, y in pixels; labels int64 `[n]`, from 0; masks bool or uint8 `[n, H, W]`,
                where there is a mask head. `n` may be 0. Boxes are clipped to their pictures.
            image_sizes: `(height, width)` of each picture of a stack that is padded already.

        Returns:
            In training `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`, `loss_box_reg` and
            `loss_mask`, whose sum is to be minimised. In evaluation of each picture a dictionary of
            boxes `[n, 4]`, labels `[n]`, scores `[n]`, the most likely first, and, where there is a
            mask head, masks bool `[n, 1, H, W]` of the picture's size.

        Raises:
            ValueError: `targets` are missing, or one does not fit; the message names it.
        """
        if not self.training:
            found = self.detect(images, image_sizes)
            sizes = _sizes(images, image_sizes)
            return place_detections(found, sizes, sizes)
        if targets is None:
            raise ValueError("targets are missing: a detector in training needs them (or .eval())")
        batch, sizes = self.batch(images, image_sizes)
        padded = batch.shape[2], batch.shape[3]
        clipped = clip_targets(targets, sizes, padded, self.num_classes, self.masks)
        maps = self.feature_maps(batch)
        proposals, losses = self._propose(batch, maps, sizes, clipped)
        return losses | self.roi_heads(maps, proposals, sizes, clipped)[1]

    def detect(
        self, images: Tensor | list[Tensor], image_sizes: Sizes | None = None
    ) -> list[Target]:
        """Detections with masks of the size of a region: for `place_detections`.

        Args:
            images: as in `forward`.
            image_sizes: as in `forward`.

        Returns:
            Of each picture a dictionary of boxes `[n, 4]` in its pixels, labels `[n]`, scores `[n]`
            and, where there is a mask head, `mask_probabilities` `[n, 1, 28, 28]` of the positions
            in each box.

        Raises:
            ValueError: the detector is in training.
        """
        if self.training:
            raise ValueError("detect is for evaluation, but the detector is in training: .eval()")
        batch, sizes = self.batch(images, image_sizes)
        maps = self.feature_maps(batch)
        proposals, _ = self._propose(batch, maps, sizes, None)
        return self.roi_heads(maps, proposals, sizes)[0]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Maps `[N, width, h, w]` of the pyramid of a batch, finest first."""
        return self.pyramid(self.backbone(images))

    def batch(
        self, images: Tensor | list[Tensor], image_sizes: Sizes | None = None
    ) -> tuple[Tensor, Sizes]:
        """Pictures in one tensor, padded with zeros, and the `(height, width)` of each of them."""
        sizes = _sizes(images, image_sizes)
        listed = list(images)
        least = self.square_pad or 0
        height, width = (
            -(-max(least, *(x.shape[axis] for x in listed)) // PAD_MULTIPLE) * PAD_MULTIPLE
            for axis in (1, 2)
        )
        if isinstance(images, Tensor):
            return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2])), sizes
        padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in listed]
        return torch.stack(padded), sizes

    def _propose(
        self, images: Tensor, maps: list[Tensor], sizes: Sizes, targets: list[Target] | None
    ) -> tuple[list[Tensor], Target]:
        from torchvision.models.detection.image_list import ImageList

        named = {str(level): x for level, x in enumerate(maps)}
        return self.rpn(ImageList(images, sizes), named, targets)

    @property
    def trunk(self) -> nn.Module:
        """The backbone that was given, without a simple pyramid around it."""
        return self.backbone.net if self.config["pyramid"] == "simple" else self.backbone  # type: ignore[return-value]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks of the backbone forget what is inside them and compute it again."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` of the blocks of the backbone.

        The heads stay as they are: numbers of regions differ from step to step.

        Args:
            backend: as in `torch.compile`.
        """
        self.trunk.compile_blocks(backend)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Names of all parameters that the published recipes do not decay; biases are decayed.

        Those are what the backbone says, and the norms of pyramid and heads, unless they are
        LayerNorms, which the recipe of kind "vitdet" decays.
        """
        kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
        undecayed = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}  # type: ignore[operator]
        for name, module in self.named_modules():
            if isinstance(module, kinds) and not name.startswith("backbone."):
                undecayed |= {f"{name}.{key}" for key, _ in module.named_parameters()}
        return undecayed

    @property
    def num_layers(self) -> int:
        """Layers for layer decay, those of the backbone; pyramid and heads are in its last one."""
        return self.backbone.num_layers  # type: ignore[return-value]

    def layer_ids(self) -> dict[str, int]:
        """The layer of each parameter by its name, from 0; see `layer_ids` of the backbone."""
        of_backbone: dict[str, int] = self.backbone.layer_ids()  # type: ignore[operator]
        last = self.num_layers - 1
        return {
            name: of_backbone.get(name.removeprefix("backbone."), last)
            if name.startswith("backbone.")
            else last
            for name, _ in self.named_parameters()
        }


_ARGUMENTS = tuple(inspect.signature(Detector).parameters)[1:]


def place_detections(
    detections: list[Target],
    resized: Sizes,
    original: Sizes,
    one_scale: bool = False,
    threshold: float = 0.5,
) -> list[Target]:
    """Detections in the pixels of the pictures as they were before they were resized.

    Boxes are scaled, clipped to their picture, and left out where they are empty then. Nothing is
    rounded.

    Args:
        detections: of `Detector.detect`.
        resized: `(height, width)` of the pictures that the detector saw, without padding.
        original: `(height, width)` of the pictures to place them in.
        one_scale: both axes are scaled by the ratio of the longer sides, as in the published code
            of the detector of kind `detection`. Otherwise each has its own: they differ by how
            sizes were rounded.
        threshold: probability from which on a pixel belongs to the object.

    Returns:
        Dictionaries of boxes, labels, scores, and masks bool `[n, 1, H, W]` if there are any.
    """
    from convmae.models.dense_tasks.rcnn.masks import paste_masks

    placed = []
    for found, (rows, columns), (height, width) in zip(detections, resized, original):
        y, x = height / rows, width / columns
        if one_scale:
            x = y = max(height, width) / max(rows, columns)
        boxes = found["boxes"] * found["boxes"].new_tensor([x, y, x, y])
        border = boxes.new_tensor([width, height, width, height])
        boxes = boxes.clamp(min=0).minimum(border)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        result = {"boxes": boxes[kept], "labels": found["labels"][kept]}
        result["scores"] = found["scores"][kept]
        if "mask_probabilities" in found:
            probabilities = found["mask_probabilities"][kept]
            result["masks"] = paste_masks(probabilities, boxes[kept], (height, width), threshold)
        placed.append(result)
    return placed


def create_detector(name: str, num_classes: int, **options: Any) -> Detector:
    """`Detector(create_backbone(name, kind, ...), num_classes, ...)`, with fresh parameters.

    `convmae.create_model("detect:" + name, num_classes=...)` is the same.

    Args:
        name: `convvit_{tiny,small,base,large,huge}` or `timm:` and the name of a network of timm;
            with or without `detect:` before it.
        num_classes: classes, without the background.
        **options: arguments of `create_backbone`, but that `kind` is "detection" if not given and
            `img_size` is 1024; and those of `Detector`. For kind "vitdet" `pyramid` is "simple",
            `norm` "layer" and `square_pad` the larger side of `img_size`, if not given.

    Raises:
        ValueError: there is no such network, or an option does not fit.
        TypeError: there is no such option.
    """
    from convmae.models.dense_tasks.creation import SIZE_OPTIONS, create_backbone

    bare = name.removeprefix(DETECT)
    of_backbone = [
        parameter.name
        for parameter in inspect.signature(create_backbone).parameters.values()
        if parameter.name != "name" and parameter.kind is not parameter.VAR_KEYWORD
    ]
    of_backbone += SIZE_OPTIONS
    check_arguments(DETECT + bare, options, [*of_backbone, *_ARGUMENTS])
    defaults: dict[str, Any] = {"kind": "detection", "img_size": 1024, "in_chans": 3}
    trunk = defaults | {key: options[key] for key in of_backbone if key in options}
    heads = {key: value for key, value in options.items() if key in _ARGUMENTS}
    if trunk["kind"] == "vitdet" and not is_timm_name(bare):
        size = trunk["img_size"]
        side = size if isinstance(size, int) else max(size)
        heads = {"pyramid": "simple", "norm": "layer", "square_pad": side} | heads
    model = Detector(create_backbone(bare, **trunk), num_classes, **heads)
    model.config = {key: _plain(value) for key, value in trunk.items()} | model.config
    return model


def _with_pyramid(
    backbone: nn.Module, pyramid: str, width: int, norm: str
) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """The backbone, the pyramid behind it, and the strides of all maps.

    A simple pyramid is around its backbone, as in the published code, and nothing is behind it.
    """
    if pyramid == "simple":
        from convmae.models.dense_tasks.simple_pyramid import SimpleFeaturePyramid

        net: Any = backbone
        around = SimpleFeaturePyramid(net, width)
        return around, nn.Identity(), tuple(around.strides)
    from convmae.models.dense_tasks.rcnn.layers import FeaturePyramid, norm_layer

    channels: tuple[int, ...] = tuple(backbone.channels)  # type: ignore[arg-type]
    strides: tuple[int, ...] = tuple(backbone.strides)  # type: ignore[arg-type]
    if len(channels) < 2:
        raise ValueError(
            'pyramid must be "simple" for a backbone of one map (kind "vitdet"), got "fpn"'
        )
    behind = FeaturePyramid(channels, width, norm_layer(norm))
    return backbone, behind, (*strides, 2 * strides[-1])


def _proposal_network(config: dict[str, Any], strides: tuple[int, ...]) -> nn.Module:
    from convmae.models.dense_tasks.rcnn.proposals import Anchors, ProposalHead, ProposalNetwork

    ratios = config["aspect_ratios"]
    top_n = [
        {mode: config[f"rpn_{when}_nms_top_n_{short}"] for mode, short in _MODES}
        for when in ("pre", "post")
    ]
    return ProposalNetwork(
        Anchors(config["anchor_sizes"], ratios, strides),
        ProposalHead(config["width"], len(ratios), conv_depth=config["rpn_convs"]),
        fg_iou_thresh=config["rpn_fg_iou_thresh"],
        bg_iou_thresh=config["rpn_bg_iou_thresh"],
        batch_size_per_image=config["rpn_batch_size_per_image"],
        positive_fraction=config["rpn_positive_fraction"],
        pre_nms_top_n=top_n[0],
        post_nms_top_n=top_n[1],
        nms_thresh=config["rpn_nms_thresh"],
    )


_MODES = (("training", "train"), ("testing", "test"))


def _region_heads(config: dict[str, Any], strides: tuple[int, ...]) -> nn.Module:
    from convmae.models.dense_tasks.rcnn import region_heads as parts
    from convmae.models.dense_tasks.rcnn.layers import norm_layer
    from convmae.models.dense_tasks.rcnn.pooling import RegionPooling

    width, norm, classes = config["width"], norm_layer(config["norm"]), config["num_classes"]
    with_regions = strides[:-LEVELS_WITHOUT_REGIONS]

    def pooling(size: int) -> nn.Module:
        return RegionPooling(with_regions, size, config["canonical_size"])

    of_masks: dict[str, Any] = {}
    if config["masks"]:
        head, predictor = parts.mask_head(width, config["mask_convs"], classes, norm)
        of_masks = {"mask_roi_pool": pooling(parts.MASK_SIZE), "mask_head": head}
        of_masks["mask_predictor"] = predictor
    return parts.RegionHeads(
        mask_batch_size_per_image=config["mask_batch_size_per_image"],
        box_roi_pool=pooling(parts.BOX_SIZE),
        box_head=parts.box_head(width, config["box_convs"], config["box_features"], norm),
        box_predictor=parts.BoxPredictor(config["box_features"], classes),
        fg_iou_thresh=config["box_fg_iou_thresh"],
        bg_iou_thresh=config["box_fg_iou_thresh"],
        batch_size_per_image=config["box_batch_size_per_image"],
        positive_fraction=config["box_positive_fraction"],
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=config["box_score_thresh"],
        nms_thresh=config["box_nms_thresh"],
        detections_per_img=config["box_detections_per_img"],
        **of_masks,
    )


def _sizes(images: Tensor | list[Tensor], image_sizes: Sizes | None) -> Sizes:
    """`(height, width)` of each picture.

    Raises:
        ValueError: there are none, they are of other channels, or `image_sizes` do not fit them.
    """
    if not len(images):
        raise ValueError("images are empty, expected [N, C, H, W] or a list of [C, H, W]")
    shapes = [tuple(x.shape) for x in images]
    if any(len(shape) != 3 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"images must be [N, C, H, W], or a list of [C, H, W] with equal C, got {shapes}"
        )
    if image_sizes is None:
        return [(shape[1], shape[2]) for shape in shapes]
    sizes = [(int(height), int(width)) for height, width in image_sizes]
    larger = any(h > s[1] or w > s[2] or h < 1 or w < 1 for (h, w), s in zip(sizes, shapes))
    if len(sizes) != len(shapes) or larger:
        raise ValueError(f"image_sizes are {sizes}, but images have shapes {shapes}")
    return sizes


def _check(config: dict[str, Any]) -> None:
    """Raises `ValueError` unless numbers are in their ranges."""
    whole = [key for key in config if key.endswith(("_convs", "_image", "_img", "_train", "_test"))]
    for key in ("num_classes", "width", "box_features", "square_pad", *whole):
        value = config[key]
        optional = key in ("square_pad", "mask_batch_size_per_image")
        if optional and value is None:
            continue
        least = 0 if key in ("box_convs", "mask_convs") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key} must be a whole number from {least}, got {value!r}")
    for key in config:
        if key.endswith(("_thresh", "_fraction")) and not 0.0 <= config[key] <= 1.0:
            raise ValueError(f"{key} must be from 0 to 1, got {config[key]!r}")
    if config["rpn_bg_iou_thresh"] > config["rpn_fg_iou_thresh"]:
        raise ValueError(
            f"rpn_bg_iou_thresh {config['rpn_bg_iou_thresh']} must not be larger than "
            f"rpn_fg_iou_thresh {config['rpn_fg_iou_thresh']}"
        )
    for part in ("rpn", "box"):
        count, share = (
            config[f"{part}_{key}"] for key in ("batch_size_per_image", "positive_fraction")
        )
        if int(count * share) < 1:
            raise ValueError(
                f"{part}_batch_size_per_image {count} times {part}_positive_fraction {share} must "
                "be at least 1: nothing could be learned of objects"
            )
    if config["pyramid"] not in PYRAMIDS:
        raise ValueError(f"pyramid must be one of {', '.join(PYRAMIDS)}, got {config['pyramid']!r}")
    for key in ("anchor_sizes", "aspect_ratios"):
        if not config[key] or any(not value > 0 for value in config[key]):
            raise ValueError(f"{key} must be positive numbers, got {config[key]!r}")


def _plain(value: Any) -> Any:
    """A value as a file of JSON has it."""
    return list(value) if isinstance(value, tuple) else value
