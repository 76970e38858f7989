"""`convmae stats`: the mean and deviation of a data set's channels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convmae.data import channel_statistics, open_source
from convmae.files import replacing

if TYPE_CHECKING:
    from convmae.config import StatsConfig


def stats(config: StatsConfig) -> str:
    """Measures `--mean` and `--std`; returns them as YAML, and writes that to `config.output`.

    Raises:
        OptionError (a ValueError): an option cannot work.
        convmae.data.DataError (a ValueError): no such pictures, or too many unreadable.
    """
    config.validate()
    source = open_source(
        config.data_path,
        split=config.split,
        max_samples=config.max_samples,
        seed=config.seed,
        reading=config.reading,
    )
    mean, std = channel_statistics(source, workers=config.num_workers)
    lines = [f"# {source.description}; full scale is 1"]
    for name, values in (("mean", mean), ("std", std)):
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
