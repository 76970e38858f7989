"""`convmae reconstruct`: what a checkpoint paints where it cannot see."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.config import (
    ConvertConfig,
    OptionError,
    ReconstructConfig,
    WeightsError,
    check_patches,
    for_option,
)
from convmae.data import (
    DataError,
    Failure,
    PhotoSource,
    Statistics,
    find_pictures,
    open_source,
)
from convmae.data.apart import check_picture_apart
from convmae.data.arrays import ARRAY_EXTENSION
from convmae.data.errors import printable
from convmae.data.formats.pillow import EXTENSIONS
from convmae.data.open import open_files
from convmae.models import MaskedImageModel
from convmae.models.adapt import DECODER
from convmae.records.pictures import reconstruction_picture, save_picture
from convmae.records.unreadable import NAMED_AT_MOST
from convmae.training.machine import pick_device
from convmae.weights.architecture import read_encoder
from convmae.weights.conversion import convert_weights
from convmae.weights.foreign import few, open_foreign

if TYPE_CHECKING:
    from convmae.config import ReadOptions
    from convmae.data import Source
    from convmae.weights.checkpoint import Weights
    from convmae.weights.foreign import ForeignWeights


@dataclass(frozen=True)
class Drawn:
    """What `draw` left.

    Attributes:
        output: the picture.
        failures: what could not be read.
        failed: whether that is more than the options allow.
    """

    output: Path
    failures: list[Failure]
    failed: bool

    def __str__(self) -> str:
        lines = [f"wrote {self.output}"]
        if self.failures:
            plural = "s" if len(self.failures) > 1 else ""
            lines.append(f"{len(self.failures):,} picture{plural} could not be read:")
            lines += [f"  {name}: {reason}" for name, reason in self.failures[:NAMED_AT_MOST]]
            lines += ["  ..."] * (len(self.failures) > NAMED_AT_MOST)
        return "\n".join(map(printable, lines))


def reconstruct(config: ReconstructConfig) -> Path:
    """Draws a labelled grid, one row a picture; returns the path of what was written.

    Every picture is cut to a centred crop of the size that the model was trained at. An unreadable
    picture is replaced by another, if there are more than are drawn, and named in a warning.

    Raises:
        OptionError (a ValueError): an option cannot work, no such checkpoint or picture.
        convmae.data.DataError (a ValueError): a folder without pictures, or none is readable.
    """
    drawn = draw(config)
    if drawn.failures:
        warnings.warn(str(drawn), stacklevel=2)
    return drawn.output


def draw(config: ReconstructConfig) -> Drawn:
    """`reconstruct`, and what could not be read."""
    config.validate()
    for name in config.images:
        check_picture_apart(config.output, name)
    device = pick_device(config.device)
    with for_option("checkpoint"):
        weights = _read_weights(config)
        model = weights.build_model(device)
        statistics = weights.statistics
    if not isinstance(model, MaskedImageModel):
        raise OptionError(
            f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}, which has no "
            "decoder; expected a model from convmae pretrain"
        )
    ratio = model.mask_ratio if config.mask_ratio is None else config.mask_ratio
    check_patches(ratio, *model.img_size, model.patch_size, model.mask_rounding)
    reading, notes = config.reading.over(weights.reading)
    for note in notes:
        print(note, file=sys.stderr)
    source = _open(config.images, reading)
    if source.channels != model.in_chans:
        raise OptionError(
            f"--images have {source.channels} channels, but the model of --checkpoint takes "
            f"{model.in_chans}"
        )
    images, failures = source.crops(config.max_images, model.img_size)
    picture = reconstruction_picture(model, images, ratio, config.seed, *statistics)
    output = Path(config.output).expanduser()
    save_picture(picture, output)
    reasons = {failure.name: failure.reason for failure in (*source.failures, *failures)}
    given = {str(Path(name).expanduser()) for name in config.images}
    failed = not given.isdisjoint(reasons)
    failed |= len(reasons) > config.max_unreadable * source.pictures
    return Drawn(output, [Failure(*item) for item in reasons.items()], failed)


def _read_weights(config: ReconstructConfig) -> Weights:
    """The weights of `config.checkpoint`, whoever wrote them; prints what they do not tell."""
    found = open_foreign(config.checkpoint)
    told = (found.options if found.ours is None else found.ours.config).get("norm_pix_loss")
    is_told = isinstance(told, bool)
    if is_told and config.norm_pix_loss not in (None, told):
        raise OptionError(
            f"--norm_pix_loss {config.norm_pix_loss} contradicts {found.path}, which says "
            f"{told}; leave it out"
        )
    weights = _convert(config, found) if found.ours is None else found.ours
    if not is_told and config.norm_pix_loss is None and found.ours is None:
        print(
            f"note: {found.path} does not tell whether it predicts normalised patches: taken as "
            "no (--norm_pix_loss)"
        )
    if config.mean is None or config.std is None:
        return weights
    channels = weights.config.get("in_chans", len(config.mean))
    if len(config.mean) != channels:
        raise OptionError(
            f"--mean has {len(config.mean)} numbers, but {weights.path} is of {channels} channels"
        )
    return replace(weights, pictures=Statistics(config.mean, config.std))


def _convert(config: ReconstructConfig, found: ForeignWeights) -> Weights:
    """Weights of other code as those of a pretraining model of ours."""
    read_encoder(found)  # else it is of another architecture
    lacking = [name for name in DECODER if not any(key.startswith(name) for key in found.state)]
    if lacking:
        names = ", ".join(f"{name}*" for name in lacking)
        raise OptionError(
            f"--checkpoint: {found.path} has no decoder (no {names}), so it cannot paint; "
            "`convmae pretrain --init` trains one for its encoder"
        )
    options = ConvertConfig(
        config.checkpoint,
        config.output,
        kind="convmae",
        norm_pix_loss=config.norm_pix_loss,
        mean=config.mean,
        std=config.std,
    )
    try:
        done = convert_weights(options, found)
    except (OptionError, WeightsError) as error:
        if not error.with_flags.startswith("--") or error.with_flags.startswith("--checkpoint"):
            raise
        raise OptionError(
            f"--checkpoint {config.checkpoint!r}: {error.with_flags}; that is an option of "
            "`convmae convert`, which writes a file that reconstruct reads"
        ) from error
    if done.missing:
        raise OptionError(
            f"--checkpoint: {found.path} lacks {few(done.missing)} of its decoder; what it paints "
            "without would mean nothing"
        )
    for note in (*found.notes, *done.notes):
        print(f"note: {note.replace('are written', 'are used')}")
    return done.weights


def _open(names: tuple[str, ...], reading: ReadOptions) -> Source:
    """One folder, set of shards or demo as `--data_path` takes it; or files and folders of them.

    Raises:
        OptionError: nothing of that name.
        DataError: pictures and arrays together, or no picture that can be read.
    """
    if len(names) == 1 and not Path(names[0]).expanduser().is_file():
        try:
            return open_source(names[0], max_unreadable=1.0, reading=reading)
        except DataError as error:
            raise DataError(error.with_flags.replace("--data_path", "--images")) from error
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            paths.append(path)
        elif path.is_dir():
            paths += find_pictures(path, "--images", EXTENSIONS | {ARRAY_EXTENSION})
        else:
            raise OptionError(f"--images {name!r} does not exist; expected a file or a folder")
    where = names[0] if len(names) == 1 else "what is named"
    try:
        photos, failures, description, _ = open_files(paths, None, where, 1.0, reading)
    except DataError as error:
        raise DataError(error.with_flags.replace("--data_path", "--images")) from error
    return PhotoSource(photos, description=description, failures=failures, max_unreadable=1.0)


def main(config: ReconstructConfig) -> int:
    """The command: `reconstruct`, and what it says of itself; returns the exit status."""
    drawn = draw(config)
    print(drawn)
    return int(drawn.failed)
