"""What fails or disagrees in a benchmark is reported and left out, and the others are measured."""

from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import registry, report, runner
from tests.benchmarks.test_benchmarks import RATES, TINY_FLAGS, Scripted, scripted


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    monkeypatch.setattr(command, "measure_rates", lambda device, dtypes: RATES)


def test_a_contender_that_fails_or_disagrees_is_left_out_and_the_others_go_on():
    comparison, log = scripted([1] * 9, [1] * 9)

    def fail():
        raise RuntimeError("no room\nmore about it")

    comparison.contenders.insert(0, runner.Contender("failing", fail, lambda _: []))
    comparison.contenders.append(Scripted("wrong", [1] * 9, log, 2.0).contender())
    times = runner.measure(comparison, torch.float32, repeats=2, budget=0)
    assert times == {"packed": [1, 1], "dense": [1, 1]}
    assert comparison.failures[0] == "failing: RuntimeError: no room"
    assert "wrong: tensor 0 of 'wrong' has a relative error of 1.00e+00" in comparison.failures[1]


def test_a_baseline_that_fails_leaves_nothing_to_compare():
    comparison, _ = scripted([1] * 9, [])
    with pytest.raises(runner.DisagreementError, match="dense: IndexError: pop from empty list"):
        runner.measure(comparison, torch.float32, repeats=1, budget=0)


def test_a_case_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fail(setting, dtype):
        raise RuntimeError("no such kernel")

    other = registry.CASES["gather/stage1"].build

    def disagree(setting, dtype):
        comparison = other(setting, dtype)
        packed, dense = comparison.contenders
        wrong = replace(packed, result=lambda outputs: [2 * t for t in packed.result(outputs)])
        return replace(comparison, contenders=[wrong, dense])

    for name, build in (("gather/images", fail), ("gather/stage1", disagree)):
        monkeypatch.setitem(registry.CASES, name, replace(registry.CASES[name], build=build))
    path = tmp_path / "results.json"
    flags = ["--case", "gather", "--dtype", "float32", "--repeats", "1", "--json", str(path)]
    with pytest.raises(SystemExit) as error:
        command.main([*TINY_FLAGS, *flags])
    first, second = str(error.value.code).splitlines()
    assert first == "gather/images in float32: left out, RuntimeError: no such kernel"
    assert "gather/stage1 in float32: left out, packed: tensor 0 of 'packed' has a rel" in second
    results = report.load(path)
    assert {row.case for row in results.rows} == {"gather/stage2"}
    assert results.notes == [first, second]
    assert "\ngather/stage2 " in capsys.readouterr().out


@pytest.mark.thorough
def test_contenders_are_chosen_and_the_rows_of_others_kept(tmp_path, capsys):
    path = tmp_path / "results.json"
    flags = [*TINY_FLAGS, "--dtype", "float32", "--repeats", "1", "--json", str(path), "--keep"]
    command.main([*flags, "--case", "gather/stage2"])
    before = {row.contender: row for row in report.load(path).rows}
    with pytest.raises(SystemExit, match="no contender fits other; there are packed, dense"):
        command.main([*flags, "--case", "gather/stage2", "--contender", "other"])
    assert {row.contender: row for row in report.load(path).rows} == before
    command.main([*flags, "--case", "gather/stage2", "--contender", "pack*", "--compile-models"])
    after = {row.contender: row for row in report.load(path).rows}
    assert list(after) == ["packed", "dense"] and after != before
    capsys.readouterr()


def test_results_of_a_rehearsal_make_no_table(tmp_path, capsys):
    path = tmp_path / "results.json"
    flags = ["--case", "gather/stage2", "--dtype", "float32", "--repeats", "1", "--stand-in"]
    command.main([*TINY_FLAGS, *flags, "--json", str(path)])
    assert report.load(path).environment["stand_in"] is True
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert "is of a rehearsal" in capsys.readouterr().err
