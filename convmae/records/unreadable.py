"""The pictures of a run that cannot be read: counted, named, and limited."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae.data import Failure, check_share
from convmae.data.errors import printable

if TYPE_CHECKING:
    from convmae.data import Source
    from convmae.records.log import RunLog

NAMED_AT_MOST = 20  # unreadable pictures named on the terminal; the log names all


class UnreadableTally:
    """Counts and names the pictures that cannot be read, and stops a run that has too many."""

    def __init__(self, source: Source, limit: float) -> None:
        self.source, self.limit = source, limit
        self.reasons: dict[str, str] = {}

    def report(self, log: RunLog, step: int) -> None:
        """Notes what is left out, and the pictures that the check before the run could not read."""
        for left_out in self.source.left_out:
            message = str(left_out)
            log.event("left_out", step, f"note: {message}", count=left_out.total, what=message)
        for note in self.source.notes:
            log.say(note)
        self._note(self.source.failures, log, step)

    def add(self, failures: list[Failure], log: RunLog, step: int) -> None:
        """Notes failures; each picture is reported once.

        Raises:
            DataError: there are more than the share `limit` of all pictures now.
        """
        before = len(self.reasons)
        self._note(failures, log, step)
        if len(self.reasons) > before:
            known = [Failure(name, reason) for name, reason in self.reasons.items()]
            check_share(known, self.source.pictures, self.limit)

    def _note(self, failures: list[Failure], log: RunLog, step: int) -> None:
        for name, reason in (map(printable, failure) for failure in failures):
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            log.write({"event": "unreadable", "step": step, "path": name, "reason": reason})
            if len(self.reasons) <= NAMED_AT_MOST:
                log.say(f"warning: skipped unreadable picture {name}: {reason}")
            if len(self.reasons) == NAMED_AT_MOST:
                log.say(f"warning: further unreadable pictures are named in {log.path.name} only")

    def named(self) -> dict[str, str]:
        """Path and reason of every unreadable picture."""
        return dict(self.reasons)
