"""The one reader of pictures: every kind of file keeps its values, bands and orientation."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from convmae.config import ReadOptions
from convmae.data import DataError, UnreadableError, channel_statistics, open_source
from convmae.data.crops import resized
from convmae.data.formats.decode import EncodedPicture
from convmae.data.formats.tiff import upright
from tests.support.shard_files import write_shard

Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")
pytest.importorskip("torchvision")

DEEP = np.random.default_rng(0).integers(0, 65_536, (20, 30, 5)).astype(np.uint16)
GREY = DEEP[..., 0]
RGB = np.ascontiguousarray(DEEP[..., :3] >> 8).astype(np.uint8)


def tiff(path: Path, values: np.ndarray, orientation: int = 1, **options) -> Path:
    tags = [(274, 3, 1, orientation, True)] if orientation != 1 else []
    tags += [(42113, 2, 0, options.pop("nodata"), True)] if "nodata" in options else []
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, extratags=tags, **{"photometric": "minisblack"} | options)
    return path


def load(file: Path | bytes, **reading) -> torch.Tensor:
    """The picture, as the header announces it."""
    picture = EncodedPicture(file, ReadOptions(**reading))
    image = picture.load()
    assert (len(image), image.dtype) == picture.header().kind
    return image


def refused(file: Path, message: str, **reading) -> None:
    """Both the header and the pixels are refused."""
    picture = EncodedPicture(file, ReadOptions(**reading))
    for read in (picture.header, picture.load):
        with pytest.raises(UnreadableError, match=message):
            read()


# -- types and bands ------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_every_band_of_a_tiff_is_kept(tmp_path: Path, compression, planar: str, dtype) -> None:
    values = (DEEP.astype(np.int64) - (30_000 if dtype == np.int16 else 0)).astype(dtype)
    for tile in (None, (16, 16)):
        stored = np.moveaxis(values, -1, 0) if planar == "separate" else values
        options = {"planarconfig": planar, "compression": compression, "tile": tile}
        got = load(tiff(tmp_path / "a.tif", np.ascontiguousarray(stored), **options))
        wanted = {np.uint8: torch.uint8, np.uint16: torch.uint16}.get(dtype, torch.float32)
        assert got.dtype == wanted
        assert np.array_equal(got.numpy(), np.moveaxis(values, -1, 0))


def test_a_fourth_band_is_transparency_only_where_the_file_says_so(tmp_path: Path) -> None:
    values = np.concatenate([RGB, (DEEP[..., 3:4] >> 8).astype(np.uint8)], 2)
    infrared = tiff(tmp_path / "a.tif", values, photometric="rgb", extrasamples=(0,))
    assert np.array_equal(load(infrared).numpy(), np.moveaxis(values, -1, 0))
    assert np.array_equal(load(infrared, bands=(4, 1)).numpy(), np.moveaxis(values, -1, 0)[[3, 0]])
    refused(infrared, "the file has 4 bands, but --bands asks for 2 5", bands=(2, 5))
    options = {"photometric": "rgb", "extrasamples": ("unassalpha",)}
    transparent = tiff(tmp_path / "b.tif", values, **options)
    share = values[..., 3:] / 255
    on_white = np.moveaxis(values[..., :3] * share + 255 * (1 - share), -1, 0)
    assert np.abs(load(transparent).numpy() - on_white).max() <= 1
    assert np.array_equal(load(transparent, bands=(1, 2, 3, 4)).numpy(), np.moveaxis(values, -1, 0))
    deep = tiff(tmp_path / "c.tif", DEEP[..., :4], **options)
    share = DEEP[..., 3:4] / 65_535
    on_white = np.moveaxis(DEEP[..., :3] * share + 65_535 * (1 - share), -1, 0)
    assert np.abs(load(deep).numpy() - on_white).max() <= 1


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_white_is_zero_is_inverted_at_every_depth(tmp_path: Path, bits: int) -> None:
    values = {1: GREY > 30_000, 8: (GREY >> 8).astype(np.uint8), 16: GREY}[bits]
    got = load(tiff(tmp_path / "a.tif", values, photometric="miniswhite"))
    wanted = np.where(values, 0, 255) if bits == 1 else 2**bits - 1 - values
    assert len(got) == (1 if bits == 16 else 3)
    assert all(np.array_equal(channel, wanted) for channel in got.numpy())
    if bits == 8:  # what the file says of its values holds before they are inverted
        lone = values.copy()
        lone[lone == 7], lone[0, 0] = 8, 7
        white = {"photometric": "miniswhite"}
        got = load(tiff(tmp_path / "b.tif", lone, **white), nodata=7, in_chans=1)
        assert got[0, 0, 0] == round(float((255 - lone.astype(float)).ravel()[1:].mean()))


def deep_files(folder: Path) -> dict[Path, np.ndarray]:
    """Files of 12 or 16 bits, and the values that were written."""
    small, rgb = GREY % 4096, np.ascontiguousarray(DEEP[..., :3])
    text = b" ".join(str(value).encode() for value in small.ravel())
    jp2 = imagecodecs.jpeg2k_encode(rgb, level=0, codecformat="jp2")
    Image.fromarray(GREY).save(folder / "grey.png")
    contents = {
        "rgb.png": (imagecodecs.png_encode(rgb), rgb),
        "rgb.jp2": (jp2, rgb),
        "a.pgm": (b"P5\n# 12 bits\n30 20\n4095\n" + small.astype(">u2").tobytes(), small),
        "b.pgm": (b"P2 30 20 4095\n" + text, small),
        "c.ppm": (b"P6 30 20 65535\n" + rgb.astype(">u2").tobytes(), rgb),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    tifffile.imwrite(folder / "packed.tif", small, bitspersample=12)
    return {
        folder / "grey.png": GREY,
        folder / "packed.tif": small,
        **{folder / name: values for name, (_, values) in contents.items()},
    }


def test_more_than_eight_bits_are_never_scaled(tmp_path: Path) -> None:
    for path, values in deep_files(tmp_path).items():
        got = load(path)
        wanted = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        assert got.dtype == torch.uint16 and np.array_equal(got.numpy(), wanted), path
        assert torch.equal(load(path.read_bytes()), got), path
        if len(got) == 1:
            assert torch.equal(load(path, in_chans=3), got.expand(3, -1, -1)), path


def test_whole_numbers_are_kept_exactly_or_refused(tmp_path: Path) -> None:
    values = np.array([[2**24, -(2**24)], [0, 77]], dtype=np.int32)
    assert load(tiff(tmp_path / "a.tif", values))[0].tolist() == values.tolist()
    refused_pixels = EncodedPicture(tiff(tmp_path / "b.tif", values + 1))
    with pytest.raises(UnreadableError, match="int32 from -16777215 to 16777217; float32"):
        refused_pixels.load()
    refused(tiff(tmp_path / "c.tif", GREY.astype(np.complex64)), "values of complex64")


def test_pages_and_volumes(tmp_path: Path) -> None:
    stack = np.ascontiguousarray(np.moveaxis(DEEP, -1, 0))
    pages = tiff(tmp_path / "a.tif", stack)
    refused(pages, r"several pages \(5\); --pages first reads .* --pages bands")
    assert np.array_equal(load(pages, pages="first").numpy(), stack[:1])
    assert np.array_equal(load(pages, pages="bands").numpy(), stack)
    volume = np.zeros((4, 32, 32), dtype=np.uint16)
    tiff(tmp_path / "b.tif", volume, volumetric=True, tile=(4, 16, 16))
    refused(tmp_path / "b.tif", "a volume of 4 x 32 x 32")
    with tifffile.TiffWriter(tmp_path / "c.tif") as writer:
        writer.write(GREY)
        writer.write(GREY[::2, ::2], subfiletype=1)  # an overview is no page of its own
    assert np.array_equal(load(tmp_path / "c.tif").numpy(), GREY[None])


def test_damaged_files_are_told(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", DEEP, planarconfig="contig")
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    refused(path, "cut short: its pixels end at byte")
    path.write_bytes(content[:8] + b"\xff" * 100)
    refused(path, "not a TIFF that can be read")
    png = imagecodecs.png_encode(np.ascontiguousarray(DEEP[..., :3]))
    with pytest.raises(UnreadableError, match="png"):
        EncodedPicture(png[:300]).load()
    with pytest.raises(UnreadableError, match="cut short: 1 of 600 values"):
        EncodedPicture(b"P5 30 20 4095\n12").load()


@pytest.mark.parametrize("suffix", ["tif", "bands.tif", "png", "jp2", "avif", "jpg", "pgm"])
def test_damaged_bytes_are_an_unreadable_picture(tmp_path: Path, suffix: str) -> None:
    path, rng = tmp_path / f"a.{suffix}", random.Random(suffix)
    if suffix == "bands.tif":
        tiff(path, DEEP, planarconfig="contig", compression="deflate")
    elif suffix == "jp2":
        rgb = np.ascontiguousarray(DEEP[..., :3])
        path.write_bytes(imagecodecs.jpeg2k_encode(rgb, level=0, codecformat="jp2"))
    elif suffix == "pgm":
        path.write_bytes(b"P2 30 20 4095\n" + b" ".join(b"%d" % v for v in GREY.ravel() % 4096))
    else:
        Image.fromarray(GREY if suffix in ("png", "tif") else RGB).save(path)
    content, unreadable = path.read_bytes(), 0
    for _ in range(100):
        damaged = bytearray(content[: rng.randrange(len(content))] if unreadable < 5 else content)
        for _ in range(min(3, len(damaged))):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        picture = EncodedPicture(bytes(damaged))
        for read in (picture.header, picture.load):
            try:
                read()
            except UnreadableError as error:
                unreadable += 1
                assert str(error) and "\n" not in str(error)
    assert unreadable >= 5


# -- geometry -------------------------------------------------------------------------------------


def turned_files(folder: Path, orientation: int) -> dict[Path, np.ndarray]:
    """Files with an EXIF orientation, and their values before it."""
    files = {
        tiff(folder / "plain.tif", RGB, orientation, photometric="rgb"): RGB,
        tiff(folder / "lzw.tif", RGB, orientation, photometric="rgb", compression="lzw"): RGB,
        tiff(folder / "deep.tif", GREY, orientation): GREY,
        tiff(folder / "bands.tif", DEEP, orientation, planarconfig="contig"): DEEP,
        tiff(folder / "float.tif", GREY.astype(np.float32), orientation): GREY,
    }
    smooth = np.add.outer(np.arange(20) * 5, np.arange(30) * 3).astype(np.uint8)
    smooth = np.stack([smooth, 255 - smooth, smooth // 2], 2)
    for name, values in (("a.jpg", smooth), ("b.png", RGB), ("c.webp", RGB), ("d.png", GREY)):
        image = Image.fromarray(values)
        exif = image.getexif()
        exif[0x0112] = orientation
        options = {"a.jpg": {"quality": 100, "subsampling": 0}, "c.webp": {"lossless": True}}
        image.save(folder / name, exif=exif, **options.get(name, {}))
        files[folder / name] = values
    return files


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_and_whole_pictures_agree(tmp_path: Path, orientation: int) -> None:
    for path, values in turned_files(tmp_path, orientation).items():
        picture = EncodedPicture(path)
        whole = picture.load()
        stored = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        wanted = upright(stored, orientation)
        assert np.abs(whole.float().numpy() - wanted).max() <= (4 if path.suffix == ".jpg" else 0)
        full = picture.crop(lambda h, w: (0, 0, h, w), (16, 24))
        assert torch.equal(full, resized(whole, (16, 24))), path
        part = picture.crop(lambda h, w: (h - 8, w - 10, 7, 9), (7, 9))
        bottom, right = whole.shape[1] - 8, whole.shape[2] - 10
        assert torch.equal(part, whole[:, bottom : bottom + 7, right : right + 9]), path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_exif_means(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(RGB)
    image.getexif()[0x0112] = orientation
    expected = np.moveaxis(np.asarray(ImageOps.exif_transpose(image)), -1, 0)
    assert np.array_equal(upright(np.moveaxis(RGB, -1, 0), orientation), expected)


# -- pixels without data --------------------------------------------------------------------------


def test_pixels_without_data_get_the_mean_of_the_others(tmp_path: Path) -> None:
    values = DEEP.astype(np.float32) / 1000
    values[:5, :, 1] = -9999
    values[0, 0, 2] = np.nan
    path = tiff(tmp_path / "a.tif", values, planarconfig="contig", nodata="-9999")
    got = load(path)
    assert torch.equal(got[1, 5:], torch.from_numpy(values[5:, :, 1].copy()))
    assert got[1, :5].flatten().tolist() == pytest.approx([values[5:, :, 1].mean()] * 150)
    assert float(got[2, 0, 0]) == pytest.approx(float(np.nanmean(values[..., 2])))
    measured = EncodedPicture(path).measured()
    assert torch.isnan(measured).sum((1, 2)).tolist() == [0, 150, 1, 0, 0]
    assert float(load(path, nodata=float("nan")).min()) == -9999
    mean, std = channel_statistics(open_source(tmp_path), workers=0)
    known = np.where(values == -9999, np.nan, values).reshape(-1, 5)
    np.testing.assert_allclose(mean, np.nanmean(known, 0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, np.nanstd(known, 0, dtype=np.float64), rtol=1e-6)
    empty = tiff(tmp_path / "b.tif", np.full((8, 8), 3, dtype=np.uint16))
    with pytest.raises(UnreadableError, match="no pixel of band 1 holds data"):
        load(empty, nodata=3)
    with pytest.raises(UnreadableError, match="NaN or infinite values; --nodata nan leaves NaN"):
        load(tiff(tmp_path / "c.tif", values[..., 2]))


@pytest.mark.parametrize("kind", ["folder", "shard", "arrays"])
@pytest.mark.parametrize("value", [-9999.0, -3.4028234663852886e38])
def test_values_that_must_mean_no_data_are_refused(tmp_path: Path, kind: str, value) -> None:
    values = np.linspace(270, 300, 600, dtype=np.float32).reshape(20, 30)
    values[3:9] = value
    if kind == "arrays":
        np.save(tmp_path / "a.npy", values)
    elif kind == "folder":
        tiff(tmp_path / "a.tif", values)
    else:
        content = tiff(tmp_path / "a.tif", values).read_bytes()
        (tmp_path / "a.tif").unlink()
        write_shard(tmp_path / "a.tar", [("a.tif", content)])
    with pytest.raises(
        DataError, match=rf"holds {re.escape(f'{value:.8g}')} far .*nodata .* leaves it out"
    ):
        open_source(tmp_path)
    source = open_source(tmp_path, reading=ReadOptions(nodata=value))
    (mean,), _ = channel_statistics(source, workers=0)
    known = values[values > 0].astype(np.float64)
    assert mean == pytest.approx(float(known.mean()))
    assert float(source.preview(1, (16, 16)).min()) > 260


# -- data sets ------------------------------------------------------------------------------------


def test_the_kind_of_most_pictures_is_that_of_all(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "0.png")
    for index in range(1, 5):
        tiff(tmp_path / f"{index}.tif", DEEP, planarconfig="contig")
    source = open_source(tmp_path, max_unreadable=0.5)
    assert (source.channels, source.dtype) == (5, torch.uint16)
    assert source.description == f"5 pictures of 5 channels of uint16 in {tmp_path}"
    assert [(Path(f.name).name, f.reason) for f in source.failures] == [
        ("0.png", "3 channels of uint8, where other pictures have 5 of uint16")
    ]
    with pytest.raises(UnreadableError, match="where other pictures have 5 of uint16"):
        source.photos.load(0)


def test_photographs_of_any_mode_are_rgb_and_counted(tmp_path: Path) -> None:
    for index, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "1")):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.fromarray(RGB).convert(mode).save(tmp_path / f"{index}.{suffix}")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    source = open_source(tmp_path)
    assert (source.channels, source.dtype, source.failures) == (3, torch.uint8, [])
    for note in (
        "2 of 7 in 8-bit grey",
        "1 of 7 with transparency, laid on white",
        "1 of 7 animations, of which the first picture is read",
    ):
        assert note in source.description


def test_grey_pictures_are_one_channel_on_request(tmp_path: Path) -> None:
    grey = (GREY >> 8).astype(np.uint8)
    for index in range(3):
        Image.fromarray(grey).save(tmp_path / f"{index}.png")
    source = open_source(tmp_path)
    assert source.channels == 3 and "--in_chans 1 reads one channel" in source.description
    source = open_source(tmp_path, reading=ReadOptions(in_chans=1))
    assert source.channels == 1 and np.array_equal(source.photos.load(0)[0].numpy(), grey)
    Image.fromarray(RGB).save(tmp_path / "3.png")
    source = open_source(tmp_path, reading=ReadOptions(in_chans=1))
    wanted = np.asarray(Image.fromarray(RGB).convert("L"))
    assert np.array_equal(source.photos.load(3)[0].numpy(), wanted)
    with pytest.raises(DataError, match="the file has 1 channel of uint8, but in_chans is 4"):
        open_source(tmp_path, reading=ReadOptions(in_chans=4))
    demo = open_source("demo", reading=ReadOptions(in_chans=1))
    rgb = open_source("demo").photos.load(1).permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))
    assert demo.channels == 1 and np.array_equal(demo.photos.load(1)[0].numpy(), expected)
    with pytest.raises(DataError, match="bands has no effect on the demo"):
        open_source("demo", reading=ReadOptions(bands=(1,)))


def test_shards_are_read_as_folders_are(tmp_path: Path) -> None:
    folder, buffer = tmp_path / "folder", io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    folder.mkdir()
    (folder / "0.jpg").write_bytes(buffer.getvalue())  # the content decides
    tiff(folder / "1.tif", RGB, photometric="rgb", compression="lzw")
    tiff(folder / "2.tiff", RGB, 6, photometric="rgb")
    members = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    write_shard(tmp_path / "shards" / "a.tar", members)
    photos = open_source(folder).photos
    source = open_source(tmp_path / "shards")
    images = dict(source.map(torch.clone, workers=0))
    assert len(images) == 3
    for index in range(3):
        assert torch.equal(images[index], photos.load(index))
    deep = tiff(tmp_path / "deep.tif", DEEP, planarconfig="contig").read_bytes()
    write_shard(tmp_path / "deep" / "a.tar", [("x.tif", deep), ("y.tiff", deep)])
    source = open_source(tmp_path / "deep", reading=ReadOptions(bands=(5, 1)))
    assert (source.channels, source.dtype) == (2, torch.uint16)
    got = dict(source.map(torch.clone, workers=0))[1]
    assert np.array_equal(got.numpy(), np.moveaxis(DEEP, -1, 0)[[4, 0]])


def test_the_largest_picture_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiff(tmp_path / "a.tif", GREY)
    tiff(tmp_path / "b.tif", RGB, photometric="rgb")
    Image.fromarray(RGB).save(tmp_path / "c.png")
    Image.fromarray(GREY).save(tmp_path / "d.png")
    for path in sorted(tmp_path.iterdir()):
        refused(path, "20 x 30 pixels are 600, more than --max_pixels 599 allows", max_pixels=599)
        assert load(path, max_pixels=600).shape[1:] == (20, 30)
    np.save(tmp_path / "e.npy", GREY)
    with pytest.raises(DataError, match="e.npy: 20 x 30 pixels are 600"):
        (tmp_path / "arrays").mkdir()
        (tmp_path / "e.npy").rename(tmp_path / "arrays" / "e.npy")
        open_source(tmp_path / "arrays", reading=ReadOptions(max_pixels=599))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)  # Pillow refuses twice as many
    with pytest.raises(UnreadableError, match="max_pixels allows more"):
        load(tmp_path / "c.png")
    assert load(tmp_path / "c.png", max_pixels=200_000_000).shape == (3, 20, 30)


# -- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        ((200, 64, 64), "nhw: 200 pictures"),
        ((1000, 28, 28), "chw: one picture .* of 1000 channels"),
        ((3, 3, 3), "hwc: one picture .* of 3 channels"),
        ((3, 64, 4), "hwc: one picture .* of 4 channels"),
        ((5, 8, 8, 9), "nhwc: 5 pictures .* of 9 channels"),
        ((5, 20, 30, 40), "nchw: 5 pictures .* of 20 channels"),
    ],
)
def test_shapes_that_can_be_read_in_several_ways_are_refused(tmp_path, shape, choices) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(DataError, match=f"can be read in several ways; choose one: .*{choices}"):
        open_source(tmp_path)


@pytest.mark.parametrize("layout", ["hwc", "chw", "nhw"])
def test_the_layout_is_an_option(tmp_path: Path, layout: str) -> None:
    values = np.arange(6 * 7 * 8, dtype=np.uint16).reshape(6, 7, 8)
    np.save(tmp_path / "a.npy", values)
    photos = open_source(tmp_path, reading=ReadOptions(layout=layout)).photos
    wanted = {"hwc": [values.transpose(2, 0, 1)], "chw": [values], "nhw": values[:, None]}[layout]
    assert len(photos) == len(wanted) and photos.channels == len(wanted[0])
    for index, picture in enumerate(wanted):
        assert np.array_equal(photos.load(index).numpy(), picture)
        got = photos.crop(index, lambda h, w: (1, 2, 3, 4), (3, 4))
        assert np.array_equal(got.numpy(), picture[:, 1:4, 2:6])
    with pytest.raises(DataError, match="does not have the axes of layout nhwc"):
        open_source(tmp_path, reading=ReadOptions(layout="nhwc"))


def test_one_data_set_has_one_layout(tmp_path: Path) -> None:
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.zeros((3, 20, 30), dtype=np.uint8))
    np.save(tmp_path / "3.npy", np.zeros((20, 30, 3), dtype=np.uint8))
    (failure,) = open_source(tmp_path, max_unreadable=0.3).failures
    assert failure.name.endswith("3.npy") and "read as hwc, where others are chw" in failure.reason


def test_bands_and_nodata_of_arrays(tmp_path: Path) -> None:
    values = DEEP[..., :4].copy()
    values[values == 0] = 1
    values[:10, :, 2] = 0
    np.save(tmp_path / "a.npy", values)
    reading = ReadOptions(bands=(3, 1), nodata=0)
    photos = open_source(tmp_path, reading=reading).photos
    image = photos.load(0)
    assert np.array_equal(image[1].numpy(), values[..., 0])
    assert set(image[0, :10].flatten().tolist()) == {round(values[10:, :, 2].mean())}
    part = photos.crop(0, lambda h, w: (8, 3, 4, 5), (4, 5))
    assert torch.equal(part, image[:, 8:12, 3:8])
    with pytest.raises(DataError, match="the file has 4 bands, but .*bands asks for 9"):
        open_source(tmp_path, reading=ReadOptions(bands=(9,)))


def test_options_that_mean_nothing_here_are_told(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    reading = ReadOptions(layout="hwc", pages="first")
    text = open_source(tmp_path, reading=reading).description
    assert "--layout hwc has no effect on picture files" in text and "--pages" not in text
    (tmp_path / "a.png").unlink()
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 3), np.uint8))
    text = open_source(tmp_path, reading=reading).description
    assert "--pages first has no effect on arrays" in text and "--layout" not in text
    text = open_source("demo", reading=reading).description
    for option in ("--layout hwc", "--pages first"):
        assert f"{option} has no effect on the demo" in text
    assert "no effect" not in open_source("demo").description
