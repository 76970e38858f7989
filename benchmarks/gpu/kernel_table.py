"""What the stage `kernels` measured, grouped for the digest and as a Markdown table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

EAGER, TRITON = "pytorch", "triton"
Row = dict[str, Any]


def measured_rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """The rows of all items; those that failed have none."""
    return [row for result in results.values() for row in result.get("rows", [])]


def by_kernel(rows: Iterable[Row]) -> dict[tuple[str, str], dict[tuple[str, int], Row]]:
    """Rows by kernel with its shape and dtype, then by implementation and batch.

    A `*` follows the shape of what is so small that it was timed in the cache.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    for row in rows:
        name = f"{row['kernel']} {row['shape']}" + ("*" if row["in_cache"] else "")
        groups.setdefault((name, row["dtype"]), {})[row["implementation"], row["batch"]] = row
    return groups


def compiled(group: dict[tuple[str, int], Row], batch: int) -> Row:
    """The row of the compiled kernel at a batch; empty if there is none."""
    others = (EAGER, TRITON)
    return next((r for (who, b), r in group.items() if b == batch and who not in others), {})


def markdown(content: dict[str, Any]) -> str:
    """A line for each kernel and dtype, and what it was measured on.

    Raises:
        ValueError: no kernel was measured.
    """
    rows = [row for row in measured_rows(content["kernels"]) if "us" in row]
    if not rows:
        raise ValueError("there is no kernel that was measured")
    batches = sorted({row["batch"] for row in rows})
    heads = [f"batch {batch}, µs | of copy | PyTorch, µs | against it" for batch in batches]
    lines = [
        f"| kernel | dtype | {' | '.join(heads)} | Triton, µs |",
        "|---|---|" + "--:|" * (4 * len(batches) + 1),
    ]
    for (name, dtype), group in by_kernel(rows).items():
        cells = [f"`{name}`", dtype]
        for batch in batches:
            ours, eager = compiled(group, batch), group.get((EAGER, batch), {})
            cells += [_us(ours), f"{ours['of_copy']:.0%}" if ours else "–", _us(eager)]
            cells.append(f"**{eager['us'] / ours['us']:.2f}x**" if ours and eager else "–")
        cells.append(_us(group.get((TRITON, batches[0]), {})))
        lines.append(f"| {' | '.join(cells)} |")
    env = content["environment"]
    rate = max(row["copy_rate"] for row in rows) / 1e12
    return "\n".join(
        [
            *lines,
            "",
            f"{env['device']}, torch {env['torch']}, {env['date']}; "
            f"copy rate measured in that run: {rate:.2f} TB/s.",
            "",
            "A call's time is that of many in a captured graph. `of copy`: the bytes that must",
            "move, over that time, as a share of the copy rate. PyTorch's way is eager. Triton:",
            f"batch {batches[0]}. `*`: so small that it was timed in the cache. See `docs/gpu.md`.",
        ]
    )


def _us(row: Row) -> str:
    return f"{row['us']:.1f}" if row else "–"
