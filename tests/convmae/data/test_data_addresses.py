"""Shards at an http address, and the `sizes.json` that says how many samples they have."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from convmae.data import DataError, open_source, shards
from convmae.data.named import named_batches
from convmae.data.sizes import parse_sizes
from tests.support.shard_files import SIZES, TINY, damage, values, write_shards

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
pytest.importorskip("webdataset")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps


def test_sizes_are_written_used_and_checked(tmp_path: Path) -> None:
    write_shards(tmp_path)
    lines: list[str] = []
    assert shards.main([str(tmp_path)], lines.append) == 0
    assert lines == [f"wrote {tmp_path / 'sizes.json'}"]
    listed = json.loads((tmp_path / "sizes.json").read_text())
    names = [f"shard-{i:06}.tar" for i in range(4)]
    assert listed == dict(zip(names, SIZES)) | {
        "classes": ["0", "1", "2"],
        "left_out": {},
    }
    listed["shard-000000.tar"] = 6  # one too few
    listed["classes"] = ["cat", "cow", "dog"]
    (tmp_path / "sizes.json").write_text(json.dumps(listed))
    source = open_source(tmp_path)
    assert source.pictures == 24 and source.classes == ["cat", "cow", "dog"]
    with pytest.raises(DataError, match="shard-000000.tar holds more than 6 samples"):
        list(source.batches(TINY, 24, 0, 1, workers=1))
    later = time.time() + 10
    os.utime(tmp_path / "shard-000003.tar", (later, later))
    assert open_source(tmp_path).pictures == 25  # too old to be believed
    shutil.rmtree(tmp_path)
    assert shards.main([str(tmp_path)], lines.append) == 2 and "holds no .tar files" in lines[-1]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a.tar": "3"}', '{"a.tar": -1}', '{"../a.tar": 3}', '{"pipe:x.tar": 3}']
)
def test_sizes_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"here .*python -m convmae.data.shards FOLDER writes"):
        parse_sizes(text.encode(), "here")


@pytest.fixture
def address(tmp_path: Path):
    """A folder `www`, and where it is served."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches by curl")


@needs_curl
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_at_an_address_are_those_of_the_folder(address, workers: int) -> None:
    folder, url = address
    shards.write_sizes(write_shards(folder / "train"))
    shards.write_sizes(write_shards(folder / "val"))
    local = open_source(folder)
    for name in (url, f"{url}/", f"{url}/train/shard-{{000000..000003}}.tar"):
        there = open_source(name)
        assert there.pictures == 25 and there.classes == local.classes
        for first in (0, 3):
            ours = local.batches(TINY, 4, first, 8, seed=2, workers=workers)
            theirs = there.batches(TINY, 4, first, 8, seed=2, workers=workers)
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.images, other.images) and torch.equal(one.keys, other.keys)
                assert torch.equal(one.labels, other.labels) and not other.failures
    assert open_source(f"{url}/train").pictures == 25
    (batch,) = open_source(url, "val").evaluation_batches(TINY, 25, workers=workers)
    assert values(batch) == list(range(25))


@needs_curl
def test_shards_at_an_address_that_are_not_divided(address) -> None:
    folder, url = address
    shards.write_sizes(write_shards(folder))
    with pytest.raises(DataError, match=r"val/sizes.json cannot be read"):
        open_source(url, "val")
    pattern = f"{url}/shard-{{000000..000003}}.tar"
    for name in (url, pattern):
        assert open_source(name, "val", undivided=True).pictures == 25
    shards.write_sizes(write_shards(folder / "val"))
    (folder / "val" / "sizes.json").write_text('{"shard-000000.tar": 7}')
    assert open_source(url, "val", undivided=True).pictures == 7


def test_an_address_without_sizes(address) -> None:
    folder, url = address
    write_shards(folder)
    match = r"sizes of the shards are needed, but .*/sizes.json cannot be read .*404.*convmae.data"
    for name in (url, f"{url}/shard-{{000000..000003}}.tar"):
        with pytest.raises(DataError, match=match):
            open_source(name)
    (folder / "sizes.json").write_text('{"shard-000000.tar": 7}')
    with pytest.raises(DataError, match="sizes.json lacks shard-000001.tar"):
        open_source(f"{url}/shard-{{000000..000001}}.tar")


@needs_curl
def test_what_an_address_does_not_give_is_told(address) -> None:
    folder, url = address
    shards.write_sizes(write_shards(folder))
    source = open_source(url)
    damage(folder / "shard-000001.tar", "cut in a picture")
    (folder / "shard-000003.tar").unlink()
    for workers in (0, 1):
        (batch,) = source.batches(TINY, 25, 0, 1, workers=workers)
        assert len(batch.images) == 25
        named = {failure.name.removeprefix(f"{url}/shard-") for failure in batch.failures}
        wanted = {f"000001.tar: sample {i}" for i in (2, 3)}
        assert named == wanted | {f"000003.tar: sample {i}" for i in range(5)}
        assert set(values(batch)) == set(range(9)) | set(range(11, 20))


@needs_curl
def test_chosen_batches_at_an_address_are_those_of_the_folder(address) -> None:
    folder, url = address
    shards.write_sizes(write_shards(folder))
    found = []
    for where in (str(folder), url):
        source = open_source(where, split=None)
        batches = list(named_batches(source, TINY, 4, [1, 2, 5, 6], workers=2))
        found.append({batch.number: (batch.names, values(batch)) for batch in batches})
        assert not any(reason for batch in batches for reason in batch.reasons)
    assert found[0] == found[1]
    assert {number: numbers for number, (_, numbers) in found[0].items()} == {
        1: [4, 5, 6, 7],
        2: [8, 9, 10, 11],
        5: [20, 21, 22, 23],
        6: [24],
    }
    assert found[0][2][0] == [f"shard-00000{s}.tar/s{n:03}" for s, n in
                              ((1, 8), (1, 9), (1, 10), (2, 11))]  # fmt: skip
