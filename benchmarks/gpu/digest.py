"""All results of a folder on one page of at most 10,000 characters.

`python -m benchmarks.gpu.digest FOLDER` writes it to digest.txt there and prints it.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import ncu_table, store
from benchmarks.gpu.kernel_table import EAGER, TRITON, by_kernel, compiled, measured_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMIT = 10_000
SUITES = ("tests", "training")  # stages that run pytest; each leaves NAME.xml
WARNING = "*** STAND-IN: a rehearsal on a CPU. No time and no ratio below means anything. ***"


def digest(folder: Path, limit: int = LIMIT) -> str:
    """The page; the profile's table, then the others, are cut where it would be too long."""
    for kernels_of_a_step in (25, 15, 8, 3):
        text = _page(folder, kernels_of_a_step)
        if len(text) <= limit:
            return text
    note = "\n... cut; the files have the rest\n"
    return text[: limit - len(note)] + note


def _page(folder: Path, kernels_of_a_step: int) -> str:
    run = store.load(folder / "run.json")
    environment = run.get("environment", {})
    slug = environment.get("slug", "no-device")
    prefix = f"{slug}-" if environment.get("stand_in") else ""
    kernels = store.load(folder / f"{slug}-kernels.json")
    sections: list[Callable[[], list[str]]] = [
        lambda: [WARNING] if environment.get("stand_in") else [],
        lambda: _machine(environment),
        lambda: _stages(run.get("stages", [])),
        lambda: _checks(kernels.get("checks", {})),
        lambda: [
            line
            for suite in SUITES
            for line in _tests(suite, folder / f"{prefix}{suite}.xml")
            or _tests_in_log(suite, folder / "log.txt")
        ],
        lambda: _kernels(kernels.get("kernels", {})),
        lambda: _choices(store.load(folder / f"{slug}-choices.json")),
        lambda: _counters(folder / f"{slug}-counters.csv"),
        lambda: _steps(store.load(folder / f"{slug}-steps.json")),
        lambda: _profile(store.load(folder / f"{slug}-profile.json"), kernels_of_a_step),
    ]
    parts = []
    for section in sections:
        try:
            parts.append(section())
        except Exception as error:  # a file that is not as expected costs its own section only
            parts.append([f"*** a part of this page failed: {type(error).__name__}: {error}"])
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _machine(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return ["nothing is known of the machine: stage env did not end well, see log.txt"]
    kernels = facts.get("kernels", {})
    lines = [
        f"{facts.get('device')}, compute capability {facts.get('compute_capability', '-')}, "
        f"{facts.get('multiprocessors', '-')} multiprocessors, {facts.get('memory_gib', '-')} GiB, "
        f"L2 {facts.get('l2_mib', '-')} MiB; {facts.get('cores')} cores; {facts.get('date')}",
        f"torch {facts.get('torch')}, python {facts.get('python')}, "
        + ", ".join(f"{name} {facts.get(name)}" for name in ("triton", "numpy", "pytest-xdist"))
        + f", driver {facts.get('driver')}",
    ]
    if isinstance(kernels, dict):
        lines += [f"{name} kernels: {kernels.get(name)}" for name in ("cuda", "triton")]
    return lines


def _stages(stages: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{stage['name']:10} {stage['outcome']:8} {stage['seconds']:4d} s of {stage['limit']}"
        + (f"  {stage['note'][:120]}" if stage.get("note") else "")
        for stage in stages
    ]


def _checks(checks: dict[str, dict[str, Any]]) -> list[str]:
    if not checks:
        return []
    kinds = ("ok", "failed", "skipped")
    passed, failed, skipped = ([n for n, r in checks.items() if kind in r] for kind in kinds)
    lines = [f"checks: {len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped"]
    lines += [f"  FAILED {name}: {checks[name]['failed'][:110]}" for name in failed[:10]]
    lines += [f"  skipped: {why}" for why in sorted({checks[n]["skipped"] for n in skipped})]
    return lines


def _tests(suite: str, file: Path) -> list[str]:
    """What pytest's report says of a stage; nothing if there is no whole report."""
    try:
        cases = list(ElementTree.parse(file).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    passed = len(cases) - len(bad) - len(skipped)
    lines = [f"{suite}: {passed} passed, {len(bad)} failed, {len(skipped)} skipped"]
    for case in bad[:20]:
        what = case.find("failure")
        what = case.find("error") if what is None else what
        message = " ".join(what.get("message", "").split()) if what is not None else ""
        lines.append(f"  FAILED {case.get('name')}: {message[:120]}")
    if len(bad) > 20:
        lines.append(f"  and {len(bad) - 20} more")
    return lines


def _tests_in_log(suite: str, file: Path) -> list[str]:
    """What the log says of tests that were stopped before they could write their report."""
    try:
        _, found, log = file.read_text(errors="replace").rpartition(f"== {suite}, ")
    except OSError:
        return []
    log, _, _ = log.partition("\n== ")  # what the next stage printed
    one = (
        r"(?:(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)|^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED))"
    )
    ends = [(m[1] or m[4], m[2] or m[3]) for m in re.finditer(one, log, re.MULTILINE)]
    if not found or not ends:
        return []
    bad = [name for how, name in ends if how in ("FAILED", "ERROR")]
    passed = sum(how == "PASSED" for how, _ in ends)
    lines = [f"{suite}, stopped: {passed} passed, {len(bad)} failed, {len(ends)} of them ended"]
    return lines + [f"  FAILED {name}" for name in bad[:20]]


# -- kernels --------------------------------------------------------------------------------------


def _kernels(results: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each kernel and dtype; batches beside each other, then Triton's time."""
    if not results:
        return []
    rows = measured_rows(results)
    left_out = {item: result["failed"] for item, result in results.items() if "failed" in result}
    batches = sorted({row["batch"] for row in rows})
    rates = [row["copy_rate"] for row in rows]
    lines = [f"kernels; copy rate measured then: {max(rates) / 1e12:.2f} TB/s"] if rates else []
    head = "".join(f" | batch {batch}: us, GB/s, copy, eager" for batch in batches)
    lines.append(f"{'':42}{head} | Triton us")
    for (name, dtype), group in by_kernel(rows).items():
        cells = [f"{name:34} {dtype.replace('float', 'f').replace('bf', 'bf'):7}"]
        for batch in batches:
            cells.append(_cell(compiled(group, batch), group.get((EAGER, batch), {})))
        triton = group.get((TRITON, batches[0]), {})
        cells.append(f"{triton['us']:.1f}" if "us" in triton else "-")
        lines.append(" | ".join(cells))
        for part, count, us in group.get(("cuda", batches[0]), {}).get("parts", [])[:2]:
            lines.append(f"    of it {us:8.1f} us in {count:.3g} of {_short_name(part, 60)}")
    if any(row["in_cache"] for row in rows):
        lines.append("* all its sets of arguments fit the L2 cache: a time of the cache")
    lines += [f"  LEFT OUT {name}: {why[:110]}" for name, why in list(left_out.items())[:12]]
    return lines


def _cell(ours: dict[str, Any], eager: dict[str, Any]) -> str:
    if "us" not in ours:
        return f"{'failed' if 'failed' in ours else '-':^28}"
    ratio = f"{eager['us'] / ours['us']:.2f}x" if "us" in eager else "-"
    speed = ours["rate"] / 1e9
    return f"{ours['us']:7.1f} {speed:7.1f} {ours['of_copy']:4.0%} {ratio:>7}"


def _short_name(name: str, width: int) -> str:
    """A kernel's name without return type and arguments."""
    name = name.removeprefix("void ").replace("convmae::cuda::", "").replace("at::native::", "")
    return name if len(name) <= width else name[: width - 2] + ".."


def _choices(content: dict[str, Any]) -> list[str]:
    """What a table of measured choices says: where it is not the default."""
    found = [*content.get("implementations", []), *content.get("kernels", [])]
    if not found:
        return []
    changed = [choice for choice in found if choice["choice"] != choice["default"]]
    said = [f"measured choices: {len(found)}, of them {len(changed)} not the default"]
    for choice in changed[:8]:
        times = ", ".join(f"{name} {us:.1f}" for name, us in choice["microseconds"].items())
        rows, columns = choice["kernel"]
        said.append(
            f"  {choice['op']} {choice['dtype']} side {choice['side']}, to {choice['most']} "
            f"channels, {rows}x{columns}: {choice['choice']} (us: {times})"
        )
    return said


def _counters(file: Path) -> list[str]:
    try:
        counted = ncu_table.read(file.read_text())
    except OSError:
        return []
    columns = list(ncu_table.SHOWN)
    lines = ["counters (ncu): us; % of peak: " + ", ".join(columns[1:]) + "; stalls, cycles"]
    for kernel in counted:
        figures = " ".join(f"{kernel.figures.get(column, float('nan')):6.1f}" for column in columns)
        stalls = sorted(kernel.stalls.items(), key=lambda item: -item[1])[:4]
        worst = ", ".join(f"{name} {value:.1f}" for name, value in stalls)
        lines.append(f"{_short_name(kernel.kernel, 44):44} {figures}  {worst}")
    return lines


# -- steps ----------------------------------------------------------------------------------------


def _steps(results: dict[str, Any]) -> list[str]:
    rows = results.get("rows", [])
    if not rows:
        return [f"  note: {note[:150]}" for note in results.get("notes", [])[:6]]
    setting = results["setting"]
    lines = [f"steps: {setting['model']}, batch {setting['batch_size']}, {setting['img_size']} px"]
    lines.append(f"{'':54} {'median':>14} spread   ratio of limit")
    for row in rows:
        name = f"{row['case']}, {row['dtype']}: {row['contender']}"
        lines.append(
            f"{name:54} {row['median']:10.2f} {row['unit']:3} {row['spread']:6.1%} "
            f"{row['ratio']:6.2f}x {row['fraction']:8.0%}"
        )
    return lines + [f"  note: {note[:150]}" for note in results.get("notes", [])[:6]]


def _profile(profile: dict[str, Any], most: int) -> list[str]:
    rows = profile.get("kernels", [])
    if not rows:
        return []
    step, busy = profile["step_ms"], profile["kernels_ms"]
    lines = [
        f"a packed step by kernel: {step:.2f} ms, of it {busy:.2f} ms in "
        f"{profile['launches']:.0f} launches"
    ]
    kinds: dict[str, float] = {}
    for row in rows:
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["ms"]
    shares = sorted(kinds.items(), key=lambda item: -item[1])
    lines.append("  " + ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in shares))
    for row in rows[:most]:
        lines.append(
            f"{row['ms']:8.3f} ms {row['share']:4.0%} {row['launches']:6.0f}x  "
            f"{_short_name(row['kernel'], 66)}"
        )
    return lines


def main(arguments: Sequence[str]) -> None:
    """Writes and prints the page."""
    folder = Path(arguments[0])
    text = digest(folder)
    (folder / "digest.txt").write_text(text)
    if "--quiet" not in arguments:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
