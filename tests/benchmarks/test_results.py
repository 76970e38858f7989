"""Tables of what was measured, and what the documents say of it."""

import json
import re
import sys

import pytest

from benchmarks import report
from benchmarks.gpu import kernel_table
from docs import kernel_shares
from tests.support.paths import ROOT


def kernel_row(**changes):
    row = {"kernel": "forward", "shape": "side4/8/5x5", "batch": 2, "dtype": "float32"}
    row |= {"copy_rate": 2e12, "in_cache": False, "implementation": "cuda", "us": 10.0}
    return row | {"of_copy": 0.5} | changes


def test_a_table_of_kernels():
    rows = [
        kernel_row(),
        kernel_row(implementation="pytorch", us=25.0),
        kernel_row(implementation="triton", us=30.0),
        kernel_row(batch=4, us=20.0, of_copy=0.6),
        kernel_row(kernel="table", shape="radius1", in_cache=True, batch=4, us=4.0),
    ]
    environment = {"device": "a card", "torch": "2.0", "date": "today"}
    found = {"a": {"rows": rows}, "b": {"failed": "it hangs"}}
    lines = kernel_table.markdown({"environment": environment, "kernels": found}).splitlines()
    assert lines[2:4] == [
        "| `forward side4/8/5x5` | float32 | 10.0 | 50% | 25.0 | **2.50x** "
        "| 20.0 | 60% | – | – | 30.0 |",
        "| `table radius1*` | float32 | – | – | – | – | 4.0 | 50% | – | – | – |",
    ]
    assert {line.count("|") for line in lines[:4]} == {12}
    assert "a card, torch 2.0, today; copy rate measured in that run: 2.00 TB/s." in lines
    with pytest.raises(ValueError, match="no kernel that was measured"):
        kernel_table.markdown({"environment": environment, "kernels": {"b": found["b"]}})


KERNELS_PAGE = """
## Instructions of a tile

| kernel | expected | H100 allows | predicted, at most |
|---|--:|--:|--:|
| `masked_conv2d_tiles<float, 4, 5>` | 400 | 930 | 90 % |
| `masked_conv2d_grads_tiles<float, 2, 3>` | 300 | 233 | 77 % |

## Another
"""


def test_a_page_of_shares_tells_what_was_measured_from_what_was_changed_since():
    found = {"a": {"rows": [kernel_row(batch=128), kernel_row(batch=256, of_copy=0.9)]}}
    moved = kernel_row(kernel="gather", shape="side4/8", batch=128, us=3.0)
    found["b"] = {"rows": [moved, kernel_row(shape="side2/8/3x3", batch=128)]}
    results = {"H100": {"environment": {"date": "2026-01-02 03:04 UTC"}, "kernels": found}}
    name = "masked_conv2d_tiles<float, 4, 5>"
    same, changed, gone, forgotten = (
        kernel_shares.page(KERNELS_PAGE, results, code).splitlines()
        for code in ({"H100": {name: 400}}, {"H100": {name: 500}}, {}, {"H200": {name: 400}})
    )
    assert same[2] == f"| `{name}` | 4096 | 400 | 90 % | 50 % forward (2026-01-02) |"
    assert same[3].endswith("| 1536 | 300 | 77 % | not yet measured |")
    assert same[4] == (
        "| `masked_conv2d_tiles<float, 2, 3>`, gone | – | – | – | 50 % forward (2026-01-02) |"
    )
    assert same[-1] == "| `gather side4/8` | float32 | 50 %, 3.0 µs |"
    then = "50 % forward (2026-01-02) |"
    assert changed[2].endswith(f"| not yet measured; with 500 instructions {then}")
    assert gone == forgotten and gone[2].endswith(f"| not yet measured; of other code {then}")
    with pytest.raises(ValueError, match="there is no table"):
        kernel_shares.page("", results, {})


def test_the_page_of_shares_is_what_its_program_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_shares.py"])
    kernel_shares.main()
    assert (
        capsys.readouterr().out == (ROOT / "docs" / "generated" / "kernel_shares.md").read_text()
    ), "python docs/kernel_shares.py > docs/generated/kernel_shares.md"


# -- what is written of what was measured ----------------------------------------------------------


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "generated").glob("benchmarks-*.md")))
def test_pages_are_what_the_command_in_their_first_line_prints(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = re.search("`python -m benchmarks.report (.*)`", page.read_text().splitlines()[0])
    report.main(command[1].split())
    assert capsys.readouterr().out == page.read_text()


def test_the_readme_says_what_was_measured():
    """Its summary, cell by cell, against the files of results."""
    results = ROOT / "benchmarks" / "results"
    cpu = report.load(results / "cpu.json").rows
    cards = [
        (
            report.load(results / f"{card}-steps.json").rows,
            json.loads((results / f"{card}-kernels.json").read_text())["kernels"],
        )
        for card in ("h100", "h200")
    ]

    def ratio(rows, case, dtype, contender="packed"):
        key = case, dtype, contender
        (row,) = (row for row in rows if (row.case, row.dtype, row.contender) == key)
        return row.ratio

    def stage1(kernels, *ops):
        names = [f"cuda:{op}/side4/256/5x5/128/bfloat16" for op in ops]
        rows = [row for name in names for row in kernels[name]["rows"]]
        pytorch, ours = (
            sum(row["us"] for row in rows if row["implementation"] == implementation)
            for implementation in ("pytorch", "cuda")
        )
        return pytorch / ours

    def on_cpu(name):
        return [ratio(cpu, name, dtype) for dtype in ("float32", "bfloat16")]

    def on_cards(case, contender="packed"):
        return [ratio(rows, case, "bfloat16", contender) for rows, _ in cards]

    def depthwise_on_cards(*ops):
        return [stage1(kernels, *ops) for _, kernels in cards]

    depthwise, both = "depthwise 5x5, stage 1, forward", "depthwise/stage1/forward_backward"
    gradients = "input_gradient", "weight_gradient"
    expected = {
        depthwise: on_cpu("depthwise/stage1/forward") + depthwise_on_cards("forward"),
        f"{depthwise} + backward": on_cpu(both) + depthwise_on_cards("forward", *gradients),
        "stages 1 and 2, forward + backward": on_cpu("stages12") + on_cards("stages12"),
        "whole training step": on_cpu("step") + on_cards("step"),
        "whole training step, `--cuda_graph`": [None, None, *on_cards("step", "packed graph")],
        "peak memory of training, dense / packed": on_cpu("memory") + on_cards("memory"),
    }
    text = (ROOT / "README.md").read_text().partition("## How fast")[2]
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in table[1:]] == list(expected)
    for name, *cells in table[1:]:
        for cell, value in zip(cells, expected[name], strict=True):
            if value is None:
                assert cell == "–", name
            else:
                digits = len(cell.rstrip("x").partition(".")[2])
                assert cell == f"{value:.{digits}f}x", name
