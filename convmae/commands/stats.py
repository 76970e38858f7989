"""`convmae stats`: the mean and deviation of a data set's channels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convmae.data import open_source
from convmae.data.errors import printable
from convmae.data.statistics import check_deviations, measure
from convmae.files import replacing
from convmae.records.unreadable import NAMED_AT_MOST

if TYPE_CHECKING:
    from convmae.config import StatsConfig


def stats(config: StatsConfig) -> str:
    """Measures `--mean` and `--std`; returns them as YAML, and writes that to `config.output`.

    Raises:
        OptionError (a ValueError): an option cannot work.
        convmae.data.DataError (a ValueError): no such pictures, too many unreadable, or a channel
            that is the same everywhere, which no run could normalise. Nothing is written then.
    """
    config.validate()
    source = open_source(
        config.data_path,
        split=config.split,
        max_samples=config.max_samples,
        seed=config.seed,
        reading=config.reading,
        choice=config.picture_choice,
    )
    measured = measure(source, workers=config.num_workers)
    check_deviations(measured, f"--data_path {config.data_path!r}")
    lines = [f"# {source.description}; full scale is 1"]
    if measured.failures:
        total = measured.pictures + len(measured.failures)
        lines.append(f"# {len(measured.failures):,} of {total:,} cannot be read and are left out:")
        lines += [f"# {name}: {reason}" for name, reason in measured.failures[:NAMED_AT_MOST]]
        if len(measured.failures) > NAMED_AT_MOST:
            lines.append("# ...")
    lines += [f"# {left_out}" for left_out in source.left_out]
    lines += [f"# {note}" for note in source.notes]
    lines = [printable(line) for line in lines]
    for name, values in zip(("mean", "std"), measured.statistics):
        lines.append(f"{name}: [{', '.join(f'{value:.6g}' for value in values)}]")
    text = "\n".join(lines) + "\n"
    if config.output:
        path = Path(config.output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    return text


def main(config: StatsConfig) -> int:
    """The command: `stats`, and what it says of itself; returns the exit status."""
    print(stats(config), end="")
    return 0
