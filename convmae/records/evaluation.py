"""What the last evaluation found, kept in a run's folder and shown on its page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from convmae.files import replacing
from convmae.records.gallery import data_url, encoded

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage

FOUND = "found.json"


@dataclass
class EvaluationDetails:
    """Tables and pictures of one evaluation.

    Attributes:
        step: after which step.
        tables: title, names of columns, and rows of texts.
        pictures: by their titles.
        figures: numbers behind them, for programs.
    """

    step: int
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    pictures: dict[str, PILImage.Image] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes all of it into `folder`, in place of the evaluation before.

        Raises:
            OSError: the disk refused.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for number, (title, picture) in enumerate(self.pictures.items()):
            files[title] = f"picture-{number}.png"
            with replacing(folder / files[title]) as new:
                picture.save(new, format="png")
        found = {
            "step": self.step,
            "figures": self.figures,
            "tables": [list(table) for table in self.tables],
            "pictures": files,
        }
        with replacing(folder / FOUND) as new:
            new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def evaluation_section(folder: Path) -> str:
    """HTML of what `EvaluationDetails.write` left; empty where nothing can be read."""
    from PIL import Image

    try:
        found = json.loads((folder / FOUND).read_text(encoding="utf-8"))
        parts = [f'<p class="note">after step {int(found["step"]):,}</p>']
        parts += [_table(*table) for table in found["tables"]]
        for title, name in found["pictures"].items():
            with Image.open(folder / str(name)) as picture:
                source = data_url(encoded(picture))
            parts.append(
                f'<figure class="panel detail"><figcaption>{escape(title)}</figcaption>'
                f'<img src="{source}" alt="{escape(title)}"></figure>'
            )
        return "\n".join(parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ""  # no evaluation, or files that somebody changed


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="panel scroll"><table><caption>{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )
