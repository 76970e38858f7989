"""A table of measured choices: which implementation runs an op, and which CUDA kernel.

`python -m convmae_kernels measure` writes one. It serves the device and the versions that it was
measured with; another one is ignored, with a warning. What it says holds for the whole process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE = "CONVMAE_KERNELS_TABLE"
FORMAT = 2
OPS = (
    *("masked_conv2d", "strided_conv2d", "window_conv2d"),
    *("gather_visible", "scatter_visible", "gather_windows"),
)
IMPLEMENTATIONS = ("reference", "cpu", "cuda", "triton")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Sizes(NamedTuple):
    """What a choice depends on besides op and dtype.

    Attributes:
        side: of the blocks.
        channels: of the input.
        kernel: (0, 0) where there is none.
        stride: of a convolution.
        group_channels: input channels of a group of a convolution; 0 where there is none.
    """

    side: int
    channels: int
    kernel: tuple[int, int] = (0, 0)
    stride: int = 1
    group_channels: int = 0


class Choice(NamedTuple):
    """What was the fastest, and for which problems.

    Attributes:
        op: of `OPS`, or a registered one with several CUDA kernels.
        dtype: "bfloat16".
        side, kernel: of blocks and convolution.
        least, most: of the channels.
        wide: whether the channels fill 16 bytes.
        choice: an implementation, or the name of a CUDA kernel.
        default: what would run without the table.
        microseconds: of each candidate.
        stride, group_channels: as in `Sizes`. A depthwise convolution has 1 channel in a group,
            `window_conv2d` stands for all convolutions that are not depthwise.
    """

    op: str
    dtype: str
    side: int
    kernel: tuple[int, int]
    least: int
    most: int
    wide: bool
    choice: str
    default: str
    microseconds: dict[str, float]
    stride: int = 1
    group_channels: int = 0

    def covers(self, op: str, dtype: torch.dtype, sizes: Sizes) -> bool:
        """Whether it is of this problem."""
        return (
            self.op == op
            and f"torch.{self.dtype}" == str(dtype)
            and self.side == sizes.side
            and self.kernel == sizes.kernel
            and self.stride == sizes.stride
            and self.group_channels == sizes.group_channels
            and self.least <= sizes.channels <= self.most
            and self.wide == is_wide(sizes.channels, dtype)
        )


@dataclass(frozen=True)
class Table:
    """What a file holds; `where` is its path.

    Attributes:
        facts: what it was measured with, as `facts_of` has them.
        implementations: choices among implementations.
        kernels: choices among the kernels of the compiled library for CUDA.
    """

    where: str
    facts: dict[str, Any]
    implementations: tuple[Choice, ...]
    kernels: tuple[Choice, ...]

    @property
    def device_type(self) -> str:
        return "cpu" if self.facts["capability"] is None else "cuda"


_table: Table | None = None  # asked for
_in_use: Table | None = None  # and found to be of this machine


def in_use() -> Table | None:
    """The table that chooses, if there is one."""
    return _in_use


def find(op: str, x: torch.Tensor, sizes: Sizes) -> str | None:
    """The implementation that was measured to be the fastest; None: nothing was measured."""
    if _in_use is None or x.device.type != _in_use.device_type:
        return None
    for choice in _in_use.implementations:
        if choice.covers(op, x.dtype, sizes):
            return choice.choice
    return None


def is_wide(channels: int, dtype: torch.dtype) -> bool:
    """Whether the channels of a position fill 16 bytes."""
    return channels * dtype.itemsize % 16 == 0


def channel_class(channels: int) -> tuple[int, int]:
    """The least and the most channels for which a measurement stands: up to a power of two."""
    most = 1 << max(0, channels - 1).bit_length()
    return most // 2 + 1, most


def facts_of(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a table is good for."""
    import convmae_kernels  # whole by now

    triton = _version_of_triton() if device.type == "cuda" else None
    if device.type == "cuda":
        name: str = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, capability = cpu_name(), None
    return {
        "device": name,
        "capability": capability,
        "convmae_kernels": convmae_kernels.__version__,
        "torch": torch.__version__,
        "triton": triton,
    }


def _version_of_triton() -> str | None:
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# -- use ------------------------------------------------------------------------------------------


