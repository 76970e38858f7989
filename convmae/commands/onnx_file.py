"""`convmae convert --output model.onnx`: a classifier or an encoder for other runtimes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae.config import OptionError, WeightsError, for_option
from convmae.config.checks import as_pair
from convmae.data import Statistics
from convmae.files import replacing
from convmae.models import ConvViT
from convmae.models.cnn.classifier import TimmClassifier
from convmae.models.cnn.names import is_timm_name
from convmae.models.dense_tasks.segmenter import Segmenter
from convmae.models.task_names import DETECT, split_task
from convmae.weights.checkpoint import WEIGHTS, Weights, open_weights
from convmae.weights.dense_conversion import is_dense
from convmae.weights.foreign import open_foreign
from convmae.weights.networks import encoder_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae.config import ConvertConfig

ONNX = ".onnx"
OPSET = 20  # the first with GELU as one operator
LARGEST = 2**31 - 2**20  # bytes that one file holds, as its format counts them, less its graph
# Of float32 kernels that add up in another order: convvit_tiny and convvit_base differ by 8e-7 of
# their largest output at 224 x 224 pixels. Trained weights may lose more digits; a hundred times is
# left for them.
TOLERANCE = 1e-4


@dataclass
class OnnxReport:
    """What was written.

    Attributes:
        checkpoint: the file read, and in words what it is.
        output: the file written.
        model: the model's name for `convmae.create_model`.
        inputs: name and shape of the input, in words.
        outputs: likewise of the output.
        difference: the largest difference of an output of onnxruntime from ours, over the largest
            output, at batches of 1 and 3 random images; None where onnxruntime is not installed.
        notes: anything else to know.
    """

    checkpoint: str
    output: Path
    model: str
    inputs: str
    outputs: str
    difference: float | None
    notes: list[str]

    def __str__(self) -> str:
        compared = "onnxruntime is not installed: the outputs were not compared with PyTorch's"
        if self.difference is not None:
            compared = (
                f"onnxruntime gives PyTorch's outputs: largest difference {self.difference:.1e} of "
                "the largest output, at batches of 1 and 3 images"
            )
        return "\n".join(
            [
                f"read {self.checkpoint}",
                f"wrote {self.output}: {self.model}, opset {OPSET}, {self.inputs} -> "
                f"{self.outputs}, with any batch",
                compared,
                *(f"note: {note}" for note in self.notes),
            ]
        )


class _Features(nn.Module):
    """What an encoder without a classifier gives: normed tokens, or the last map of a network."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W] -> [N, gh * gw, D]`, in raster order; `[N, D, h, w]` of timm's."""
        return self.model.forward_features(images)


def convert_to_onnx(config: ConvertConfig, convert: Callable[[ConvertConfig], Any]) -> OnnxReport:
    """Writes `config.output`, an ONNX file of a classifier, a segmenter or else an encoder.

    Its metadata are those of our `.safetensors` files (`model`, `config`, and where they are known
    `mean`, `std` and `classes`, as JSON), `input_size` (height and width) and the options of it.

    Args:
        config: the options of `convmae convert`.
        convert: what reads weights of any origin and writes ours.

    Raises:
        OptionError: an option cannot work, a package is missing, or onnxruntime gives other
            outputs than PyTorch; nothing was written.
    """
    target = _target(config)
    with for_option("checkpoint"):
        weights, what, notes = _classifier(config, convert)
        model: Any = weights.build_model()
    assert isinstance(model, ConvViT | TimmClassifier | Segmenter)
    needed = sum(p.numel() for p in model.parameters()) * 4
    if needed > LARGEST:
        raise OptionError(
            f"--output {config.output!r}: one ONNX file holds 2 GiB, but {weights.model} in "
            f"float32 has {needed / 2**30:.1f}; `torch.onnx.export(..., external_data=True)` in "
            "Python writes its weights beside it"
        )
    if weights.pictures is None:
        notes = [*notes, "nothing tells mean and deviation of the pictures: give --mean and --std"]
    classifies = bool(model.num_classes)
    output = "logits" if classifies else "features"
    module: Any = model.float() if classifies else _Features(model.float())
    # The other models have taken on another size already.
    given = config.input_size if isinstance(model, Segmenter) else None
    size = as_pair(given or tuple(model.img_size))
    shape = (model.in_chans, *size)
    program = _export(module, shape, output)
    program.model.metadata_props.update(_metadata(weights, model, size))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            program.save(fresh, external_data=False)
            difference = _difference(fresh, module, shape)
            if difference is not None and difference > TOLERANCE:
                raise OptionError(
                    f"--output {config.output!r}: onnxruntime differs from PyTorch by "
                    f"{difference:.1e} of the largest output, expected at most {TOLERANCE}"
                )
    except OSError as error:
        raise OptionError(f"--output {config.output!r} cannot be written: {error}") from error
    with torch.no_grad():
        given_back = module(torch.zeros(1, *shape)).shape[1:]
    return OnnxReport(
        checkpoint=what,
        output=target,
        model=weights.model,
        inputs=f"images [batch, {', '.join(map(str, shape))}] (float32, normalised)",
        outputs=f"{output} [batch, {', '.join(map(str, given_back))}]",
        difference=difference,
        notes=notes,
    )


