"""Semantic segmentation: a backbone, a head that tells the class of each pixel, and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae.config.label_maps import IGNORED
from convmae.models.cnn.names import check_arguments, is_timm_name
from convmae.models.dense_tasks.creation import SIZE_OPTIONS, create_backbone
from convmae.models.dense_tasks.head_layers import ConvNorm, resized
from convmae.models.dense_tasks.light_head import LightHead
from convmae.models.dense_tasks.segmentation_losses import dice_loss, pixel_cross_entropy
from convmae.models.dense_tasks.sliding_windows import by_windows
from convmae.models.dense_tasks.upernet import FCNHead, UPerHead
from convmae.models.task_names import SEGMENT

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS: dict[str, type[UPerHead] | type[LightHead]] = {"upernet": UPerHead, "light": LightHead}
LOSSES = ("ce", "ce+dice")
OPTIONS = [
    *("head", "head_width", "aux_width", "dropout", "loss", "class_weights", "mean_over"),
]
MEANS = ("all", "labelled")
AUXILIARY_WEIGHT = 0.4  # of the auxiliary head in the loss, as officially
# Official widths, which a backbone with narrower maps has as wide as these.
UPERNET_WIDTH, AUXILIARY_WIDTH, LIGHT_WIDTH = 768, 256, 64


class Segmenter(nn.Module):
    """`head(backbone(images))`: logits of the class of every 4 x 4 pixels.

    The names of parameters are mmseg's: `backbone.*`, `decode_head.*`, `auxiliary_head.*`.
    It trains with batches of one picture too: a BatchNorm that gets a single value for each channel
    then, behind the pooling of the whole map to 1 x 1, takes its running statistics, which stay.

    Args:
        backbone: a module, from images `[N, C, H, W]` to a list of maps, finest first; it tells
            their `channels` and `strides`.
        num_classes: of labels, the background among them if it has one; 2 to 255.
        head: `"upernet"` as published, or `"light"`, much smaller, for CPUs.
        head_width: channels of the head; None for the official 768, or fewer where the coarsest map
            has fewer, and for 64 of the light head.
        aux_width: channels of the auxiliary head, which only helps to train; 0 for none. None for
            the official 256, or fewer where its map has fewer; the light head has none by default.
        dropout: share of channels that are dropped before the last layer of a head, in training.
        loss: `"ce"`, cross-entropy; or `"ce+dice"`, which adds a soft Dice loss: for targets that
            are small, which cross-entropy alone may leave out.
        class_weights: factors of the classes in the cross-entropy; None for 1.
        mean_over: the cross-entropy is a mean over `"all"` pixels, ignored ones included, as
            officially; or over `"labelled"` ones.

    Attributes:
        config: of a model by `create_segmenter`: its options, as plain values.
        num_classes: as given.
        in_chans: channels of the images.
        img_size: of a model by `create_segmenter`: height and width that it was made for.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    config: dict[str, Any]
    img_size: tuple[int, int]

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        head: str = "upernet",
        head_width: int | None = None,
        aux_width: int | None = None,
        dropout: float = 0.1,
        loss: str = "ce",
        class_weights: Sequence[float] | None = None,
        mean_over: str = "all",
    ) -> None:
        super().__init__()
        _check_options(num_classes, head, head_width, aux_width, dropout)
        _check_losses(loss, class_weights, mean_over, num_classes)
        self.backbone = backbone
        self.num_classes = num_classes
        self.in_chans: int = backbone.in_chans
        self.loss, self.mean_over = loss, mean_over
        self.class_weights = None if class_weights is None else tuple(map(float, class_weights))
        channels: tuple[int, ...] = tuple(backbone.channels)
        if len(channels) < 2:
            raise ValueError(
                f"backbone gives {len(channels)} map, expected two at least, of several strides"
            )
        upernet = head == "upernet"
        if head_width is None:
            head_width = min(UPERNET_WIDTH, channels[-1]) if upernet else LIGHT_WIDTH
        if aux_width is None:
            aux_width = min(AUXILIARY_WIDTH, channels[-2]) if upernet else 0
        self.decode_head = HEADS[head](channels, head_width, num_classes, dropout)
        self.auxiliary_head: FCNHead | None = None
        if aux_width:
            self.auxiliary_head = FCNHead(channels[-2], aux_width, num_classes, dropout)
        self.head_options: dict[str, Any] = {
            "num_classes": num_classes,
            "head": head,
            "head_width": head_width,
            "aux_width": aux_width,
            "dropout": dropout,
            "loss": loss,
            "class_weights": None if class_weights is None else list(self.class_weights or ()),
            "mean_over": mean_over,
        }

    # -- forward ----------------------------------------------------------------------------------

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Logits of images; with labels `losses(images, labels)`.

        A model that is wrapped for several processes has to be called for its losses this way.

        Args:
            images: floating `[N, in_chans, H, W]`, normalised; 32 pixels a side at least.
            labels: as in `losses`.

        Returns:
            Logits `[N, num_classes, h, w]` of the size of the finest map (`h = H / 4`), or losses.
        """
        if labels is not None:
            return self.losses(images, labels)
        self.check_images(images)
        return self.decode_head(self.backbone(images))

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What to minimise is the sum of these.

        `loss_decode`, the cross-entropy of the head, and `loss_auxiliary`, 0.4 times that of the
        auxiliary head; with `"ce+dice"` as well `loss_decode_dice` and `loss_auxiliary_dice`. By
        default the cross-entropy is the mean over all pixels, ignored ones included, as in the
        official code: see `pixel_cross_entropy`. Logits are brought to the size of the labels.

        Args:
            images: as in `forward`.
            labels: int64 `[N, H, W]` in `[0, num_classes)`; 255 is ignored.

        Returns:
            Names, and float32 scalars.

        Raises:
            TypeError, ValueError: images or labels do not fit the model. Of labels on a GPU their
                values are not looked at, as that would wait for it.
        """
        self.check_images(images)
        self._check_labels(images, labels)
        maps = self.backbone(images)
        size, strides = labels.shape[1:], self.backbone.strides
        logits = _at_size(self.decode_head(maps), size, strides[0])
        found = self._losses_of("decode", logits, labels, 1.0)
        if self.auxiliary_head is not None:
            logits = _at_size(self.auxiliary_head(maps[-2]), size, strides[-2])
            found |= self._losses_of("auxiliary", logits, labels, AUXILIARY_WEIGHT)
        return found

    def _losses_of(
        self, name: str, logits: Tensor, labels: Tensor, factor: float
    ) -> dict[str, Tensor]:
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        entropy = pixel_cross_entropy(logits, labels, weights, self.mean_over)
        found = {f"loss_{name}": factor * entropy}
        if self.loss == "ce+dice":
            found[f"loss_{name}_dice"] = factor * dice_loss(logits, labels)
        return found

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """Logits of every pixel, without gradients: `logits.argmax(1)` are the classes.

        Args:
            images: as in `forward`.
            window: height and width of windows that the pictures are seen through, one number for
                squares; logits of pixels in several windows are averaged, and pictures smaller than
                a window padded. None sees whole pictures. The published model was trained on, and
                predicts by, windows of 512.
            stride: pixels from one window to the next; None for two thirds of a window, 341 of 512
                as officially.

        Returns:
            Logits float32 `[N, num_classes, H, W]`.

        Raises:
            TypeError, ValueError: the images do not fit the model, or an argument cannot be.
        """
        self.check_images(images)
        if window is None:
            if stride is not None:
                raise ValueError(f"stride {stride} is of windows, but window is None")
            return self._pixels(images)
        windows = _pair("window", window)
        if stride is None:
            stride = (max(2 * windows[0] // 3, 1), max(2 * windows[1] // 3, 1))
        strides = _pair("stride", stride)
        if strides[0] > windows[0] or strides[1] > windows[1]:
            raise ValueError(
                f"stride {stride} is larger than window {window}, which leaves pixels out"
            )
        return by_windows(self._pixels, images, windows, strides)

    def _pixels(self, images: Tensor) -> Tensor:
        logits = self.decode_head(self.backbone(images))
        return _at_size(logits, images.shape[2:], self.backbone.strides[0])

    # -- checks -----------------------------------------------------------------------------------

    def check_images(self, images: Tensor) -> None:
        """The images fit the model.

        Raises:
            TypeError, ValueError: they do not.
        """
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating, got {images.dtype}; convmae.normalise makes them so"
            )
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must be [N, {self.in_chans}, H, W] for this model, got "
                f"{list(images.shape)}"
            )

    def _check_labels(self, images: Tensor, labels: Tensor) -> None:
        expected = [images.shape[0], *images.shape[2:]]
        if labels.dtype != torch.int64 or list(labels.shape) != expected:
            raise ValueError(
                f"labels must be int64 {expected} for these images, got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        if labels.device.type == "cpu":
            wrong = ((labels < 0) | (labels >= self.num_classes)) & (labels != IGNORED)
            if bool(wrong.any()):
                raise ValueError(
                    f"labels hold {int(labels[wrong][0])}, expected 0 to {self.num_classes - 1}, "
                    f"or {IGNORED} for pixels that are ignored"
                )

    # -- training ---------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks of the backbone are computed again for gradients, to save memory."""
        self.backbone.set_grad_checkpointing(enable)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` of the blocks of the backbone and of the convolutions of the heads.

        Args:
            backend: as in `torch.compile`.
        """
        if hasattr(self.backbone, "compile_blocks"):
            self.backbone.compile_blocks(backend)
        for head in (self.decode_head, self.auxiliary_head):
            for module in () if head is None else head.modules():
                if isinstance(module, ConvNorm):
                    module.compile(backend=backend, dynamic=False)

    def no_weight_decay(self) -> set[str]:
        """Names of all parameters that the official recipe does not decay: vectors among them."""
        of_backbone = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        heads = (x for x in self.named_parameters() if not x[0].startswith("backbone."))
        return of_backbone | {name for name, p in heads if p.dim() <= 1}

    @property
    def num_layers(self) -> int:
        """Groups of parameters that learn each at its own rate, from the first layers to the heads.

        A group `i` of `layer_ids` learns at `decay ** (num_layers - 1 - i)` times the rate.
        """
        return self.backbone.num_layers

    def layer_ids(self) -> dict[str, int]:
        """The group of each parameter by its name; those of the heads are in the last."""
        of_backbone = self.backbone.layer_ids()
        return {
            name: of_backbone[name.removeprefix("backbone.")]
            if name.startswith("backbone.")
            else self.num_layers - 1
            for name, _ in self.named_parameters()
        }


def create_segmenter(
    name: str,
    num_classes: int,
    img_size: int | tuple[int, int] = 512,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> Segmenter:
    """A `Segmenter` with fresh parameters: `Segmenter(create_backbone(name), num_classes)`.

    `convmae.create_model("segment:" + name, num_classes=...)` is the same.

    Args:
        name: the backbone, `convvit_{tiny,small,base,large,huge}` or `timm:` and the name of a
            convolutional network of timm; with or without `segment:` before it.
        num_classes: as in `Segmenter`.
        img_size: height and width of the pictures, or windows of them, that it is trained on.
        in_chans: their channels.
        drop_path_rate: stochastic depth of the last block of the backbone.
        **options: of `Segmenter`: `head`, `head_width`, `aux_width`, `dropout`, `loss`,
            `class_weights`, `mean_over`; and `embed_dim`, `depth`, `num_heads` or `mlp_ratio` other
            than those of a ConvViT's name.

    Raises:
        ValueError: there is no such backbone, or an argument does not fit.
        TypeError: there is no such argument.
    """
    bare = name.removeprefix(SEGMENT)
    known = [*OPTIONS, *(() if is_timm_name(bare) else SIZE_OPTIONS)]
    check_arguments(SEGMENT + bare, options, known)
    sizes = {key: options.pop(key) for key in SIZE_OPTIONS if key in options}
    size = _pair("img_size", img_size)
    shared: dict[str, Any] = {"in_chans": in_chans, "drop_path_rate": drop_path_rate}
    backbone = create_backbone(bare, "segmentation", img_size=size, **shared, **sizes)
    model = Segmenter(backbone, num_classes, **options)
    model.img_size = size
    plain = {key: list(v) if isinstance(v, Sequence) else v for key, v in sizes.items()}
    model.config = {"img_size": list(size)} | shared | plain | model.head_options
    return model


def _at_size(logits: Tensor, size: torch.Size, stride: int) -> Tensor:
    """Logits of a map as float32 of each pixel of the pictures.

    Where a stride does not divide a side, the map reaches beyond the picture on the right or at the
    bottom, and that part is cut off.
    """
    reach = [max(side * stride, pixels) for side, pixels in zip(logits.shape[2:], size)]
    return resized(logits.float(), (reach[0], reach[1]))[:, :, : size[0], : size[1]]


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(
            f"{name} must be a positive whole number, or (height, width), got {value!r}"
        )
    return pair[0], pair[1]


def _check_options(
    num_classes: int, head: str, head_width: int | None, aux_width: int | None, dropout: float
) -> None:
    if not isinstance(num_classes, int) or not 2 <= num_classes <= IGNORED:
        raise ValueError(
            f"num_classes must be a whole number from 2 (the background is a class) to {IGNORED}, "
            f"as label {IGNORED} is ignored, got {num_classes!r}"
        )
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    for name, width, least in (("head_width", head_width, 1), ("aux_width", aux_width, 0)):
        if width is not None and (not isinstance(width, int) or width < least):
            raise ValueError(f"{name} must be a whole number from {least}, got {width!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def _check_losses(
    loss: str, class_weights: Sequence[float] | None, mean_over: str, num_classes: int
) -> None:
    for name, value, known in (("loss", loss, LOSSES), ("mean_over", mean_over, MEANS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if class_weights is None:
        return
    fits = len(class_weights) == num_classes
    if not fits or any(not math.isfinite(w) or w < 0 for w in class_weights):
        raise ValueError(
            f"class_weights must be {num_classes} finite numbers from 0, one for each class, got "
            f"{list(class_weights)}"
        )
