"""The tables of a run's page, as HTML."""

from __future__ import annotations

import dataclasses
from html import escape
from typing import TYPE_CHECKING, Any

from convmae.config import TRAINING_OPTIONS, OptionError
from convmae.records.wording import is_number, plain

if TYPE_CHECKING:
    from convmae.records.history import History


def configuration(options: dict[str, Any], command: str) -> str:
    """Rows of options; those that differ from the command's defaults are marked, with those."""
    defaults = _defaults(command, options)
    made = []
    for name, value in options.items():
        shown = f"<code>{escape(plain(value))}</code>"
        changed = name in defaults and plain(defaults[name]) != plain(value)
        if changed:
            shown += f' <span class="note">default {escape(plain(defaults[name]))}</span>'
        kind = ' class="changed"' if changed else ""
        made.append(f"<div{kind}><dt>{escape(str(name))}</dt><dd>{shown}</dd></div>")
    return "\n".join(made)


def _defaults(command: str, options: dict[str, Any]) -> dict[str, Any]:
    """The defaults of a command's options; empty where the run did not say which it was.

    Where a method sets what was not given, they are what it sets.
    """
    if command not in TRAINING_OPTIONS:
        return {}
    own: Any = TRAINING_OPTIONS[command]()
    try:
        of_model = dataclasses.replace(own, model=options["model"])
        of_method = dataclasses.replace(of_model, method=options.get("method", "auto"))
        return vars(of_method.filled()) | {"model": own.model, "method": of_model.filled().method}
    except (KeyError, TypeError, OptionError):  # no methods, in this command or in this run
        return vars(own)


def rows(texts: dict[str, str]) -> str:
    """Rows of names and texts."""
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in texts.items()
    )


def event_rows(history: History, log: str) -> str:
    """Rows of a table, of the events that are kept; `log` is the name of the file that has all."""
    made = []
    for event in history.events:
        details = {k: v for k, v in event.items() if k not in ("event", "step")}
        details_text = ", ".join(f"{name} {plain(value)}" for name, value in details.items())
        step = event.get("step", "")
        shown = f"{step:,}" if is_number(step) else ""
        made.append(_row(shown, str(event["event"]), details_text))
    return "\n".join(made + _rest(history.event_count - len(made), log, columns=3))


def unreadable_rows(history: History, log: str) -> str:
    """Rows of a table: pictures that could not be read, and why."""
    made = [_row(name, reason) for name, reason in history.unreadable.items()]
    return "\n".join(made + _rest(history.unreadable_count - len(made), log, columns=2))


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _rest(count: int, log: str, columns: int) -> list[str]:
    if count <= 0:
        return []
    return [f'<tr><td colspan="{columns}">and {count:,} more, in {escape(log)}</td></tr>']
