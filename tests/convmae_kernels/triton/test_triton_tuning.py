"""Which configuration the tuner takes, with a timer and kernels of the tests' own."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton")

from convmae_kernels.triton import tuning
from convmae_kernels.triton.tuning import Choices, Configuration, fastest

A, B, C = CONFIGURATIONS = [Configuration(name, {"CHANNELS": 8}, 4) for name in ("a", "b", "c")]
RIGHT = torch.tensor([1.0, float("nan"), 3.0])


def choose(times, results=None):
    """What `fastest` takes, given the milliseconds and results of "a", "b" and "c"."""
    results = results or {}
    running = []

    def run(configuration):
        running.append(configuration.name)
        found = results.get(configuration.name, RIGHT)
        if isinstance(found, Exception):
            raise found
        return (found.clone(),)

    def timer(call):
        call()
        return times[running[-1]]

    return fastest(CONFIGURATIONS, run, timer).name


def test_the_fastest_is_taken():
    assert choose({"a": 3, "b": 1, "c": 2}) == "b"
    assert choose({"a": 1, "b": 1, "c": 1}) == "a"


@pytest.mark.parametrize(
    "wrong",
    [
        RIGHT + torch.tensor([0, 0, 3e-7]),
        RIGHT.nan_to_num(),
        torch.full((3,), float("nan")),
        torch.zeros(3),
    ],
    ids=["one bit", "a NaN less", "only NaN", "zeros"],
)
def test_wrong_results_are_never_taken(wrong):
    with pytest.warns(RuntimeWarning, match="configuration 'b' gives wrong results"):
        assert choose({"a": 3, "b": 1, "c": 2}, {"b": wrong}) == "c"


def test_what_raises_is_never_taken():
    times, error = {"a": 3, "b": 1, "c": 2}, ValueError("out of shared memory")
    assert choose(times, {"b": error}) == "c"
    assert choose(times, {"a": error, "b": error}) == "c"
    with pytest.raises(RuntimeError, match="no configuration of the kernel runs") as caught:
        choose(times, dict.fromkeys("abc", error))
    assert caught.value.__cause__ is error
    with pytest.raises(torch.OutOfMemoryError):
        choose(times, {"b": torch.OutOfMemoryError("full")})


def test_a_timer_that_raises_rejects_too():
    def timer(call):
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="no configuration"):
        fastest(CONFIGURATIONS, lambda c: (RIGHT,), timer)


# -- the file -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "triton.json"


def test_choices_last(file):
    choices = Choices(lambda: file)
    assert choices.get("key") is None
    choices.set("key", "a")
    choices.set("other", "b")
    assert choices.get("key") == "a"
    again = Choices(lambda: file)
    assert (again.get("key"), again.get("other")) == ("a", "b")
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"key": 3}', '{"key": null}', "\udcff"], ids=repr
)
def test_a_damaged_file_is_an_empty_one(file, text):
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    choices = Choices(lambda: file)
    assert choices.get("key") is None
    choices.set("key", "a")
    assert json.loads(file.read_text()) == {"key": "a"}


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_file_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (lambda: tmp_path / "file" / "triton.json", no_home):
        choices = Choices(place)
        choices.set("key", "a")
        assert choices.get("key") == "a"
        assert Choices(place).get("key") is None
    folder = tmp_path / "folder"
    (folder / "triton.json").mkdir(parents=True)
    Choices(lambda: folder / "triton.json").set("key", "a")
    assert [f.name for f in folder.iterdir()] == ["triton.json"]  # nothing temporary stays


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / "convmae_kernels" / "triton.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.cache_file() == tmp_path / "home/.cache/convmae_kernels/triton.json"


@pytest.mark.thorough
def test_several_processes_write_at_once(file):
    """The file is whole at any time. A process may undo another's last choice, never its own."""
    code = (
        "import json, pathlib, sys\n"
        "from convmae_kernels.triton.tuning import Choices\n"
        "choices = Choices(lambda: pathlib.Path(sys.argv[1]))\n"
        "for i in range(200):\n"
        "    choices.set(f'{sys.argv[2]} {i}', 'a')\n"
        "    assert json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(file), name], cwd=ROOT)
        for name in ("one", "two")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    names = [key.split()[0] for key in json.loads(file.read_text())]
    assert max(names.count("one"), names.count("two")) == 200
    assert [f.name for f in file.parent.iterdir()] == [file.name]


# -- when it is tuned ---------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def machine(monkeypatch, file):
    """A pretended GPU: what ran, what is captured, how long each configuration takes."""
    state = SimpleNamespace(ran=[], capturing=False, times={"a": 3, "b": 1, "c": 2}, failure=None)

    def launch(configuration, x, scale):
        state.ran.append((configuration.name, x.unique().numel() > 1))
        if state.failure is not None:
            raise state.failure
        return (x * scale,)

    def timer(call):
        call()
        return state.times[state.ran[-1][0]]

    def run(elements=tuning.MIN_ELEMENTS):
        state.ran.clear()
        x = torch.zeros(elements).as_subclass(OnGpu)
        (y,) = tuning.run("op", "problem", CONFIGURATIONS, launch, (x, 2.0))
        assert torch.equal(y, x)
        return state.ran[-1][0]

    def forget():
        monkeypatch.setattr(tuning, "CHOICES", Choices(lambda: file))

    state.run, state.forget = run, forget
    forget()
    monkeypatch.setattr(tuning, "gpu_time", timer)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_tuned_once_on_random_numbers(machine, file):
    assert machine.run() == "b"
    *tuning_runs, last = machine.ran
    assert {name for name, _ in tuning_runs} == {"a", "b", "c"}
    assert all(random for _, random in tuning_runs)
    assert last == ("b", False)
    assert machine.run() == "b"
    assert len(machine.ran) == 1
    (key,) = json.loads(file.read_text())
    assert key == f"op, problem, a GPU, triton {tuning.triton.__version__}"


def test_a_new_process_reads_the_choice(machine):
    machine.run()
    machine.forget()
    machine.times = {"a": 0, "b": 9, "c": 9}
    assert machine.run() == "b"
    assert len(machine.ran) == 1


def test_a_remembered_name_that_is_no_configuration(machine, file):
    file.parent.mkdir()
    file.write_text(json.dumps({f"op, problem, a GPU, triton {tuning.triton.__version__}": "z"}))
    assert machine.run() == "b"
    assert len(machine.ran) > 1


def test_not_while_a_graph_is_captured(machine):
    machine.capturing = True
    assert machine.run() == "a"
    assert len(machine.ran) == 1
    machine.capturing = False
    assert machine.run() == "b"
    machine.capturing = True
    assert machine.run() == "b"


def test_not_for_small_problems(machine, file):
    assert machine.run(tuning.MIN_ELEMENTS - 1) == "a"
    assert not file.exists()
    machine.run()
    assert machine.run(3) == "b"


def test_the_random_state_is_left_alone(machine):
    before = torch.get_rng_state()
    machine.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_to_tune(machine, monkeypatch, file):
    def full(arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tuning, "_TOO_LARGE", set())
    monkeypatch.setattr(tuning, "_random_arguments", full)
    assert machine.run() == "a"
    monkeypatch.setattr(tuning, "_random_arguments", None)  # it is not tried at every call
    assert machine.run() == "a"
    assert not file.exists()


def test_the_grid_covers_everything():
    configuration = Configuration("a", {"POSITIONS": 16, "CHANNELS": 64}, num_warps=4)
    assert configuration.grid(POSITIONS=33, CHANNELS=65) == (6,)
    assert configuration.grid(POSITIONS=32, CHANNELS=64) == (2,)
    assert configuration.options["num_warps"] == 4
