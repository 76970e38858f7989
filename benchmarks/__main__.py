"""`python -m benchmarks`: measures cases, prints a table, and writes JSON if asked."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
import traceback
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import benchmarks.budget
import benchmarks.decoder
import benchmarks.pretraining  # noqa: F401  (they register)
from benchmarks import cases, full, models, networks, registry, report  # noqa: F401  (they register)
from benchmarks.limits import Rates, environment, measure_rates, using_threads
from benchmarks.peers import Checkouts
from benchmarks.revision import RevisionError, Worker, workers
from benchmarks.runner import (
    Comparison,
    DisagreementError,
    Row,
    make_rows,
    measure,
    one_line,
)
from benchmarks.setting import Setting
from convmae_kernels.ops.support.arithmetic import SLOW_ON_CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPE_HELP = "autocast for models; if absent both, or float32 alone with --summary, to be quick"


KEEP_HELP = "keep the rows of other cases that the file holds; with --full, go on where it ends"
BUDGET_HELP = "seconds for a case, if three rounds fit (default: 6; of a point of --full 1)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and memory of packed operators and models against dense ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--case", nargs="+", default=[], metavar="PATTERN", help="names or globs; all if absent")
    add("--contender", nargs="+", metavar="PATTERN", help="names or globs, besides the baseline")
    add("--list", action="store_true", help="print the cases and stop")
    add("--json", metavar="FILE", help="write the results here as JSON, after every case")
    add("--keep", action="store_true", help=KEEP_HELP)
    add("--summary", action="store_true", help="say at the end what skipping saved in the step")
    add("--compare", nargs="+", default=[], metavar="REV", help="commits to measure in turn too")
    add("--full", action="store_true", help="points of sweeps and peers in place of the cases")
    add("--quick", action="store_true", help="with --full: fewer points, and no peer's step")
    add("--official", metavar="DIR", help="with --full: a checkout of ConvMAE's own code")
    add("--official_fast", "--official-fast", metavar="DIR", help="the same of FastConvMAE's")
    add("--spark", metavar="DIR", help="the same of SparK's")
    add("--dtype", nargs="+", choices=DTYPES, help=DTYPE_HELP)
    add("--model", default=Setting.model, help="whose sizes and steps to measure")
    add("--batch_size", "--batch-size", type=int, default=Setting.batch_size, help="images")
    add("--img_size", "--img-size", type=int, default=Setting.img_size, help="side in pixels")
    add("--mask_ratio", "--mask-ratio", type=float, default=Setting.mask_ratio, help="hidden share")
    add("--repeats", type=int, default=20, help="rounds at most")
    add("--budget", type=float, default=argparse.SUPPRESS, help=BUDGET_HELP)
    add("--threads", type=int, default=None, help="CPU threads; PyTorch's choice if absent")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    add("--no-compile", "--no_compile", action="store_true", help="no compiled dense operators")
    add("--compile-models", "--compile_models", action="store_true", help="compiled models too")
    add("--compile-blocks", "--compile_blocks", action="store_true", help="the step by blocks too")
    add("--stand-in", "--stand_in", action="store_true", help="a rehearsal: figures mean nothing")
    return parser


def _setting(args: argparse.Namespace) -> Setting:
    """Raises: ValueError: a choice that cannot be measured."""
    if args.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {args.repeats}")
    args.budget = getattr(args, "budget", full.BUDGET if args.full else 6.0)
    if args.budget < 0:
        raise ValueError(f"budget must not be negative, got {args.budget}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA device")
    if args.full and args.compare:
        raise ValueError("--compare measures the cases, not the points of --full")
    for option in ("quick", "official", "official_fast", "spark"):
        if getattr(args, option) and not args.full:
            raise ValueError(f"--{option} is for --full")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"json must be a file in a folder that exists, got {args.json}")
    models.parameters(args.model)
    return Setting(
        model=args.model,
        batch_size=args.batch_size,
        img_size=args.img_size,
        mask_ratio=args.mask_ratio,
        device=torch.device(args.device),
        compile=not args.no_compile,
        compile_models=args.compile_models,
        compile_blocks=args.compile_blocks,
    )


def run(
    chosen: Sequence[registry.Case],
    setting: Setting,
    dtypes: Sequence[torch.dtype],
    *,
    repeats: int,
    budget: float,
    contenders: Sequence[str] | None = None,
    others: Sequence[Worker] = (),
    done: Callable[[report.Results], None] = lambda results: None,
    failures: list[str] | None = None,
) -> report.Results:
    """Measures the machine's limits, then every case in every dtype.

    A contender that fails or computes something else is left out, and so is a case in which nothing
    is left to compare; notes and `failures` say so. Calls `done` with the results so far after
    each, so that a run that is stopped loses little. `others`: revisions to measure in every case.
    """
    failures = [] if failures is None else failures
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in matrix products
    rates = {None: measure_rates(setting.device, dtypes)}  # by threads
    gemm = {str(dtype)[6:]: rate for dtype, rate in rates[None].gemm.items()}
    facts = environment(setting.device)
    rates[torch.get_num_threads()] = rates[None]
    facts |= {other.name: f"kernels: {other.facts['kernels']}" for other in others}
    results = report.Results(facts, _facts(setting), rates[None].copy, gemm, [])
    for case in chosen:
        for dtype in case.dtypes or dtypes:
            if dtype not in dtypes:
                continue
            if not case.emulated and setting.device.type == "cpu" and dtype in SLOW_ON_CPU:
                note = f"networks and layers in {str(dtype)[6:]}: left out, the CPU emulates it"
                results.notes.extend([note] if note not in results.notes else [])
                continue
            print(f"measuring {case.name} in {str(dtype)[6:]} ...", file=sys.stderr, flush=True)
            with using_threads(case.threads):
                if case.threads not in rates:
                    rates[case.threads] = measure_rates(setting.device, dtypes)
                build = partial(_build, case, setting, dtype, contenders, others)
                limits = {"repeats": repeats, "budget": budget}
                rows, notes, failed = _measure(case, build, rates[case.threads], dtype, **limits)
            results.rows.extend(rows)
            results.notes.extend(note for note in notes if note not in results.notes)
            failures.extend(failure for failure in failed if not full.is_of_a_peer(failure))
            done(results)
            if setting.compile or setting.compile_models or setting.compile_blocks:
                torch.compiler.reset()
            gc.collect()
    return results


def _measure(
    case: registry.Case,
    build: Callable[[], Comparison],
    rates: Rates,
    dtype: torch.dtype,
    **limits: Any,
) -> tuple[list[Row], list[str], list[str]]:
    """The rows of a case, the notes about it, and those of its notes that are failures."""
    name = f"{case.name} in {str(dtype)[6:]}"
    rows: list[Row] = []
    comparison = None
    try:
        comparison = build()
        times = measure(comparison, dtype, **limits)
        rows = make_rows(case.name, comparison, times, rates, dtype, case.at)
        failed = [f"{name}: left out {failure}" for failure in comparison.failures]
    except DisagreementError as error:
        failed = [f"{name}: left out, {error}"]
    except Exception as error:
        traceback.print_exc()
        failed = [f"{name}: left out, {one_line(error)}"]
    return rows, [*(comparison.notes if comparison else []), *failed], failed


def _build(
    case: registry.Case,
    setting: Setting,
    dtype: torch.dtype,
    patterns: Sequence[str] | None,
    others: Sequence[Worker],
) -> Comparison:
    """The comparison of a case, of the baseline and the contenders whose name fits a pattern.

    Other revisions are contenders too, whatever the patterns; those that cannot do the case are
    among its failures.

    Raises:
        DisagreementError: there is no such contender.
    """
    comparison = case.build(setting, dtype)
    for other in others:
        try:
            comparison.contenders.append(other.contender(case.name, setting, dtype))
        except RevisionError as error:
            comparison.failures.append(f"{other.name}: {error}")
    if patterns is None:
        return comparison
    names = {comparison.baseline, *(other.name for other in others)}
    chosen = [
        contender
        for contender in comparison.contenders
        if contender.name in names
        or any(fnmatch.fnmatchcase(contender.name, pattern) for pattern in patterns)
    ]
    if len(chosen) < 2:
        names = ", ".join(contender.name for contender in comparison.contenders)
        raise DisagreementError(f"no contender fits {', '.join(patterns)}; there are {names}")
    return replace(comparison, contenders=chosen)


def _kept(file: str | None, setting: Setting) -> report.Results | None:
    """The results of a file; None if there is none yet.

    Raises:
        ValueError: there is no file to keep, or it holds results of another setting or device.
    """
    if not file:
        raise ValueError("--keep needs --json, the file whose rows are kept")
    if not Path(file).exists():
        return None
    old = report.load(file)
    same = (_sizes(_facts(setting)), environment(setting.device).get("gpu"))
    if (_sizes(old.setting), old.environment.get("gpu")) != same:
        raise ValueError(f"{file} holds results of another setting or device; keep it elsewhere")
    return old


def _merge(
    old: Sequence[Row], new: Sequence[Row], measured: set[str], all_contenders: bool
) -> list[Row]:
    """New rows, after the old ones of other cases or, unless all were measured, contenders."""
    again = {(row.case, row.dtype, row.contender) for row in new}
    kept = [
        row
        for row in old
        if (row.case, row.dtype, row.contender) not in again
        and not (all_contenders and row.case in measured)
    ]
    return [*kept, *new]


def _sizes(facts: Mapping[str, object]) -> dict[str, object]:
    """A setting without what says only which contenders there are."""
    return {name: value for name, value in facts.items() if not name.startswith("compile")}


def _facts(setting: Setting) -> dict[str, object]:
    return asdict(setting) | {"device": str(setting.device)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        setting = _setting(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        names = args.dtype or (["float32"] if args.summary else list(DTYPES))
        dtypes = [DTYPES[name] for name in names]
        known = Checkouts(args.official, args.official_fast, args.spark)
        every = full.cases(setting, dtypes, args.quick, known) if args.full else None
        chosen = registry.select(args.case, every)
        if args.list:
            print("\n".join(f"{case.name:36} {case.about}" for case in chosen))
            return
        if args.summary and "step" not in [case.name for case in chosen]:
            raise ValueError("--summary needs the case 'step'; add it to --case")
        old = _kept(args.json, setting) if args.keep else None
        if old and args.full:
            full.check_same_threads(old.environment, args.json)
    except ValueError as error:
        parser.error(str(error))
    kept = old.rows if old else []
    if args.full:
        chosen = full.missing(chosen, kept)
    measured = {case.name for case in chosen}
    failures: list[str] = []

    def merged(results: report.Results) -> report.Results:
        if args.stand_in:
            results.environment["stand_in"] = True
        rows = _merge(kept, results.rows, measured, args.contender is None)
        notes = full.lasting(old.notes, chosen) if old and args.full else []
        notes = [*notes, *(note for note in results.notes if note not in notes)]
        return replace(results, rows=rows, notes=notes)

    def done(results: report.Results) -> None:
        if args.json:
            report.save(merged(results), args.json)

    try:
        with workers(args.compare, setting.device, torch.get_num_threads()) as others:
            results = run(
                chosen,
                setting,
                dtypes,
                repeats=args.repeats,
                budget=args.budget,
                contenders=args.contender,
                others=others,
                done=done,
                failures=failures,
            )
    except RevisionError as error:
        parser.error(str(error))
    results = merged(results)
    print(report.header(results), report.table(results), sep="\n\n")
    if args.full:
        print("", *report.align(full.lines(results.rows), left=2), sep="\n")
    if args.summary and not failures:
        print("", report.summary(results), sep="\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
