"""WebDataset shards: which there are, how many samples each has, and their members one by one.

A shard is a `.tar` file of samples: members `<key>.jpg`, `.png`, `.tif` ... or `.npy`, and
`<key>.cls`, the label as text (`convmae.data.labels`), side by side (`convmae.data.archive` tells
which members are one sample). All that is left out is counted, by kind, with first names.

How many samples a shard has must be known before training. Of local shards it is counted from
the headers in the archive; at an http address it is read from `sizes.json` beside the shards, an
object of shard names and counts, with the names of the classes under `"classes"` if there are any,
and what is left out, a count and first names for each kind, under `"left_out"`:

    {"shard-000000.tar": 10000, "shard-000001.tar": 9312, "classes": ["cat", "dog"],
     "left_out": {".json": [19312, "s0.json", "s1.json"]}}

`python -m convmae.data.shards FOLDER` writes it; labels that are words, or whole numbers of which
none could be a place, become the names of the classes, sorted. Local shards are not counted where a
`sizes.json` that names all of them is younger than they are.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from convmae.data.archive import (
    ARCHIVE_ERRORS,
    error_reason,
    is_address,
    open_shard,
    read_samples,
)
from convmae.data.classes import listed
from convmae.data.errors import DataError, Failure
from convmae.data.labels import LABEL, LONGEST_LABEL, LabelTally, label_text
from convmae.data.left_out import LeftOut
from convmae.data.sizes import SHARD, SIZES_AT_MOST, SIZES_FILE, SIZES_HELP, Sizes, parse_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

SHARDS_AT_MOST = 10**6  # names that a pattern stands for
MIDDLE_NAMES_AT_MOST = 8  # as many middle names are told


@dataclass(frozen=True)
class Shards:
    """Shards in the order of their names, how many samples each has, and the damaged ones.

    `classes` are the names in `sizes.json`; without it `labels` are those that were counted.
    """

    where: str
    names: tuple[str, ...]  # paths or addresses
    sizes: tuple[int, ...]
    classes: list[str] | None = None
    failures: list[Failure] = field(default_factory=list)
    labels: LabelTally | None = None
    left_out: LeftOut | None = None  # members; None where `sizes.json` does not tell
    notes: tuple[str, ...] = ()  # what else to tell of them

    def entries(self) -> list[tuple[str, str]]:
        """The name of each shard, and its samples; of files the size in bytes too."""
        counts = [f"{size} samples" for size in self.sizes]
        if any(is_address(name) for name in self.names):
            names = [urlsplit(name).path.rpartition("/")[2] for name in self.names]
            return list(zip(names, counts))
        paths = [Path(name) for name in self.names]
        each = zip(paths, counts)
        return [(path.name, f"{count}, {path.stat().st_size} bytes") for path, count in each]


# -- one shard ------------------------------------------------------------------------------------


@dataclass
class _ShardCount:
    """What the headers of one local shard say."""

    size: int = 0
    labels: LabelTally = field(default_factory=LabelTally)
    failure: Failure | None = None
    left_out: LeftOut = field(default_factory=lambda: LeftOut("members of shards"))
    middles: Counter[str] = field(default_factory=Counter)  # of names with further dots


def _count_samples(path: Path) -> _ShardCount:
    count, last = _ShardCount(), "none"
    try:
        with open_shard(str(path)) as (archive, stream):
            for sample in read_samples(archive, stream, str(path), left_out=count.left_out):
                if LABEL in sample:
                    member = archive.extractfile(sample[LABEL])
                    text = label_text(member.read(LONGEST_LABEL))  # type: ignore[union-attr]
                    count.labels.add(text, f"{path}: {sample['__key__']}")
                count.size, last = count.size + 1, sample["__key__"]
                if len(count.middles) <= MIDDLE_NAMES_AT_MOST:
                    count.middles[last.rpartition("/")[2].partition(".")[2]] += 1
    except ARCHIVE_ERRORS as error:
        reason = (
            f"{error_reason(error)}; {count.size} samples before that are good, the last is {last}"
        )
        count.failure = Failure(str(path), reason)
    return count


# -- all shards -----------------------------------------------------------------------------------


def list_shards(where: str, split: str | None, undivided: bool = False) -> Shards:
    """The shards of a folder, a pattern or an address.

    Args:
        where: a local folder, or a pattern of paths or addresses with braces, or the address of a
            folder with `sizes.json`.
        split: "train" or "val": which folder at an address; a pattern is "train" only. None:
            `where` is the place of the split itself.
        undivided: for `val`, take all shards where they are not divided into splits.

    Raises:
        DataError: not http, https or a path; a shard or `sizes.json` is missing or broken.
    """
    if Path(where).is_dir():
        found = sorted(path for path in Path(where).iterdir() if path.suffix == SHARD)
        return _local_shards(where, [path for path in found if not path.name.startswith(".")])
    _check_scheme(where)
    if is_address(where) and not urlsplit(where).path.endswith(SHARD):
        return _shards_at_address(where, split, undivided)
    if split == "val" and not undivided:
        raise DataError(
            f"--data_path {where!r} has no val pictures: a pattern names the shards of one split; "
            "expected a folder, or the address of one, with train and val inside"
        )
    names = _expand_pattern(where)
    if is_address(where):
        sizes_file = _sibling_address(names[0], SIZES_FILE)
        return _shards_with_sizes(where, names, _fetch_sizes(sizes_file), sizes_file)
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

    spans = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in spans) > SHARDS_AT_MOST:
        raise DataError(
            f"--data_path {pattern!r} stands for more than {SHARDS_AT_MOST:,} shards; expected "
            "fewer, or a folder"
        )
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
    listed_sizes = _read_sizes(paths)
    if listed_sizes is None:
        return _count_shards(where, paths)
    sizes_file = str(paths[0].parent / SIZES_FILE)
    for path in paths:
        at_most = path.stat().st_size // tarfile.BLOCKSIZE  # each has a header
        if listed_sizes.counts[path.name] > at_most:
            raise DataError(
                f"{sizes_file} says that {path.name} holds {listed_sizes.counts[path.name]:,} "
                f"samples, but its size has room for {at_most:,} at most. {SIZES_HELP}"
            )
    return _shards_with_sizes(where, [str(path) for path in paths], listed_sizes, sizes_file)


def _count_shards(where: str, paths: list[Path]) -> Shards:
    """The local shards, their samples counted and their labels read."""
    sizes: list[int] = []
    failures: list[Failure] = []
    labels, left_out = LabelTally(), LeftOut("members of shards")
    middles: Counter[str] = Counter()
    with ThreadPoolExecutor(8) as pool:
        for count in pool.map(_count_samples, paths):
            sizes.append(count.size)
            labels.update(count.labels)
            left_out.merge([count.left_out])
            middles += count.middles
            if count.failure is not None:
                failures.append(count.failure)
    names = tuple(str(path) for path in paths)
    notes = _middle_names(middles)
    return Shards(where, names, tuple(sizes), None, failures, labels, left_out, notes)


def _middle_names(middles: Counter[str]) -> tuple[str, ...]:
    """A note where pictures that belong together may count as several."""
    few = 2 <= len(middles) <= MIDDLE_NAMES_AT_MOST and min(middles.values()) >= 2
    if not few or "" in middles:
        return ()
    each = ", ".join(f"{count:,} {middle!r}" for middle, count in sorted(middles.items()))
    return (
        f"note: the names of the samples have parts in common after their first dot ({each}); each "
        "counts as a picture of its own",
    )


def _read_sizes(paths: list[Path]) -> Sizes | None:
    """The local `sizes.json`, if it can stand for counting."""
    file = paths[0].parent / SIZES_FILE
    try:
        written = file.stat().st_mtime_ns
        if any(path.parent != file.parent or path.stat().st_mtime_ns > written for path in paths):
            return None
        with file.open("rb") as opened:
            data = opened.read(SIZES_AT_MOST + 1)
    except OSError:
        return None
    sizes = parse_sizes(data, str(file))
    return sizes if all(path.name in sizes.counts for path in paths) else None


def _shards_with_sizes(where: str, names: list[str], sizes: Sizes, sizes_file: str) -> Shards:
    short = [
        urlsplit(name).path.rpartition("/")[2] if is_address(name) else Path(name).name
        for name in names
    ]
    missing = [name for name in short if name not in sizes.counts]
    if missing:
        raise DataError(f"{sizes_file} lacks {', '.join(missing[:3])}. {SIZES_HELP}")
    counts = tuple(sizes.counts[name] for name in short)
    notes: tuple[str, ...] = ()
    if sizes.left_out is None:
        notes = (
            f"note: {sizes_file} does not tell whether shards hold members that are left out; "
            "`python -m convmae.data.shards FOLDER` counts them",
        )
    return Shards(where, tuple(names), counts, sizes.classes, left_out=sizes.left_out, notes=notes)


def _shards_at_address(address: str, split: str | None, undivided: bool) -> Shards:
    """The shards that the `sizes.json` at an address names, in its folder of `split` if any."""
    folder = address if address.endswith("/") else f"{address}/"
    tried = [] if split is None else [f"{folder}{split}/{SIZES_FILE}"]
    if split in ("train", None) or undivided:
        tried.append(f"{folder}{SIZES_FILE}")
    reasons = []
    for sizes_file in tried:
        try:
            sizes = _fetch_sizes(sizes_file)
        except DataError as error:
            reasons.append(str(error))
            continue
        names = [_sibling_address(sizes_file, name) for name in sorted(sizes.counts)]
        return _shards_with_sizes(address, names, sizes, sizes_file)
    raise DataError("; ".join(reasons))


def _sibling_address(address: str, name: str) -> str:
    """The address of another file in the same folder."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def _fetch_sizes(address: str) -> Sizes:
    from urllib.request import urlopen

    try:
        with urlopen(address, timeout=30) as answer:  # http or https: checked before
            data = answer.read(SIZES_AT_MOST + 1)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--data_path: the sizes of the shards are needed, but {address} cannot be read "
            f"({error}). {SIZES_HELP}"
        ) from error
    return parse_sizes(data, address)


