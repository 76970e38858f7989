"""Imports a module of kernels and calls its functions for another process: `worker.py MODULE.so`.

Reads `(name, arguments)` and writes `(True, value)` or `(False, message)`, pickled, until its input
ends.
"""

import importlib.util
import os
import pickle
import sys
from pathlib import Path


def main(library):
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints
    spec = importlib.util.spec_from_file_location(Path(library).stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, getattr(module, name)(*arguments)
        except RuntimeError as error:
            answer = False, str(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
