"""Signals that end a run between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

ALWAYS = ("SIGINT", "SIGTERM")
# A closed terminal, and the warnings of schedulers; taken over only where nothing else was chosen:
# `nohup` ignores SIGHUP, and a program may have a use of its own for the others.
UNLESS_CHOSEN = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
INSISTS_AFTER = 1.0  # seconds; torchrun hands on a Ctrl-C that its processes have got already


class Interrupted(KeyboardInterrupt):
    """A signal ended a run before its first step.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Notes the signals that ask a run to end, so that no step and no file is cut in two.

    Until `hold` is called, while there is nothing to save, the first one raises `Interrupted` at
    once. Later signals change nothing (a scheduler may send several), but a second Ctrl-C does: it
    raises `KeyboardInterrupt`.

    Attributes:
        number: the first signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._held = False
        self._noted_at = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self.number is not None

    def hold(self) -> None:
        """From here on a signal is noted only."""
        self._held = True

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in (*ALWAYS, *UNLESS_CHOSEN):
                number = getattr(signal, name, None)  # Windows has two of them
                if number is None:
                    continue
                if name in ALWAYS or signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loading process that has just begun, with the handlers of its parent
        if self.number is None:
            self.number, self._noted_at = number, time.monotonic()
            if not self._held:
                raise Interrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self._noted_at >= INSISTS_AFTER:
            raise KeyboardInterrupt