def write_sizes(folder: str | Path, say: Callable[[str], None] = print) -> Path:
    """Counts the shards of a local folder and writes `sizes.json` beside them.

    Raises:
        DataError: no shards, a damaged one, or labels that tell no classes.
    """
    file = Path(folder) / SIZES_FILE
    paths = sorted(path for path in Path(folder).glob(f"*{SHARD}"))
    if not paths:
        raise DataError(f"{str(folder)!r} holds no {SHARD} files")
    shards = _count_shards(str(folder), paths)
    if shards.failures:
        raise DataError("; ".join(f"{name}: {reason}" for name, reason in shards.failures))
    values: dict[str, Any] = {Path(n).name: size for n, size in zip(shards.names, shards.sizes)}
    assert shards.labels is not None and shards.left_out is not None  # counted just now
    classes, problem = shards.labels.classes(), shards.labels.problem()
    if problem is not None:
        classes = shards.labels.names()
        if classes is None:
            raise DataError(problem)
        say(f"{len(classes)} classes are named by their labels: {listed(classes)}")
    if classes is not None:
        values["classes"] = classes
    values["left_out"] = {
        kind: [count, *shards.left_out.names[kind]]
        for kind, count in shards.left_out.counts.items()
    }
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return file


def main(arguments: list[str], say: Callable[[str], None] = print) -> int:
    """`python -m convmae.data.shards FOLDER...`"""
    for folder in arguments:
        try:
            say(f"wrote {write_sizes(folder, say)}")
        except DataError as error:
            say(f"error: {error}")
            return 2
    return 0 if arguments else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
