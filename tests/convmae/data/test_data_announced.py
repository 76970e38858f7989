"""What files announce is checked before memory is taken for it."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from convmae.data import DataError, UnreadableError, idx, open_source, sizes
from convmae.data.archive import EXTENDED_AT_MOST, MEMBER_AT_MOST
from convmae.data.formats.decode import EncodedPicture
from convmae.data.idx import read_idx
from convmae.data.shards import list_shards
from convmae.data.sizes import SIZES_AT_MOST, parse_sizes
from tests.support.shard_files import TINY, sample, values, write_shard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("torchvision")
pytest.importorskip("webdataset")

MIB = 2**20


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fails where Python and NumPy held more than `limit` bytes at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes"


# -- IDX ------------------------------------------------------------------------------------------


def idx_header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


def test_no_more_is_unpacked_than_the_header_announces(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx_header(2, 3, 4) + bytes(24)))
    assert read_idx(path, 3).shape == (2, 3, 4)
    with path.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
        packed.write(idx_header(2, 3, 4))
        for _ in range(256):
            packed.write(bytes(MIB))
    with memory_below(2 * MIB), pytest.raises(DataError, match="holds 41 or more bytes, but its h"):
        read_idx(path, 3)


def test_more_is_announced_than_can_be_packed(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    most = 2**32 - 1
    path.write_bytes(gzip.compress(idx_header(most, most, most) + bytes(100)))
    with memory_below(2 * MIB), pytest.raises(DataError, match="so much cannot be packed into it"):
        read_idx(path, 3)
    plain = tmp_path / "plain"
    plain.write_bytes(idx_header(most, most, most) + bytes(100))
    with memory_below(2 * MIB), pytest.raises(DataError, match="holds 116 bytes, but its header"):
        read_idx(plain, 3)
    plain.write_bytes(idx_header(0, 28, 28))
    with pytest.raises(DataError, match=r"is empty: its header says \[0, 28, 28\]"):
        read_idx(plain, 3)


def test_large_files_are_to_be_unpacked_and_are_then_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = idx_header(64, 512, 512) + bytes(range(256)) * (64 * 1024)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content, 1))
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(idx, "UNPACKED_AT_MOST", 2**24)
    with pytest.raises(DataError, match=r"16777232 bytes; expected at most 16777216 .* gunzip"):
        read_idx(tmp_path / "a.gz", 3)
    with memory_below(MIB):
        images = read_idx(tmp_path / "a", 3)
        assert images.shape == (64, 512, 512) and images[63, 511].tolist() == [*range(256)] * 2


# -- arrays ---------------------------------------------------------------------------------------


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def described(shape: object, dtype: str = "|u1") -> str:
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}}}"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (described((100_000, 100_000, 3)), "which are 30,000,000,000 bytes, but 64 follow"),
        (described((2**62, 4, 4)), "which are 73,786,976,294,838,206,464 bytes"),
        (described((8, 9)), r"says \[8, 9\] of uint8, which are 72 bytes, but 64 follow"),
        (described((-8, 8)), r"says \[-8, 8\]"),
        (described((4, 4), "|V2000000000"), "which are 32,000,000,000 bytes"),
        ("(" * 9000, "not a .npy array of numbers"),
        ("-" * 9000 + "1", "not a .npy array of numbers"),
    ],
)
def test_arrays_that_announce_nonsense(tmp_path: Path, header: str, reason: str) -> None:
    content = npy(header, bytes(64))
    with memory_below(16 * MIB), pytest.raises(UnreadableError, match=reason):
        EncodedPicture(content).load()
    np.save(tmp_path / "0.npy", np.zeros((8, 8), np.uint8))
    (tmp_path / "1.npy").write_bytes(content)
    with memory_below(16 * MIB):
        (failure,) = open_source(tmp_path, max_unreadable=0.5).failures
    assert failure.name == str(tmp_path / "1.npy")
    whole = EncodedPicture(npy(described((8, 8)), bytes(64))).load()
    assert np.array_equal(whole, np.zeros((1, 8, 8)))


# -- members of shards ----------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def append(path: Path, *blocks: bytes) -> None:
    """Puts `blocks` in place of the archive's end."""
    with tarfile.open(path) as archive:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in archive)
    path.write_bytes(path.read_bytes()[:end] + b"".join(blocks) + bytes(1024))


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([header("s001.png", 2**50)], "unexpected end of data"),
        ([header("long", 2**40, tarfile.GNUTYPE_LONGNAME)], "announces 1099511627776 bytes"),
        ([header("pax", EXTENDED_AT_MOST + 1, tarfile.XHDTYPE)], "announces 1048577 bytes"),
        ([header("pax", 2**40, tarfile.XGLTYPE)], "announces 1099511627776 bytes"),
        ([header("s001.png", -512)], "announces -512 bytes"),
        ([header("pax", 0, tarfile.XHDTYPE)] * 5000, "recursion"),
    ],
    ids=["picture", "long name", "extended", "global", "negative", "nested"],
)
def test_members_that_announce_nonsense(tmp_path: Path, blocks: list[bytes], reason: str) -> None:
    path = write_shard(tmp_path / "a.tar", sample(1, label=0) + sample(2, label=0))
    append(path, *blocks)
    with memory_below(32 * MIB):
        shards = list_shards(str(tmp_path), None)
    (failure,) = shards.failures
    assert failure.name == str(path) and reason in failure.reason
    assert "samples before that are good" in failure.reason


