"""What a command writes lies apart from the pictures that it reads, now or when it goes on."""

from __future__ import annotations

import os
from pathlib import Path

from convmae.config import OptionError


def local_folder(data_path: str | os.PathLike[str]) -> Path | None:
    """The folder `data_path`; None of `demo`, an address or a pattern, which names each file."""
    folder = Path(data_path).expanduser()
    return folder if os.fspath(data_path) != "demo" and folder.is_dir() else None


def check_apart(output_dir: str | os.PathLike[str], data_path: str) -> None:
    """Raises `OptionError` where the folder of a run and the pictures lie in one another."""
    folder = local_folder(data_path)
    if folder is None:
        return
    output = Path(output_dir).expanduser()
    if is_inside(output, folder):
        raise OptionError(
            f"--output_dir {str(output_dir)!r} lies in --data_path {data_path!r}, where the "
            "pictures of the run would be read as pictures to train on; give a folder outside"
        )
    if is_inside(folder, output):
        raise OptionError(
            f"--data_path {data_path!r} lies in --output_dir {str(output_dir)!r}, where the run "
            "writes; give a folder of its own for what it writes"
        )


def check_picture_apart(output: str | os.PathLike[str], images: str) -> None:
    """Raises `OptionError` where the picture `--output` would be one of `--images`."""
    folder = None if Path(images).expanduser().is_file() else local_folder(images)
    target = Path(output).expanduser()
    if folder is not None and is_inside(target, folder):
        raise OptionError(
            f"--output {str(output)!r} lies in --images {images!r}, where it would be read as a "
            "picture next time; give a file outside"
        )
    if folder is None and os.path.realpath(target) == os.path.realpath(Path(images).expanduser()):
        raise OptionError(f"--output {str(output)!r} would be written over that of --images")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it, links resolved."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return inner == outer or outer in inner.parents
