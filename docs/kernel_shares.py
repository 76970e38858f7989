"""Each CUDA kernel's share of the copy rate: predicted from its instructions, and measured.

    python docs/kernel_shares.py > docs/generated/kernel_shares.md

It reads generated/kernels.md (`docs/kernel_report.py`) and what `make gpu` measured. A measured
figure is of the code of that day: `measured_code.json` has the instructions of a tile of the
kernels that were measured, by card. A kernel that is not in it, or takes other instructions now,
was not measured yet. After a measurement `--measured CARD` notes the instructions of now there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a script, `docs` is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import kernel_table
from docs.kernel_report import tiled_kernel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMPILED = ROOT / "docs" / "generated" / "kernels.md"
MEASURED_CODE = ROOT / "docs" / "measured_code.json"
CARDS = ("H100", "H200")
BATCH = 128
NOT_YET = "not yet measured"


class Counted(NamedTuple):
    """A tiled kernel as compiled now: instructions of an expected tile, its share by card."""

    name: str
    expected: int
    shares: dict[str, str]

    @property
    def passes(self) -> int:
        """How often a kernel reads or writes all features: all gradients at once do it 3 times."""
        return 3 if "_grads" in self.name else 2

    @property
    def tile_bytes(self) -> int:
        """Of a tile of 128 bytes of channels."""
        sides = re.findall(r", (\d+)", self.name)  # of tile and kernel; tensor cores have 4 and 7
        side = int(sides[0]) if sides else 4
        return self.passes * side * side * 128


def counted(page: str) -> list[Counted]:
    """The rows of the table "Instructions of a tile".

    Raises:
        ValueError: the page has no such table, or other columns.
    """
    _, found, text = page.partition("## Instructions of a tile\n")
    if not found:
        raise ValueError("there is no table of instructions")
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    cards = {
        head[i - 1].removesuffix(" allows"): i
        for i, cell in enumerate(head)
        if cell == "predicted, at most"
    }
    if "expected" not in head or not cards:
        raise ValueError(f"the table of instructions has the columns {', '.join(head)}")
    expected = head.index("expected")
    return [
        Counted(row[0].strip("`"), int(row[expected]), {card: row[i] for card, i in cards.items()})
        for row in rows
    ]


def measured(content: dict[str, Any]) -> tuple[dict[str, list[str]], dict[tuple[str, str], str]]:
    """Shares by tiled kernel, "66 % forward", and by op and dtype of what only moves."""
    tiled: dict[str, list[str]] = {}
    moves: dict[tuple[str, str], str] = {}
    rows = [row for row in kernel_table.measured_rows(content["kernels"]) if "us" in row]
    for (name, dtype), group in kernel_table.by_kernel(rows).items():
        row = kernel_table.compiled(group, BATCH)
        if not row:
            continue
        share = f"{100 * row['of_copy']:.0f} %"
        kernel = tiled_kernel(*name.rstrip("*").split(" "), dtype)
        if kernel is None:
            moves[name, dtype] = f"{share}, {row['us']:.1f} µs"
        else:
            tiled.setdefault(kernel, []).append(f"{share} {row['kernel'].replace('_', ' ')}")
    return tiled, moves


def page(compiled: str, results: dict[str, dict[str, Any]], code: dict[str, Any]) -> str:
    """The page, in Markdown.

    Args:
        compiled: generated/kernels.md.
        results: CARD-kernels.json by card.
        code: `measured_code.json`: by card, the instructions of the kernels that were measured.
    """
    tables = {card: measured(content) for card, content in results.items()}
    when = {card: content["environment"]["date"].split()[0] for card, content in results.items()}

    def cell(kernel: Counted, card: str) -> str:
        shares, then = tables[card][0].get(kernel.name), code.get(card, {}).get(kernel.name)
        if shares is None:
            return NOT_YET
        said = f"{', '.join(shares)} ({when[card]})"
        if then == kernel.expected:
            return said
        old = "of other code" if then is None else f"with {then} instructions"
        return f"{NOT_YET}; {old} {said}"

    heads = [f"{card}, predicted, at most | {card}, measured" for card in results]
    lines = [
        "| kernel | bytes of a tile | instructions of it, expected | " + " | ".join(heads) + " |",
        "|---|--:|--:|" + "--:|---|" * len(results),
    ]
    for kernel in counted(compiled):
        cells = [f"`{kernel.name}`", str(kernel.tile_bytes), str(kernel.expected)]
        for card in results:
            cells += [kernel.shares.get(card, "–"), cell(kernel, card)]
        lines.append(f"| {' | '.join(cells)} |")
    gone = sorted({name for tiled, _ in tables.values() for name in tiled})
    gone = [name for name in gone if name not in {kernel.name for kernel in counted(compiled)}]
    for name in gone:
        said = [
            f"– | {', '.join(tables[card][0].get(name, ['–']))} ({when[card]})" for card in results
        ]
        lines.append(f"| `{name}`, gone | – | – | {' | '.join(said)} |")
    lines += ["", "## What only moves, measured", ""]
    lines += [
        "| op | dtype | " + " | ".join(f"{card} ({when[card]})" for card in results) + " |",
        "|---|---|" + "--:|" * len(results),
    ]
    moved = dict.fromkeys(key for _, moves in tables.values() for key in moves)
    for name, dtype in moved:
        cells = [moves.get((name, dtype), "–") for _, moves in tables.values()]
        lines.append(f"| `{name}` | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measured", choices=CARDS, help="note that a card has just been measured")
    options = parser.parse_args()
    compiled = COMPILED.read_text()
    results = {
        card: json.loads((RESULTS / f"{card.lower()}-kernels.json").read_text()) for card in CARDS
    }
    code = json.loads(MEASURED_CODE.read_text()) if MEASURED_CODE.exists() else {}
    if options.measured:
        timed = measured(results[options.measured])[0]
        kernels = {kernel.name: kernel.expected for kernel in counted(compiled)}
        code[options.measured] = {name: kernels[name] for name in timed if name in kernels}
        MEASURED_CODE.write_text(json.dumps(code, indent=1, sort_keys=True) + "\n")
        return
    print("<!-- Written by `python docs/kernel_shares.py`; not by hand. -->\n")
    print("# Shares of the copy rate, compute capability 9.0\n")
    print(f"Measured at batch {BATCH}; docs/kernels.md says what is predicted, and how.\n")
    print(page(compiled, results, code))


if __name__ == "__main__":
    main()
