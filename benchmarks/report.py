"""Results as a terminal table, as JSON, as pages of `docs/generated/` and in words.

`python -m benchmarks.report FILE ...` prints a page; its first line says how to make it again.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import kernel_table
from benchmarks.runner import BASELINE, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FORMAT = 2  # of the files that are written; those of format 1 have rows without `at`
READABLE = (1, 2)
LEGEND = """\
Times are medians of interleaved rounds. `dense`: plain PyTorch in channels-last with the same
parameters, eager, in the same run as `packed`; `dense, compiled` may be of a later one.
`stages12` is stages 1 and 2, forward and backward, `step` a whole training step, `memory` the
peak of a process that trains, and `mae` our step beside one of MAE with a ViT-B, which has no
convolutions (under `dense`). `of the limit`: the least possible time (bytes that must move over
the copy rate, or FLOPs over the matrix product rate, whichever is longer) over the measured
one; for memory, the state of the parameters over the peak."""


@dataclass(frozen=True)
class Results:
    """One run of the benchmark.

    Attributes:
        environment: what it ran on; see `limits.environment`.
        setting: model, batch size, image size, mask ratio, device.
        copy: measured copy bandwidth in bytes/s.
        gemm: measured matrix product rate in FLOP/s, by dtype.
        rows: the figures.
        notes: what was left out, and why.
    """

    environment: dict[str, Any]
    setting: dict[str, Any]
    copy: float
    gemm: dict[str, float]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def save(results: Results, path: str | Path) -> None:
    """Writes results as JSON; a file of that name is replaced as a whole."""
    text = json.dumps({"format": FORMAT, **asdict(results)}, indent=1, allow_nan=False)
    temporary = Path(f"{path}.new")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def load(path: str | Path) -> Results:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file does not hold results of this version or an older one.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.pop("format", None) not in READABLE:
        raise ValueError(f"{path} does not hold benchmark results of format {FORMAT} or older")
    names = {f.name for f in fields(Results)}
    if set(content) != names:
        raise ValueError(f"{path} holds {sorted(content)}, expected {sorted(names)}")
    content["rows"] = [Row(**row) for row in content["rows"]]
    return Results(**content)


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


# -- text -----------------------------------------------------------------------------------------


def quantity(value: float, unit: str) -> str:
    """A number with a prefix: `quantity(25.7e6, "B")` is `"25.7 MB"`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def number(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio: `1.83x`."""
    digits = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:.{digits}f}x"


def align(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of text of a table; the first `left` columns are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _threads(environment: dict[str, Any]) -> str:
    number = environment["threads"]
    return f"{number} thread{'s' if number != 1 else ''}"


def header(results: Results) -> str:
    """What was measured on what, and the machine's limits."""
    env, s = results.environment, results.setting
    gemm = ", ".join(f"{quantity(rate, 'FLOP/s')} {dtype}" for dtype, rate in results.gemm.items())
    gpu = f"{env['gpu']}, " if "gpu" in env else ""
    return (
        f"{gpu}{env['cpu']}, {env['cores']} cores, {_threads(env)}, {env['capability']}, "
        f"torch {env['torch']}, compiled kernels: {env['kernels']}; {env['date']}\n"
        f"{s['model']}, batch {s['batch_size']}, {s['img_size']} x {s['img_size']} pixels, "
        f"{s['mask_ratio']:.0%} hidden\n"
        f"limits measured in this run: copy {quantity(results.copy, 'B/s')}, matrix product {gemm}"
    )


def table(results: Results) -> str:
    """Every row, for a terminal."""
    lines = [
        ["case", "dtype", "contender", "median", "spread", "vs dense", "by round", "rounds"]
        + ["must move", "must compute", "limit", "of limit"]
    ]
    for row in results.rows:
        lines.append(
            [
                row.case,
                row.dtype,
                row.contender,
                f"{number(row.median)} {row.unit}",
                f"{row.spread:.0%}" if row.rounds > 1 else "-",
                times(row.ratio),
                times(row.round_ratio),
                str(row.rounds),
                quantity(row.bytes, "B"),
                quantity(row.flops, "FLOP") if row.flops else "-",
                f"{number(row.limit)} {row.unit}" if row.limit else "-",
                f"{row.fraction:.0%}" if row.limit else "-",
            ]
        )
    legend = (
        "median and spread (interquartile range / median) of interleaved rounds; vs dense: ratio "
        "of the medians, by round: median of the ratios;\nlimit: bytes that must move / copy "
        "bandwidth or FLOPs / matrix product rate, visible work only; memory: peak of a process, "
        "limit its parameters' state"
    )
    return "\n".join([*align(lines, left=3), legend, *(f"note: {n}" for n in results.notes)])


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.dtype), {})[row.contender] = row
    return groups


