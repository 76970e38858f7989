"""What the compiler made of the CUDA kernels: registers, shared memory, occupancy, instructions.

    python docs/kernel_report.py > docs/generated/kernels.md     # for sm_90, from the built library
    python docs/kernel_report.py sm_80       # the first table only: tiles are walked for sm_90
    python docs/kernel_report.py --gigahertz 1.98 --copy H200=4.8

It reads `convmae_kernels/_C.so` with `cuobjdump`, from the CUDA toolkit or as Triton carries it; no
GPU is needed. Instructions are counted by running the machine code on the CPU (`docs/sass/`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a script, `docs` is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import kernel_table
from docs import sass, tile_walk

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "convmae_kernels" / "_C.so"
MEASURED = ROOT / "benchmarks" / "results" / "h200-kernels.json"
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
    threads: int  # of a thread block

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
        return "_tiles" in self.symbol or "_tensor" in self.symbol

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor of compute capability 9.0 holds at a time."""
        warps = self.threads // 32
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
    threads = block_sizes()
    found, arch, symbol = [], "", ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif (match := re.match(r"\s*REG:", line)) and symbol:
            sizes = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            bytes_ = (sizes[key] for key in ("STACK", "SHARED", "LOCAL"))
            found.append(Kernel(arch, symbol, sizes["REG"], *bytes_, threads[arch, symbol]))
    return found


def block_sizes() -> dict[tuple[str, str], int]:
    """The threads of a thread block, by architecture and symbol: what its launch bounds say."""
    found, arch, symbol, at = {}, "", "", False
    for line in cuobjdump("-elf").splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\.nv\.info\.(\S+)", line):
            symbol = match[1]
        elif "EIATTR_" in line:
            at = "EIATTR_MAX_THREADS" in line
        elif at and (match := re.match(r"\s*Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", line)):
            x, y, z = (int(number, 16) for number in match.groups())
            found[arch, symbol] = x * y * z
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


class Card(NamedTuple):
    """What a GPU could do at best: the figures that a prediction rests on."""

    name: str
    copy: float  # bytes a second, read and written
    multiprocessors: int
    hertz: float

    def instructions(self, moved: int) -> float:
        """How many warp instructions a multiprocessor can issue while it moves so many bytes.

        It issues 4 a cycle and has its share of the copy bandwidth.
        """
        return 4 * self.hertz * moved * self.multiprocessors / self.copy


class Tile(NamedTuple):
    """What a tile costs in a kernel for sm_90, in instructions of a warp."""

    name: str
    alone: float  # the tile sees no other one
    all: float
    expected: float
    multiply_adds: float  # among the expected ones; products of matrices on tensor cores
    once: float  # a run

    def share(self, card: Card) -> float:
        """The share of the copy rate that the instructions leave possible."""
        return min(1, self.allowed(card) / self.expected)

    def allowed(self, card: Card) -> float:
        """The instructions for which there is time while tiles are read and written.

        One is read and another written; for all gradients at once two are read.
        """
        shape = tile_walk.Shape.of(self.name)
        return card.instructions((3 if shape.op == "_grads" else 2) * shape.side**2 * 128)


