"""`python -m benchmarks.worker THREADS`: measures what another process asks for; see `revision`.

Reads one question a line from standard input, JSON, and answers on standard output in the same way:
a failure is an answer with the word `error`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

import convmae_kernels
from benchmarks import registry
from benchmarks.revision import CONTENDER, PAUSE
from benchmarks.runner import one_line
from benchmarks.setting import Setting

if TYPE_CHECKING:
    from benchmarks.runner import Comparison, Contender

# What registers cases. An older revision may lack what one of them imports.
MODULES = ("cases", "networks", "decoder", "pretraining", "budget")


def _register() -> dict[str, str]:
    """Imports what registers cases; why some cannot be imported, by module."""
    failures = {}
    for module in MODULES:
        try:
            importlib.import_module(f"benchmarks.{module}")
        except Exception as error:
            failures[module] = one_line(error)
    return failures


class Measuring:
    """Answers questions; holds the comparison that was built last."""

    def __init__(self, failures: dict[str, str]) -> None:
        self._failures = failures
        self._comparison: Comparison | None = None
        self._contender: Contender | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What a question asks for, after the threads that did it have gone to sleep."""
        try:
            return getattr(self, f"_{question.pop('do')}")(**question)
        except Exception as error:
            return {"error": one_line(error)}
        finally:
            time.sleep(PAUSE)

    def _build(self, case: str, setting: dict[str, Any], dtype: str) -> dict[str, Any]:
        self._comparison = self._contender = None
        gc.collect()
        if case not in registry.CASES:
            reasons = [f"{module} cannot run: {why}" for module, why in self._failures.items()]
            raise ValueError("; ".join([f"there is no case {case!r} at that revision", *reasons]))
        facts = setting | {"device": torch.device(setting["device"]), "compile": False}
        self._comparison = registry.CASES[case].build(Setting(**facts), getattr(torch, dtype))
        found = [c for c in self._comparison.contenders if c.name == CONTENDER]
        if not found:
            raise ValueError(f"{case} has no contender {CONTENDER!r}")
        self._contender = found[0]
        return {}

    def _measure(self, results: str | None) -> dict[str, Any]:
        assert self._comparison is not None
        assert self._contender is not None
        value, output = self._comparison.clock(self._contender.run)
        if results is not None:
            torch.save(list(self._contender.result(output)), results)
        return {"value": value}


def main() -> None:
    """Answers until the input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    torch.backends.cudnn.allow_tf32 = False
    # What a case prints must not stand among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    measuring = Measuring(_register())
    facts = {"package": convmae_kernels.__file__, "kernels": convmae_kernels.info()["cpu"]}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measuring.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
