"""Headers of `.npy` files, checked before NumPy takes the memory that they announce."""

from __future__ import annotations

import math
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

MAGIC = np.lib.format.MAGIC_PREFIX
# What NumPy raises for files that are no arrays, or announce nonsense.
ARRAY_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, EOFError, SyntaxError, TypeError)
ARRAY_ERRORS += (KeyError, MemoryError, OverflowError, RecursionError, TokenError)


def check_header(file: BinaryIO, size: int) -> None:
    """Checks that a file of `size` bytes can hold the array that its header announces.

    A file that is none of `.npy` is left to NumPy. The file is left at its beginning.

    Raises:
        ValueError: it cannot.
        one of ARRAY_ERRORS: the header is damaged.
    """
    if file.read(len(MAGIC)) == MAGIC:
        file.seek(0)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(
                f"version {version[0]}.{version[1]} of the format; expected 1.0 or 2.0"
            )
        announced, there = math.prod(shape) * dtype.itemsize, size - file.tell()
        if min(shape, default=0) < 0 or (announced > there and not dtype.hasobject):
            raise ValueError(
                f"its header says {list(shape)} of {dtype}, which are {announced:,} bytes, but "
                f"{there:,} follow"
            )
    file.seek(0)
