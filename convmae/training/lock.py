"""One process for a run's folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from convmae.config import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from convmae.records.folder import RunFolder

HELD = (errno.EACCES, errno.EAGAIN)  # what the system says of a lock that another process has
PATIENCE = 0.5  # seconds in which the holder of a lock writes who it is

_mine: set[str] = set()  # folders that this process holds: its own locks never refuse it


class RunLock:
    """Holds a run's folder for this process, until `release` or the end of the process.

    It is a POSIX record lock on a file in the folder. The system takes it back when the process
    dies, also by `kill -9`. Children do not inherit it, as they would inherit that of `flock`: a
    loading process that outlives its parent holds nothing. NFS passes it on to other machines. But
    a process loses it when it closes any handle of the file: nothing else may open it.

    Attributes:
        problem: why the folder could not be locked, on a system without such locks; else None.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._handle = -1
        self._made: list[Path] = []  # folders that were made for it, the outermost first
        self._name = ""

    def acquire(self) -> None:
        """Makes the folder, and locks it.

        Raises:
            OptionError: another run holds the folder, or it cannot be made or written.
        """
        self.folder.check_writable()
        self._name = os.path.realpath(self.folder.path)
        if self._name in _mine:
            raise OptionError(self._refusal({}, "another run in this process"))
        try:
            self._make_folder()
            self._open()
        except OSError as error:
            self._undo()
            reason = error.strerror or str(error)
            raise OptionError(
                f"--output_dir {str(self.folder)!r} cannot be written: {reason}"
            ) from error
        _mine.add(self._name)

    def release(self) -> None:
        """Lets the folder go; folders that were made for nothing are removed."""
        if self._handle >= 0:
            _mine.discard(self._name)
            self._undo()

    @property
    def lost(self) -> bool:
        """Whether the folder was deleted, or another took its place."""
        try:
            return not os.path.samestat(os.stat(self.folder.lock), os.fstat(self._handle))
        except OSError:
            return True

    def renew(self) -> None:
        """Makes the folder again, and locks it.

        Raises:
            OptionError: as `acquire`.
        """
        _mine.discard(self._name)
        self._close()
        self.acquire()

    def note(self) -> str:
        """A line about a folder that could not be locked."""
        return (
            f"note: --output_dir {str(self.folder)!r} could not be locked ({self.problem}): take "
            "care that no other run uses it"
        )

    # -- the file ---------------------------------------------------------------------------------

    def _open(self) -> None:
        """Opens and locks the file; once more where a run that ended removed it meanwhile."""
        while True:
            self._handle = os.open(self.folder.lock, os.O_RDWR | os.O_CREAT, 0o666)
            self._lock()
            if not self.lost:
                break
            self._close()
        os.ftruncate(self._handle, 0)
        os.write(self._handle, (json.dumps(_who_am_i()) + "\n").encode())
        os.fsync(self._handle)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            self.problem = "this system has no record locks"
            return
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise OptionError(self._refusal(self._holder(), "another run")) from None
            self.problem = error.strerror or str(error)
        else:
            self.problem = None

    def _holder(self) -> dict[str, Any]:
        """What the holder wrote about itself; it may just be doing that."""
        until = time.monotonic() + PATIENCE
        while True:
            found = _read(os.pread(self._handle, 4096, 0))
            if found or time.monotonic() > until:
                self._close()
                return found
            time.sleep(0.02)

    def _refusal(self, holder: dict[str, Any], else_named: str) -> str:
        who = else_named
        if holder:
            who = (
                f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            )
        return (
            f"--output_dir {str(self.folder)!r} is in use by {who}; wait until that run ends, stop "
            "it, or give another folder"
        )

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    # -- the folder -------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        missing = []
        path = self.folder.path
        while not path.exists():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            try:
                folder.mkdir(exist_ok=True)
            except FileNotFoundError as error:  # its parent is there: /proc, for example
                reason = f"no folder can be made in {folder.parent}"
                raise OSError(error.errno, reason) from error
            self._made.append(folder)

    def _undo(self) -> None:
        """Removes the file, and the folders that were made and are empty."""
        with suppress(OSError):  # a file that nobody has locked harms nobody
            if self._handle >= 0 and not self.lost:
                self.folder.lock.unlink()  # before the handle is closed: the file is still ours
        self._close()
        with suppress(OSError):
            while self._made:
                self._made.pop().rmdir()
        self._made.clear()


def _who_am_i() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _read(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
