"""Runs one warp of a compiled CUDA kernel on the CPU, from its machine code, and counts its steps.

    code = sass.functions(text of cuobjdump -sass)["_Z6kernel..."]
    warp = sass.Warp(code, constants, memory)
    warp.run()
    warp.issued                                       # how often each instruction was issued

It knows the instructions of compute capability 9.0 that the project's kernels use, and raises
`UnknownInstruction` at any other. All 32 lanes are computed, so results can be compared with what
the kernel should give. An instruction counts once for the warp, whatever its predicate says; lanes
that went different ways meet again where the code says so (BSSY, BSYNC), each side counts.
"""

from docs.sass.text import Instruction, UnknownInstruction, functions
from docs.sass.warp import MEMORY_BASE, PARAMETERS, Warp, run_block

__all__ = [
    "MEMORY_BASE",
    "PARAMETERS",
    "Instruction",
    "UnknownInstruction",
    "Warp",
    "functions",
    "run_block",
]
