"""Makes the drawings of docs/concepts: `python docs/drawings.py`.

What is numbered or coloured in them is asked from the library itself. The lines and the letters are
of a grey that is read on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

import torch

import convmae_kernels as ck

FOLDER = Path(__file__).resolve().parent / "concepts" / "drawings"
GREY, INK = "#7f838a", "#10242e"
COLOURS = ("#6fb7d6", "#8fcf9b", "#f0c05a", "#e88f7a", "#b79be0", "#e3a7cf")
MASK = ck.BlockMask.from_visible(
    torch.tensor([[[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]], dtype=torch.bool)
)


class Drawing:
    """An SVG file, drawn shape by shape; lengths are in pixels, `y` grows downwards."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="Helvetica, Arial, '
            f'sans-serif" font-size="13">\n<title>{title}</title>'
        )
        self.shapes: list[str] = []

    def square(self, x: float, y: float, side: float, fill: str = "none", line: float = 1) -> None:
        self.rectangle(x, y, side, side, fill, line)

    def rectangle(
        self, x: float, y: float, w: float, h: float, fill: str = "none", line: float = 1
    ) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{GREY}" stroke-width="{line:g}"/>'
        )

    def text(
        self, x: float, y: float, words: object, fill: str = GREY, anchor: str = "middle", **more
    ) -> None:
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}"{extra}>{words}</text>'
        )

    def path(self, points: list[tuple[float, float]], colour: str = GREY, width: float = 2) -> None:
        places = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            'stroke-linejoin="round"/>'
        )

    def arrow(self, x: float, y: float, to: float) -> None:
        """A horizontal arrow from `x` to `to`."""
        self.path([(x, y), (to, y)])
        self.path([(to - 6, y - 5), (to, y), (to - 6, y + 5)])

    def __str__(self) -> str:
        return "\n".join([self.head, *self.shapes, "</svg>\n"])


def visible_rows() -> dict[tuple[int, int], int]:
    """Which row of the packed tensor each visible block is, by its row and column in the grid."""
    gw = MASK.grid[1]
    return {divmod(index, gw): row for row, index in enumerate(MASK.block_index.tolist())}


