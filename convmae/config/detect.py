"""The options of `convmae detect train`, `evaluate`, `predict` and `convert`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from convmae.config.checks import (
    TIMM,
    OptionError,
    check_choice,
    check_number,
    check_size,
    check_text,
)
from convmae.config.inference import InferenceConfig
from convmae.config.objects import ObjectConfig
from convmae.config.run import RunConfig

PYRAMIDS = ("fpn", "simple")
NORMS = ("batch", "group", "layer")
DETECT_SCHEDULES = ("cosine", "linear", "constant", "multistep")
MOST_CLASSES = 100_000
SIZE_UNIT = 32
# Of the detector itself, by the names of its arguments.
WHOLE = (
    *("width", "rpn_convs", "rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train"),
    *("rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "rpn_batch_size_per_image"),
    *("box_convs", "box_features", "box_batch_size_per_image", "box_detections_per_img"),
    *("mask_convs", "mask_batch_size_per_image"),
)
HEADS = (*WHOLE, "norm", "anchor_sizes", "canonical_size", "box_score_thresh", "box_nms_thresh")
# What of the options of all trainings means nothing here.
WITHOUT_EFFECT = {
    "min_crop": "pictures are not cropped but resized at random (--scale_min, --scale_max)",
}


@dataclass
class DetectTrainConfig(ObjectConfig, RunConfig):
    """Train a detector: the boxes, names and masks of the objects in pictures.

    A Mask R-CNN, or with --no_masks a Faster R-CNN. The defaults are the published recipe of
    ConvMAE-Base with a feature pyramid on COCO, for an effective batch of 32.
    """

    data_path: str = ""
    """A folder of pictures with objects in a known layout (--annotations and the options after it
    say where things lie in another), or YOLO's data.yaml."""
    model: str | None = None
    """The backbone: convvit_tiny, _small, _base, _large, _huge, or timm:NAME, a convolutional
    network of timm; by default what --init is of, else convvit_base."""
    init: str | None = None
    """Weights of the backbone to start from: a run's folder, a .safetensors file or an official
    .pth; by default random ones."""
    masks: bool = True
    """Learn the masks of the objects as well as their boxes."""
    pyramid: Literal["fpn", "simple"] = "fpn"
    """fpn is a feature pyramid of the maps of all stages; simple makes one of the last map of a
    ConvViT, as ViTDet does."""
    window_size: int | None = None
    """Patches in a row of the windows of attention; by default the published 16 with fpn, 14 with
    simple."""
    drop_path: float = 0.1
    """Stochastic depth of the last block of the backbone; it rises linearly from 0."""
    width: int = 256
    """Channels of the pyramid and of the heads."""
    norm: Literal["batch", "group", "layer"] | None = None
    """Norms of pyramid and heads; by default batch with fpn and layer with simple. group and layer
    do not depend on the batch, which suits batches of 1 or 2."""
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Sides of the anchors in pixels, one for each map of the pyramid, the finest first."""
    canonical_size: float = 224.0
    """Side in pixels of a box that takes its features from the map of stride 16."""
    rpn_convs: int = 2
    """3x3 convolutions of the proposing network."""
    rpn_pre_nms_top_n_train: int = 2000
    """Proposals of each map before suppression, in training."""
    rpn_post_nms_top_n_train: int = 1000
    """Proposals of a picture after suppression, in training."""
    rpn_pre_nms_top_n_test: int = 1000
    """Proposals of each map before suppression, in evaluation."""
    rpn_post_nms_top_n_test: int = 1000
    """Proposals of a picture after suppression, in evaluation."""
    rpn_batch_size_per_image: int = 256
    """Anchors of a picture that count for the losses."""
    box_convs: int = 4
    """3x3 convolutions of the box head."""
    box_features: int = 1024
    """Features of a region behind them."""
    box_batch_size_per_image: int = 512
    """Proposals of a picture that the box head is trained on."""
    box_score_thresh: float = 0.05
    """A detection has a higher score."""
    box_nms_thresh: float = 0.5
    """Overlap (IoU) from which on the less likely of two detections of a class is dropped."""
    box_detections_per_img: int = 100
    """Most detections of a picture."""
    mask_convs: int = 4
    """3x3 convolutions of the mask head."""
    mask_batch_size_per_image: int | None = None
    """Most proposals of a picture that the mask head is trained on; all that have an object if not
    given."""
    input_size: int | tuple[int, int] = 1024
    """Pixels of the canvas that pictures are resized and cut to, one number or height and width,
    multiples of 32."""
    scale_min: float = 0.1
    """Large-scale jitter: least factor on the size that fits into the canvas."""
    scale_max: float = 2.0
    """Largest factor."""
    keep_empty: bool = False
    """Train on pictures without an object as well."""
    batch_size: int = 4
    """Pictures in a batch of one process."""
    epochs: int = 25
    """Passes over the pictures."""
    blr: float = 6.4e-4
    """Base learning rate, for an effective batch of 256: 8e-5 at the published batch of 32."""
    warmup_epochs: float = 0.125
    """Epochs over which the learning rate rises linearly from --warmup_lr."""
    warmup_lr: float = 8e-8
    """Learning rate of the first step."""
    weight_decay: float = 0.1
    """For all parameters, biases too, but norms, position embeddings and tables of positions."""
    layer_decay: float = 1.0
    """Every layer of the backbone learns this many times more slowly than the one after it; the
    published recipe with simple has 0.8."""
    sched: Literal["cosine", "linear", "constant", "multistep"] = "cosine"  # type: ignore[assignment]
    """How the learning rate goes after the warm-up; multistep divides it by 10 at --decay_at."""
    decay_at: tuple[float, ...] = (0.889, 0.963)
    """Shares of the run at which multistep divides."""
    eval_every: float = 1
    """Epochs between evaluations on the val split; the last is always evaluated."""
    eval_batch_size: int | None = None
    """Pictures in a batch of an evaluation; batch_size if not given."""

    @property
    def size_unit(self) -> int:
        """Pixels that must divide `input_size`: the stride of the coarsest map that is pooled."""
        return SIZE_UNIT

    @property
    def schedules(self) -> tuple[str, ...]:
        """What `sched` may be."""
        return DETECT_SCHEDULES

    @property
    def kind(self) -> str:
        """The kind of backbone that the pyramid takes."""
        return "vitdet" if self.pyramid == "simple" else "detection"

    def heads(self) -> dict[str, Any]:
        """Arguments of the detector; what is None is left to it."""
        given = {name: getattr(self, name) for name in HEADS}
        return {name: value for name, value in given.items() if value is not None}

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        if not isinstance(self.data_path, str) or self.data_path.strip() in ("", "demo"):
            raise OptionError(
                f"--data_path must name a folder of pictures with objects, got {self.data_path!r}"
            )
        super().validate()
        self.check_objects(both=True)
        for name in ("model", "init"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        self.check_adapting("init")
        check_choice("pyramid", self.pyramid, PYRAMIDS)
        for name in (*WHOLE, "window_size", "eval_batch_size"):
            if getattr(self, name) is not None:
                at_least = 0 if name.endswith("_convs") else 1
                check_number(name, getattr(self, name), whole=True, at_least=at_least)
        if self.norm is not None:
            check_choice("norm", self.norm, NORMS)
        for size in self.anchor_sizes:
            check_number("anchor_sizes", size, above=0)
        for name in ("canonical_size", "scale_min", "eval_every"):
            check_number(name, getattr(self, name), above=0)
        check_number("scale_max", self.scale_max, at_least=self.scale_min)
        check_number("layer_decay", self.layer_decay, above=0, at_most=1)
        check_number("drop_path", self.drop_path, at_least=0, below=1)
        for name in ("box_score_thresh", "box_nms_thresh"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)
        for share in self.decay_at:
            check_number("decay_at", share, above=0, below=1)
        self._check_together()

    def _check_together(self) -> None:
        for name, why in WITHOUT_EFFECT.items():
            if getattr(self, name) != getattr(RunConfig, name):
                raise OptionError(
                    f"--{name} {getattr(self, name)} has no effect in detect train: {why}; leave "
                    "it out"
                )
        if self.torchcompile not in (None, "blocks"):
            raise OptionError(
                f"--torchcompile {self.torchcompile} compiles the whole model, but what the heads "
                "of a detector compute depends on what it finds; give --torchcompile blocks, which "
                "compiles the blocks of the backbone"
            )
        if self.pyramid == "simple" and (self.model or "").startswith(TIMM):
            raise OptionError(
                f"--pyramid simple is for the last map of a ConvViT, but --model is {self.model}; "
                "give --pyramid fpn"
            )


@dataclass
class DetectInferenceConfig(InferenceConfig):
    """What evaluating and predicting have in common."""

    batch_size: int = 4
    """Pictures in a batch of one process."""
    input_size: int | tuple[int, int] | None = None
    """Pixels of the canvas that pictures are resized to fit into, one number or height and width,
    multiples of 32; those it was trained at if not given."""
    box_score_thresh: float | None = None
    """A detection has a higher score; as in training if not given."""
    box_nms_thresh: float | None = None
    """Overlap (IoU) from which on the less likely of two detections of a class is dropped; as in
    training if not given."""
    box_detections_per_img: int | None = None
    """Most detections of a picture; as in training if not given."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        if self.crop_pct != InferenceConfig.crop_pct:
            raise OptionError(
                f"--crop_pct {self.crop_pct:g} has no effect: pictures are not cropped to detect "
                "objects in them; leave it out"
            )
        if self.picture_list is not None:
            raise OptionError(
                f"--picture_list {self.picture_list!r} has no effect here: which pictures a split "
                "has, --train_list and --val_list say; leave it out"
            )
        if self.input_size is not None:
            check_size(self.input_size, SIZE_UNIT)
        for name in ("box_score_thresh", "box_nms_thresh"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=0, at_most=1)
        if self.box_detections_per_img is not None:
            check_number("box_detections_per_img", self.box_detections_per_img, whole=True, above=0)

    def thresholds(self) -> dict[str, float]:
        """What of the detector's thresholds is given, by the names of its arguments."""
        names = ("box_score_thresh", "box_nms_thresh", "box_detections_per_img")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class DetectEvaluateConfig(ObjectConfig, DetectInferenceConfig):
    """Measure a detector: average precision of boxes and masks, as COCO does."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file of a detector."""
    data_path: str
    """Pictures with objects, as in convmae detect train. Classes are matched by name."""
    split: Literal["val", "train"] = "val"
    """Which of its splits."""
    output: str | None = None
    """A JSON file to write the figures to."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_text("data_path", self.data_path)
        self.check_objects(both=False)


@dataclass
class DetectPredictConfig(DetectInferenceConfig):
    """Find objects in pictures: results as COCO's JSON, and pictures with boxes and masks."""

    checkpoint: str
    """A run's folder, a checkpoint folder or a .safetensors file of a detector."""
    data_path: str | tuple[str, ...]
    """Pictures: folders, files, or a .txt file with a path in each line."""
    image_folder: str | None = None
    """Below --data_path the folder of the pictures; that itself if not given."""
    second_images: str | None = None
    """Below --data_path the folder of a second picture for each, with the same names: its channels
    are stacked after those of the first."""
    second_chans: int | None = None
    """Channels of a second picture; by default 1."""
    coco_ids: str | None = None
    """A COCO JSON file: results get the ids of its images and categories, by their names, as its
    evaluation needs. By default pictures and classes count from 1."""
    output: str | None = None
    """The JSON file of results to write; needed."""
    pictures: str | None = None
    """A folder to draw every picture into, with its boxes, masks, names and scores."""
    draw_score: float = 0.5
    """The least score of what is drawn; the JSON file has all."""
    overwrite: bool = False
    """Write over an output that exists."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data or the model.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        super().validate()
        check_number("draw_score", self.draw_score, at_least=0, at_most=1)
        if self.output is None or not self.output.lower().endswith(".json"):
            raise OptionError(f"--output must be a .json file to write, got {self.output!r}")
        for name in ("image_folder", "second_images", "coco_ids", "pictures"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        folders = self.image_folder is not None or self.second_images is not None
        if folders and len(self.paths) > 1:
            name = "second_images" if self.second_images is not None else "image_folder"
            raise OptionError(
                f"--{name} names a folder below --data_path, which must be one folder, got "
                f"{len(self.paths)} places"
            )
        if self.second_chans is not None:
            check_number("second_chans", self.second_chans, whole=True, above=0)


@dataclass
class DetectConvertConfig(ObjectConfig):
    """Convert annotations of objects (Pascal VOC, YOLO, or COCO with repairs) to COCO's JSON."""

    data_path: str
    """Pictures with objects, as in convmae detect train."""
    output: str
    """The JSON file to write."""
    split: Literal["train", "val"] = "train"
    """Which of the splits."""
    max_unreadable: float = 0.1
    """Share of pictures that may be missing or unreadable."""
    overwrite: bool = False
    """Write over an output that exists."""

    def validate(self) -> None:
        """Checks every option that can be checked without the data.

        Raises:
            OptionError: naming the option, what was found and what was expected.
        """
        self.check_reading()
        self.check_objects(both=False)
        check_text("data_path", self.data_path)
        check_choice("split", self.split, ("train", "val"))
        check_number("max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        if not self.output.lower().endswith(".json"):
            raise OptionError(f"--output must be a .json file to write, got {self.output!r}")
