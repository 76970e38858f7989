"""`python -m convmae`: the same as `convmae`."""

import sys

from convmae.cli import main

if __name__ == "__main__":
    sys.exit(main())