def block(drawing: Drawing, x: float, y: float, side: int, cell: float, row: int | None) -> None:
    """A block of positions, in the colour of its packed row, or hidden if that is None."""
    if row is None:
        drawing.text(x + cell * side / 2, y + cell * side / 2 + 5, "hidden")
    else:
        for i in range(side * side):
            drawing.square(x + i % side * cell, y + i // side * cell, cell, COLOURS[row], 0.5)
    drawing.square(x, y, cell * side, line=2)


def packed() -> Drawing:
    """A feature map of blocks of 2 x 2 positions, and its packed rows."""
    drawing, side, cell = Drawing(640, 250, "A feature map and its packed rows"), 2, 30
    rows, (gh, gw) = visible_rows(), MASK.grid
    drawing.text(125, 20, "feature map [1, C, 6, 8]")
    for r in range(gh):
        for c in range(gw):
            x, y = 5 + c * cell * side, 35 + r * cell * side
            row = rows.get((r, c))
            block(drawing, x, y, side, cell, row)
    ranks = ck.from_zorder(torch.arange(side * side))
    for r, c in rows:
        for i in range(side):
            for j in range(side):
                x, y = 5 + (c * side + j + 0.5) * cell, 35 + (r * side + i + 0.5) * cell + 5
                drawing.text(x, y, int(ranks[i, j]), INK)
    drawing.arrow(265, 125, 325)
    drawing.text(295, 115, "gather")
    drawing.text(490, 20, "packed features [4, 4, C]")
    for row in range(MASK.num_visible):
        y = 45 + row * 42
        drawing.text(345, y + 20, f"row {row}", anchor="start")
        for i in range(side * side):
            drawing.rectangle(400 + i * 55, y, 55, cell, COLOURS[row])
            drawing.text(427 + i * 55, y + 20, i, INK)
    drawing.text(510, 230, "positions of a block, in Z-order")
    return drawing


def zorder() -> Drawing:
    """The ranks of the positions of a block of side 4, and a 2 x 2 convolution of stride 2."""
    drawing, cell = Drawing(640, 220, "Z-order within a block of 4 x 4 positions"), 42
    ranks = ck.from_zorder(torch.arange(16))
    centres: list[tuple[float, float]] = [(0, 0)] * 16
    for i in range(4):
        for j in range(4):
            rank, x, y = int(ranks[i, j]), 5 + j * cell, 35 + i * cell
            drawing.square(x, y, cell, COLOURS[rank // 4], 0.5)
            centres[rank] = (x + cell / 2, y + cell / 2)
    drawing.path(centres, INK, 1)
    for rank, (x, y) in enumerate(centres):
        drawing.square(x - 10, y - 9, 19, COLOURS[rank // 4], 0)
        drawing.text(x, y + 5, rank, INK)
    drawing.text(90, 20, "a block of 4 x 4 positions")
    drawing.text(430, 20, "its packed row [16, C]: four groups of 2 x 2")
    for rank in range(16):
        drawing.rectangle(215 + rank * 26, 45, 26, 34, COLOURS[rank // 4])
        drawing.text(228 + rank * 26, 67, rank, INK)
    drawing.text(430, 110, "reshaped to [4, 4 C], and one matrix product:")
    drawing.text(430, 128, "the 2 x 2 convolution of stride 2")
    for rank in range(4):
        drawing.rectangle(215 + rank * 104, 145, 104, 34, COLOURS[rank])
        drawing.text(267 + rank * 104, 167, rank, INK)
    drawing.text(430, 200, "[4, C']: the same block at the next stage, in Z-order again")
    return drawing


def neighbours() -> Drawing:
    """The neighbour table of one block, and which taps of a 5 x 5 kernel meet something."""
    drawing = Drawing(640, 290, "A convolution looks across the borders of blocks")
    side, cell = 2, 36
    number = visible_rows()[(1, 1)]
    table = MASK.neighbours(1)[number].tolist()
    drawing.text(5, 20, "the block of row 1, and the eight around it", anchor="start")
    for place, row in enumerate(table):
        x, y = 5 + place % 3 * cell * side, 35 + place // 3 * cell * side
        block(drawing, x, y, side, cell, None if row < 0 else row)
    x, y = 5 + 2 * cell, 35 + 2 * cell  # the first position of the block
    drawing.square(x + cell / 2 - 5, y + cell / 2 - 5, 10, INK)
    left, top = x - 2 * cell, y - 2 * cell
    corners = [(left, top), (left + 5 * cell, top), (left + 5 * cell, top + 5 * cell)]
    corners += [(left, top + 5 * cell), (left, top)]
    drawing.path(corners, "#d0453a", 3)
    drawing.text(5, 275, "red: what a 5 x 5 kernel reaches from there", anchor="start")
    drawing.text(460, 20, "mask.neighbours(1)[1]: rows of the packed features")
    for place, row in enumerate(table):
        x, y = 352 + place % 3 * 72, 60 + place // 3 * 50
        drawing.rectangle(x, y, 72, 50, "none" if row < 0 else COLOURS[row])
        drawing.text(x + 36, y + 30, row, GREY if row < 0 else INK, font_size=16)
    drawing.text(460, 240, "-1: hidden, or outside the image;")
    drawing.text(460, 258, "its taps are left out")
    return drawing


def resolutions() -> Drawing:
    """One mask at three resolutions."""
    drawing, width = Drawing(640, 200, "One mask, three resolutions"), 48
    rows, (gh, gw) = visible_rows(), MASK.grid
    for number, (stride, side) in enumerate(((4, 4), (8, 2), (16, 1))):
        left = 5 + number * 220
        drawing.text(left + 96, 20, f"stride {stride}: side {side}")
        for r in range(gh):
            for c in range(gw):
                x, y, step = left + c * width, 30 + r * width, width / side
                if (r, c) in rows:
                    for i in range(side * side):
                        fill = COLOURS[rows[(r, c)]]
                        drawing.square(x + i % side * step, y + i // side * step, step, fill, 0.5)
                drawing.square(x, y, width, line=1.5)
        shown = MASK.num_visible * side * side
        drawing.text(left + 96, 194, f"{shown} positions of {gh * gw * side * side}")
    return drawing


def two_ways() -> Drawing:
    """What is computed densely and multiplied by the mask, and what packed."""
    drawing, cell = Drawing(640, 215, "The dense way and the packed way"), 22
    rows, (gh, gw) = visible_rows(), MASK.grid

    def grid(x: float, y: float, hidden: str, word: str) -> None:
        for r in range(gh):
            for c in range(gw):
                row = rows.get((r, c))
                fill = hidden if row is None else COLOURS[row]
                drawing.square(x + c * cell, y + r * cell, cell, fill)
                if row is None and word:
                    drawing.text(x + (c + 0.5) * cell, y + (r + 0.5) * cell + 4, word)

    drawing.text(
        5, 20, "dense: every position is computed, then multiplied by the mask", anchor="start"
    )
    for number, word in enumerate(("0", "?", "0")):
        grid(45 + number * 210, 32, "none", word)
    drawing.arrow(150, 65, 245)
    drawing.text(197, 57, "convolve")
    drawing.arrow(360, 65, 455)
    drawing.text(407, 57, "times mask")
    drawing.text(5, 135, "packed: what is hidden is nowhere", anchor="start")
    for start in (45, 465):
        for row in range(MASK.num_visible):
            drawing.square(start + row * cell, 150, cell, COLOURS[row])
    drawing.arrow(150, 161, 455)
    drawing.text(302, 153, "convolve, by the table of neighbours")
    drawing.text(320, 202, "the coloured numbers are the same", font_weight="bold")
    return drawing


DRAWINGS = (packed, zorder, neighbours, resolutions, two_ways)

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in DRAWINGS:
        (FOLDER / f"{draw.__name__}.svg").write_text(str(draw()))
