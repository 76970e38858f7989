"""Which configuration of a kernel runs: the fastest on this GPU, found once and remembered.

All configurations of a kernel give the same bits, so the choice changes nothing but the time: ranks
of a distributed job may tune alone and choose differently, and no collective is involved.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Below this many elements a launch costs more than the kernel, and timings say nothing.
MIN_ELEMENTS = 1 << 18


class Configuration(NamedTuple):
    """The tile of one program, by the names of the kernel's constants, and its warps."""

    name: str
    tile: dict[str, int]
    num_warps: int

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.tile, "num_warps": self.num_warps, "num_stages": 1}

    def grid(self, **sizes: int) -> tuple[int]:
        """The number of programs that cover `sizes`, given by the names of the tile's axes."""
        # `triton.cdiv` takes ten times as long.
        return (math.prod(-(-size // self.tile[axis]) for axis, size in sizes.items()),)


class Choices:
    """Names of configurations by key, kept in a JSON file.

    A file that is damaged or cannot be read counts as empty, and one that cannot be written is left
    alone: choices then last as long as the process.
    """

    def __init__(self, file: Callable[[], Path]) -> None:
        self._file = file
        self._names: dict[str, str] | None = None

    def get(self, key: str) -> str | None:
        """The choice for a key; the file is read once."""
        if self._names is None:
            self._names = self._read()
        return self._names.get(key)

    def set(self, key: str, name: str) -> None:
        """Remembers a choice, beside those that other processes have written meanwhile."""
        self._names = {**(self._names or {}), **self._read(), key: name}
        temporary = None
        try:
            file = self._file()
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
                temporary = out.name
                json.dump(self._names, out, indent=1, sort_keys=True)
            os.replace(temporary, file)
        except (OSError, RuntimeError):  # RuntimeError: there is no home folder
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        try:
            names = json.loads(self._file().read_text())
        except (OSError, RuntimeError, ValueError):
            return {}
        if not isinstance(names, dict):
            return {}
        return {key: name for key, name in names.items() if isinstance(name, str)}


def cache_file() -> Path:
    """`$XDG_CACHE_HOME/convmae_kernels/triton.json`, in `~/.cache` if that is not set."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "convmae_kernels" / "triton.json"


CHOICES = Choices(cache_file)
_LOCK = threading.Lock()
_TOO_LARGE: set[str] = set()  # problems that the memory does not suffice to tune for


def gpu_time(run: Callable[[], object]) -> float:
    """Median milliseconds of a call, by CUDA events."""
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def fastest(
    configurations: Sequence[Configuration],
    run: Callable[[Configuration], tuple[Tensor, ...]],
    time: Callable[[Callable[[], object]], float],
) -> Configuration:
    """The fastest configuration that runs and gives the bits of the first one that runs.

    Args:
        configurations: the safe one first.
        run: runs a configuration and returns its results.
        time: the time of a call.

    Raises:
        RuntimeError: none runs.
        torch.OutOfMemoryError: the memory does not suffice to compare.
    """
    expected = best = failure = None
    best_time = math.inf
    for configuration in configurations:
        try:
            found = run(configuration)
            if expected is not None and not all(map(_equal, found, expected)):
                warnings.warn(
                    f"configuration {configuration.name!r} gives wrong results and is not used",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            elapsed = time(functools.partial(run, configuration))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # too many resources for this GPU, a failed compilation, ...
            failure = error
            continue
        expected = expected or found
        if elapsed < best_time:
            best, best_time = configuration, elapsed
    if best is None:
        raise RuntimeError("no configuration of the kernel runs on this GPU") from failure
    return best


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def run(
    op: str,
    problem: str,
    configurations: Sequence[Configuration],
    launch: Callable[..., tuple[Tensor, ...]],
    arguments: tuple[Any, ...],
) -> Any:
    """`launch(configuration, *arguments)` with the best configuration, which is found if need be.

    Not while a CUDA graph is captured, nor for small problems nor in Triton's interpreter: there
    the remembered configuration runs, or the first.

    Args:
        op: the name of the op.
        problem: what the choice depends on besides op, device and Triton's version.
        configurations: the safe one first.
        launch: runs a configuration on the arguments.
        arguments: of the op; the first is a tensor.
    """
    x = arguments[0]
    if not x.is_cuda:
        return launch(configurations[0], *arguments)
    key = f"{op}, {problem}, {_device_name(x.device)}, triton {triton.__version__}"
    chosen = _remembered(key, configurations)
    worthwhile = x.numel() >= MIN_ELEMENTS and key not in _TOO_LARGE
    if chosen is None and worthwhile and not torch.cuda.is_current_stream_capturing():
        chosen = _tune(key, configurations, launch, arguments)
    return launch(chosen or configurations[0], *arguments)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _remembered(key: str, configurations: Sequence[Configuration]) -> Configuration | None:
    name = CHOICES.get(key)
    return next((c for c in configurations if c.name == name), None)


def _tune(key, configurations, launch, arguments) -> Configuration | None:
    """Finds and remembers the fastest configuration, on random numbers in place of the tensors'."""
    with _LOCK:
        chosen = _remembered(key, configurations)  # by another thread, meanwhile
        if chosen is not None:
            return chosen
        try:
            drawn = _random_arguments(arguments)
            chosen = fastest(configurations, lambda c: launch(c, *drawn), gpu_time)
        except torch.OutOfMemoryError:
            _TOO_LARGE.add(key)
            return None
        CHOICES.set(key, chosen.name)
        return chosen


def _random_arguments(arguments):
    generator = torch.Generator(arguments[0].device).manual_seed(0)
    return [
        torch.empty_like(x).normal_(generator=generator)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in arguments
    ]
