"""One WebDataset shard: its samples, member by member, and none of what it announces believed.

The ending of a member is what follows the last dot of its name. Its sample:

- Neighbours whose names agree up to the first dot are one sample, as in WebDataset, if one of the
  first `GROUP_HEAD` of them has no further dot: `s0.input.jpg`, `s0.target.jpg` and `s0.cls`.
  Its picture is the one without a middle name, `s0.jpg`, else the first by the alphabet.
- Otherwise the dots are part of the names, and what agrees up to the last dot is one sample:
  `IMG_2024.01.01.jpg` and `IMG_2024.01.01.cls`, then `IMG_2024.01.02.jpg`.

Members of other kinds are never read. All that is left out is counted, by kind, with first names.
"""

from __future__ import annotations

import os
import tarfile
from contextlib import contextmanager
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from convmae.data.errors import UnreadableError
from convmae.data.formats.pillow import EXTENSIONS
from convmae.data.labels import LABEL, LONGEST_LABEL
from convmae.data.left_out import LeftOut, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PICTURES = {extension[1:] for extension in EXTENSIONS} | {"npy"}

# What files from elsewhere may announce.
MEMBER_AT_MOST = 2**32  # bytes of a picture
EXTENDED_AT_MOST = 2**20  # bytes of a header that extends another
GROUP_HEAD = 64  # members that decide where the name of their sample ends

EXTENDED_HEADERS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
# What reading an archive raises; the last three where a header announces nonsense.
ARCHIVE_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, tarfile.TarError)
ARCHIVE_ERRORS += (MemoryError, OverflowError, RecursionError)
ShardSample = dict[str, Any]  # __key__, and for each extension the member or its contents


def is_address(name: str) -> bool:
    """Whether a shard is to be fetched, rather than opened as a file."""
    return name.startswith(("http://", "https://"))


@contextmanager
def open_shard(name: str) -> Iterator[tuple[tarfile.TarFile, BinaryIO]]:
    """The archive of a shard, which can seek if it is a file, and the stream it is read from.

    Raises:
        OSError, tarfile.TarError: it cannot be opened.
    """
    if is_address(name):
        from webdataset.gopen import gopen

        stream, mode = gopen(name), "r|"
    else:
        stream, mode = open(name, "rb"), "r:"  # noqa: SIM115
    try:
        with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header) as archive:  # type: ignore[call-overload]
            yield archive, stream
    finally:
        stream.close()


class _Header(tarfile.TarInfo):
    """A header of an archive, refused before memory is taken where it announces nonsense."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        extends = header.type in EXTENDED_HEADERS
        if header.size < 0 or (extends and header.size > EXTENDED_AT_MOST):
            raise tarfile.ReadError(f"damaged: a header announces {header.size} bytes")
        return header


class _Member(NamedTuple):
    """A file of an archive that may belong to a sample."""

    name: str
    stem: str
    """The name without its last ending."""
    group: str
    """The name up to the first dot after the folder: the sample, by WebDataset's own rule."""
    ending: str
    """In lower case, without the dot."""
    value: Any
    """The header, or the contents; None of a kind that is not read."""


def read_samples(
    archive: tarfile.TarFile,
    stream: BinaryIO,
    name: str,
    read: bool = False,
    left_out: LeftOut | None = None,
) -> Iterator[ShardSample]:
    """The samples of an archive that have a picture, members as headers or, if `read`, contents.

    What is not read is counted in `left_out`.

    Raises:
        one of ARCHIVE_ERRORS: the archive is damaged; the sample that the damage cuts is not
            yielded.
    """
    left_out = LeftOut() if left_out is None else left_out
    end = None if is_address(name) else os.fstat(stream.fileno()).st_size
    damage: list[Exception] = []
    sample: ShardSample | None = None
    for key, members in _grouped(_until_damage(_members(archive, end, read, left_out), damage)):
        if sample is not None:
            yield sample
        sample = _sample(key, members, left_out)
    if damage:
        raise damage[0]
    if sample is not None:
        yield sample
    if not is_address(name):
        _check_end(archive, stream)


def _until_damage(members: Iterator[_Member], damage: list[Exception]) -> Iterator[_Member]:
    try:
        yield from members
    except ARCHIVE_ERRORS as error:
        damage.append(error)


