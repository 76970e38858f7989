"""Fixtures for all tests."""

import os
import zlib

import pytest
import torch

from convmae_kernels.ops.support.dispatch import TRITON_INTERPRETS

# Run by `test_triton_kernels.py`, in a process in which Triton interprets its kernels.
collect_ignore = [] if TRITON_INTERPRETS else ["convmae_kernels/triton/interpreted"]

WARNINGS_OF_OTHERS = (
    r"ignore:There is a performance drop because we have not yet implemented the batching rule",
    r"ignore:.*isinstance\(treespec, LeafSpec\).*:FutureWarning",
    r"ignore:`torch.jit.script` is deprecated:FutureWarning",
    r"ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning",
)


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="the tests marked `thorough` too, and whole sweeps"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out what `thorough` marks: a test, or of a sweep all but a sample.

    The sample has the first case, and of the others one of so many: which ones follows from their
    names, so that no value of an axis is left out by its place.
    """
    if config.getoption("--thorough"):
        return
    begun: set[str] = set()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        number = 0 if test not in begun else zlib.crc32(item.nodeid.encode())
        begun.add(test)
        marks = [mark.kwargs.get("but_every") for mark in item.iter_markers("thorough")]
        runs = all(every is not None and number % every == 0 for every in marks)
        (kept if runs else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config):
    for warning in WARNINGS_OF_OTHERS:
        config.addinivalue_line("filterwarnings", warning)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of the processes tests start


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty():
    """Fills uninitialised tensors with NaN, those that compiled kernels allocate included.

    In PyTorch's deterministic mode `aten::empty`, `empty_like`, `new_empty` and `empty_strided`
    fill what they allocate, whether Python or C++ calls them.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Restores the number of threads that a test changes; yields the function that sets it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of twelve random pictures."""
    from tests.support.training_runs import folder_of

    return folder_of(tmp_path_factory.mktemp("pictures") / "data", 12)
