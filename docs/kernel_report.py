"""What the compiler made of the CUDA kernels: registers, shared memory, occupancy, access widths.

    python docs/kernel_report.py             # a Markdown table for sm_90, from the built library
    python docs/kernel_report.py sm_80

It reads `convmae_kernels/_C.so` with `cuobjdump`, from the CUDA toolkit or as Triton carries it; no
GPU is needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).resolve().parents[1] / "convmae_kernels" / "_C.so"
TYPES = {
    "f": "float",
    "d": "double",
    "t": "2 bytes",
    "j": "4 bytes",
    "m": "8 bytes",
    "NS_8BFloat16E": "bfloat16",
    "NS_4HalfE": "half",
    "NS0_5ChunkE": "16 bytes",
}
# Of a multiprocessor of compute capability 9.0 (CUDA programming guide): what bounds how many
# thread blocks it holds.
MAX_BLOCKS, MAX_WARPS, REGISTERS, SHARED_BYTES = 32, 64, 65536, 233472


class Kernel(NamedTuple):
    """A kernel as compiled for one architecture; sizes in bytes.

    From compute capability 9.0 on, `shared` includes the 1 KiB that the system keeps of every
    thread block that uses shared memory.
    """

    arch: str
    symbol: str
    registers: int
    stack: int
    shared: int
    local: int

    @property
    def name(self) -> str:
        """The kernel and its template arguments: `masked_conv2d_tiles<bfloat16, 4, 5>`."""
        _, rest = re.fullmatch(r"(_ZN7convmae4cuda)(.*)", self.symbol).groups()
        length = re.match(r"\d+", rest).group()
        name, rest = rest[len(length) :][: int(length)], rest[len(length) + int(length) :]
        if not rest.startswith("I"):
            return name
        kind = next(mangled for mangled in TYPES if rest.startswith("I" + mangled))
        numbers = re.match(r"(?:Li\d+E)*", rest[1 + len(kind) :]).group()
        return f"{name}<{', '.join([TYPES[kind], *re.findall('[0-9]+', numbers)])}>"

    @property
    def is_specialised(self) -> bool:
        """One of the kernels for a given kernel side on tiles of a given side."""
        return "_tiles" in self.symbol

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor of compute capability 9.0 holds at a time."""
        warps = 1 if self.is_specialised else 8
        per_warp = -(-self.registers * 32 // 256) * 256
        per_block = -(-max(self.shared, 1024) // 128) * 128
        by_registers = REGISTERS // (per_warp * warps)
        return warps * min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, SHARED_BYTES // per_block)


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool: on the PATH, or in Triton; None if there is none."""
    found = shutil.which(name)
    spec = None if found else importlib.util.find_spec("triton")
    if spec and spec.origin:
        tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(tool) if tool.exists() else None
    return found


def cuobjdump(*arguments: str) -> str:
    """The output of `cuobjdump` on the built library."""
    command = [find_tool("cuobjdump") or "cuobjdump", *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels() -> list[Kernel]:
    """Every kernel of the built library, for every architecture that it was compiled for."""
    found, arch, symbol = [], "", ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif (match := re.match(r"\s*REG:", line)) and symbol:
            sizes = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found.append(
                Kernel(arch, symbol, sizes["REG"], sizes["STACK"], sizes["SHARED"], sizes["LOCAL"])
            )
    return found


def instructions(arch: str) -> dict[str, list[str]]:
    """The machine instructions of every kernel, by its symbol, without operands."""
    found: dict[str, list[str]] = {}
    symbol = ""
    for line in cuobjdump("-sass", "-arch", arch).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z0-9_.]+)", line):
            found.setdefault(symbol, []).append(match[1])
    return found


def widths(code: list[str], pattern: str) -> str:
    """How many bits wide the accesses matching the pattern are: `128 x16, 32 x3`."""
    counts: dict[int, int] = {}
    for instruction in code:
        if re.match(pattern, instruction):
            width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", instruction)
            bits = int(width[1]) if width else 32
            counts[bits] = counts.get(bits, 0) + 1
    return ", ".join(f"{bits} x{counts[bits]}" for bits in sorted(counts, reverse=True)) or "none"


def table(arch: str) -> str:
    """Markdown: a row for each kernel of the architecture."""
    code = instructions(arch)
    rows = [
        "| kernel | registers | shared memory | spills | warps of 64 | copies to shared, bits "
        "| loads, bits | stores, bits |",
        "|---|--:|--:|--:|--:|---|---|---|",
    ]
    for kernel in sorted(kernels(), key=lambda kernel: kernel.name):
        if kernel.arch != arch:
            continue
        lines = code[kernel.symbol]
        rows.append(
            f"| `{kernel.name}` | {kernel.registers} | {kernel.shared} | "
            f"{kernel.stack + kernel.local} | {kernel.resident_warps} | "
            f"{widths(lines, 'LDGSTS')} | {widths(lines, r'LDG[.]')} | {widths(lines, r'STG[.]')} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else "sm_90"))
