"""WebDataset shards: which there are, how many samples each has, and their members one by one.

A shard is a `.tar` file of samples: members `<key>.jpg`, `.png`, `.tif` ... or `.npy`, and
`<key>.cls`, the label as text, side by side. Members of other kinds are never read.

How many samples a shard has must be known before training. Of local shards it is counted from
the headers in the archive; at an http address it is read from `sizes.json` beside the shards, an
object of shard names and counts, with the names of the classes under `"classes"` if there are any:

    {"shard-000000.tar": 10000, "shard-000001.tar": 9312, "classes": ["cat", "dog"]}

`python -m convmae.data.shards FOLDER` writes it. Local shards are not counted where a
`sizes.json` that names all of them is younger than they are.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from convmae.data.errors import DataError, Failure
from convmae.data.pillow import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES_FILE = "sizes.json"
SHARD = ".tar"
LABEL = "cls"
PICTURES = {extension[1:] for extension in EXTENSIONS} | {"npy"}
SIZES_HELP = (
    f"python -m convmae.data.shards FOLDER writes {SIZES_FILE} for the shards in a local folder; "
    'it is an object like {"shard-000000.tar": 10000}'
)

ARCHIVE_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)  # what reading an archive raises
ShardSample = dict[str, Any]  # __key__, and for each extension the member or its contents


@dataclass(frozen=True)
class Shards:
    """Shards in the order of their names, how many samples each has, and the damaged ones."""

    where: str
    names: tuple[str, ...]  # paths or addresses
    sizes: tuple[int, ...]
    classes: list[str] | None = None
    failures: list[Failure] = field(default_factory=list)


# -- one shard ------------------------------------------------------------------------------------


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
        with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
            yield archive, stream
    finally:
        stream.close()


def read_samples(
    archive: tarfile.TarFile, stream: BinaryIO, name: str, read: bool = False
) -> Iterator[ShardSample]:
    """The samples of an archive that have a picture, members as headers or, if `read`, contents.

    Raises:
        OSError, EOFError, ValueError, tarfile.TarError: the archive is damaged; the sample
            that the damage cuts is not yielded.
    """
    from webdataset.tariterators import group_by_keys

    def members() -> Iterator[dict[str, Any]]:
        for member in _headers(archive):
            data: Any = member
            if read:
                try:
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                except ARCHIVE_ERRORS:
                    yield {}  # makes `group_by_keys` yield the sample before
                    raise
            yield {"fname": member.name, "data": data, "__url__": name}
        yield {}  # makes `group_by_keys` yield the last sample
        if not is_address(name):
            _check_end(archive, stream)

    for sample in group_by_keys(members()):
        if PICTURES & sample.keys():
            yield sample


def _headers(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members that may be read: files with a known suffix."""
    from webdataset.tariterators import base_plus_ext

    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # else all headers stay in memory
        suffix = base_plus_ext(member.name)[1]
        if member.isreg() and suffix is not None and suffix.lower() in PICTURES | {LABEL}:
            yield member


def _check_end(archive: tarfile.TarFile, stream: BinaryIO) -> None:
    """Raises `tarfile.ReadError` where the archive does not end as a whole one does.

    tarfile itself ends silently at a damaged header.
    """
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged or cut short: the archive's end mark is missing")


def error_reason(error: Exception) -> str:
    """The first line of an error; without the arguments that webdataset adds to a ValueError."""
    text = str(error.args[0]) if isinstance(error, ValueError) and error.args else str(error)
    return text.partition("\n")[0] or type(error).__name__


@dataclass
class _ShardCount:
    """What the headers of one local shard say."""

    size: int = 0
    labels: set[str] = field(default_factory=set)
    failure: Failure | None = None


def _count_samples(path: Path) -> _ShardCount:
    count, last = _ShardCount(), "none"
    try:
        with open_shard(str(path)) as (archive, stream):
            for sample in read_samples(archive, stream, str(path)):
                if LABEL in sample:
                    member = archive.extractfile(sample[LABEL])
                    count.labels.add(member.read(32).decode("ascii", "replace").strip())  # type: ignore[union-attr]
                count.size, last = count.size + 1, sample["__key__"]
    except ARCHIVE_ERRORS as error:
        reason = (
            f"{error_reason(error)}; {count.size} samples before that are good, the last is {last}"
        )
        count.failure = Failure(str(path), reason)
    return count


# -- all shards -----------------------------------------------------------------------------------


def list_shards(where: str, split: str | None) -> Shards:
    """The shards of a folder, a pattern or an address.

    Args:
        where: a local folder, or a pattern of paths or addresses with braces, or the address of a
            folder with `sizes.json`.
        split: "train" or "val": which folder at an address; a pattern is "train" only. None:
            `where` is the folder of the split itself.

    Raises:
        DataError: not http, https or a path; a shard or `sizes.json` is missing or broken.
    """
    if Path(where).is_dir():
        found = sorted(path for path in Path(where).iterdir() if path.suffix == SHARD)
        return _local_shards(where, [path for path in found if not path.name.startswith(".")])
    _check_scheme(where)
    if is_address(where) and not urlsplit(where).path.endswith(SHARD):
        return _shards_at_address(where, split)
    if split == "val":
        raise DataError(
            f"--data_path {where!r} has no val pictures: a pattern names the shards of one split; "
            "expected a folder, or the address of one, with train and val inside"
        )
    names = _expand_pattern(where)
    if is_address(where):
        sizes_file = _sibling_address(names[0], SIZES_FILE)
        return _shards_with_sizes(where, names, *_fetch_sizes(sizes_file), sizes_file)
    paths = [Path(name).expanduser() for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"--data_path {where!r}: {len(missing)} of {len(paths)} shards do not exist, the first "
            f"{missing[0]}"
        )
    return _local_shards(where, paths)