def markdown(results: Results) -> str:
    """A line for each case and dtype, then the other contenders, and what it was measured on."""
    compiled = f"{BASELINE} compiled"
    lines = [
        "| case | dtype | packed | dense | dense, compiled | against dense | of the limit |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    others = [
        "| case | dtype | contender | median | spread | dense in that run | against it "
        "| of the limit |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    heads = len(others)
    for (case, dtype), group in _groups(results.rows).items():
        for row in group.values():
            if row.contender not in ("packed", BASELINE, compiled):
                others.append(
                    f"| {case} | {dtype} | {row.contender} | {number(row.median)} {row.unit} | "
                    f"{row.spread:.1%} | {_opponent(row)} | **{times(row.ratio)}** | "
                    f"{_of_limit(row)} |"
                )
        if "packed" not in group:  # it failed, as a note says
            continue
        packed = group["packed"]
        other = f"{number(group[compiled].median)}" if compiled in group else "–"
        lines.append(
            f"| {case} | {dtype} | {number(packed.median)} {packed.unit} | "
            f"{_opponent(packed)} | {other} | **{times(packed.ratio)}** | {_of_limit(packed)} |"
        )
    if len(others) > heads:
        lines += ["", "The same in other ways, each with the dense one of its own run:", ""]
        lines += others
    notes = [f"- {note}" for note in dict.fromkeys(results.notes)]
    return "\n".join([*lines, "", header(results), *(["", *notes] if notes else [])])


def _opponent(row: Row) -> str:
    """What the row was compared with, in the run that measured both."""
    return number(row.median * row.ratio)


def _of_limit(row: Row) -> str:
    return f"{row.fraction:.0%}" if row.limit else "–"


def page(files: Sequence[str]) -> str:
    """A page of `docs/generated/`: the tables of files of the benchmark and of the GPU's kernels.

    Raises:
        ValueError: a file holds neither, or is of a rehearsal.
    """
    command = f"python -m benchmarks.report {shlex.join(files)}"
    parts = [f"<!-- Written by `{command}`; not by hand. -->", "# Measured"]
    for file in files:
        content = _read(file)
        if isinstance(content, dict) and "kernels" in content:
            refuse_rehearsal(content["environment"], file)
            parts += ["## Kernels", kernel_table.markdown(content)]
        else:
            results = load(file)
            refuse_rehearsal(results.environment, file)
            parts += ["## Cases", LEGEND, markdown(results)]
    return "\n\n".join(parts)


def refuse_rehearsal(environment: dict[str, Any], file: str) -> None:
    """Raises ValueError where the results of a file are of a rehearsal."""
    if environment.get("stand_in"):
        raise ValueError(f"{file} is of a rehearsal: its figures mean nothing")


def summary(results: Results) -> str:
    """What skipping saved in the step, in plain sentences, one for each dtype.

    Raises:
        ValueError: the step was not measured.
    """
    s, env = results.setting, results.environment
    sentences = []
    for (case, dtype), group in _groups(results.rows).items():
        if case != "step" or "packed" not in group:
            continue
        packed, dense = group["packed"].median, group[BASELINE].median
        rate = [s["batch_size"] / (1e-3 * ms) for ms in (packed, dense)]
        verdict = (
            f"{dense / packed:.2f} times as fast, {1 - packed / dense:.0%} of the time saved"
            if packed < dense
            else f"{dense / packed:.2f} times as fast: skipping does not pay at this size here"
        )
        sentences.append(
            f"Measured now on this machine ({_threads(env)}): one training step of "
            f"{s['model']} on {s['batch_size']} images of {s['img_size']} x {s['img_size']} "
            f"pixels, {s['mask_ratio']:.0%} hidden, in {dtype} takes {number(dense)} ms "
            f"({rate[1]:.1f} images/s) when the hidden positions are computed too, and "
            f"{number(packed)} ms ({rate[0]:.1f} images/s) when they are skipped: {verdict}."
        )
    if not sentences:
        raise ValueError("a summary needs the case 'step', which was not measured")
    return "\n".join(sentences)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the Markdown page of JSON files of results, for docs/generated/."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument(
        "results",
        nargs="+",
        help="what `python -m benchmarks --json FILE` wrote, or CARD-kernels.json of `make gpu`",
    )
    args = parser.parse_args(arguments)
    try:
        print(page(args.results))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
