"""`report.html`: one page, without a network, of what a run did."""

from __future__ import annotations

import json
import re
import time
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from convmae.files import replacing
from convmae.records.charts import charts, epochs
from convmae.records.evaluation import evaluation_section
from convmae.records.folder import RunFolder
from convmae.records.gallery import Gallery
from convmae.records.history import LogFollower
from convmae.records.summary import RunRecord, about, cards, reason_of, status_of
from convmae.records.tables import configuration, event_rows, rows, unreadable_rows

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage


PICTURE_WORDS = {
    "reconstruction": "originals, what was visible, and what the model painted",
    "prediction": "pictures, the truth, and what the model predicts",
}


class Report:
    """The page of a run that goes on, written after each save.

    What a page costs does not grow with the run: of the log it reads the lines that are new, of the
    pictures it encodes the one that is new; it shows at most `MAX_PICTURES` pictures, curves of at
    most `MAX_POINTS` points and `MAX_EVENTS` events, and its memory is bounded likewise. The first
    page that a process writes of a folder reads the log once from its beginning.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.gallery = Gallery(folder)
        self.log = LogFollower(folder.log)
        self._texts: tuple[dict[str, Any], dict[str, str]] | None = None

    def add_picture(self, picture: PILImage.Image, step: int) -> None:
        """Keeps the picture after a step, for this page and those after it.

        Raises:
            OSError: a file could not be written.
        """
        self.gallery.add(picture, step)

    def write(self) -> Path:
        """Writes the page in place of the old one, whole or not at all; returns its path.

        Raises:
            OSError: the page could not be written.
        """
        if self._texts is None:
            self._texts = (self.folder.read_options(), self.folder.read_environment())
        history = self.log.read()
        run = RunRecord(self.folder, *self._texts, history, self.log.age)
        page = _page(run, self.gallery)
        with replacing(self.folder.report) as new:
            # a path that is no UTF-8 reaches us as half characters, which have no UTF-8 either
            new.write_text(page, encoding="utf-8", errors="backslashreplace")
        return self.folder.report


def write_report(folder: str | Path | RunFolder) -> Path:
    """Writes `folder/report.html`, in place of the old one, whole or not at all.

    The page is one file that opens from disk and needs nothing else: summary, curves,
    pictures, the last evaluation, options, environment and events of the run, as far as the folder
    has them.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the page could not be written.
    """
    folder = RunFolder.of(folder)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to report on")
    return Report(folder).write()


def _page(run: RunRecord, gallery: Gallery) -> str:
    """The page, as text."""
    history, log = run.history, run.folder.log.name
    command = run.environment.get("command", "")
    status, done = status_of(run)
    reason = reason_of(run)
    pictures, damaged = gallery.shown(history.last.get("step", 0))
    evaluation = evaluation_section(run.folder.evaluation)
    data = {
        "charts": charts(history),
        "pictures": pictures,
        "marks": history.marks,
        "epochs": epochs(history),
    }
    parts = {
        "title": escape(f"{run.name}: {status}"),
        "command": escape(f"convmae {command}".strip()),
        "model": escape(run.name),
        "about": escape(about(run)),
        "status": escape(status),
        "kind": status.split()[0],
        "reason": escape(reason),
        "done": f"{100 * done:.1f}",
        "cards": "\n".join(cards(run)),
        "drawn": escape(f"{run.folder.drawn.capitalize()}s"),
        "picture_words": escape(PICTURE_WORDS[run.folder.drawn]),
        "evaluation": evaluation,
        "damaged": escape(f"cannot be read: {', '.join(damaged)}"),
        "configuration": configuration(run.options, command),
        "environment": rows(run.environment),
        "events": event_rows(history, log),
        "event_count": f"{history.event_count:,}",
        "unreadable": unreadable_rows(history, log),
        "unreadable_count": f"{history.unreadable_count:,}",
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        "data": _embeddable(data),
    }
    shown = {
        "has_reason": bool(reason),
        "has_charts": bool(data["charts"]),
        "has_pictures": bool(pictures or damaged),
        "has_slides": bool(pictures),
        "has_damaged": bool(damaged),
        "has_evaluation": bool(evaluation),
        "has_configuration": bool(run.options),
        "has_environment": bool(run.environment),
        "has_events": bool(history.event_count),
        "has_unreadable": bool(history.unreadable_count),
    }
    parts |= {name: "" if there else "hidden" for name, there in shown.items()}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _template())


def style_sheet() -> str:
    """The CSS of the page, for others that are to look like it."""
    return _template().partition("<style>")[2].partition("</style>")[0]


def _template() -> str:
    template = resources.files("convmae.records").joinpath("report_template.html")
    return template.read_text(encoding="utf-8")


def _embeddable(data: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
