"""One recipe from several starts, several seeds each, and a table of what came out.

    python examples/compare_starts.py finetune --config recipes/fashion-mnist_finetune.yaml \
        --data_path data/fashion-mnist --starts random pretrained=runs/fashion \
        --seeds 0 1 2 --output_dir runs/compared -- --max_samples 500

runs `convmae finetune` six times (`segment` and `detect` run `convmae segment train` and
`convmae detect train`) and writes after each of them

    runs/compared/comparison.md       mean, deviation and single values of the last evaluations
    runs/compared/comparison.json     all evaluations, times, commands, versions
    runs/compared/random/seed-0       the run itself
    runs/compared/random/seed-0.txt   what it printed

Started again it skips what is done and goes on with a run that was stopped. What stands behind `--`
goes to every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convmae.records.log import read_log

# words of the command, and the option that takes weights to start from
TASKS = {
    "finetune": (["finetune"], "--finetune"),
    "linprobe": (["linprobe"], "--finetune"),
    "segment": (["segment", "train"], "--init"),
    "detect": (["detect", "train"], "--init"),
}
RANDOM = "random"
NOT_METRICS = ("event", "step", "epoch", "seconds")
SET_HERE = ("--config", "--data_path", "--seed", "--output_dir", "--resume", "--init", "--finetune")
INTERRUPTED = "interrupted; go on with"  # what a run prints that a signal has ended early


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="options behind -- go to every run",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("task", choices=list(TASKS))
    add("--config", type=Path, required=True, help="a recipe of that task")
    add("--data_path", required=True)
    add(
        "--starts",
        nargs="+",
        required=True,
        metavar="NAME=WEIGHTS",
        help="what to start from: a name for the table, and a run's folder or a file of weights; "
        "the word random stands for random weights",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--output_dir", type=Path, required=True)
    add("--metrics", nargs="+", metavar="NAME", help="rows of the table; default: all numbers")
    return parser


def parse_starts(given: list[str]) -> dict[str, str | None]:
    """`{"random": None, "pretrained": "runs/fashion"}` of `random pretrained=runs/fashion`."""
    starts: dict[str, str | None] = {}
    for text in given:
        name, mark, weights = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or set(name) == {"."}:
            raise ValueError(
                f"--starts {text}: expected a name of letters, digits, . _ and - before the ="
            )
        if name in starts:
            raise ValueError(f"--starts {text}: the name {name!r} is used twice")
        if not mark and name != RANDOM:
            raise ValueError(f"--starts {text}: expected {RANDOM} or NAME=WEIGHTS")
        if mark and not Path(weights).expanduser().exists():
            raise ValueError(f"--starts {text}: {weights!r} does not exist")
        starts[name] = weights if mark else None
    return starts


def check(args: argparse.Namespace, more: list[str]) -> None:
    if not args.config.is_file():
        raise ValueError(f"--config: {args.config} is no file")
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"--seeds {args.seeds}: expected different numbers of 0 or more")
    for word in more:
        name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in SET_HERE:
            raise ValueError(f"{word} behind --: it is set for every run; leave it out there")


def setting(args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """What must be the same where a comparison is gone on with."""
    return {
        "task": args.task,
        "recipe": args.config.read_text(),
        "data_path": str(args.data_path),
        "options": more,
    }


def environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?")
    for name in ("convmae", "torch", "torchvision", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- runs ---------------------------------------------------------------------------------------


def command(args: argparse.Namespace, weights: str | None, seed: int, folder: Path) -> list[str]:
    words, option = TASKS[args.task]
    flags = ["--config", str(args.config), "--data_path", str(args.data_path)]
    flags += ["--seed", str(seed), "--output_dir", str(folder), "--resume", "auto"]
    return [*words, *flags, *([] if weights is None else [option, weights])]


def execute(arguments: list[str], output: Path, module: str = "convmae") -> tuple[int, str]:
    """Runs a program, `convmae` if no other; what it prints goes to a file too.

    Returns:
        Its exit status, and what it printed.
    """
    lines = []
    with output.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
                lines.append(line)
        except KeyboardInterrupt:  # the run got it too, and saves
            raise SystemExit(process.wait()) from None
    return process.wait(), "".join(lines)


def result_of(folder: Path) -> dict[str, Any]:
    """The evaluations in a run's log, and the seconds that its last process trained.

    Raises:
        ValueError: there is none.
    """
    entries = read_log(folder)
    evaluations = [entry for entry in entries if entry.get("event") == "evaluation"]
    if not evaluations:
        raise ValueError(f"{folder / 'log.txt'} has no evaluation")
    seconds = [e["seconds"] for e in entries if "event" not in e and "seconds" in e]
    return {
        "evaluations": evaluations,
        "seconds": seconds[-1] if seconds else None,
        "resumed": any(entry.get("event") == "resumed" for entry in entries),
    }


# -- tables -------------------------------------------------------------------------------------


def numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in evaluation.items()
        if name not in NOT_METRICS
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }


def cell(values: list[float]) -> str:
    """`70.12 ± 1.03 (69.1, 70.1, 71.2)`; a single value stands for itself."""
    single = [f"{value:.4g}" for value in values]
    if len(values) < 2:
        return single[0] if single else "–"
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"**{mean:.4g}** ± {deviation:.2g} ({', '.join(single)})"


def table(content: dict[str, Any], metrics: list[str] | None) -> str:
    """The last evaluations, a row for each figure and a column for each start, as Markdown."""
    runs = content["runs"]
    starts = list(content["starts"])
    last = {
        start: [
            numbers(run["evaluations"][-1])
            for run in sorted(runs, key=lambda run: run["seed"])
            if run["start"] == start
        ]
        for start in starts
    }
    names = metrics or list(dict.fromkeys(n for rows in last.values() for row in rows for n in row))
    lines = [f"| | {' | '.join(starts)} |", f"|---|{'--:|' * len(starts)}"]
    for name in names:
        cells = [cell([row[name] for row in last[start] if name in row]) for start in starts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    times = []
    for start in starts:
        of_start = [run for run in runs if run["start"] == start and not run["resumed"]]
        times.append(cell([run["seconds"] / 60 for run in of_start if run["seconds"]]))
    lines.append(f"| minutes of training | {' | '.join(times)} |")
    seeds = ", ".join(f"{start}: {len(last[start])}" for start in starts)
    heading = (
        f"`convmae {' '.join(TASKS[content['setting']['task']][0])}`, {content['config']}, "
        f"data {content['setting']['data_path']}"
    )
    more = content["setting"]["options"]
    return "\n".join(
        [
            heading + (f", {' '.join(more)}" if more else "") + ".",
            "Last evaluations: mean ± standard deviation (single runs, by seed). "
            f"Runs so far: {seeds}.",
            "",
            *lines,
            "",
        ]
    )


def replace_text(path: Path, text: str) -> None:
    fresh = path.with_name(f".new.{path.name}")
    fresh.write_text(text)
    fresh.replace(path)


# -- command line -------------------------------------------------------------------------------


def begin(args: argparse.Namespace, starts: dict[str, str | None], more: list[str]) -> Any:
    """What an earlier call left in `comparison.json`, or a new table without runs.

    Raises:
        ValueError: it was of other options.
    """
    path = args.output_dir / "comparison.json"
    now = setting(args, more)
    if not path.exists():
        return {"setting": now, "config": args.config.name, "starts": starts, "runs": []}
    content = json.loads(path.read_text())
    changed = [name for name in now if content["setting"].get(name) != now[name]]
    changed += [f"start {n}" for n in starts if content["starts"].get(n, starts[n]) != starts[n]]
    if changed:
        raise ValueError(
            f"--output_dir: {args.output_dir} holds a comparison of another "
            f"{' and another '.join(changed)}; name a new folder"
        )
    content["starts"] = {**content["starts"], **starts}
    return content


def main(arguments: list[str] | None = None, run: Any = execute) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    more = given[cut + 1 :]
    parser = options()
    args = parser.parse_args(given[:cut])
    try:
        check(args, more)
        starts = parse_starts(args.starts)
        content = begin(args, starts, more)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output_dir: {args.output_dir} cannot be written: {error}")
    done = {(one["start"], one["seed"]) for one in content["runs"]}
    for seed in args.seeds:
        for name, weights in starts.items():
            if (name, seed) in done:
                print(f"{name}, seed {seed}: done before")
                continue
            folder = args.output_dir / name / f"seed-{seed}"
            folder.parent.mkdir(exist_ok=True)
            words = [*command(args, weights, seed, folder), *more]
            print(f"{name}, seed {seed}: convmae {' '.join(words)}", flush=True)
            status, printed = run(words, folder.with_suffix(".txt"))
            if status or INTERRUPTED in printed:
                reason = f"exit status {status}" if status else "a signal ended it"
                raise SystemExit(
                    f"{name}, seed {seed}: {reason}; see {folder.with_suffix('.txt')}. "
                    "The same command goes on from here."
                )
            result = {"start": name, "seed": seed, "command": words, **result_of(folder)}
            content["runs"].append({**result, "environment": environment()})
            replace_text(args.output_dir / "comparison.json", json.dumps(content, indent=1) + "\n")
            replace_text(args.output_dir / "comparison.md", table(content, args.metrics))
    text = table(content, args.metrics)
    replace_text(args.output_dir / "comparison.md", text)
    print(text)
    return content


if __name__ == "__main__":
    main()
