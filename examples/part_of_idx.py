"""The first pictures of a data set of IDX files, for experiments that must be short.

    python -m examples.part_of_idx data/fashion-mnist data/small --train 6000 --val 2000

writes the four files of a folder of the MNIST family with the first 6,000 pictures to train on and
the first 2,000 to test on; `make fashion-mnist-small` calls it so. The order of the family's files
is random, so the classes are about as frequent as in the whole.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.data.errors import DataError
from convmae.data.idx import PREFIX, UNSIGNED_BYTE, IdxPhotos, find_idx

if TYPE_CHECKING:
    import numpy as np


def first(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pictures of a split, `[count, H, W]`, and their labels, `[count]`, uint8.

    Raises:
        DataError: a file is missing or broken, or there are fewer.
    """
    photos = IdxPhotos(folder, split, labelled=True)
    if count > len(photos):
        raise DataError(f"--{split} {count}: {folder} has {len(photos)}")
    assert photos.labels is not None
    return photos.images[:count], photos.labels[:count]


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes uint8 of any shape as a packed IDX file; the same values make the same file."""
    header = struct.pack(f">HBB{values.ndim}I", 0, UNSIGNED_BYTE, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


def main(arguments: list[str] | None = None) -> None:
    """The command.

    Raises:
        SystemExit: wrong input, which it has named.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the IDX files lie")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument(
        "--train", type=int, required=True, metavar="N", help="how many to train on"
    )
    parser.add_argument("--val", type=int, required=True, metavar="N", help="how many to test on")
    args = parser.parse_args(arguments)
    counts = {"train": args.train, "val": args.val}
    for split, count in counts.items():
        if count < 1:
            parser.error(f"--{split} {count}: expected 1 or more")
    if args.output.exists():
        parser.error(f"output: {args.output} is there already; name a new folder")
    folder = find_idx(args.folder)
    if folder is None:
        parser.error(f"folder: {args.folder} has no IDX files of the MNIST family")
    try:
        parts = {split: first(folder, split, count) for split, count in counts.items()}
    except DataError as error:
        parser.error(error.with_flags)
    unfinished = args.output.with_name(f".new.{args.output.name}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for split, (images, labels) in parts.items():
            write_idx(unfinished / f"{PREFIX[split]}-images-idx3-ubyte.gz", images)
            write_idx(unfinished / f"{PREFIX[split]}-labels-idx1-ubyte.gz", labels)
        unfinished.rename(args.output)
    except OSError as error:
        parser.error(f"output: {args.output} cannot be written: {error}")


if __name__ == "__main__":
    main()
