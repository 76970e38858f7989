"""Reads the tables of Nsight Compute: `ncu --import REPORT --page raw --csv --print-units base`."""

from __future__ import annotations

import csv
import re
from typing import NamedTuple

# Columns of the digest: the beginning of a metric's name.
SHOWN = {
    "us": ("gpu__time_duration.sum",),
    "DRAM": ("gpu__dram_throughput.avg.pct", "dram__throughput.avg.pct"),
    "memory": ("gpu__compute_memory_throughput.avg.pct",),
    "SM": ("sm__throughput.avg.pct",),
    "warps": ("sm__warps_active.avg.pct",),
}
STALL = re.compile(r"smsp__average_warps?_\w*issue_stalled_(\w+?)(?:_per_issue_active)?\.\w+$")
NO_STALL = ("selected", "not_issued")  # ends of names: a warp that issues, a part of another one


class Counted(NamedTuple):
    """A kernel, its figures by column of `SHOWN`, and its stalls in cycles an instruction."""

    kernel: str
    figures: dict[str, float]
    stalls: dict[str, float]


def read(text: str) -> list[Counted]:
    """The kernels in one or more of ncu's CSV tables (`--page raw`), whatever else is there."""
    found: list[Counted] = []
    header: list[str] = []
    units: list[str] = []
    for line in csv.reader(text.splitlines()):
        if "Kernel Name" in line:
            header, units = line, []
        elif header and len(line) == len(header):
            if not units:
                units = line  # the line below the header
                continue
            values = {
                name: number * _factor(unit)
                for name, unit, cell in zip(header, units, line, strict=True)
                if (number := _number(cell)) is not None
            }
            figures = {
                column: next((v for name, v in values.items() if name.startswith(start)), None)
                for column, start in SHOWN.items()
            }
            stalls = {
                m[1]: v
                for name, v in values.items()
                if (m := STALL.match(name))
                and (m[1] == "not_selected" or not m[1].endswith(NO_STALL))
            }
            name = line[header.index("Kernel Name")]
            known = {column: value for column, value in figures.items() if value is not None}
            found.append(Counted(name, known, stalls))
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def _factor(unit: str) -> float:
    """Times in microseconds, all else as it is."""
    return {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}.get(
        unit, 1.0
    )
