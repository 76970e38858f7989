"""The options of reading pictures, which every command that reads some has. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from convmae.config.checks import check_choice, check_number, config_from_mapping
from convmae.config.errors import OptionError

LAYOUTS = ("auto", "hw", "hwc", "chw", "nhw", "nhwc", "nchw")
PAGES = ("first", "bands")
MAX_PIXELS = 178_956_970  # what Pillow refuses by default: twice its MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class ReadOptions:
    """How pictures are read; None is the default, or what a checkpoint says.

    The fields are those of `DataConfig`, where they are explained.
    """

    in_chans: int | None = None
    bands: tuple[int, ...] | None = None
    nodata: float | None = None
    layout: str | None = None
    pages: str | None = None
    max_pixels: int | None = None

    @property
    def pixel_limit(self) -> int:
        """`max_pixels`, or its default."""
        return MAX_PIXELS if self.max_pixels is None else self.max_pixels

    def given(self) -> dict[str, Any]:
        """The options that are not None, as plain values that YAML and JSON hold.

        A nodata value that is no number is the text "nan".
        """
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.bands is not None:
            values["bands"] = list(self.bands)
        if self.nodata is not None and math.isnan(self.nodata):
            values["nodata"] = "nan"
        return values

    @classmethod
    def of(cls, values: dict[str, Any]) -> ReadOptions:
        """The inverse of `given`.

        Raises:
            OptionError: an option that does not exist, or a value that cannot be.
        """
        config = config_from_mapping(DataConfig, values)
        config.check_reading()
        return config.reading

    def over(self, learnt: ReadOptions | None) -> tuple[ReadOptions, list[str]]:
        """These options, and for those not given what a checkpoint was trained with.

        Args:
            learnt: of the checkpoint; None where it says nothing.

        Returns:
            The options to read with, and a line for the log for each that contradicts `learnt`.
        """
        if learnt is None:
            return self, []
        own, before = self.given(), learnt.given()
        notes = [
            f"note: --{name} {_words(own[name])} is given, but the checkpoint was trained with "
            f"{_words(before[name])}"
            for name in own
            if name in before and own[name] != before[name]
        ]
        return ReadOptions.of(before | own), notes


@dataclass(frozen=True)
class PictureChoice:
    """Which pictures of a folder are read, where no folders `train` and `val` divide them.

    Attributes:
        option: that asks for it, to name in messages.
        file: a text file with a name in each line; None for every picture.
        val_share: share of each class that is held out of these; 0 for none.
        seed: of what is held out.
        held_out: whether that is read, else the rest.
    """

    option: str
    file: str | None = None
    val_share: float = 0.0
    seed: int = 0
    held_out: bool = False


def listed_choice(option: str, file: str | None) -> PictureChoice | None:
    """The pictures that a list names; None, which is all of them, without a list."""
    return None if file is None else PictureChoice(option, file)


@dataclass(kw_only=True)
class DataConfig:
    """How pictures are read. What is not given is as the checkpoint says, if there is one."""

    in_chans: int | None = None
    """Channels: 1 reads 8-bit pictures as grey, 3 repeats the one channel of grey data; another
    number is only compared with what is found. By default 8-bit pictures are read as RGB, and data
    of 16 bits or float with the channels that they have."""
    bands: tuple[int, ...] | None = None
    """Which bands to read, in this order, counted from 1 as GDAL does; all if not given."""
    nodata: float | None = None
    """Value of pixels without data, or nan; they get the mean of the picture's other pixels of that
    band. By default what a TIFF itself says (GDAL's tag); nan leaves out only NaN."""
    layout: Literal["auto", "hw", "hwc", "chw", "nhw", "nhwc", "nchw"] | None = None
    """Axes of .npy arrays: n pictures, h height, w width, c channels. auto, the default, takes
    shapes that can be read in one way alone, and refuses others."""
    pages: Literal["first", "bands"] | None = None
    """Of a TIFF with several pages read the first alone, or each page as bands; by default such a
    file is refused."""
    max_pixels: int | None = None
    """Pixels above which a picture is refused before memory is taken for it; 178,956,970 by
    default."""

    @property
    def reading(self) -> ReadOptions:
        """These options as one value."""
        names = [field.name for field in dataclasses.fields(ReadOptions)]
        values = {name: getattr(self, name) for name in names}
        if self.bands is not None:
            values["bands"] = tuple(self.bands)
        return ReadOptions(**values)

    def check_reading(self) -> None:
        """Raises `OptionError` where an option of reading has a value that cannot work."""
        if self.in_chans is not None:
            check_number("in_chans", self.in_chans, whole=True, above=0)
        if self.max_pixels is not None:
            check_number("max_pixels", self.max_pixels, whole=True, above=0)
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        if self.pages is not None:
            check_choice("pages", self.pages, PAGES)
        if self.nodata is not None and not math.isnan(self.nodata):
            check_number("nodata", self.nodata)
        if self.bands is not None:
            self._check_bands()

    def _check_bands(self) -> None:
        if not self.bands:
            raise OptionError("--bands must name at least one band, got none")
        for band in self.bands:
            check_number("bands", band, whole=True, at_least=1)
        if len(set(self.bands)) < len(self.bands):
            raise OptionError(f"--bands must name each band once, got {_words(list(self.bands))}")
        if self.in_chans is not None and self.in_chans != len(self.bands):
            raise OptionError(
                f"--in_chans {self.in_chans} does not fit the {len(self.bands)} --bands "
                f"{_words(list(self.bands))}; give one of the two"
            )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
