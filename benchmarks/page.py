"""`python -m benchmarks.page FILE ... -o report.html`: results as one page that needs nothing else.

Tables of everything in the files, and charts of what `--full` measured: time against the visible
share, speed-up, roofline, parts of the step, memory, threads. It opens from disk, without a network
and without a script, in light and dark.
"""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import fits, report
from benchmarks.drawing import COLOURS, Axis, Series, bars, chart
from benchmarks.report import Results, number, quantity, refuse_rehearsal, times
from benchmarks.runner import BASELINE
from benchmarks.sweeps import PREFIX as SWEEPS
from convmae.files import replacing
from convmae.records.report import style_sheet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.runner import Row

# The tables: a title, and the cases that are in it; the first that fits has a case.
TABLES = (
    ("Peers", ("peer/*",)),
    ("Memory", ("memory", "*/memory")),
    ("Training steps", ("step", "mae", "joined", "pretrain/*")),
    ("Networks and stages", ("network/*", "stages12")),
    ("Layers", ("layer/*", "drop_in/*", "strided/*", "decoder/*")),
    ("Operators", ("mask", "gather/*", "scatter/*", "depthwise/*")),
    ("Counted, not measured", ("budget/*",)),
    ("Parts of a training step", ("sweep/step/parts/*",)),
    ("Points of the sweeps", ("sweep/*",)),
    ("Others", ("*",)),
)
FOLDED = ("Points of the sweeps", "Counted, not measured")

STYLE = """
:root { --c3: #9333ea; --c4: #be185d; --c5: #0e7490; --c6: #854d0e; --c7: #4b5563; }
@media screen and (prefers-color-scheme: dark) {
  :root { --c3: #c08bff; --c4: #ff7ab8; --c5: #4cc9dd; --c6: #d8b25a; --c7: #a9b4c4; }
}
.charts, .charts + .panel { margin-top: 12px; }
.chart svg { touch-action: auto; }
.bar-of { fill: var(--c); }
.key.dashed::before {
  background: repeating-linear-gradient(90deg, var(--c) 0 4px, transparent 4px 7px);
}
.scroll { max-height: none; margin-bottom: 12px; }
.scroll td:first-child { white-space: nowrap; }
.scroll td.n, .scroll th.n { text-align: right; white-space: nowrap; min-width: 0; }
.scroll tr.ours td { font-weight: 600; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
ul { margin: 0; padding: 12px 16px 12px 34px; } p.note { margin: 6px 0; }
"""


@dataclass(frozen=True)
class Run:
    """The results of one file.

    Attributes:
        name: of the file, without its folder and ending.
        results: what is in it.
    """

    name: str
    results: Results

    @property
    def rows(self) -> list[Row]:
        """The figures."""
        return self.results.rows