def _check_scheme(name: str) -> None:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", name)
    if scheme and not is_address(name):
        raise DataError(
            f"--data_path {name!r}: {scheme[1]}: is no way to fetch shards; expected a path, "
            "http:// or https://"
        )


def _expand_pattern(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"--data_path {pattern!r} is no pattern of shards: {error}") from error
    for name in names:
        _check_scheme(name)
        if is_address(name) != is_address(pattern):
            raise DataError(f"--data_path {pattern!r} mixes addresses and files: {name!r}")
    return names


def _local_shards(where: str, paths: list[Path]) -> Shards:
    names = tuple(str(path) for path in paths)
    listed = _read_sizes(paths)
    if listed is not None:
        return _shards_with_sizes(where, list(names), *listed, str(paths[0].parent / SIZES_FILE))
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(_count_samples, paths))
    failures = [count.failure for count in counts if count.failure is not None]
    labels = set().union(*(count.labels for count in counts))
    return Shards(where, names, tuple(count.size for count in counts), _classes(labels), failures)


def _classes(labels: set[str]) -> list[str] | None:
    """ "0" to the largest label; labels that are no whole numbers fail when they are read."""
    numbers = [int(label) for label in labels if label.isdecimal()]
    return [str(label) for label in range(max(numbers) + 1)] if numbers else None


def _read_sizes(paths: list[Path]) -> tuple[dict[str, int], list[str] | None] | None:
    """The local `sizes.json`, if it can stand for counting."""
    file = paths[0].parent / SIZES_FILE
    try:
        written = file.stat().st_mtime_ns
        if any(path.parent != file.parent or path.stat().st_mtime_ns > written for path in paths):
            return None
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    sizes, classes = parse_sizes(text, str(file))
    return (sizes, classes) if all(path.name in sizes for path in paths) else None


def parse_sizes(text: str, sizes_file: str) -> tuple[dict[str, int], list[str] | None]:
    """`sizes.json` to counts and class names.

    Raises:
        DataError: it does not have that form.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{sizes_file} is no JSON: {error}. {SIZES_HELP}") from error
    classes = values.pop("classes", None) if isinstance(values, dict) else None
    right = isinstance(values, dict) and all(
        type(size) is int and size >= 0 and name.endswith(SHARD) and not re.search(r"[/\\:]", name)
        for name, size in values.items()
    )
    named = classes is None or (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    )
    if not right or not named:
        raise DataError(
            f"{sizes_file} does not hold names of shards and their counts. {SIZES_HELP}"
        )
    return values, classes


def _shards_with_sizes(
    where: str, names: list[str], sizes: dict[str, int], classes: list[str] | None, sizes_file: str
) -> Shards:
    short = [
        urlsplit(name).path.rpartition("/")[2] if is_address(name) else Path(name).name
        for name in names
    ]
    missing = [name for name in short if name not in sizes]
    if missing:
        raise DataError(f"{sizes_file} lacks {', '.join(missing[:3])}. {SIZES_HELP}")
    return Shards(where, tuple(names), tuple(sizes[name] for name in short), classes)


def _shards_at_address(address: str, split: str | None) -> Shards:
    """The shards that the `sizes.json` at an address names, in its folder of `split` if any."""
    folder = address if address.endswith("/") else f"{address}/"
    tried = [f"{folder}{split}/{SIZES_FILE}"]
    if split == "train":
        tried.append(f"{folder}{SIZES_FILE}")
    reasons = []
    for sizes_file in tried:
        try:
            sizes, classes = _fetch_sizes(sizes_file)
        except DataError as error:
            reasons.append(str(error))
            continue
        names = [_sibling_address(sizes_file, name) for name in sorted(sizes)]
        return _shards_with_sizes(address, names, sizes, classes, sizes_file)
    raise DataError("; ".join(reasons))


def _sibling_address(address: str, name: str) -> str:
    """The address of another file in the same folder."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def _fetch_sizes(address: str) -> tuple[dict[str, int], list[str] | None]:
    from urllib.request import urlopen

    try:
        with urlopen(address, timeout=30) as answer:  # http or https: checked before
            text = answer.read().decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"--data_path: the sizes of the shards are needed, but {address} cannot be read "
            f"({error}). {SIZES_HELP}"
        ) from error
    return parse_sizes(text, address)


def write_sizes(folder: str | Path) -> Path:
    """Counts the shards of a local folder and writes `sizes.json` beside them.

    Raises:
        DataError: no shards, or a damaged one.
    """
    file = Path(folder) / SIZES_FILE
    file.unlink(missing_ok=True)
    paths = sorted(path for path in Path(folder).glob(f"*{SHARD}"))
    if not paths:
        raise DataError(f"{str(folder)!r} holds no {SHARD} files")
    shards = _local_shards(str(folder), paths)
    if shards.failures:
        raise DataError("; ".join(f"{name}: {reason}" for name, reason in shards.failures))
    values: dict[str, Any] = {Path(n).name: size for n, size in zip(shards.names, shards.sizes)}
    if shards.classes is not None:
        values["classes"] = shards.classes
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return file


def main(arguments: list[str], say: Callable[[str], None] = print) -> int:
    """`python -m convmae.data.shards FOLDER...`"""
    for folder in arguments:
        try:
            say(f"wrote {write_sizes(folder)}")
        except DataError as error:
            say(f"error: {error}")
            return 2
    return 0 if arguments else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
