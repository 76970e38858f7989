"""`python -m convmae_kernels`: which implementations are there, and why not.

`python -m convmae_kernels measure` times them, and writes a table for `ck.use_table`.
"""

from __future__ import annotations

import sys

from convmae_kernels.info import info


def main() -> None:
    """Prints what is there, or measures."""
    if sys.argv[1:2] == ["measure"]:
        from convmae_kernels import measure

        measure.main(sys.argv[2:])
        return
    if len(sys.argv) > 1:
        sys.exit(f"there is no command {sys.argv[1]!r}, expected measure, or nothing")
    for name, text in info().items():
        print(f"{name:10} {text}")


main()
