"""Speed and memory of the packed operators and models, side by side with their dense counterparts.

`python -m benchmarks` measures (see `--help`), `python -m benchmarks.report FILE` turns its JSON
into a page of docs/generated. `cases` holds every case, `runner` measures, `work` counts what must
be moved and computed, `limits` measures what the machine can do at best, `report` prints.
"""

import ctypes
import os

# As the command line does: large tensors in large pages, for every contender.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Lets what one call frees serve the next, for every contender; whether the system can.

    In the steps of a training memory is used again, and after the first ones hardly a page is new.
    A single op, called again and again, gives its output back to the system and gets new pages
    each time, which takes longer than the op itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


keep_freed_memory()
