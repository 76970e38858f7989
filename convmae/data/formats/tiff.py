"""TIFF files: any number of bands, 8 to 64 bits, whole or real numbers, by tifffile.

Ordinary 8-bit pictures (grey, RGB, palette, CMYK and the like) are left to Pillow.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convmae.data.errors import UnreadableError
from convmae.data.formats.stored import Stored, check_pixels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from convmae.config.data import ReadOptions

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
MEASURED = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, SEPARATED)  # values of which stand for themselves
UNSIGNED, UNDEFINED = 1, 4  # sample formats
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of transparency
REDUCED, MASK = 1, 4  # bits of a page that is a smaller copy of another, or a mask of it
NODATA_TAG, ORIENTATION_TAG, PAGES_TAG = 42113, 274, "images"
MOST_PACKED = 2000  # no compression packs pictures more tightly


class TiffHeader(NamedTuple):
    """What the tags of a TIFF say of its picture, upright."""

    height: int
    width: int
    channels: int
    dtype: np.dtype
    alpha: bool
    plain: bool
    """Whether Pillow reads it without any loss."""
    nodata: float | None


def read_tiff_header(file: Path | bytes, reading: ReadOptions) -> TiffHeader:
    """The header of the picture that a TIFF holds; no pixels are decoded.

    Raises:
        UnreadableError: it is damaged, or holds what is no single picture.
    """
    with _opened(file) as tiff:
        page, *others = _pages(tiff, reading)
        turned = _orientation(page) >= 5  # 5 to 8 turn by a quarter
        height, width = page.imagelength, page.imagewidth
        plain = not others and _is_plain(page, reading)
        return TiffHeader(
            width if turned else height,
            height if turned else width,
            page.samplesperpixel * (1 + len(others)),
            np.dtype(np.uint8) if plain else _dtype(page),
            not others and _alpha(page) is not None,
            plain,
            _nodata(page),
        )


def read_tiff(file: Path | bytes, reading: ReadOptions) -> Stored:
    """The values of a TIFF, upright.

    Raises:
        UnreadableError: it is damaged, compressed in a way that cannot be read here, or holds what
            is no single picture.
    """
    with _opened(file) as tiff:
        pages = _pages(tiff, reading)
        page = pages[0]
        parts = [_page_values(part) for part in pages]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        alpha = _alpha(page) if len(pages) == 1 else None
        return Stored(
            values,
            nodata=_nodata(page),
            largest=_largest(page) if page.photometric == WHITE_IS_ZERO else None,
            alpha=alpha,
            premultiplied=alpha is not None and _extra(page)[-1] == ASSOCIATED,
            photo=_dtype(page) in (np.uint8, np.bool_) and len(values) == 1,
        )


@contextmanager
def _opened(file: Path | bytes) -> Iterator[Any]:
    """A `tifffile.TiffFile`; whatever it raises for a damaged file is an `UnreadableError`."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as tiff:
            yield tiff
    except UnreadableError:
        raise
    except Exception as error:  # its parser raises whatever Python raises on the way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "imagecodecs" in reason:
            reason += "; pip install imagecodecs"
        raise UnreadableError(f"not a TIFF that can be read: {reason}") from error


def _pages(tiff: Any, reading: ReadOptions) -> list[Any]:
    """The pages to read: one, or several alike as bands.

    Raises:
        UnreadableError: several without `--pages`, a volume, or sizes that cannot be.
    """
    pages: list[Any] = []
    for page in tiff.pages:
        if page.subfiletype & (REDUCED | MASK) and pages:
            continue
        pages.append(page)
        if len(pages) == 2 and reading.pages is None:
            raise UnreadableError(
                f"a TIFF of several pages ({len(tiff.pages)}); --pages first reads the first "
                "alone, --pages bands reads each as bands"
            )
        if reading.pages == "first":
            break
    if not pages:
        raise UnreadableError("a TIFF without any page")
    first = pages[0]
    for page in pages:
        if (page.shape, page.dtype, page.photometric) != (
            first.shape,
            first.dtype,
            first.photometric,
        ):
            raise UnreadableError(
                f"pages that differ, {page.shape} of {page.dtype} after {first.shape} of "
                f"{first.dtype}; --pages first reads the first alone"
            )
    _check_page(tiff, first, len(pages), reading)
    return pages


