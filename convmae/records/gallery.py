"""The pictures of a run: kept as files after each save, each encoded once for its page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.files import replacing
from convmae.records.pictures import save_picture

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage

    from convmae.records.folder import RunFolder

MAX_PICTURES = 24  # on a page
MAX_WIDTH = 1200  # pixels of a picture on a page
MAX_HEIGHT = 2400


class Gallery:
    """The pictures in a run's folder, those of an earlier process included."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._steps: dict[int, Path] | None = None  # listed when they are first asked for

    def add(self, picture: PILImage.Image, step: int) -> None:
        """Keeps the picture after a step, and a smaller copy for the page.

        Raises:
            OSError: a file could not be written.
        """
        path = self.folder.step_picture(step)
        save_picture(picture, path)
        with replacing(self.folder.picture) as new:
            new.write_bytes(path.read_bytes())
        _write_copy(encoded(picture), self.folder.page_picture(path))
        self._listed()[step] = path

    def shown(self, last_step: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Up to `MAX_PICTURES` of the pictures, evenly chosen, first and last always.

        Args:
            last_step: of the run; that of the newest picture where there is no series.

        Returns:
            `step` and `src` (a data URL) of each, and the names of those that cannot be read.
        """
        drawn = sorted(self._listed().items())
        if not drawn and self.folder.picture.is_file():
            drawn = [(last_step, self.folder.picture)]
        chosen = np.linspace(0, len(drawn) - 1, min(len(drawn), MAX_PICTURES)).round().astype(int)
        pictures, unreadable = [], []
        for step, path in (drawn[index] for index in chosen):
            content = self._content(path)
            if content:
                pictures.append({"step": step, "src": data_url(content)})
            else:
                unreadable.append(path.name)
        return pictures, unreadable

    def _listed(self) -> dict[int, Path]:
        if self._steps is None:
            self._steps = dict(self.folder.step_pictures())
        return self._steps

    def _content(self, path: Path) -> bytes:
        """The copy for the page, made where there is none that is as new; empty if unreadable."""
        from PIL import Image

        copy = self.folder.page_picture(path)
        try:
            if copy.is_file() and copy.stat().st_mtime_ns >= path.stat().st_mtime_ns:
                return copy.read_bytes()
            with Image.open(path) as picture:
                content = encoded(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return b""
        _write_copy(content, copy)
        return content


def data_url(content: bytes) -> str:
    """A picture that `encoded` gave, as the source of an image on a page."""
    kind = "webp" if content[8:12] == b"WEBP" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(picture: PILImage.Image) -> bytes:
    """A picture as WebP (PNG where Pillow has no WebP), at most `MAX_WIDTH` by `MAX_HEIGHT`."""
    from PIL import features

    buffer = io.BytesIO()
    shown = picture.convert("RGB")
    shown.thumbnail((MAX_WIDTH, MAX_HEIGHT))
    shown.save(buffer, "webp" if features.check("webp") else "png", quality=82, method=2)
    return buffer.getvalue()


def _write_copy(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_bytes(content)
