"""What a log tells, gathered line by line in bounded memory, so that each line is read once."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from convmae.records.curves import Curve, EvenSample
from convmae.records.scores import SCORES, main_score
from convmae.records.wording import is_number

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RATES = ("images_per_s", "model_images_per_s", "input_images_per_s")
DRAWN = ("loss", "lr", "grad_norm", *RATES, "memory_mib")  # of lines of training
MARKED = {"resumed": "resumed", "nonfinite": "not finite"}
MAX_EVENTS = 200  # events, marks and unreadable pictures that are kept, each


class History:
    """What the lines so far came to.

    Attributes:
        first, last: the first and last line of training with a loss; empty if there is none.
        losses: their number.
        seconds: of training: the sum over the processes of a resumed run.
        curves, scores: of training and of evaluations, over steps, by the name of the value.
        epochs: the epoch over steps.
        rates: images per second, by name.
        peak: the most memory, in MiB.
        best: the evaluation of the best weights.
        events: the first `MAX_EVENTS` of the other events, unreadable pictures apart.
        event_count: the number of all of them.
        unreadable: name and reason of the first `MAX_EVENTS` pictures that could not be read.
        unreadable_count: the number of all of them, each counted once.
        marks: steps that the curves mark.
        ending: the event `interrupted` or `failed` that nothing followed.
    """

    def __init__(self) -> None:
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.losses = 0
        self.curves: defaultdict[str, Curve] = defaultdict(Curve)
        self.scores: defaultdict[str, Curve] = defaultdict(Curve)
        self.epochs = Curve()
        self.rates: defaultdict[str, EvenSample] = defaultdict(EvenSample)
        self.peak: float | None = None
        self.best: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.event_count = 0
        self.unreadable: dict[str, str] = {}
        self._unreadable_names: set[str] = set()
        self.marks: list[dict[str, Any]] = []
        self.ending: dict[str, Any] = {}
        self._seconds_before = self._seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds_before + self._seconds

    @property
    def unreadable_count(self) -> int:
        return len(self._unreadable_names)

    def add(self, entry: dict[str, Any]) -> None:
        """Takes one line of the log; what a line lacks, or has of another kind, is passed over."""
        event = entry.get("event")
        if event is None:
            self._training(entry)
        elif event == "evaluation":
            self._evaluation(entry)
        elif event == "unreadable" and "path" in entry:
            self._unreadable(entry)
        else:
            self._event(entry)

    def _training(self, entry: dict[str, Any]) -> None:
        if not (is_number(entry.get("loss")) and is_number(entry.get("step"))):
            return
        self.first, self.last = self.first or entry, entry
        self.losses += 1
        self.ending = {}
        seconds = entry.get("seconds")
        seconds = seconds if is_number(seconds) else 0.0
        if seconds < self._seconds:  # another process
            self._seconds_before += self._seconds
        self._seconds = seconds
        _draw(self.curves, DRAWN, entry)
        self._epoch(entry)
        for name in RATES:
            if is_number(entry.get(name)):
                self.rates[name].add(entry[name])
        memory = entry.get("memory_mib")
        if is_number(memory):
            self.peak = memory if self.peak is None else max(self.peak, memory)

    def _evaluation(self, entry: dict[str, Any]) -> None:
        if is_number(entry.get("step")):
            _draw(self.scores, (*SCORES, "loss"), entry)
            self._epoch(entry)
        main = main_score(entry)
        if main is not None and entry[main] > self.best.get(main, -1.0):
            self.best = entry

    def _unreadable(self, entry: dict[str, Any]) -> None:
        name = str(entry["path"])
        if name not in self._unreadable_names and len(self.unreadable) < MAX_EVENTS:
            self.unreadable[name] = str(entry.get("reason", ""))
        self._unreadable_names.add(name)

    def _event(self, entry: dict[str, Any]) -> None:
        event = str(entry["event"])
        self.event_count += 1
        if len(self.events) < MAX_EVENTS:
            self.events.append(entry)
        if event in MARKED and is_number(entry.get("step")) and len(self.marks) < MAX_EVENTS:
            self.marks.append({"step": entry["step"], "label": MARKED[event]})
        if event == "resumed":
            self.ending = {}
        elif event in ("interrupted", "failed") and not self.ending:
            self.ending = entry

    def _epoch(self, entry: dict[str, Any]) -> None:
        if is_number(entry.get("epoch")):
            self.epochs.add(entry["step"], entry["epoch"])


def _draw(curves: dict[str, Curve], names: tuple[str, ...], entry: dict[str, Any]) -> None:
    for name in names:
        if is_number(entry.get(name)):
            curves[name].add(entry["step"], entry[name])


class LogFollower:
    """Reads a log that grows: at each `read` the lines that are new, and all where it is another.

    Attributes:
        history: what all lines so far came to.
        age: seconds from the last line to the last `read`.
        lines_read: lines that were parsed, in all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history, self.age, self.lines_read = History(), float("inf"), 0
        self._file, self._offset = -1, 0

    def read(self) -> History:
        """The history, with the lines that were added since; a log that is missing is empty."""
        if not self.path.is_file():
            self.history, self.age, self._file = History(), float("inf"), -1
            return self.history
        with self.path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._file or facts.st_size < self._offset:
                self.history, self._offset, self._file = History(), 0, facts.st_ino
            file.seek(self._offset)
            for entry in self._entries(file):
                self.history.add(entry)
        self.age = max(0.0, time.time() - facts.st_mtime)
        return self.history

    def _entries(self, lines: Any) -> Iterator[dict[str, Any]]:
        for line in lines:
            if not line.endswith(b"\n"):  # not written whole, as yet
                return
            self._offset += len(line)
            self.lines_read += 1
            try:
                entry = json.loads(line.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry
