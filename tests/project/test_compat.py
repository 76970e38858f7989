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
def test_all_run(pytestconfig): assert pytestconfig.getoption("--thorough")
def test_skipped():
    import pytest
    pytest.skip("a reason")
"""
THOROUGH = """
def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true")
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
    (tmp_path / "conftest.py").write_text(THOROUGH)
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


# -- wheels -------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python that writes down what it is told, and prints what the file `says` has."""
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n'
        f'if [ "$1" = -c ]; then /bin/cat {tmp_path}/says; fi\n'
    )
    python.chmod(0o755)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "convmae-1.0-py3-none-any.whl").write_text("")
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    return python


@pytest.mark.parametrize(
    ("where", "cpu", "good"),
    [
        ("environment/lib/convmae_kernels/__init__.py", "yes, AVX2", True),
        ("environment/lib/convmae_kernels/__init__.py", "no: not built", False),
        ("convmae_kernels/__init__.py", "yes, AVX2", False),
    ],
)
def test_a_wheel_is_tested_where_it_is_installed(where, cpu, good, stand_in, tmp_path, monkeypatch):
    """Not a checkout that lies nearby, nor reference ops."""
    monkeypatch.setenv("CXX", "g++")
    environment = compat.without_compilers(stand_in)
    assert environment["PATH"] == str(stand_in.parent) and "CXX" not in environment
    (tmp_path / "says").write_text(f"{tmp_path / where}\n{cpu}\n")
    wheel = tmp_path / "convmae-1.0-py3-none-any.whl"
    if not good:
        with pytest.raises(compat.CompatError, match=f"does not work: .*{cpu}"):
            compat.install_wheel(stand_in, wheel, environment)
        return
    folder = compat.install_wheel(stand_in, wheel, environment)
    assert sorted(path.name for path in folder.iterdir()) == ["pyproject.toml", "tests"]
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:2] == ["-m pip uninstall --yes convmae", f"-m pip install --no-index {wheel}"]


def test_a_compiler_in_the_environment_of_a_wheel(stand_in):
    (stand_in.parent / "g++").symlink_to("/bin/sh")
    with pytest.raises(compat.CompatError, match="bin has g.., expected no compiler there"):
        compat.without_compilers(stand_in)


def test_what_is_no_wheel(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(compat, "make_environment", lambda torch, for_wheel: stand_in)
    (stand_in.parents[2] / "pyproject.toml").write_text('"torch>=2.11"')
    assert compat.main(["2.11.0", "--wheel", "dist/none.whl"]) == 2
    message = "compat: WHEEL=dist/none.whl is no wheel; expected a file that `make wheel` wrote\n"
    assert capsys.readouterr().err == message
