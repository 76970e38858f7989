"""Triton's kernels without a GPU: those in `interpreted/`, in processes that interpret them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


def pytest_generate_tests(metafunc):
    """One process for all of them, which starts once; where they take long, one for each file."""
    thorough = metafunc.config.getoption("--thorough")
    paths = sorted(FOLDER.glob("test_*.py")) if thorough else [FOLDER]
    metafunc.parametrize("path", paths, ids=lambda path: path.stem)


def test_interpreted(path, request):
    thorough = ["--thorough"] if request.config.getoption("--thorough") else []
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *thorough, path],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
