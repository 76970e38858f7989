"""A stage made of items, of which none stops the others, whatever happens in it.

The items run one after another in a worker process. One that raises is reported, and the worker
goes on; one that kills the worker, or the GPU's context with it, or that gives no answer in its
time is reported, and a new worker goes on with the next.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from benchmarks.gpu.device import Device

MARK = "@@ "  # before what a worker tells: everything else that it prints goes to the log
START_SECONDS = 60.0  # for a worker to start: to import torch on a cold machine
EXIT_BROKEN = 17  # of a worker whose GPU answers no more

Result = dict[str, Any]


def work(device: Device, stage: str, run: Callable[[str], Result]) -> None:
    """The worker: runs the items named on standard input, a JSON list, and tells their results."""
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


def supervise(
    command: Sequence[str],
    items: Sequence[str],
    *,
    seconds: float,
    item_seconds: float,
    done: Callable[[dict[str, Result]], None],
) -> dict[str, Result]:
    """Runs every item in workers, and calls `done` with all results so far after each.

    Args:
        command: of a worker.
        items: their names, the most important first.
        seconds: after which no further item is begun.
        item_seconds: after which an item hangs.
        done: told all results so far, by item.

    Returns:
        The results by item; `{"failed": why}` of those that have none.
    """
    end = time.monotonic() + seconds
    results: dict[str, Result] = {}
    rest = list(items)
    while rest:
        if time.monotonic() >= end:
            for item in rest:
                results[item] = {"failed": f"not reached in the stage's {seconds:.0f} s"}
            done(results)
            break
        before = len(rest)
        rest = _one_worker(command, rest, results, end, item_seconds, done)
        if len(rest) == before and time.monotonic() < end:  # it did not even begin
            for item in rest:
                results[item] = {"failed": "its worker did not start; the log says why"}
            done(results)
            break
    return results


def _one_worker(command, items, results, end, item_seconds, done) -> list[str]:
    """Runs items until one stops the worker, or time is over; returns those that are left."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    rest, current = list(items), None
    try:
        process.stdin.write(json.dumps(rest) + "\n")
        process.stdin.flush()
        limit = time.monotonic() + START_SECONDS
        while rest:
            try:
                line = lines.get(timeout=max(0.0, min(limit, end) - time.monotonic()))
            except queue.Empty:
                if current is not None:
                    why = f"no answer in {item_seconds:.0f} s: it hangs"
                    if time.monotonic() < limit:
                        why = "the stage's time was over while it ran"
                    results[current] = {"failed": why}
                    rest.remove(current)
                    done(results)
                break
            if line is None:  # the worker ended
                code = process.wait()
                if current is not None:
                    results[current] = {"failed": f"its process ended with exit code {code}"}
                    rest.remove(current)
                    done(results)
                break
            if not line.startswith(MARK):
                if line.strip():
                    print(line, end="", flush=True)
                continue
            told = json.loads(line[len(MARK) :])
            if "begin" in told:
                current, limit = told["begin"], time.monotonic() + item_seconds
                continue
            results[told["end"]] = told["result"]
            rest.remove(told["end"])
            current, limit = None, time.monotonic() + START_SECONDS
            done(results)
    except BrokenPipeError:
        pass
    finally:
        process.kill()
        process.wait()
    return rest


def _read(stream, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


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
