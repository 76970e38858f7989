"""Another revision is measured in the same run, in a process of its own. No test looks at times."""

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, registry, runner  # noqa: F401  (`cases` registers)
from benchmarks.revision import ROOT, RevisionError, Worker, commit_of
from benchmarks.setting import Setting

TINY = Setting(model="convmae_tiny", batch_size=2, img_size=64, compile=False)


@pytest.fixture(scope="module")
def worker():
    """A worker with the code that is tested: another revision would have to be compiled."""
    worker = Worker("0123456789", ROOT, 1)
    yield worker
    worker.close()


def test_worker_measures_beside_the_others_and_agrees(worker):
    comparison = registry.CASES["gather/stage2"].build(TINY, torch.float32)
    comparison.contenders.append(worker.contender("gather/stage2", TINY, torch.float32))
    times = runner.measure(comparison, torch.float32, repeats=4, budget=0)
    assert [c.name for c in comparison.contenders] == ["packed", "dense", "packed at 0123456"]
    assert {name: len(values) for name, values in times.items()} == {
        "packed": 3,
        "dense": 3,
        "packed at 0123456": 3,
    }
    assert all(value > 0 for value in times["packed at 0123456"])


def test_other_results_are_a_disagreement(worker):
    """The worker measures another case: what it gives must not pass for that of this one."""
    comparison = registry.CASES["gather/stage2"].build(TINY, torch.float32)
    comparison.contenders.append(worker.contender("gather/stage1", TINY, torch.float32))
    times = runner.measure(comparison, torch.float32, repeats=3, budget=0)
    assert set(times) == {"packed", "dense"}
    assert "packed at 0123456: tensor 0" in comparison.failures[0]


def test_worker_tells_of_a_case_that_it_lacks_and_goes_on(worker):
    with pytest.raises(RevisionError, match="no case 'gather/stage9' at that revision"):
        worker.contender("gather/stage9", TINY, torch.float32)
    assert worker.contender("gather/stage1", TINY, torch.float32).run()[0].shape[2] == 64


@pytest.mark.thorough
def test_case_that_a_revision_lacks_is_a_failure_of_it_alone(worker, monkeypatch):
    case = registry.CASES["gather/stage2"]
    here = registry.Case("only/here", case.about, case.build)
    failures = []
    options = {"repeats": 3, "budget": 0, "others": [worker], "failures": failures}
    results = command.run([here], TINY, [torch.float32], **options)
    assert [row.contender for row in results.rows] == ["packed", "dense"]
    assert "packed at 0123456: " in failures[0]
    assert results.environment["packed at 0123456"].startswith("kernels: ")


@pytest.mark.thorough
def test_process_that_ends_is_an_error():
    worker = Worker("0123456789", ROOT, 1)
    contender = worker.contender("gather/stage1", TINY, torch.float32)
    worker._process.kill()
    with pytest.raises(RevisionError, match="its process ended"):
        contender.run()
        contender.run()
    worker.close()


@pytest.mark.parametrize("revision", ["no-such-tag", "-v", ""])
def test_names_that_are_no_commit(revision, capsys):
    with pytest.raises(RevisionError, match="compare"):
        commit_of(revision)
    with pytest.raises(SystemExit):
        command.main(["--case", "gather", f"--compare={revision}"])
    assert "compare" in capsys.readouterr().err


@pytest.mark.thorough
def test_packages_of_another_folder_are_refused(tmp_path):
    (tmp_path / "benchmarks").symlink_to(Path(ROOT, "benchmarks"))
    (tmp_path / "convmae_kernels").symlink_to(Path(ROOT, "convmae_kernels"))
    with pytest.raises(RevisionError, match="expected"):
        Worker("0123456789", tmp_path, 1)