def tiles() -> list[Tile]:
    """The cost of a tile in each tiled kernel for sm_90, by running its code."""
    code = sass.functions(cuobjdump("-sass", "-arch", "sm_90"))
    counted = []
    for kernel in sorted(kernels(), key=lambda kernel: kernel.name):
        if kernel.arch != "sm_90" or not kernel.is_specialised:
            continue
        shape = tile_walk.Shape.of(kernel.name)
        visible = 0.4 if shape.kernel == 7 else 0.25
        walk = tile_walk.walk(kernel.name, code[kernel.symbol], kernel.threads // 32)
        kind = "HMMA" if shape.tensor else "FFMA"
        issued, multiply_adds = walk.count(), walk.count(kind).expected(visible)
        costs = issued.alone, issued.all, issued.expected(visible), multiply_adds, issued.once
        counted.append(Tile(kernel.name, *costs))
    return counted


def instruction_table(tiles: list[Tile], cards: list[Card]) -> str:
    """Markdown: what a tile costs in each tiled kernel for sm_90, and what copy speed allows."""
    heads = [f"{card.name} allows | predicted, at most" for card in cards]
    rows = [
        "| kernel | alone | all visible | expected | of these multiply-adds | once a run | "
        + " | ".join(heads)
        + " |",
        "|---|" + "--:|" * (5 + 2 * len(cards)),
    ]
    for tile in tiles:
        name, *costs = tile
        cells = [f"`{name}`", *(f"{number:.0f}" for number in costs)]
        for card in cards:
            cells += [f"{tile.allowed(card):.0f}", f"{100 * tile.share(card):.0f} %"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def measured_table(tiles: list[Tile], card: Card, content: dict[str, Any]) -> str:
    """Markdown: the share of the copy rate that was predicted, at most, and the measured ones.

    `content` is what `make gpu` wrote as CARD-kernels.json. What only moves has no prediction.
    """
    shares = {tile.name: tile.share(card) for tile in tiles}
    rows = [row for row in kernel_table.measured_rows(content["kernels"]) if "us" in row]
    batches = sorted({row["batch"] for row in rows})
    lines = [
        "| op | dtype | kernel | predicted, at most | "
        + " | ".join(f"measured, batch {batch}" for batch in batches)
        + " |",
        "|---|---|---|" + "--:|" * (1 + len(batches)),
    ]
    for (name, dtype), group in kernel_table.by_kernel(rows).items():
        measured = [kernel_table.compiled(group, batch) for batch in batches]
        kernel = tiled_kernel(*name.rstrip("*").split(" "), dtype)
        if kernel in shares:
            cells = [f"`{name}`", dtype, f"`{kernel}`", f"{100 * shares[kernel]:.0f} %"]
        else:
            cells = [f"`{name}`", dtype, "–", "–"]
        cells += [f"{100 * row['of_copy']:.0f} %" if row else "–" for row in measured]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tiled_kernel(op: str, shape: str, dtype: str) -> str | None:
    """The name of the tiled kernel of `forward`, `side4/256/5x5`; None without a square kernel.

    Blocks of side 4 and more are cut into tiles of 4 x 4.
    """
    match = re.fullmatch(r"side(\d+)/\d+/(\d+)x\2", shape)
    if match is None:
        return None
    grad = "_weight_grad" if op == "weight_gradient" else ""
    kind = {"float32": "float", "float16": "half"}.get(dtype, dtype)
    return f"masked_conv2d{grad}_tiles<{kind}, {min(4, int(match[1]))}, {match[2]}>"


def card_and_speed(text: str) -> tuple[str, float]:
    """`H100=3.0` of the command line."""
    match = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a card and its TB/s, as in H100=3.0")
    return match[1], float(match[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("arch", nargs="?", default="sm_90")
    parser.add_argument(
        "--copy",
        nargs="+",
        type=card_and_speed,
        default=[("H200", 4.3), ("H100", 3.0)],
        metavar="CARD=TB/S",
        help="what a card copies, read and written",
    )
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--gigahertz", type=float, default=1.85)
    options = parser.parse_args()
    print("<!-- Written by `python docs/kernel_report.py`; not by hand. -->\n")
    print(f"# The CUDA kernels as compiled, {options.arch}\n\n{table(options.arch)}")
    if options.arch == "sm_90":
        cards = [
            Card(name, speed * 1e12, options.multiprocessors, options.gigahertz * 1e9)
            for name, speed in options.copy
        ]
        walked, content = tiles(), json.loads(MEASURED.read_text())
        print(f"\n## Instructions of a tile\n\n{instruction_table(walked, cards)}")
        device = content["environment"]["device"]
        for card in cards:
            if card.name in device:
                print(f"\n## Share of the copy rate, {device}\n")
                print(measured_table(walked, card, content))


if __name__ == "__main__":
    main()