def _grouped(members: Iterator[_Member]) -> Iterator[tuple[str, Iterator[_Member]]]:
    """The members of each sample, and its name; see the beginning of this file for the rule."""
    for group, run in groupby(members, key=lambda member: member.group):
        head = list(islice(run, GROUP_HEAD))  # not all: contents may be in memory
        whole = chain(head, run)  # noqa: B031 (what is left of it)
        if any(member.stem == group for member in head):
            yield group, whole
        else:
            yield from groupby(whole, key=lambda member: member.stem)


def _sample(key: str, members: Iterator[_Member], left_out: LeftOut) -> ShardSample | None:
    """The sample that `members` make, with one picture and at most one label; None without one."""
    best: dict[bool, _Member] = {}  # the picture (False) and the label (True)
    for member in members:
        if member.value is None:
            continue
        is_label = member.ending == LABEL
        better, other = member, best.get(is_label)
        if other is not None:
            first, second = other, member
            if (second.stem != key, second.name) < (first.stem != key, first.name):
                first, second = second, first
            kind = "labels" if is_label else "pictures"
            left_out.add(f"{kind} beside another of the same sample", second.name)
            better = first
        best[is_label] = better
    picture, label = best.get(False), best.get(True)
    if picture is None:
        if label is not None:
            left_out.add("labels without a picture beside them", label.name)
        return None
    sample = {"__key__": key, picture.ending: picture.value}
    return sample if label is None else sample | {LABEL: label.value}


def _next(archive: tarfile.TarFile, end: int | None) -> tarfile.TarInfo | None:
    """The next header of an archive of `end` bytes; None where it ends, or at a damaged header."""
    if end is not None and archive.offset > end:
        raise tarfile.ReadError("unexpected end of data")
    return archive.next()


def _members(
    archive: tarfile.TarFile, end: int | None, read: bool, left_out: LeftOut
) -> Iterator[_Member]:
    """The files of an archive with an ending; those that are not read count in `left_out` too."""
    offset = -1
    while (header := _next(archive, end)) is not None:
        archive.members = []  # type: ignore[attr-defined] # else all headers stay in memory
        if header.size < 0 or archive.offset <= offset:
            raise tarfile.ReadError(f"damaged: {header.name} announces {header.size} bytes")
        offset = archive.offset
        if header.isdir():
            continue
        folder, slash, base = header.name.rpartition("/")
        stem, _, ending = base.rpartition(".")
        kind = kind_of(header.name) if header.isreg() else "links and devices"
        if kind[0] != "." or not stem:
            left_out.add(kind, header.name)
            continue
        ending = ending.lower()
        group = folder + slash + base.partition(".")[0]
        member = _Member(header.name, folder + slash + stem, group, ending, None)
        if ending not in PICTURES | {LABEL}:
            left_out.add(kind, header.name)
            yield member
            continue
        value: Any = header
        if read:
            try:
                value = read_member(archive, header)
            except UnreadableError as error:
                value = error
            except ARCHIVE_ERRORS:
                yield member._replace(value=header)  # so that the sample before ends here
                raise
        yield member._replace(value=value)


def read_member(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    """The contents of a member; of a label, the beginning.

    Raises:
        UnreadableError: it announces more than a picture may have.
        one of ARCHIVE_ERRORS: the archive is damaged.
    """
    if header.issparse():
        raise UnreadableError("a sparse member of the archive; expected a plain one")
    is_label = header.name.lower().endswith(f".{LABEL}")
    if header.size > MEMBER_AT_MOST and not is_label:
        raise UnreadableError(
            f"it announces {header.size:,} bytes; expected at most {MEMBER_AT_MOST:,}"
        )
    file = archive.extractfile(header)
    assert file is not None  # a regular file
    content = file.read(LONGEST_LABEL if is_label else header.size)
    if not is_label and len(content) < header.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _check_end(archive: tarfile.TarFile, stream: BinaryIO) -> None:
    """Raises `tarfile.ReadError` where the archive does not end as a whole one does.

    tarfile itself ends silently at a damaged header.
    """
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged or cut short: the archive's end mark is missing")


def error_reason(error: Exception) -> str:
    """The first line of an error, or its name."""
    return str(error).partition("\n")[0] or type(error).__name__