def page(files: Sequence[str | Path]) -> str:
    """The page of files of results.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds no results, or those of a rehearsal.
    """
    runs = []
    for file in files:
        results = report.load(file)
        refuse_rehearsal(results.environment, str(file))
        runs.append(Run(Path(file).stem, results))
    sections = [
        _section("What it was measured on", _machines(runs)),
        _section("Cost against the visible share", _shares(runs), SHARES_NOTE),
        _section("Speed-up", _speed_ups(runs), SPEED_UP_NOTE),
        _section("Limits of the machine", _rooflines(runs), ROOFLINE_NOTE),
        _section("Where a training step spends its time", _parts(runs)),
        _section("Memory", _memory(runs), MEMORY_NOTE),
        _section("Threads", _threads(runs)),
        _section("Left out, and why", _left_out(runs), LEFT_OUT_NOTE),
        *(_section(title, _table(runs, title)) for title, _ in TABLES),
        _section("Notes", _notes(runs)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>Benchmarks</title>\n'
        f"<style>{style_sheet()}{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n"
        '<p class="command">python -m benchmarks</p>\n<h1>What skipping hidden positions saves</h1>'
        '\n<p class="about">Every figure is of a run in which all contenders were measured in '
        "turn. <b>packed</b> computes visible positions alone, <b>dense</b> computes all of them "
        "with the same parameters; both gave the same numbers before they were timed.</p>\n"
        f"</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str, note: str = "") -> str:
    if not content:
        return ""
    said = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{content}\n</section>\n"


def _charts(charts: Iterable[str]) -> str:
    inside = "\n".join(one for one in charts if one)
    return f'<div class="charts">\n{inside}\n</div>' if inside else ""


def _named(title: str, run: Run, runs: Sequence[Run]) -> str:
    """A title with the name of its run, where there are several."""
    return f"{title} ({run.name})" if len(runs) > 1 else title


def _html_table(head: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are words, the others numbers; a line is of escaped text.

    A line whose third cell begins with "packed" stands out.
    """
    made = []
    for cells in lines:
        ours = words >= 3 and cells[2].startswith("packed")
        kind = ' class="ours"' if ours else ""
        made.append(f"<tr{kind}>{_cells('td', cells, words)}</tr>")
    if not made:
        return ""
    return (
        '<div class="panel scroll"><table><thead><tr>'
        f"{_cells('th', head, words)}</tr></thead>"
        f"<tbody>{''.join(made)}</tbody></table></div>"
    )


def _cells(tag: str, cells: Sequence[str], words: int) -> str:
    kinds = ("" if i < words else ' class="n"' for i in range(len(cells)))
    return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells))


# -- what was measured ----------------------------------------------------------------------------


def _machines(runs: Sequence[Run]) -> str:
    head = ["run", "machine", "setting", "copy", "matrix product"]
    lines = []
    for run in runs:
        machine, setting, _ = report.header(run.results).split("\n")
        gemm = ", ".join(f"{quantity(v, 'FLOP/s')} {k}" for k, v in run.results.gemm.items())
        lines.append([run.name, machine, setting, quantity(run.results.copy, "B/s"), gemm])
    return _html_table(head, lines, words=5)


def _table(runs: Sequence[Run], title: str) -> str:
    head = ["case", "dtype", "contender", "median", "spread", "against baseline", "by round"]
    head += ["rounds", "limit", "of limit"]
    parts = []
    for run in runs:
        rows = [row for row in run.rows if _title_of(row.case) == title]
        text = _html_table(head, [_line_of(row) for row in rows], words=3)
        if not text:
            continue
        name = f'<p class="note">{escape(run.name)}</p>' if len(runs) > 1 else ""
        if title in FOLDED:
            text = f"<details><summary>{len(rows)} rows</summary>{text}</details>"
        parts.append(name + text)
    return "\n".join(parts)


def _title_of(case: str) -> str:
    return next(
        title
        for title, patterns in TABLES
        if any(fnmatch.fnmatchcase(case, pattern) for pattern in patterns)
        and not (title == "Memory" and case.startswith("sweep/"))
    )


def _line_of(row: Row) -> list[str]:
    return [
        row.case,
        row.dtype,
        row.contender,
        f"{number(row.median)} {row.unit}",
        f"{row.spread:.0%}" if row.rounds > 1 else "–",
        times(row.ratio),
        times(row.round_ratio),
        str(row.rounds),
        f"{number(row.limit)} {row.unit}" if row.limit else "–",
        f"{row.fraction:.0%}" if row.limit else "–",
    ]


def _left_out(runs: Sequence[Run]) -> str:
    notes = [note for run in runs for note in run.results.notes if "left out" in note]
    return _list(notes)


def _notes(runs: Sequence[Run]) -> str:
    return _list([n for run in runs for n in run.results.notes if "left out" not in n])


def _list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    return f'<ul class="panel">{items}</ul>' if items else ""


# -- charts ---------------------------------------------------------------------------------------

SHARES_NOTE = (
    "The lines are a + b · share, fitted to the packed measures by least squares; a is what does "
    "not depend on the share. A fit is called a straight line where no measure is further than "
    f"{fits.STRAIGHT:.0%} from it."
)
SPEED_UP_NOTE = (
    "The baseline's median over the packed one's; above 1 skipping pays. Dense computes all "
    "positions whatever is visible."
)
ROOFLINE_NOTE = (
    "Operations and bytes that the visible positions need, whoever does the work: a dense "
    "contender's own operations are more. The roof is the copy and the matrix product of the same "
    "run, with all its threads; points of one thread stand under it too."
)
MEMORY_NOTE = "Peak of a fresh process."
LEFT_OUT_NOTE = "A contender that gave other numbers was not timed."


def _percent(value: float) -> str:
    return f"{value:.0%}"


FEW = 4  # points that make no roofline
SHARE = Axis("visible share", ticks=(0, 0.25, 0.5, 0.75, 1.0), text=_percent)


def _shares(runs: Sequence[Run]) -> str:
    charts, tables = [], []
    for run in runs:
        lines = fits.lines(run.rows)
        dense = fits.series(run.rows, "visible", BASELINE)
        for op, line in lines.items():
            unit = next(row.unit for row in run.rows if row.at.get("op") == op)
            found = [(row.at["visible"], row.median) for row in dense.get(op, ())]
            begin = 0.0 if line.a >= 0 else -line.a / line.b  # nothing takes less than no time
            fitted = [(share, line.at(share)) for share in (begin, line.points[-1][0])]
            series = [
                Series("packed", line.points, 0, line=False),
                Series(f"fit, R² {line.r2:.4f}", fitted, 0, dots=False, dashed=True),
                Series("dense", found, 1),
            ]
            y = Axis(unit, start=0.0)
            charts.append(chart(_named(op, run, runs), SHARE, y, series))
        head, *cells = fits.table(run.rows)
        tables.append(_html_table(head, cells, words=2))
    return _charts(charts) + "\n".join(tables)


def _speed_ups(runs: Sequence[Run]) -> str:
    axes = {
        "visible": SHARE,
        "channels": Axis("channels", log=True, ticks=(64, 128, 256, 512)),
        "side": Axis("side of a block, positions", log=True, ticks=(2, 4, 8)),
        "batch": Axis("images", log=True),
    }
    y = Axis("times as fast as dense", log=True, start=1.0)
    charts = []
    for run in runs:
        for axis, x in axes.items():
            series = [
                Series(op, [(row.at[axis], row.ratio) for row in rows], i, dashed=i >= COLOURS)
                for i, (op, rows) in enumerate(fits.series(run.rows, axis).items())
                if rows[0].unit == "ms"
            ]
            title = f"Speed-up and {x.name}"
            charts.append(chart(_named(title, run, runs), x, y, series, height=300))
    return _charts(charts)


def _rooflines(runs: Sequence[Run]) -> str:
    return _charts(_roofline(run, runs, dtype) for run in runs for dtype in run.results.gemm)


def _roofline(run: Run, runs: Sequence[Run], dtype: str) -> str:
    """FLOP/s over FLOP/byte of every row that has both, under the measured limits."""
    clouds: dict[str, list[tuple[tuple[float, float], str]]] = {"packed": [], BASELINE: []}
    for row in run.rows:
        counted = row.flops and row.bytes and row.unit == "ms"
        if row.dtype == dtype and row.contender in clouds and counted:
            rate = row.flops / (row.median / 1e3)
            label = f"{row.case}, {row.contender}: {quantity(rate, 'FLOP/s')}"
            clouds[row.contender].append(((row.flops / row.bytes, rate), label))
    places = [x for cloud in clouds.values() for ((x, _), _) in cloud]
    if len(places) < FEW:
        return ""
    copy, gemm = run.results.copy, run.results.gemm[dtype]
    knee = gemm / copy
    low, high = min(min(places), knee) / 1.5, max(max(places), knee) * 1.5
    roof = [(low, copy * low), (knee, gemm), (high, gemm)]
    series = [Series("copy and matrix product", roof, 7, dots=False)]
    for i, (name, cloud) in enumerate(clouds.items()):
        labels = [label for _, label in cloud]
        series.append(Series(name, [at for at, _ in cloud], i, line=False, labels=labels))
    x = Axis("FLOP / byte", log=True)
    y = Axis("FLOP/s", log=True, text=lambda value: quantity(value, ""))
    return chart(_named(f"Roofline, {dtype}", run, runs), x, y, series, height=320)


def _parts(runs: Sequence[Run]) -> str:
    charts = []
    for run in runs:
        groups: dict[str, list[tuple[str, float]]] = {}
        for row in run.rows:
            if row.at.get("axis") == "part":
                name = f"{row.at['part']}, {row.at['phase']}"
                groups.setdefault(name, []).append((row.contender, row.median))
        charts.append(bars(_named("Parts of a step", run, runs), "ms", list(groups.items())))
    return _charts(charts)


def _memory(runs: Sequence[Run]) -> str:
    charts = []
    for run in runs:
        groups: dict[str, list[tuple[str, float]]] = {}
        for row in run.rows:
            if row.unit == "MiB":
                name = row.case.removeprefix(SWEEPS).removesuffix("/memory")
                group = groups.setdefault(f"{name}, {row.dtype}", [])
                group.append((row.contender, row.median))
        charts.append(bars(_named("Peak memory", run, runs), "MiB", list(groups.items())))
    return _charts(charts)


def _threads(runs: Sequence[Run]) -> str:
    charts = []
    for run in runs:
        for contender in ("packed", BASELINE):
            series = []
            for i, (op, rows) in enumerate(fits.series(run.rows, "threads", contender).items()):
                one = rows[0]
                if one.at["threads"] == 1 and rows[-1].at["threads"] > 1:
                    points = [(row.at["threads"], one.median / row.median) for row in rows]
                    series.append(Series(op, points, i, dashed=i >= COLOURS))
            counts = sorted({int(x) for one in series for x, _ in one.points})
            x, y = Axis("threads", ticks=counts), Axis("times as fast as one thread", start=1.0)
            title = f"Threads, {contender}"
            charts.append(chart(_named(title, run, runs), x, y, series))
    return _charts(charts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page of JSON files of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=main.__doc__)
    parser.add_argument("results", nargs="+", help="what `python -m benchmarks --json FILE` wrote")
    parser.add_argument("-o", "--output", default="report.html", help="the page")
    args = parser.parse_args(arguments)
    try:
        text = page(args.results)
        with replacing(Path(args.output)) as new:
            new.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(args.output)


if __name__ == "__main__":
    main()