def _target(config: ConvertConfig) -> Path:
    """The file to write; that it can be, before anything is read."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"--output {config.output!r} needs {' and '.join(missing)}, which is not installed: "
            "`pip install 'convmae[onnx]'`"
        )
    target = Path(config.output).expanduser()
    if target.is_dir():
        raise OptionError(f"--output {config.output!r} is a folder, and named like a file")
    if target.exists() and not config.overwrite:
        raise OptionError(f"--output: {target} exists; --overwrite replaces it")
    if config.kind in ("convmae", "spark", "fcmae"):
        encoder = "convvit" if config.kind == "convmae" else "network"
        raise OptionError(
            f"--kind {config.kind}, a pretraining model, has no use in an ONNX file; expected "
            f"--kind {encoder}, its encoder, which is written if --kind is not given"
        )
    if config.format != "auto":
        raise OptionError(f"--format {config.format} is of PyTorch files, but --output is of ONNX")
    return target


def _classifier(
    config: ConvertConfig, convert: Callable[[ConvertConfig], Any]
) -> tuple[Weights, str, list[str]]:
    """The weights of a classifier, segmenter or encoder, where they are from, and notes."""
    try:
        own = encoder_weights(open_weights(config.checkpoint))
    except WeightsError:  # of another origin: `convert` reads those too, or says why not
        own = None
    described = (config.model, config.num_heads, config.decoder_num_heads, config.key)
    of_network = own is not None and is_timm_name(own.model)
    if own is not None and split_task(own.model)[0]:
        return _segmenter(config, own, f"{own.path}: weights of convmae: {own.model}")
    if own is None and is_dense(open_foreign(config.checkpoint, config.key)):
        with tempfile.TemporaryDirectory() as folder:
            report = convert(replace(config, output=str(Path(folder) / WEIGHTS), input_size=None))
            weights, what, notes = _segmenter(
                config, open_weights(report.output), report.checkpoint
            )
        return weights, what, [*report.notes, *notes]
    if own is None or not (own.model.startswith("convvit") or of_network) or any(described):
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / WEIGHTS)
            is_network = config.kind == "network" or is_timm_name(config.model or "")
            whole = replace(config, output=file, kind="network" if is_network else "convvit")
            report = convert(whole)
            weights = open_weights(report.output)
        head = [] if weights.config["num_classes"] else ["no classifier is in it: an encoder alone"]
        return weights, report.checkpoint, [*head, *report.notes]
    _take_statistics(config, own)
    if config.input_size is not None:
        model: Any = own.build_model()
        model.set_input_size(as_pair(config.input_size))
        own.config, own.state = model.config, model.state_dict()
    alone = of_network and not own.config.get("num_classes", 1000)
    notes = ["no classifier is in it: an encoder alone"] if alone else []
    return own, f"{own.path}: weights of convmae: {own.model}", notes


def _take_statistics(config: ConvertConfig, weights: Weights) -> None:
    """Gives the weights the mean and deviation of the options, if there are any."""
    if config.mean is None or config.std is None:
        return
    channels = weights.config.get("in_chans", 3)
    if len(config.mean) != channels:
        raise OptionError(
            f"--mean has {len(config.mean)} numbers, but {weights.path} is of {channels} channels"
        )
    weights.pictures = Statistics(config.mean, config.std)


def _segmenter(
    config: ConvertConfig, weights: Weights, what: str
) -> tuple[Weights, str, list[str]]:
    """Weights of a segmenter, in words where they are from, and notes.

    Raises:
        OptionError: they are of a detector.
    """
    if split_task(weights.model)[0] == DETECT:
        raise OptionError(
            f"--checkpoint {config.checkpoint!r} is of {weights.model}: what a detector gives is "
            "of another length for each picture, which convert writes no ONNX file of; "
            "docs/export.md has one with outputs of fixed length, in Python"
        )
    _take_statistics(config, weights)
    return weights, what, ["logits are of a quarter of the pictures' size: enlarge them (bilinear)"]


def _export(module: nn.Module, shape: tuple[int, ...], output: str) -> Any:
    images = torch.zeros(2, *shape)
    with torch.no_grad():
        return torch.onnx.export(
            module.eval(),
            (images,),
            input_names=["images"],
            output_names=[output],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )


def _metadata(weights: Weights, model: Any, size: tuple[int, int]) -> dict[str, str]:
    """Names of the file's metadata and their values, JSON but for `model`."""
    values: dict[str, Any] = {"config": model.config, "input_size": list(size)}
    if weights.pictures is not None:
        values |= {key: list(value) for key, value in weights.pictures._asdict().items()}
    if weights.classes is not None:
        values["classes"] = list(weights.classes)
    return {"model": weights.model} | {key: json.dumps(value) for key, value in values.items()}


@torch.no_grad()
def _difference(path: Path, module: nn.Module, shape: tuple[int, ...]) -> float | None:
    """The largest difference of the file's outputs from the module's; None without onnxruntime."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in (1, 3):
        images = torch.randn(batch, *shape, generator=generator)
        expected = module.eval()(images)
        (found,) = session.run(None, {"images": images.numpy()})
        scale = expected.abs().max().clamp_min(1e-30)
        difference = (torch.from_numpy(found) - expected).abs().max() / scale
        largest = max(largest, float(difference.nan_to_num(torch.inf)))
    return largest
