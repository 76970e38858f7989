"""Speed and memory of the packed operators and models, side by side with their dense counterparts.

`python -m benchmarks` measures (see `--help`), `python -m benchmarks.report FILE` turns its JSON
into a page of docs/generated. `cases` holds every case, `runner` measures, `work` counts what must
be moved and computed, `limits` measures what the machine can do at best, `report` prints.
"""

import os

# As the command line does: large tensors in large pages, for every contender.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
