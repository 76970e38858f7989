"""What evaluating and predicting with a segmenter share: the model, and how it sees pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.commands.inference import Loaded
from convmae.config import OptionError, for_option
from convmae.config.checks import as_pair
from convmae.data.classes import ClassNumbers
from convmae.models.task_names import SEGMENT
from convmae.records.folder import RunFolder
from convmae.tasks.segment_evaluation import Windows
from convmae.training.machine import pick_dtype
from convmae.weights.checkpoint import open_weights

if TYPE_CHECKING:
    import torch

    from convmae.config.segment import SegmentInferenceConfig
    from convmae.data.classes import ClassNames

LEAST_WINDOW = 32  # pixels that the backbones need


def load_segmenter(
    config: SegmentInferenceConfig, device: torch.device
) -> tuple[Loaded, dict[str, Any]]:
    """The segmenter of `--checkpoint`, and the options of its run, empty where they are not there.

    Raises:
        OptionError: there is none, or it is another kind of model.
    """
    with for_option("checkpoint"):
        weights = open_weights(config.checkpoint)
        if not weights.model.startswith(SEGMENT):
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {weights.model}, which does not segment; "
                "expected what convmae segment train wrote"
            )
        model = weights.build_model(device)
        statistics = weights.statistics
    dtype, _ = pick_dtype(config.amp, device)
    learnt = RunFolder.of(weights.path.resolve().parent.parent).read_options()
    return Loaded(weights, model, statistics, device, dtype), learnt


def windows_of(config: SegmentInferenceConfig, model: Any, learnt: dict[str, Any]) -> Windows:
    """How pictures are seen: as the options say, else as the run of the checkpoint was told.

    Raises:
        OptionError: windows that are too small for the model, or leave pixels out.
    """
    window = model.img_size if config.window is None else as_pair(config.window)
    if min(window) < LEAST_WINDOW:
        raise OptionError(
            f"--window {window[0]} x {window[1]} is too small; expected {LEAST_WINDOW} pixels a "
            "side at least"
        )
    stride = None if config.stride is None else as_pair(config.stride)
    if stride is not None and (stride[0] > window[0] or stride[1] > window[1]):
        raise OptionError(
            f"--stride {stride[0]} x {stride[1]} is larger than the windows of {window[0]} x "
            f"{window[1]} pixels, which leaves pixels out"
        )
    short = config.short_side
    if short is None:
        told = learnt.get("short_side")
        short = told if isinstance(told, int) else min(model.img_size)
    return Windows(short or None, window, stride)


def class_names(loaded: Loaded) -> ClassNames:
    """The names of the classes in a checkpoint, their numbers where it has none.

    Raises:
        OptionError: it has another number of names than of classes.
    """
    known, count = loaded.weights.classes, int(loaded.model.num_classes)
    if known is None:
        return ClassNumbers.of(count)
    if len(known) != count:
        raise OptionError(
            f"--checkpoint {loaded.weights.path} names {len(known)} classes, but its model has "
            f"{count}"
        )
    return known
