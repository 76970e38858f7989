"""What a long run takes, reckoned: the arithmetic, and what limits it."""

import pytest

from benchmarks import scale
from benchmarks.scale import Run, cost


def run_of(**changes):
    """A thousand pictures a second on a GPU; nothing else limits."""
    values = dict.fromkeys(("storage", "network"), 1e12) | {"picture_bytes": 1e5}
    values |= {"step_seconds": 0.1, "batch_size": 100, "pictures": 36000, "epochs": 100}
    values |= {"gradient_bytes": 4e8, "checkpoint_bytes": 1.2e9, "gpus_per_machine": 8}
    return Run(**{**values, "cores": 64, "pictures_per_core": 1000, **changes})


def test_gpus_alone():
    one, sixteen = cost(run_of(), 1), cost(run_of(), 16)
    assert (one.hours, one.gpu_hours, one.limited_by) == (1, 1, "GPUs")
    assert (sixteen.hours, sixteen.gpu_hours) == (1 / 16, 1)
    assert one.exchange_seconds == 0
    # of 8 GPUs: 8,000 pictures a second, of 100 kB
    assert (sixteen.cores_needed, sixteen.read_bytes) == (8, 8e8)


@pytest.mark.parametrize(
    ("changes", "part", "rate"),
    [
        ({"cores": 4}, "cores", 8000),  # 2 machines of 4 cores
        ({"storage": 1e8}, "storage", 2000),
        # Half of twice the gradients leave each machine: 400 MB at 1 GB/s, for 1,600 pictures.
        ({"network": 1e9}, "network", 4000),
    ],
)
def test_what_the_gpus_wait_for(changes, part, rate):
    found = cost(run_of(**changes), 16)
    assert found.limited_by == part
    assert found.rates[part] == pytest.approx(rate)
    assert found.hours == pytest.approx(3.6e6 / rate / 3600)


@pytest.mark.parametrize("gpus", [0, -8, 12])
def test_wrong_numbers_of_gpus(gpus):
    with pytest.raises(ValueError, match=f"multiple of it, got {gpus}"):
        cost(run_of(), gpus)


def test_the_page(capsys):
    scale.main(["--card", "h200", "--gpus", "8", "16", "--epochs", "100"])
    said = capsys.readouterr().out
    assert "convmae_base, 115.0 M parameters; 1,281,167 pictures, 100 epochs" in said
    assert "step of 128: 41.8 ms (compiled, measured on one H200)" in said
    assert said.count("\n| ") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "12"], "gpus must be up to 8, or a multiple of it, got 12"),
        (["--step_ms", "40"], "--step_ms and --batch_size belong together"),
        (["--step", "graph"], "trains on one GPU"),
        (["--epochs", "0"], "--epochs: expected a number above 0, got '0'"),
        (["--gpus", "8.5"], "--gpus: expected an integer, got '8.5'"),
        (["--network", "fast"], "--network: expected a number above 0, got 'fast'"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        scale.main(flags)
    assert message in capsys.readouterr().err


def test_a_core_is_measured():
    rate, size = scale.pictures_per_core(32, count=4)
    assert rate > 0 and 10_000 < size < 500_000
