"""A stage made of items, of which none stops the others, whatever happens in it.

The items run one after another in a worker process. One that raises is reported, and the worker
goes on; one that kills the worker, or the GPU's context with it, or that gives no answer in its
time is reported, and a new worker goes on with the next.

`python -m benchmarks.gpu.items STAGE FILE SECONDS [--stand-in]` runs a stage. After each item it
writes all results into FILE, under the stage's name.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.gpu.device import Device

WORKERS = {"checks": "benchmarks.gpu.checks", "kernels": "benchmarks.gpu.timing"}
MARK = "@@ "  # before what a worker tells: everything else that it prints goes to the log
START_SECONDS = 60.0  # for a worker to start: to import torch on a cold machine
EXIT_BROKEN = 17  # of a worker whose GPU answers no more

Result = dict[str, Any]


# -- the worker -----------------------------------------------------------------------------------


def work(device: Device, stage: str, items: Sequence[str], run: Callable[[str], Result]) -> None:
    """The worker: tells its items, the most important first, and runs those that it is sent."""
    facts = {"facts": device.facts(), "items": list(items), "seconds": device.item_seconds}
    _tell(facts)
    for item in json.loads(sys.stdin.readline()):
        _tell({"begin": item})
        try:
            device.enter(f"{stage}/{item}")
            result = run(item)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {_short(str(error))}"}
        _tell({"end": item, "result": result})
        try:
            device.synchronize()
            device.free()
        except Exception:
            sys.exit(EXIT_BROKEN)


def _tell(message: dict[str, Any]) -> None:
    print("\n" + MARK + json.dumps(message), flush=True)


def _short(message: str) -> str:
    """The beginning of an error's message, in one line."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."


def largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest of the relative errors `|a - b| / |b|` of some tensors; NaN if one is NaN."""
    errors = [0.0]
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"found {list(a.shape)}, expected {list(b.shape)}")
        a, b = a.detach().double(), b.detach().double()
        errors.append(float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return float("nan") if any(e != e for e in errors) else max(errors)


# -- its supervisor, which needs no torch ---------------------------------------------------------


class Supervisor:
    """Runs the items of a stage in workers.

    Attributes:
        results: by item; `{"failed": why}` of those that have none.
        facts: what a worker says that it runs on.
        rest: the items that have no result yet; None before a worker has named them.
    """

    def __init__(
        self, command: Sequence[str], seconds: float, save: Callable[[Supervisor], None]
    ) -> None:
        """Takes the command of a worker, when the stage ends, and what to call after each item."""
        self.command, self.seconds, self.save = command, seconds, save
        self.end = time.monotonic() + seconds
        self.results: dict[str, Result] = {}
        self.facts: dict[str, Any] = {}
        self.rest: list[str] | None = None
        self.item_seconds = START_SECONDS

    def run(self) -> None:
        """Starts workers until every item has a result, or the time is over."""
        while self.rest is None or self.rest:
            if time.monotonic() >= self.end:
                self._fail_rest(f"not reached in the stage's {self.seconds:.0f} s")
            elif not self._worker():
                self._fail_rest("its worker did not start; the log says why")

    def _fail_rest(self, why: str) -> None:
        for item in self.rest or ["all"]:
            self.results[item] = {"failed": why}
        self.rest = []
        self.save(self)

    def _done(self, item: str, result: Result) -> None:
        self.results[item] = result
        assert self.rest is not None
        self.rest.remove(item)
        self.save(self)

    def _worker(self) -> bool:
        """Runs items until one stops the worker, or the time is over; whether one was begun."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(self.command, **pipes)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        current, begun = None, False
        limit = time.monotonic() + START_SECONDS
        try:
            while self.rest is None or self.rest:
                wait = min(limit, self.end) - time.monotonic()
                try:
                    line = lines.get(timeout=max(0.0, wait))
                except queue.Empty:
                    if current is not None:
                        hangs = f"no answer in {self.item_seconds:.0f} s: it hangs"
                        late = "the stage's time was over while it ran"
                        why = hangs if time.monotonic() >= limit else late
                        self._done(current, {"failed": why})
                    return begun or time.monotonic() >= self.end
                if line is None:
                    code = process.wait()
                    if current is not None:
                        why = f"its process ended with exit code {code}"
                        self._done(current, {"failed": why})
                    return begun
                if not line.startswith(MARK):
                    sys.stdout.write(line if line.strip() else "")
                    sys.stdout.flush()
                    continue
                message = json.loads(line[len(MARK) :])
                if "items" in message:
                    self.facts, self.item_seconds = message["facts"], message["seconds"]
                    self.rest = message["items"] if self.rest is None else self.rest
                    process.stdin.write(json.dumps(self.rest) + "\n")
                    process.stdin.flush()
                elif "begin" in message:
                    current, begun = message["begin"], True
                    limit = time.monotonic() + self.item_seconds
                else:
                    self._done(message["end"], message["result"])
                    current, limit = None, time.monotonic() + START_SECONDS
            return True
        except BrokenPipeError:
            return begun
        finally:
            process.kill()
            process.wait()


def _read(stream, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def main(arguments: Sequence[str]) -> None:
    """Runs a stage."""
    stage, path, seconds, *flags = arguments
    command = [sys.executable, "-m", WORKERS[stage], *flags]

    def save(supervisor: Supervisor) -> None:
        parts = {"environment": supervisor.facts, stage: supervisor.results}
        store.update(Path(path), **parts)

    supervisor = Supervisor(command, float(seconds), save)
    supervisor.run()
    results = supervisor.results
    failed = {item: result["failed"] for item, result in results.items() if "failed" in result}
    for item, why in failed.items():
        print(f"FAILED {item}: {why}")
    skipped = sum("skipped" in result for result in results.values())
    print(f"{len(results) - len(failed) - skipped} ok, {len(failed)} failed, {skipped} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
