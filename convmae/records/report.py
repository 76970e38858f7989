"""`report.html`: one page, without a network, of what a run did."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import time
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.config import TRAINING_OPTIONS
from convmae.files import replacing
from convmae.records.curves import smooth, thin
from convmae.records.folder import RunFolder
from convmae.records.log import read_log
from convmae.records.wording import clock, is_number, mebibytes, number, plain

if TYPE_CHECKING:
    from pathlib import Path

MAX_POINTS = 2000  # of a curve
MAX_PICTURES = 24
MAX_WIDTH = 1200  # pixels of a picture
MAX_EVENTS = 200
QUIET_SECONDS = (
    300.0  # a run that has not logged for longer, and for 10 lines' time, is not running
)


@dataclass
class RunRecord:
    """What a run's folder holds; whatever is missing is empty."""

    folder: RunFolder
    options: dict[str, Any]
    environment: dict[str, str]
    entries: list[dict[str, Any]]
    log_age: float = float("inf")  # seconds since the last line

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The lines of training that have a loss."""
        return [e for e in self.entries if "event" not in e and is_number(e.get("loss"))]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [entry for entry in self.entries if entry.get("event") == "evaluation"]

    @property
    def events(self) -> list[dict[str, Any]]:
        """All other events."""
        return [e for e in self.entries if "event" in e and e["event"] != "evaluation"]

    @property
    def last(self) -> dict[str, Any]:
        """The last line of training; empty if there is none."""
        return self.losses[-1] if self.losses else {}


def write_report(folder: str | Path | RunFolder) -> Path:
    """Writes `folder/report.html`, in place of the old one, whole or not at all.

    The page is one file that opens from disk and needs nothing else: summary, curves,
    reconstructions, options, environment and events of the run, as far as the folder has them.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the page could not be written.
    """
    run = read_run(folder)
    with replacing(run.folder.report) as new:
        new.write_text(render(run), encoding="utf-8")
    return run.folder.report


def read_run(folder: str | Path | RunFolder) -> RunRecord:
    """Reads the texts of a run's folder; a file that cannot be read counts as missing."""
    folder = RunFolder.of(folder)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to report on")
    log = folder.log
    age = max(0.0, time.time() - log.stat().st_mtime) if log.is_file() else float("inf")
    entries = read_log(folder)
    return RunRecord(folder, folder.read_options(), folder.read_environment(), entries, age)


def render(run: RunRecord) -> str:
    """The page, as text."""
    command = run.environment.get("command", "")
    model = str(run.options.get("model", run.folder.path.resolve().name))
    status, done = status_of(run)
    pictures = embedded_pictures(run)
    data = {"charts": charts(run), "pictures": pictures, "marks": marks(run), "epochs": epochs(run)}
    parts = {
        "title": escape(f"{model}: {status}"),
        "command": escape(f"convmae {command}".strip()),
        "model": escape(model),
        "about": escape(about(run)),
        "status": escape(status),
        "kind": status.split()[0],
        "done": f"{100 * done:.1f}",
        "cards": "\n".join(cards(run)),
        "configuration": configuration(run.options, command),
        "environment": rows(run.environment),
        "events": event_rows(run.events, run.folder.log.name),
        "event_count": f"{len(run.events):,}",
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        "data": _embeddable(data),
    }
    shown = {
        "has_charts": bool(data["charts"]),
        "has_pictures": bool(pictures),
        "has_configuration": bool(run.options),
        "has_environment": bool(run.environment),
        "has_events": bool(run.events),
    }
    parts |= {name: "" if there else "hidden" for name, there in shown.items()}
    template = resources.files("convmae.records").joinpath("report_template.html")
    text = template.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def _embeddable(data: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# -- what happened --------------------------------------------------------------------------------


def status_of(run: RunRecord) -> tuple[str, float]:
    """`finished`, `running` or `interrupted at step ...`, and the share that is done.

    Finished: the last line is of the last epoch. Otherwise an event `interrupted` or `failed` after
    the last line tells; without one, a run is running if its log is young, else it stopped.
    """
    if not run.losses:
        return ("running", 0.0) if run.log_age < QUIET_SECONDS else ("not trained", 0.0)
    total = run.options.get("epochs")
    step, epoch = run.last["step"], run.last.get("epoch", 0.0)
    done = min(1.0, epoch / total) if is_number(total) and total > 0 else 0.0
    if done == 1.0:
        return "finished", 1.0
    position = run.entries.index(run.last)
    for entry in run.entries[position:]:
        if entry.get("event") in ("interrupted", "failed"):
            return f"{entry['event']} at step {entry.get('step', step):,}", done
    line_seconds = duration(run.losses) / len(run.losses)
    if run.log_age < max(QUIET_SECONDS, 10 * line_seconds):
        return "running", done
    return f"stopped at step {step:,}", done


def duration(losses: list[dict[str, Any]]) -> float:
    """Seconds of training: the sum over the processes of a resumed run."""
    total = before = 0.0
    for entry in losses:
        seconds = entry.get("seconds") or 0.0
        if seconds < before:
            total += before
        before = seconds
    return total + before


def about(run: RunRecord) -> str:
    """The run in half a line."""
    options = run.options
    size = options.get("input_size")
    size = " x ".join(map(str, size)) if isinstance(size, list) else f"{size} x {size}"
    facts = [
        str(options.get("data_path", "")),
        f"{size} pixels" if "input_size" in options else "",
        f"{100 * options['mask_ratio']:g} % hidden" if is_number(options.get("mask_ratio")) else "",
        run.environment.get("device", ""),
    ]
    return "  ·  ".join(fact for fact in facts if fact).replace(" x ", " × ")


# -- cards ----------------------------------------------------------------------------------------


def cards(run: RunRecord) -> list[str]:
    """The summary, one box a fact; boxes without data are left out."""
    if not run.losses:
        return [card("Steps", "0", "nothing was logged yet")]
    made = [_steps_card(run), _loss_card(run), _accuracy_card(run), _speed_card(run)]
    memory = [e["memory_mib"] for e in run.losses if is_number(e.get("memory_mib"))]
    if memory:
        made.append(card("Memory", mebibytes(max(memory)), "peak"))
    seconds = duration(run.losses)
    per_step = clock(seconds / run.last["step"]) if run.last["step"] else "none"
    made.append(card("Time", clock(seconds), f"{per_step} a step"))
    return [text for text in made if text]


def _steps_card(run: RunRecord) -> str:
    step, epoch, total = run.last["step"], run.last.get("epoch", 0.0), run.options.get("epochs")
    of = f" of {total:,}" if is_number(total) else ""
    return card("Steps", f"{step:,}", f"{epoch:.4g}{of} epochs")


def _loss_card(run: RunRecord) -> str:
    first, last = run.losses[0]["loss"], run.last["loss"]
    change = f" ({100 * (last / first - 1):+.0f} %)".replace("-", "−") if first > 0 else ""
    return card("Loss", number(last), f"from {number(first)}{change}")


def _accuracy_card(run: RunRecord) -> str:
    scored = [entry for entry in run.evaluations if is_number(entry.get("acc1"))]
    if not scored:
        return ""
    best = max(scored, key=lambda entry: entry["acc1"])
    five = f"top 5: {best['acc5']:.1f} %, " if is_number(best.get("acc5")) else ""
    return card("Best accuracy", f"{best['acc1']:.2f} %", f"{five}epoch {best.get('epoch', 0):.4g}")


def _speed_card(run: RunRecord) -> str:
    """Throughput; and what of model and input pipeline limits it, where the log tells."""
    whole, model, pictures = (
        middle(run.losses, name)
        for name in ("images_per_s", "model_images_per_s", "input_images_per_s")
    )
    if whole is None:
        return ""
    value = f"{number(whole)} images/s"
    if model is None or pictures is None:
        return card("Throughput", value, "median")
    most = max(model, pictures, 1e-12)
    bars = "".join(
        f'<div class="bar"><span>{name}</span><i><b style="width:{100 * rate / most:.1f}%">'
        f"</b></i><span>{number(rate)}/s</span></div>"
        for name, rate in (("model", model), ("input", pictures))
    )
    slower = "model" if model <= pictures else "input pipeline"
    return card("Throughput", value, f"the {slower} is the bottleneck", bars)


def card(name: str, value: str, note: str, more: str = "") -> str:
    """A box: texts, and HTML below the value."""
    shown = re.sub(r" ([A-Za-z%/]+)", r"<small> \1</small>", escape(value))
    return (
        f'<div class="card"><h3>{escape(name)}</h3><p class="value">{shown}</p>{more}'
        f'<p class="note">{escape(note)}</p></div>'
    )


def middle(entries: list[dict[str, Any]], name: str) -> float | None:
    """The median of a value; of three lines or more the first, with its warm-up, is left out."""
    values = [entry[name] for entry in entries if is_number(entry.get(name))]
    if len(values) > 2:
        values = values[1:]
    return float(np.median(values)) if values else None


# -- curves ---------------------------------------------------------------------------------------


def charts(run: RunRecord) -> list[dict[str, Any]]:
    """The charts of the page: title, unit, and series of `name`, `x` (steps) and `y`."""
    made = [_loss_chart(run)]
    rates = {"images_per_s": "whole", "model_images_per_s": "model", "input_images_per_s": "input"}
    for title, unit, names, entries in (
        ("Accuracy", "%", {"acc1": "top 1", "acc5": "top 5"}, run.evaluations),
        ("Loss of evaluations", "", {"loss": "loss"}, run.evaluations),
        ("Learning rate", "", {"lr": "learning rate"}, run.losses),
        ("Gradient norm", "", {"grad_norm": "gradient norm"}, run.losses),
        ("Throughput", "images/s", rates, run.losses),
        ("Memory", "MiB", {"memory_mib": "peak"}, run.losses),
    ):
        lines = [series(label, entries, name) for name, label in names.items()]
        made.append({"title": title, "unit": unit, "series": [line for line in lines if line]})
    return [chart for chart in made if chart["series"]]


def _loss_chart(run: RunRecord) -> dict[str, Any]:
    raw = series("as logged", run.losses, "loss")
    lines = [raw | {"faint": True}] if raw else []
    if len(run.losses) > 20:
        smoothed = smooth(np.array([entry["loss"] for entry in run.losses]))
        together = [
            {"step": entry["step"], "loss": float(value)}
            for entry, value in zip(run.losses, smoothed, strict=True)
        ]
        lines.append(series("smoothed", together, "loss"))
    return {"title": "Loss", "unit": "", "wide": True, "series": lines}


def series(label: str, entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A curve of at most `MAX_POINTS` points; empty if no line has the value."""
    points = [
        (entry["step"], entry[name])
        for entry in entries
        if is_number(entry.get(name)) and is_number(entry.get("step"))
    ]
    if not points:
        return {}
    kept = thin(np.array([y for _, y in points], dtype=float), MAX_POINTS)
    x = [points[index][0] for index in kept]
    return {"name": label, "x": x, "y": [float(f"{points[index][1]:.6g}") for index in kept]}


def epochs(run: RunRecord) -> dict[str, Any]:
    """The epoch of steps, for the page to interpolate."""
    return series("epoch", [*run.losses, *run.evaluations], "epoch")


def marks(run: RunRecord) -> list[dict[str, Any]]:
    """Steps that the curves mark: where the run was resumed, and losses that are no number."""
    labels = {"resumed": "resumed", "nonfinite": "not finite"}
    found = [
        {"step": event["step"], "label": labels[event["event"]]}
        for event in run.events
        if event["event"] in labels and is_number(event.get("step"))
    ]
    return found[:MAX_EVENTS]


# -- pictures -------------------------------------------------------------------------------------


def embedded_pictures(run: RunRecord) -> list[dict[str, Any]]:
    """Up to `MAX_PICTURES` reconstructions, evenly chosen, first and last always, as data URLs."""
    drawn = run.folder.step_pictures()
    newest = run.folder.picture
    if not drawn and newest.is_file():
        drawn = [(run.last.get("step", 0), newest)]
    chosen = np.linspace(0, len(drawn) - 1, min(len(drawn), MAX_PICTURES)).round().astype(int)
    pictures = []
    for index in chosen:
        step, path = drawn[index]
        url = data_url(path)
        if url:
            pictures.append({"step": step, "src": url})
    return pictures


def data_url(path: Path) -> str:
    """A picture as WebP, at most `MAX_WIDTH` wide; empty if it cannot be read."""
    from PIL import Image, features

    form = "webp" if features.check("webp") else "png"
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            shown = picture.convert("RGB")
        shown.thumbnail((MAX_WIDTH, MAX_WIDTH * 8))
        shown.save(buffer, form, quality=82, method=4)
    except OSError:
        return ""
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- tables ---------------------------------------------------------------------------------------


def configuration(options: dict[str, Any], command: str) -> str:
    """Rows of options; those that differ from the command's defaults are marked, with those."""
    defaults = _defaults(command)
    made = []
    for name, value in options.items():
        shown = f"<code>{escape(plain(value))}</code>"
        changed = name in defaults and plain(defaults[name]) != plain(value)
        if changed:
            shown += f' <span class="note">default {escape(plain(defaults[name]))}</span>'
        kind = ' class="changed"' if changed else ""
        made.append(f"<div{kind}><dt>{escape(str(name))}</dt><dd>{shown}</dd></div>")
    return "\n".join(made)


def _defaults(command: str) -> dict[str, Any]:
    """The defaults of a command's options; empty where the run did not say which it was."""
    if command not in TRAINING_OPTIONS:
        return {}
    fields = dataclasses.fields(TRAINING_OPTIONS[command])
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def rows(texts: dict[str, str]) -> str:
    """Rows of names and texts."""
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in texts.items()
    )


def event_rows(events: list[dict[str, Any]], log: str) -> str:
    """Rows of a table, the first `MAX_EVENTS`; `log` is the name of the file that has all."""
    made = []
    for event in events[:MAX_EVENTS]:
        details = {k: v for k, v in event.items() if k not in ("event", "step")}
        details_text = ", ".join(f"{name} {plain(value)}" for name, value in details.items())
        step = event.get("step", "")
        cells = (f"{step:,}" if is_number(step) else "", str(event["event"]), details_text)
        made.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    if len(events) > MAX_EVENTS:
        rest = len(events) - MAX_EVENTS
        made.append(f'<tr><td></td><td colspan="2">and {rest:,} more, in {escape(log)}</td></tr>')
    return "\n".join(made)
