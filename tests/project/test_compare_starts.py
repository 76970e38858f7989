"""The example that runs a recipe from several starts: its runs, its table, and going on."""

import json

import pytest

from examples import compare_starts
from tests.support.paths import ROOT

FLAGS = ["--max_samples", "8", "--batch_size", "8", "--epochs", "1", "--warmup_epochs", "0"]


class Runs:
    """Stands for `convmae`: writes a log as a run does, whose figures the seed and start tell."""

    def __init__(self):
        self.calls = []
        self.status, self.printed = 0, "see report.html"

    def __call__(self, words, output):
        self.calls.append(words)
        if self.status or "interrupted" in self.printed:
            return self.status, self.printed
        flags = dict(zip(words, words[1:]))
        seed = int(flags["--seed"])
        folder = output.with_suffix("")
        folder.mkdir()
        better = 10 * ("--init" in flags or "--finetune" in flags)
        lines = [
            {"step": 4, "epoch": 0.5, "loss": 2.0, "seconds": 30.0},
            {"event": "evaluation", "step": 4, "epoch": 0.5, "acc1": 1.0},
            {"step": 8, "epoch": 1.0, "loss": 1.0, "seconds": 60.0},
            {"event": "evaluation", "step": 8, "epoch": 1.0, "acc1": 50.0 + seed + better},
        ]
        lines[-1] |= {"loss": 0.5, "seconds": 7.0}  # of the evaluation itself
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0, self.printed


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: convvit_tiny\n")
    (tmp_path / "weights").mkdir()
    flags = ["--config", tmp_path / "recipe.yaml", "--data_path", "pictures"]
    starts = ["--starts", "random", f"mae={tmp_path / 'weights'}"]
    return [*map(str, flags), *starts, "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize(
    "task, words, option",
    [
        ("finetune", ["finetune"], "--finetune"),
        ("segment", ["segment", "train"], "--init"),
        ("detect", ["detect", "train"], "--init"),
    ],
)
def test_commands_and_table(arguments, tmp_path, task, words, option):
    runs = Runs()
    compare_starts.main([task, *arguments, "--seeds", "0", "2", "--", "--epochs", "3"], runs)
    assert len(runs.calls) == 4
    assert all(
        call[: len(words)] == words and call[-2:] == ["--epochs", "3"] for call in runs.calls
    )
    weights = [call[call.index(option) + 1] if option in call else None for call in runs.calls]
    assert weights == [None, str(tmp_path / "weights")] * 2
    assert [call[call.index("--seed") + 1] for call in runs.calls] == ["0", "0", "2", "2"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| | random | mae |" in text
    assert "| acc1 | **51** ± 1.4 (50, 52) | **61** ± 1.4 (60, 62) |" in text
    assert "| loss | **0.5** ± 0 (0.5, 0.5)" in text and "| seconds" not in text
    assert "| minutes of training | **1** ± 0 (1, 1) | **1** ± 0 (1, 1) |" in text
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [len(run["evaluations"]) for run in content["runs"]] == [2] * 4


def test_goes_on_where_it_was(arguments, tmp_path):
    runs = Runs()
    compare_starts.main(["finetune", *arguments, "--seeds", "0"], runs)
    assert len(runs.calls) == 2
    runs.status = 1
    with pytest.raises(SystemExit, match="random, seed 1: exit status 1"):
        compare_starts.main(["finetune", *arguments, "--seeds", "0", "1"], runs)
    runs.status, runs.printed = 0, "interrupted; go on with --resume auto"
    with pytest.raises(SystemExit, match="random, seed 1: a signal ended it"):
        compare_starts.main(["finetune", *arguments, "--seeds", "0", "1"], runs)
    runs.printed = ""
    content = compare_starts.main(["finetune", *arguments, "--seeds", "0", "1"], runs)
    assert len(runs.calls) == 6 and runs.calls[2] == runs.calls[3] == runs.calls[4]
    assert [(run["start"], run["seed"]) for run in content["runs"]] == [
        *(("random", 0), ("mae", 0), ("random", 1), ("mae", 1)),
    ]


def test_what_cannot_be_is_refused(arguments, tmp_path, capsys):
    def refusal(*flags, task="finetune"):
        with pytest.raises(SystemExit):
            compare_starts.main([task, *arguments, *flags], Runs())
        return capsys.readouterr().err.splitlines()[-1]

    assert "'nowhere' does not exist" in refusal("--starts", "mae=nowhere")
    assert "expected random or NAME=WEIGHTS" in refusal("--starts", "mae")
    assert "used twice" in refusal("--starts", "random", "random")
    assert "different numbers" in refusal("--seeds", "1", "1")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        said = refusal("--output_dir", str(place))
        assert f"--output_dir: {place} cannot be written" in said
    assert "--seed behind --" in refusal("--", "--seed", "3")
    assert "--output-dir behind --" in refusal("--", "--output-dir", "x")
    assert not (tmp_path / "out").exists()
    compare_starts.main(["finetune", *arguments], Runs())
    assert "another task" in refusal(task="segment")
    assert "another options" in refusal("--", "--epochs", "3")


@pytest.mark.thorough
def test_a_real_run(tmp_path, capfd):
    """`convmae finetune` itself; the second call finds it done."""
    call = ["finetune", "--config", str(ROOT / "recipes/fashion-mnist_finetune.yaml")]
    call += ["--data_path", str(ROOT / "tests/files/fashion_mnist"), "--starts", "random"]
    call += ["--seeds", "5", "--output_dir", str(tmp_path / "out"), "--", *FLAGS]
    first = compare_starts.main(call)
    (run,) = first["runs"]
    assert run["evaluations"][-1]["acc1"] >= 0 and run["seconds"] > 0 and not run["resumed"]
    assert "1 steps" in (tmp_path / "out" / "random" / "seed-5.txt").read_text()
    assert compare_starts.main(call) == first
    assert "random, seed 5: done before" in capfd.readouterr().out