def test_pictures_that_are_too_large_are_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", sample(1) + [("s002.png", bytes(2000))] + sample(3))
    monkeypatch.setattr("convmae.data.archive.MEMBER_AT_MOST", 1999)
    assert MEMBER_AT_MOST == 2**32
    (batch,) = open_source(tmp_path).evaluation_batches(TINY, 3, workers=0)
    assert values(batch) == [1, 0, 3]
    assert batch.failures == [(f"{path}: s002", "it announces 2,000 bytes; expected at most 1,999")]


def test_sparse_members_are_unreadable(tmp_path: Path) -> None:
    """A picture of 3 GiB, all of it a hole: 0 bytes in the archive."""
    path = tmp_path / "a.tar"
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s002.png"}
    info = tarfile.TarInfo("sparse")
    content = b"0\n".ljust(512, b"\0")
    info.size, info.pax_headers = len(content), pax | {"GNU.sparse.realsize": str(3 * 2**30)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sample(1):
            one = tarfile.TarInfo(name)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))
        archive.addfile(info, io.BytesIO(content))
    with memory_below(32 * MIB):
        (batch,) = open_source(tmp_path).evaluation_batches(TINY, 2, workers=0)
    assert values(batch) == [1, 0]
    assert batch.failures[0].reason.startswith("a sparse member")


# -- sizes.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a.tar": -1}',
        '{"a.tar": 1.0}',
        '{"a.tar": 1e18}',
        '{"a.tar": true}',
        '{"a.tar": null}',
        '{"a.tar": NaN}',
        '{"a.tar": 1000000000000000000}',
        '{"a.tar": ' + "9" * 4000 + "}",
        '{"a.tar": ' + "9" * 10_000 + "}",
        "[" * 100_000,
        '{"a.tar": ' * 50_000,
        '{"a.tar": 1, "classes": "cat"}',
        '{"a.tar": 1, "left_out": [1]}',
        '{"a.tar": 1, "left_out": {".json": [true, "a"]}}',
        '{"a.tar": 1, "left_out": {".json": [1]}}',
        "\ufeff\x00",
    ],
    ids=lambda text: text[:30],
)
def test_sizes_that_announce_nonsense(text: str) -> None:
    with (
        memory_below(16 * MIB),
        pytest.raises(DataError, match=r"^here .*convmae.data.shards") as e,
    ):
        parse_sizes(text.encode(), "here")
    assert len(str(e.value)) < 500 and "\n" not in str(e.value)


def test_sizes_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", sample(1))
    with (tmp_path / "sizes.json").open("wb") as file:
        file.truncate(SIZES_AT_MOST * 100)
    with memory_below(2 * SIZES_AT_MOST), pytest.raises(DataError, match="larger than 67,108,864"):
        open_source(tmp_path)


def test_no_shard_holds_more_samples_than_headers(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", sample(1))
    room = path.stat().st_size // 512
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": room + 1}))
    with pytest.raises(DataError, match=f"says that a.tar holds {room + 1} samples, but its size"):
        open_source(tmp_path)
    assert sizes.SAMPLES_AT_MOST == 10**8


def test_a_pattern_without_end_is_refused() -> None:
    with memory_below(MIB), pytest.raises(DataError, match="stands for more than 1,000,000 shards"):
        list_shards("{0..9999}-{0..9999}.tar", "train")
