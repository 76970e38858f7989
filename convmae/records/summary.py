"""What a run is and did, in few words: its name, its state and the cards of its page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from convmae.records.scores import SCORES, main_score
from convmae.records.wording import clock, is_number, mebibytes, number

if TYPE_CHECKING:
    from convmae.records.folder import RunFolder
    from convmae.records.history import History

# A run that has not logged for longer, and for 10 lines' time, is not running
QUIET_SECONDS = 300.0


@dataclass
class RunRecord:
    """What a run's folder tells; whatever is missing is empty."""

    folder: RunFolder
    options: dict[str, Any]
    environment: dict[str, str]
    history: History
    log_age: float = float("inf")  # seconds since the last line

    @property
    def name(self) -> str:
        """The model that was asked for, or else the folder's name."""
        return str(self.options.get("model") or self.folder.path.resolve().name or "run")


def status_of(run: RunRecord) -> tuple[str, float]:
    """`finished`, `running` or `interrupted at step ...`, and the share that is done.

    Finished: the last line is of the last epoch, or step. Otherwise an event `interrupted` or
    `failed` after the last line tells; without one, a run is running if its log is young, else it
    stopped.
    """
    history = run.history
    unit = "epoch" if run.options.get("steps") is None else "step"
    total, so_far = run.options.get(f"{unit}s"), history.last.get(unit)
    done = 0.0
    if is_number(total) and total > 0 and is_number(so_far):
        done = min(1.0, max(0.0, so_far / total))
    if done == 1.0 and history.ending.get("event") != "failed":
        return "finished", 1.0
    step = history.last.get("step", 0)
    if history.ending:
        ended_at = history.ending.get("step")
        return f"{history.ending['event']} at step {_count(ended_at, step)}", done
    line_seconds = history.seconds / max(1, history.losses)
    if run.log_age < max(QUIET_SECONDS, 10 * line_seconds):
        return "running", done
    return (f"stopped at step {_count(step)}" if history.losses else "not trained"), done


def reason_of(run: RunRecord) -> str:
    """Why the run failed, in the words of its log; empty if it did not, or did not say."""
    failed = run.history.ending.get("event") == "failed"
    return str(run.history.ending.get("reason") or "") if failed else ""


def about(run: RunRecord) -> str:
    """The run in half a line."""
    options = run.options
    size = options.get("input_size")
    sides = size if isinstance(size, list) else [size, size]
    facts = [
        str(options.get("data_path") or ""),
        f"{' × '.join(map(str, sides))} pixels" if size else "",
        f"{100 * options['mask_ratio']:g} % hidden" if is_number(options.get("mask_ratio")) else "",
        run.environment.get("device", ""),
    ]
    return "  ·  ".join(fact for fact in facts if fact)


def cards(run: RunRecord) -> list[str]:
    """The summary, one box a fact; boxes without data are left out."""
    history = run.history
    made = [_steps_card(run)]
    if history.losses:
        made += [_loss_card(history), _accuracy_card(history), _speed_card(history)]
    else:
        made.append(_accuracy_card(history))
    if history.peak is not None:
        made.append(card("Memory", mebibytes(history.peak), "peak"))
    if history.losses:
        step, seconds = history.last["step"], history.seconds
        note = f"{clock(seconds / step)} a step" if step > 0 else "of training"
        made.append(card("Time", clock(seconds), note))
    if history.unreadable_count:
        count = f"{history.unreadable_count:,}"
        made.append(card("Unreadable pictures", count, "skipped; named below"))
    return [text for text in made if text]


def _steps_card(run: RunRecord) -> str:
    last, total = run.history.last, run.options.get("epochs")
    if not last:
        note = "no loss was logged" if run.history.ending else "nothing was logged yet"
        return card("Steps", _count(run.history.ending.get("step")), note)
    by_epochs = is_number(total) and run.options.get("steps") is None
    of = f" of {total:,}" if by_epochs else ""
    epoch = f"{last['epoch']:.4g}{of} epochs" if is_number(last.get("epoch")) else "done"
    return card("Steps", _count(last["step"]), epoch)


def _loss_card(history: History) -> str:
    first, last = history.first["loss"], history.last["loss"]
    if history.losses == 1:
        return card("Loss", number(last), "logged once")
    change = ""
    if first > 0 and abs(last) < 100 * first:
        change = f" ({100 * (last / first - 1):+.0f} %)".replace("-", "−")
    return card("Loss", number(last), f"from {number(first)}{change}")


def _accuracy_card(history: History) -> str:
    best = history.best
    if not best:
        return ""
    main = main_score(best)
    assert main is not None
    five = f"top 5: {best['acc5']:.1f} %" if is_number(best.get("acc5")) else ""
    epoch = f"epoch {best['epoch']:.4g}" if is_number(best.get("epoch")) else ""
    note = ", ".join(fact for fact in (five, epoch) if fact)
    return card(f"Best {SCORES[main].label}", f"{best[main]:.2f} {SCORES[main].unit}", note)


def _speed_card(history: History) -> str:
    """Throughput; and what of model and input pipeline limits it, where the log tells."""
    whole, model, pictures = (
        history.rates[name].middle()
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


def _count(value: Any, otherwise: Any = 0) -> str:
    return f"{value if is_number(value) else otherwise:,}"
