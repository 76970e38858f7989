"""`convmae convert`: weights of the official code to ours, and back; and both to ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.commands.onnx_file import ONNX, OnnxReport, convert_to_onnx
from convmae.config import OptionError, for_option
from convmae.config.convert import OFFICIAL_SUFFIXES, SAFETENSORS
from convmae.files import replacing
from convmae.models.adapt import DECODER
from convmae.records.folder import RunFolder
from convmae.weights.checkpoint import STATE, WEIGHTS, write_weights
from convmae.weights.conversion import Converted, convert_weights
from convmae.weights.dense_conversion import DENSE_KINDS, official_file
from convmae.weights.foreign import few, open_foreign
from convmae.weights.network_conversion import NETWORK_KINDS
from convmae.weights.network_files import spark_file, write_plain
from convmae.weights.pretrained import groups
from convmae.weights.tensor_files import save_tensors

if TYPE_CHECKING:
    from convmae.config import ConvertConfig


@dataclass
class ConversionReport:
    """What `convert` did; names of tensors.

    Attributes:
        checkpoint: the file read, and in words what it is.
        output: the file written.
        model: its name for `convmae.create_model`.
        config: its configuration.
        tensors: how many were written.
        missing: not in the file: freshly initialised.
        unexpected: in the file, but of no model of ours.
        reshaped: `name: old grid -> new grid`.
        left_out: in the file, but not in the model that was written.
        notes: anything else to know.
    """

    checkpoint: str
    output: Path
    model: str
    config: dict[str, Any]
    tensors: int
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    left_out: list[str]
    notes: list[str]

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.items())
        lines = [
            f"read {self.checkpoint}",
            f"wrote {self.output}: {self.model}, {self.tensors} tensors ({options})",
        ]
        for names, what in (
            (self.missing, "NOT IN THE FILE, freshly initialised"),
            (self.reshaped, "resampled"),
            (self.left_out, "left out"),
            (self.unexpected, "unknown, left out"),
        ):
            if names:
                lines.append(f"{what}: {groups(names)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


# -- convert --------------------------------------------------------------------------------------


def convert(config: ConvertConfig) -> ConversionReport | OnnxReport:
    """Writes the weights of `config.checkpoint` in the format that `config.output` asks for.

    Tensors that need no other shape are copied bit by bit, in their own dtype.

    Raises:
        OptionError: an option cannot work, or the file is no file of weights; nothing was written.
    """
    config.validate()
    if config.output.lower().endswith(ONNX):
        return convert_to_onnx(config, convert)
    target = _target(config)
    with for_option("checkpoint"):
        return _convert(config, target)


def _convert(config: ConvertConfig, target: Path) -> ConversionReport:
    """`convert` into a file that may be written."""
    found = open_foreign(config.checkpoint, config.key, config.ignore_digest)
    done = convert_weights(config, found)
    ours, found = done.weights, done.found
    is_network = done.kind in NETWORK_KINDS
    is_ours = target.suffix == SAFETENSORS and config.format == "auto"
    if config.index_buffers and (is_ours or done.kind not in DENSE_KINDS):
        raise OptionError(
            "--index_buffers is for a .pth of an official segmenter or detector; leave it out"
        )
    contents, said = _contents(config, done)
    notes = [*found.notes, *_remarks(config, done), *(done.notes if is_ours else ()), *said]
    if ours.classes is not None and not is_ours and done.kind != "segment":
        notes.append(f"a {target.suffix} cannot tell the names of the {len(ours.classes)} classes")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            if is_ours:
                described = (ours.pictures, ours.classes, ours.reading)
                write_weights(fresh, ours.model, ours.config, ours.state, *described)
            elif is_network and config.format != "spark" and done.kind != "spark":
                write_plain(fresh, ours.state)
            else:
                save_tensors(contents, fresh)
    except OSError as error:
        raise OptionError(f"--output {config.output!r} cannot be written: {error}") from error
    return ConversionReport(
        checkpoint=f"{found.path}: {found.what}",
        output=target,
        model=ours.model,
        config=ours.config,
        tensors=len(ours.state),
        missing=done.missing,
        unexpected=found.unexpected,
        reshaped=done.reshaped,
        left_out=done.left_out,
        notes=notes,
    )


def _contents(config: ConvertConfig, done: Converted) -> tuple[dict[str, Any], list[str]]:
    """What a PyTorch file of the official code is to hold; and notes."""
    ours = done.weights
    if done.kind == "spark" and config.output.lower().endswith(OFFICIAL_SUFFIXES):
        return spark_file(ours.model, ours.config, ours.state)
    if done.kind in DENSE_KINDS and config.output.lower().endswith(OFFICIAL_SUFFIXES):
        return official_file(ours, config.index_buffers), []
    return {"model": ours.state}, []


def _target(config: ConvertConfig) -> Path:
    """The file to write."""
    output = Path(config.output).expanduser()
    suffixes = OFFICIAL_SUFFIXES if config.format == "spark" else (*OFFICIAL_SUFFIXES, SAFETENSORS)
    if config.format != "auto" and not output.name.lower().endswith(suffixes):
        raise OptionError(
            f"--output {config.output!r}: a file of --format {config.format} ends in "
            f"{' or '.join(suffixes)}"
        )
    if output.suffix.lower() in OFFICIAL_SUFFIXES or output.suffix == SAFETENSORS:
        target = output
        if output.is_dir():
            raise OptionError(f"--output {config.output!r} is a folder, and named like a file")
    elif output.is_dir() or not output.suffix:
        target = output / WEIGHTS
        run = [*RunFolder.of(output).traces(), *(n for n in (STATE,) if (output / n).exists())]
        if run:
            raise OptionError(
                f"--output {config.output!r} is the folder of a run (it holds {run[0]}); its "
                "weights would be hidden by others: give another"
            )
    else:
        ends = ", ".join((SAFETENSORS, *OFFICIAL_SUFFIXES, ONNX))
        raise OptionError(
            f"--output must end in {ends}, or be a folder, got {config.output!r}, which is none yet"
        )
    if target.exists() and not config.overwrite:
        raise OptionError(f"--output: {target} exists; --overwrite replaces it")
    return target


def _remarks(config: ConvertConfig, done: Converted) -> list[str]:
    found, kind, state = done.found, done.kind, done.weights.state
    notes = []
    floating = [value for value in state.values() if value.is_floating_point()]
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in floating})
    if dtypes != ["float32"]:
        notes.append(f"tensors stay in {' and '.join(dtypes)}")
    bad = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if bad:
        notes.append(f"NaN or infinity in {few(bad)}")
    known = found.ours is not None or "norm_pix_loss" in found.options
    known = known or config.output.endswith(OFFICIAL_SUFFIXES)  # which do not say it either
    if kind == "convmae" and config.norm_pix_loss is None and not known:
        notes.append("norm_pix_loss is taken as False: the file does not tell (--norm_pix_loss)")
    if kind == "convvit" and config.kind == "auto" and "head.weight" not in found.state:
        lacking = [p for p in (*DECODER, "head.") if not any(k.startswith(p) for k in found.state)]
        names = ", ".join(f"{p}*" if p[-1] in "._" else p for p in lacking)
        notes.append(f"the file holds an encoder alone, without {names}; --finetune takes it")
    return notes


def main(config: ConvertConfig) -> int:
    """The command: `convert`, and what it says of itself; returns the exit status."""
    print(convert(config))
    return 0
