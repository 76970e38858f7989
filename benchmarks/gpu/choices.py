"""Stage `choices`: the table of measured choices for `ck.use_table`, and that it is used.

`python -m benchmarks.gpu.choices FILE SECONDS [--stand-in]` writes it into FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import device as devices
from benchmarks.gpu import store
from convmae_kernels import measure
from convmae_kernels.ops.support import choices

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Runs the stage."""
    path, seconds, *flags = arguments
    device = devices.find("--stand-in" in flags)
    wanted = measure.problems(device.where)
    if device.stand_in:
        wanted = [p for p in wanted if p.op == "gather_visible"]
    batch = device.batches[0]
    table, left_out = measure.measure(
        device.where, wanted, batch, device.seconds / 5, float(seconds)
    )
    choices.write(Path(path), table)
    store.update(Path(path), environment=device.facts())
    measure.report(Path(path), table, left_out, device.where)


if __name__ == "__main__":
    main(sys.argv[1:])
