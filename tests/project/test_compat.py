"""`make compat`: what it refuses, what it keeps of constraints.txt, and what it reports."""

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support import compat

OLDEST = compat.oldest_torch()
SOME = """
def test_good(): pass
def test_other(): pass
def test_skipped():
    import pytest
    pytest.skip("a reason")
"""


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.0+cpu", "2.14.1", "3.0.0"])
def test_versions(torch):
    assert compat.check_version(torch) == torch


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        ("", "TORCH is not given"),
        ("2.10.0", "TORCH=2.10.0 is too old"),
        ("1.99.0", "TORCH=1.99.0 is too old"),
        ("latest", "TORCH=latest is not a version of torch"),
        ("2.11", "TORCH=2.11 is not a version of torch"),
    ],
)
def test_wrong_versions(torch, message, capsys):
    assert compat.main([torch]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compat: {message}; expected a version from {OLDEST} on")


def test_a_version_that_pip_does_not_have():
    index = "torch (2.14.1)\nAvailable versions: 2.14.1, 2.13.0+cpu, 2.11.0, 2.10.0, 1.13.1\n"
    line = compat.why_pip_failed("2.99.0", "ERROR: no", index)
    assert line.startswith("TORCH=2.99.0: pip has no such torch for Python 3.")
    assert line.endswith("; expected one of 2.14.1, 2.13.0+cpu, 2.11.0")
    line = compat.why_pip_failed("2.11.0", "ERROR: no", "Available versions: 1.13.1\n")
    assert line.endswith("; expected another Python: no version is new enough")


def test_what_else_pip_says():
    output = "Looking\nERROR: Cannot install torch\n\n    The user requested torch==2.11.0\n"
    line = compat.why_pip_failed("2.11.0", output, "Available versions: 2.11.0\n")
    assert line.endswith(": Cannot install torch; The user requested torch==2.11.0")


def test_constraints_without_what_torch_chooses():
    text = (compat.ROOT / "constraints.txt").read_text()
    kept = compat.constraints(text)
    dropped = {line.partition("==")[0] for line in set(text.splitlines()) - set(kept.splitlines())}
    assert {"torch", "torchvision", "triton", "setuptools", "nvidia-cublas"} <= dropped
    assert {"numpy", "pytest", "timm", "torchmetrics"}.isdisjoint(dropped)


def test_every_suite_is_there():
    names = [name for suite in compat.SUITES.values() for name in suite]
    assert len(names) == len(set(names))
    assert [name for name in names if not (compat.ROOT / "tests" / name).is_file()] == []


@pytest.mark.parametrize(
    ("text", "counts", "good"),
    [
        (SOME, {"passed": 2, "skipped": 1}, True),
        (SOME + "def test_bad(): assert False\n", {"passed": 2, "skipped": 1, "failed": 1}, False),
        ("import no_such_module\n", {"failed": 1}, False),
        ("import pytest\npytest.importorskip('no_such_module')\n", {"skipped": 1}, True),
        ("", {}, False),
    ],
)
def test_a_suite(text, counts, good, tmp_path, monkeypatch):
    file, python = tmp_path / "test_it.py", tmp_path / "environment" / "bin" / "python"
    file.write_text(text)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    path = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": ":".join(sys.path)}
    result = compat.run_suite(python, "a suite", [file], 1, path)
    assert (result.counts, result.good) == (Counter(counts), good)
    end = f": {'ok' if counts.get('passed') else 'nothing ran'}"
    assert str(result).endswith(end if good else " of pytest)")
    assert result.reasons.total() == result.counts["skipped"]
    if text == SOME:
        assert result.reasons == {"a reason": 1}
    if "importorskip" in text:
        reason = "could not import 'no_such_module': No module named 'no_such_module'"
        assert result.reasons == {f"all of test_it.py: {reason}": 1}


@pytest.mark.parametrize(
    ("age", "exit_code", "built"), [(None, 0, True), (-9, 0, True), (9, 0, False), (-9, 3, True)]
)
def test_the_library_is_built_if_it_is_older(age, exit_code, built, tmp_path, monkeypatch, capsys):
    """`age`: by how many seconds the library is newer than the sources; None: not there."""
    library, python, ran = tmp_path / "_C.so", tmp_path / "python", tmp_path / "ran"
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for source in ("setup.py", "csrc/cpu/op.cpp"):
        (tmp_path / source).write_text("")
    python.write_text(f'#!/bin/sh\necho "$@" > {ran}\ntouch {library}\nexit {exit_code}\n')
    python.chmod(0o755)
    now = time.time()
    if age is not None:
        library.write_text("")
        os.utime(library, (now + age, now + age))
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "LIBRARY", library)
    if exit_code:
        with pytest.raises(compat.CompatError, match="_C.so could not be built"):
            compat.make_library(python, dict(os.environ))
    else:
        compat.make_library(python, dict(os.environ))
    assert ran.is_file() == built
    assert not built or ran.read_text() == "setup.py --quiet build_ext --inplace\n"
    assert ("taken as it is" in capsys.readouterr().out) == (not built)


@pytest.mark.parametrize(("failing", "code"), [(None, 0), ("kernels", 1)])
def test_the_exit_code(failing, code, monkeypatch, tmp_path, capsys):
    """1 as soon as one suite fails; the others run all the same."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(compat, "make_environment", lambda torch: python)
    monkeypatch.setattr(compat, "make_library", lambda python, environment: None)
    ran = []

    def run_suite(python, name, *arguments):
        ran.append(name)
        return compat.Result(name, Counter(passed=1), Counter(), int(name == failing), 1.0)

    monkeypatch.setattr(compat, "run_suite", run_suite)
    monkeypatch.setattr(compat, "DESCRIBE", "print('versions')")
    assert compat.main(["2.11.0"]) == code
    assert ran == list(compat.SUITES)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("versions; ")]
    failed = "kernels        1 passed, 0 skipped, 0 failed, 1 s: FAILED (exit code 1 of pytest)"
    assert [line for line in lines if "FAILED" in line] == [failed] * code
