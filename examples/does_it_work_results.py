"""The tables and charts of `examples/does_it_work.py`, of what its runs have left in a folder."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from convmae.records.log import read_log
from convmae.training.machine import pick_device, pick_dtype
from examples.compare_starts import RANDOM, cell, environment, replace_text

PROBE, FINETUNE = "probe", "finetune"
TASKS = (PROBE, FINETUNE)
SHARES = (0.01, 0.1, 1.0)  # of the labels


def part_name(task: str, share: float) -> str:
    """`finetune-10` for a tenth of the labels."""
    return f"{task}-{round(100 * share)}"


def losses(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that have a loss."""
    return [entry for entry in read_log(folder) if "event" not in entry and "loss" in entry]


def report(output: Path) -> dict[str, Any]:
    """Writes the results of all that is done in a folder; returns what `results.json` has."""
    setting = json.loads((output / "setting.json").read_text())
    folders = sorted(folder for folder in output.iterdir() if folder.is_dir())
    networks = {folder.name: collect(folder, setting["pretrainings"]) for folder in folders}
    content = {
        "setting": setting,
        "networks": networks,
        "environment": environment() | machine(),
        "command": " ".join(["python -m examples.does_it_work", *sys.argv[1:]]),
    }
    replace_text(output / "results.json", json.dumps(content, indent=1) + "\n")
    replace_text(output / "results.md", tables(content))
    return content


def machine() -> dict[str, str]:
    """The processor, how many threads PyTorch was told to take, and what trainings compute in.

    Features for probes are computed in float32 everywhere.
    """
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    dtype, why = pick_dtype("auto", pick_device("auto"))
    return {
        "processor": name,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "arithmetic": f"{str(dtype).removeprefix('torch.')}, {why}",
    }


def collect(folder: Path, pretrainings: list[str]) -> dict[str, Any]:
    """What the runs of one network have left.

    Args:
        folder: of the network.
        pretrainings: names of those that were asked for.

    Returns:
        `pretrainings`, by start, and `accuracies`, by part (`finetune-10`) and start: a list of
        `(seed, accuracy in per cent, seconds)`; the seconds of a probe without its features.
    """
    found = {start: pretraining(folder / start) for start in pretrainings if losses(folder / start)}
    accuracies: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for share in SHARES:
        of_part = accuracies.setdefault(part_name(PROBE, share), {})
        for file in sorted((folder / PROBE).glob("*.json")):
            for run in json.loads(file.read_text()):
                if run["share"] == share:
                    figures = (run["seed"], run["acc1"], run["seconds"])
                    of_part.setdefault(file.stem.partition("-")[0], []).append(figures)
    for share in SHARES:
        file = folder / part_name(FINETUNE, share) / "comparison.json"
        of_part = accuracies.setdefault(part_name(FINETUNE, share), {})
        runs = json.loads(file.read_text())["runs"] if file.is_file() else []
        for run in sorted(runs, key=lambda run: run["seed"]):
            figures = (run["seed"], run["evaluations"][-1]["acc1"], run["seconds"])
            of_part.setdefault(run["start"], []).append(figures)
    accuracies = {part: of_part for part, of_part in accuracies.items() if of_part}
    return {"pretrainings": found, "accuracies": accuracies}


def pretraining(folder: Path) -> dict[str, Any]:
    """Steps, losses and times of a pretraining, over all processes that it took."""
    seconds, before = 0.0, 0.0
    for entry in losses(folder):
        if entry["seconds"] < before:  # another process went on
            seconds += before
        before = entry["seconds"]
    entries = losses(folder)
    return {
        "steps": entries[-1]["step"],
        "epochs": entries[-1]["epoch"],
        "first_loss": entries[0]["loss"],
        "last_loss": entries[-1]["loss"],
        "seconds": round(seconds + before, 1),
        "images_per_s": statistics.median(entry["images_per_s"] for entry in entries),
    }


def tables(content: dict[str, Any]) -> str:
    """The results as Markdown, a section for each network."""
    setting = content["setting"]
    lines = [
        f"Data: {setting['data']}, {setting['pictures']} pictures to train on. Accuracy in per "
        "cent of the test pictures: mean ± standard deviation (single runs, by seed).",
        "",
    ]
    for name, network in content["networks"].items():
        lines += [f"## {name}", ""]
        if network["pretrainings"]:
            lines += ["| pretraining | steps | epochs | loss | images/s | minutes |"]
            lines += ["|---|--:|--:|--:|--:|--:|"]
        for start, run in network["pretrainings"].items():
            lines.append(
                f"| {start} | {run['steps']} | {run['epochs']:.1f} | {run['first_loss']:.3f} to "
                f"{run['last_loss']:.3f} | {run['images_per_s']:.0f} | {run['seconds'] / 60:.1f} |"
            )
        starts = [RANDOM, *setting["pretrainings"]]
        others = [start for start in starts if start != "masked" and "masked" in starts]
        heads = [*starts, *(f"masked - {start}" for start in others)]
        lines += ["", f"| labels | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
        for part, of_part in network["accuracies"].items():
            task, _, share = part.partition("-")
            cells = [cell([run[1] for run in of_part.get(start, [])]) for start in starts]
            cells += [difference(of_part, "masked", other) for other in others]
            lines.append(f"| {task}, {share} % | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def difference(of_part: dict[str, list[tuple[int, float, float]]], first: str, second: str) -> str:
    """`+1.2 ± 0.3`: the difference of two starts over the seeds that both have, by seed."""
    one, other = (dict(run[:2] for run in of_part.get(start, [])) for start in (first, second))
    found = [one[seed] - other[seed] for seed in one if seed in other]
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.3g}{deviation}"


def plot(content: dict[str, Any], file: Path) -> None:
    """Accuracy by share of the labels, a panel for each network and task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = content["networks"]
    figure, axes = pyplot.subplots(
        len(networks), len(TASKS), figsize=(9, 3.4 * len(networks)), squeeze=False
    )
    for row, (name, network) in zip(axes, networks.items()):
        for panel, task in zip(row, TASKS):
            for start in (RANDOM, *content["setting"]["pretrainings"]):
                points = {
                    100 * share: [run[1] for run in of_part[start]]
                    for share in SHARES
                    if start in (of_part := network["accuracies"].get(part_name(task, share), {}))
                }
                means = [statistics.fmean(values) for values in points.values()]
                errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()]
                panel.errorbar(list(points), means, errors, capsize=3, label=start)
            panel.set(xscale="log", xlabel="labels, %", ylabel="accuracy, %")
            panel.set_title(f"{name}, {task}")
            panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
