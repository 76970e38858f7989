"""Reads PyTorch files as data alone: damage is noticed, and nothing in a file is ever run."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import WeightsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ZIP = b"PK"
PICKLE = b"\x80"
_CHUNK = 1 << 20
_REFUSED = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"(?:WeightsUnpickler error:|Unpickler error:)\s*(.+)")


def load_tensors(path: Path, allow: Sequence[type] = ()) -> Any:
    """`torch.load(path, map_location="cpu", weights_only=True)`, of a whole and harmless file.

    PyTorch reads a file whose bytes have changed without a word; the checksums of its zip archive
    are compared here.

    Args:
        path: a file that `torch.save` wrote.
        allow: classes that are allowed besides tensors and plain containers; they must be harmless
            however they are filled.

    Raises:
        WeightsError: the file is damaged, or asks for anything else to be made or called.
    """
    try:
        with path.open("rb") as opened:
            is_zip = opened.read(2) == ZIP
        if is_zip:
            _check_archive(path)
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which are refused or read
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise WeightsError(f"{path} {_explain(error, allow)}") from error


def _explain(error: Exception, allow: Sequence[type]) -> str:
    """What is wrong with a file, from what PyTorch says."""
    text = str(error)
    refused = _REFUSED.search(text)
    if refused:
        known = ["tensors", "plain containers", *(f"{c.__module__}.{c.__name__}" for c in allow)]
        return (
            f"asks for {refused[1]} when it is read, which is refused: it could run any code. "
            f"Nothing of the file was used; expected {', '.join(known[:-1])} and {known[-1]} only"
        )
    reason = _REASON.search(text)
    words = (reason[1] if reason else text).strip().splitlines()
    return f"is damaged or was not written by torch.save: {words[0] if words else repr(error)}"


def _check_archive(path: Path) -> None:
    """The zip archive of a PyTorch file is whole, and all its members are in their place."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(member, path)
            if not any(PurePosixPath(member.filename).name == "data.pkl" for member in members):
                first = ", ".join(member.filename for member in members[:3]) or "nothing"
                raise WeightsError(
                    f"{path} is a zip archive, but not one of torch.save: it has no "
                    f"data.pkl; it holds {first}"
                )
            for member in members:
                if member.CRC:  # 0 where the file was written without checksums
                    _read_through(archive, member)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is damaged or cut short: {error}") from error


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    # orig_filename: zipfile itself cuts names at a zero byte and turns backslashes round
    name = PureWindowsPath(member.orig_filename)  # knows both kinds of slashes, and drives
    if name.drive or name.root or ".." in name.parts:
        raise WeightsError(
            f"{path} is refused: it holds {member.orig_filename!r}, a path out of the "
            "archive, which torch.save does not write"
        )
    if member.compress_type != zipfile.ZIP_STORED:
        raise WeightsError(
            f"{path} is refused: {member.filename} in it is compressed, which torch.save "
            "does not do; unpack the archive that it may be in"
        )


def _read_through(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises `BadZipFile` where the checksum differs."""
    with archive.open(member) as opened:
        while opened.read(_CHUNK):
            pass