def use_table(path: str | os.PathLike | None) -> None:
    """Lets a table of `python -m convmae_kernels measure` choose from now on; None: none.

    A call whose `impl` is named keeps it. The choice among CUDA kernels holds for these calls too,
    as far as the kernel can do the shape. Another choice may add up in another order: for the same
    bits everywhere, all processes of a job use the same table. Programs that are compiled already
    keep their implementations.

    A file that is no such table, or that was measured on another device or with other versions, is
    ignored, with a warning that says why. `CONVMAE_KERNELS_TABLE` names one from the start; one
    that is not there is ignored too.

    Raises:
        FileNotFoundError: there is no such file. What was in use stays.
    """
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"there is no table of measured choices {os.fspath(path)}")
    global _table, _in_use
    _table = _in_use = None
    _clear_kernels()
    if path is None:
        return
    try:
        table = read(Path(path))
    except (OSError, ValueError) as error:
        _ignore(path, str(error))
        return
    _table = table
    if table.device_type == "cpu":
        _begin(table, [torch.device("cpu")])
    elif torch.version.cuda is None:
        _ignore(path, f"it is of {table.facts['device']}, and this torch has no CUDA")
    else:  # when CUDA starts: before that GPUs must not be asked

        def begin() -> None:
            if _table is table:
                gpus = range(torch.cuda.device_count())
                _begin(table, [torch.device("cuda", i) for i in gpus])

        torch.cuda._lazy_call(begin)


def use_table_of_environment() -> None:
    """Uses the table that the environment names, if it does."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        use_table(path)
    except FileNotFoundError:
        _ignore(path, f"{VARIABLE} names it, but there is no such file")


def _begin(table: Table, devices: Sequence[torch.device]) -> None:
    global _in_use
    for device in devices:
        here = facts_of(device)
        wrong = [name for name, value in here.items() if table.facts[name] != value]
        if wrong:
            name = wrong[0]
            _ignore(table.where, f"its {name} is {table.facts[name]}, here it is {here[name]}")
            return
    try:
        for choice in table.kernels:
            set_kernel(choice)
    except RuntimeError as error:
        _clear_kernels()
        _ignore(table.where, str(error).splitlines()[0])
        return
    _in_use = table


def set_kernel(choice: Choice) -> None:
    """Tells the compiled library of a choice among its kernels.

    Raises:
        RuntimeError: it has no such kernel.
    """
    torch.ops.convmae.set_kernel_choice(*choice[:8])


def _clear_kernels() -> None:
    name, key = "convmae::clear_kernel_choices", "CompositeExplicitAutograd"
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, key):  # it was compiled
        torch.ops.convmae.clear_kernel_choices()


def _ignore(path: str | os.PathLike, why: str) -> None:
    warnings.warn(
        f"convmae_kernels ignores the table of measured choices {os.fspath(path)}: {why}",
        RuntimeWarning,
        stacklevel=3,
    )


# -- files ----------------------------------------------------------------------------------------


def write(path: Path, table: Table) -> None:
    """Writes a table; the file is replaced as a whole."""
    content = {
        "format": FORMAT,
        **table.facts,
        "implementations": [choice._asdict() for choice in table.implementations],
        "kernels": [choice._asdict() for choice in table.kernels],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> Table:
    """The table of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such table; the message says what is wrong.
    """
    try:
        content = json.loads(path.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'it is no table of format {FORMAT}: "format" is not {FORMAT}')
    facts = {}
    for name in ("device", "capability", "convmae_kernels", "torch", "triton"):
        if name not in content:
            raise ValueError(f"it has no {name!r}")
        facts[name] = content[name]
    implementations = _choices(content, "implementations", OPS, IMPLEMENTATIONS)
    return Table(str(path), facts, implementations, _choices(content, "kernels"))


def _choices(
    content: dict[str, Any],
    part: str,
    ops: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Choice, ...]:
    entries = content.get(part)
    if not isinstance(entries, list):
        raise ValueError(f"{part!r} is not a list")
    found = []
    for i, entry in enumerate(entries):
        try:
            choice = Choice(**entry)
            choice = choice._replace(kernel=(int(choice.kernel[0]), int(choice.kernel[1])))
            numbers = ("side", "least", "most", "stride", "group_channels")
            for name in numbers:
                if not isinstance(getattr(choice, name), int):
                    raise ValueError(f"{name} is {getattr(choice, name)!r}, expected an integer")
            for value, known in ((choice.dtype, DTYPES), (choice.op, ops), (choice.choice, names)):
                if known is not None and value not in known:
                    raise ValueError(f"{value!r} is not one of {', '.join(known)}")
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{part}[{i}]: {error}") from None
        found.append(choice)
    return tuple(found)