def _check_page(tiff: Any, page: Any, count: int, reading: ReadOptions) -> None:
    depth = page.imagedepth
    if depth > 1:
        raise UnreadableError(
            f"a volume of {depth} x {page.imagelength} x {page.imagewidth}; expected a picture: "
            "write its slices as files, or as bands"
        )
    planes = (tiff.imagej_metadata or {}).get(PAGES_TAG, 1) if tiff.is_imagej else 1
    if planes > 1 and len(tiff.pages) == 1 and reading.pages != "first":
        raise UnreadableError(
            f"a stack of {planes} pictures in one page, as ImageJ writes it; --pages first reads "
            "the first alone"
        )
    check_pixels(page.imagelength, page.imagewidth, reading)
    if page.photometric not in (*MEASURED, PALETTE, YCBCR, CIELAB):
        raise UnreadableError(
            f"a TIFF of photometric kind {page.photometric}; expected grey or RGB"
        )
    if page.photometric == WHITE_IS_ZERO and _dtype(page).kind not in "ub":
        raise UnreadableError(
            f"a TIFF whose 0 is white (MinIsWhite) of {page.dtype}, which has no black; write it "
            "as MinIsBlack"
        )
    size = tiff.filehandle.size
    if count * page.nbytes > MOST_PACKED * size:
        raise UnreadableError(
            f"its tags announce {count * page.nbytes} bytes of pixels, but the file has {size}"
        )
    ends = (o + n for o, n in zip(page.dataoffsets, page.databytecounts))
    if (end := max(ends, default=0)) > size:
        raise UnreadableError(f"cut short: its pixels end at byte {end}, but the file has {size}")


def _dtype(page: Any) -> np.dtype:
    """The dtype of the values.

    Raises:
        UnreadableError: it has none that NumPy knows.
    """
    if page.dtype is None:
        raise UnreadableError(f"samples of {page.bitspersample} bits, which have no number type")
    return np.dtype(page.dtype)


def _is_plain(page: Any, reading: ReadOptions) -> bool:
    """Whether a page is an ordinary 8-bit picture, or of a kind that only Pillow decodes."""
    kind, samples, extra = page.photometric, page.samplesperpixel, _extra(page)
    if kind in (PALETTE, YCBCR, CIELAB):
        return True
    if page.bitspersample > 8 or page.sampleformat not in (UNSIGNED, UNDEFINED):
        return False
    if kind == WHITE_IS_ZERO:  # Pillow inverts it, and then a value without data is another
        return samples == 1 and reading.nodata is None and _nodata(page) is None
    if reading.bands is not None and extra:
        return False
    transparent = extra in ((ASSOCIATED,), (UNASSOCIATED,))
    colours = {BLACK_IS_ZERO: 1, RGB: 3, SEPARATED: 4}[kind]
    return samples == colours or (transparent and samples == colours + 1 and kind != SEPARATED)


def _extra(page: Any) -> tuple[int, ...]:
    return tuple(int(kind) for kind in page.extrasamples)


def _alpha(page: Any) -> int | None:
    """The channel that a page says is transparency; None if there is none."""
    extra = _extra(page)
    if extra and extra[-1] in (ASSOCIATED, UNASSOCIATED):
        return page.samplesperpixel - 1
    return None


def _largest(page: Any) -> int:
    return 1 if page.bitspersample == 1 else 2**page.bitspersample - 1


def _nodata(page: Any) -> float | None:
    """The value that GDAL's tag gives to pixels without data."""
    tag = page.tags.get(NODATA_TAG)
    try:
        return None if tag is None else float(str(tag.value).strip(" \0"))
    except ValueError:
        return None


def _orientation(page: Any) -> int:
    tag = page.tags.get(ORIENTATION_TAG)
    value = 1 if tag is None else int(tag.value)
    return value if 1 <= value <= 8 else 1


def _page_values(page: Any) -> np.ndarray:
    """`[C, h, w]`, upright."""
    values = page.asarray()
    if page.samplesperpixel == 1:
        values = values.reshape(1, page.imagelength, page.imagewidth)
    elif page.planarconfig == 1:
        values = np.moveaxis(values, -1, 0)
    return upright(values, _orientation(page))


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """`[C, h, w]` turned and mirrored as a value of EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):
        values = values.transpose(0, 2, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1]
    return np.ascontiguousarray(values)
