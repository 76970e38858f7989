"""The command line: names of flags, precedence, errors in one line, and no torch for `--help`."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import convmae
import convmae_kernels
from convmae import OptionError, PretrainConfig, ReconstructConfig, cli
from convmae.records.folder import RunFolder
from tests.support.paths import FASHION, RECIPES
from tests.support.training_runs import DEVICE

pytest.importorskip("tyro")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

TINY = ["--model", "convmae_tiny", "--input_size", "32", "--num_workers", "0", "--device", DEVICE]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "convmae", *arguments], capture_output=True, text=True, timeout=300
    )


def parsed(*arguments: str) -> PretrainConfig:
    config = cli._parse([cli._canonical(a, "pretrain") for a in ("pretrain", *arguments)])
    assert isinstance(config, PretrainConfig)
    return config


def test_help_does_not_import_torch() -> None:
    """Of convmae and of every command, one after another."""
    commands = [[], *(name.split() for name in cli.COMMANDS)]
    code = (
        "import sys\n"
        "from convmae.cli import main\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'matplotlib', 'skimage', 'timm'}\n"
        f"for command in {commands!r}:\n"
        "    try:\n"
        "        main([*command, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, command\n"
        "    print('\\nend of help')\n"
        "    if heavy & set(sys.modules):\n"
        "        sys.exit(f'{command} imported {heavy & set(sys.modules)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("\nend of help\n")[:-1]
    assert len(pages) == len(commands)
    for page, command in zip(pages, commands, strict=True):
        assert " ".join(["convmae", *command]) in page


def test_help_names_every_option_and_its_default() -> None:
    text = run("pretrain", "--help").stdout
    for name in ("--mask_ratio", "--norm_pix_loss", "--blr", "--warmup_epochs", "--accum_iter"):
        assert name in text
    assert "0.75" in text and "hidden" in text


def test_underscores_hyphens_and_other_names_are_the_same() -> None:
    config = parsed("--mask_ratio", "0.6", "--data", "d", "-b", "8", "-j", "3", "--norm_pix_loss")
    same = parsed(
        "--mask-ratio=0.6", "--data-path=d", "--batch-size=8", "--workers=3", "--norm-pix-loss"
    )
    assert config == same
    assert (config.mask_ratio, config.data_path, config.batch_size) == (0.6, "d", 8)
    assert (config.num_workers, config.norm_pix_loss) == (3, True)
    assert parsed("--no_norm_pix_loss").norm_pix_loss is False
    assert (parsed().norm_pix_loss, parsed("--norm_pix_loss", "None").norm_pix_loss) == (None, None)


def test_sizes_are_one_number_or_two() -> None:
    assert parsed("--input_size", "96").size == (96, 96)
    assert parsed("--input-size", "96", "128").size == (96, 128)
    assert parsed("--img_size", "64", "--no_pin_mem").pin_mem is False


def test_reconstruct_takes_several_images() -> None:
    config = cli._parse(["reconstruct", "--checkpoint", "c", "--images", "a", "b", "--seed", "3"])
    assert config == ReconstructConfig("c", ("a", "b"), seed=3)


def test_a_flag_beats_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("model: convmae_tiny\nblr: 2e-4\ninput_size: [32, 64]\nnorm-pix-loss: true\n")
    config = parsed("--config", str(file), "--blr", "3e-4")
    assert (config.model, config.blr, config.size) == ("convmae_tiny", 3e-4, (32, 64))
    assert config.norm_pix_loss and config.epochs == PretrainConfig().epochs


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_read_by_their_command(file: Path) -> None:
    comment = file.read_text().partition("\nmodel")[0]
    (command,) = [name for name in cli.COMMANDS if f"convmae {name} --config" in comment]
    where = ["--data_path", "pictures", "--output_dir", "elsewhere"]
    config = cli._parse([command, "--config", str(file), *where])
    config.validate()
    assert config.output_dir == "elsewhere"
    assert command.split()[0] in file.stem or file.stem == "demo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modl: convmae_tiny", "unknown option 'modl' in --config; did you mean model or method?"),
        ("blr: fast", "--blr must be a number, got 'fast' in --config"),
        ("norm_pix_loss: 3", "--norm_pix_loss must be true or false or null, got 3 in --config"),
        ("- a list", "must hold options and values, found a list"),
        ("a: [", "cannot be read"),
        (None, "cannot be read: No such file or directory"),
        ("", "must hold options and values, found nothing"),
        ("epochs: 1\nblr: 1e-3\nepochs: 2", "'epochs' is given twice, first in line 1 (line 3)"),
        ("1: x", "a name must be text, found 1 (line 1)"),
        ("yes: 1", "a name must be text, found yes"),
        ("? [a, b]\n: 1", "a name must be text, found a list or mapping"),
        ("seed: !!python/object/apply:os.getpid []", "os.getpid' is a tag, expected a plain value"),
        ("a: 1\n---\nb: 2", "several documents (---), expected one (line 2)"),
        ("seed: 2026-99-99", "a value that cannot be: month must be in 1..12"),
        (f"seed: {'9' * 5000}", "a value that cannot be"),
        (f"seed: 0b{'1' * 5000}", "a whole number of more than 64 bits"),
        (f"model: [{'x, ' * 60}x]", "--model must be text, got ['x', 'x'"),
        ("[" * 500_000, "nested more than 4 deep (line 1)"),
        ("a: &a [x, x]\nb: *a", "*a is an alias, write the value out (line 2)"),
        ("a: [" + "1, " * 30_000 + "1]", "more than 20,000 values"),
        ("a: 1\n" * 300_000, "larger than 1 MiB"),
        ("a: \x01", "cannot be read: unacceptable character"),
    ],
)
def test_bad_files_of_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "args.yaml").write_text(text)
    assert cli.main(["pretrain", "--config", str(tmp_path / "args.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 500


def test_an_alias_bomb_takes_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine lines that stand for a thousand million values; in options and in a run's folder."""
    import tracemalloc

    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    file = tmp_path / "args.yaml"
    file.write_text("\n".join(lines))
    cli.main(["pretrain", "--config", str(file)])  # what is imported is imported
    tracemalloc.start()
    assert cli.main(["pretrain", "--config", str(file)]) == 2
    assert RunFolder.of(tmp_path).read_options() == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "is an alias" in capsys.readouterr().err
    assert peak < 10e6


def test_a_file_of_options_that_never_ends_is_refused() -> None:
    with pytest.raises(OptionError, match="larger than 1 MiB"):
        cli._read_yaml("/dev/zero")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask_ratio", "1.5"], "--mask_ratio must be in [0, 1), got 1.5"),
        (["--input_size", "100"], "--input_size must be multiples of 16"),
        (["--data", "nowhere"], "--data_path 'nowhere' does not exist"),
        (["--model", "convmae_tinny"], "did you mean convmae_tiny"),
    ],
)
def test_errors_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    output = ["--output_dir", str(tmp_path / "run")]
    assert cli.main(["pretrain", *TINY, *output, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convmae: error: ") and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("pretrain --epocs 3", "convmae pretrain has no option --epocs; did you mean --epochs?"),
        (
            "pretrain --mask-ration=1",
            "pretrain has no option --mask_ration; did you mean --mask_ratio?",
        ),
        ("pretrain --no_pin_mm", "pretrain has no option --no_pin_mm; did you mean --no_pin_mem?"),
        ("evaluate --epochs 3", "convmae evaluate has no option --epochs; see `convmae evaluate"),
        ("stats --zzz", "convmae stats has no option --zzz; see `convmae stats --help`"),
        ("stats -z 3", "convmae stats has no option -z; see `convmae stats --help`"),
        ("pretrian", "unknown command 'pretrian'; did you mean pretrain?"),
        ("--epochs 3", "unknown command '--epochs'; expected one of pretrain, finetune"),
    ],
)
def test_unknown_options_and_commands_are_one_line_of_the_command_asked_for(
    capsys: pytest.CaptureFixture[str], arguments: str, line: str
) -> None:
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("convmae: error: ") and line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_of_a_command_is_known(command: str) -> None:
    for option in dataclasses.fields(cli.COMMANDS[command].options):
        cli._check_names([command, f"--{option.name}", "x", "-h", f"--{option.name}=3"])
        if option.type == "bool":
            cli._check_names([command, f"--no_{option.name}", "--config", "-0.5", "-c", "x"])


def test_version_tells_torch_and_the_kernels_too(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-V"):
        assert cli.main([flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [f"convmae {convmae.__version__}", f"torch {torch.__version__}"]
        kernels = convmae_kernels.info()
        assert lines[2:] == [f"kernels, {n}: {kernels[n]}" for n in ("cpu", "cuda", "triton")]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
@pytest.mark.thorough(but_every=5)
def test_idle_threads_of_a_command_sleep_soon(given: dict[str, str], count: str | None) -> None:
    """OpenMP says what it has read: the setting is made before torch loads it."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-m", "convmae", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | given,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP here")
    found = re.findall("GOMP_SPINCOUNT = '(.*)'", done.stderr)[0]
    assert found == count if count is not None else int(found) > 1000


def test_a_warm_up_as_long_as_the_run_is_told_aloud_and_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures = ["--data_path", str(FASHION), "--max_samples", "4", "-b", "4", "--amp", "float32"]
    steps = ["--epochs", "2", "--warmup_epochs", "40", "--lr", "3e-5"]
    output = ["--output_dir", str(tmp_path / "run")]
    assert cli.main(["pretrain", *TINY, *pictures, *steps, *output]) == 0
    out, error = capfd.readouterr()
    assert [line for line in out.splitlines() if "warmup" in line] == [
        "warning: --warmup_epochs 40 is not shorter than --epochs 2: the learning rate only rises, "
        "to 7.500e-07 in the last step, and never reaches its peak 3.000e-05; give fewer "
        "--warmup_epochs, or 0"
    ]
    assert "Cosine" not in out + error and "timm" not in error


def test_a_new_command_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "greet.py").write_text(
        "from dataclasses import dataclass\n\n"
        "@dataclass\n"
        "class GreetConfig:\n"
        '    """Say hello."""\n\n'
        '    name: str = "nobody"\n'
        '    """Whom to greet."""\n\n'
        "def main(config: GreetConfig) -> int:\n"
        '    print(f"hello {config.name}")\n'
        "    return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from greet import GreetConfig  # type: ignore[import-not-found]

    monkeypatch.setitem(cli.COMMANDS, "greet", cli.Command(GreetConfig, "greet:main"))
    (tmp_path / "options.yaml").write_text("name: reader\n")
    assert cli.main(["greet", "--config", str(tmp_path / "options.yaml")]) == 7
    assert capsys.readouterr().out == "hello reader\n"
    with pytest.raises(SystemExit):
        cli.main(["greet", "--help"])
    assert "Whom to greet" in capsys.readouterr().out


def test_a_command_may_have_two_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass
    class SowConfig:
        """Sow seeds."""

        sort: str = "peas"
        """What to sow."""

    sown: list[str] = []
    monkeypatch.setattr(cli.Command, "run", lambda command, config: sown.append(config.sort) or 5)
    for name in ("garden sow", "garden water"):
        monkeypatch.setitem(cli.COMMANDS, name, cli.Command(SowConfig, "garden:main"))
    (tmp_path / "options.yaml").write_text("sort: beans\n")
    assert cli.main(["garden", "sow", "--config", str(tmp_path / "options.yaml")]) == 5
    assert cli.main(["garden", "water", "--sort", "leeks"]) == 5
    assert sown == ["beans", "leeks"]

    assert cli.main(["garden", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "usage: convmae garden {sow,water} ..." in listed
    assert "  garden sow    Sow seeds.\n  garden water  Sow seeds.\n" in listed
    assert cli.main(["garden"]) == 2
    assert capsys.readouterr().err == listed
    for arguments, line in (
        ("garden wader", "unknown command 'garden wader'; did you mean garden water"),
        ("gardn sow", "unknown command 'gardn'; did you mean garden"),
        ("garden sow --srt x", "convmae garden sow has no option --srt; did you mean --sort?"),
        ("garden sow --zz x", "see `convmae garden sow --help`"),
    ):
        assert cli.main(arguments.split()) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["garden", "sow", "--help"])
    assert "What to sow" in capsys.readouterr().out


def test_a_fault_in_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object) -> int:
        raise ValueError("a fault")

    monkeypatch.setattr(cli.Command, "run", fault)
    with pytest.raises(ValueError, match="a fault"):
        cli.main(["pretrain"])


def test_a_changed_bit_of_the_options_of_a_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be an edit, so it is no error where the options can still be read."""
    import random

    from convmae.config import OptionError, config_to_mapping
    from convmae.records.folder import RunFolder

    folder = RunFolder.of(tmp_path)
    folder.write_options(config_to_mapping(PretrainConfig(blr=1e-3)))
    whole = folder.options.read_bytes()
    read = lambda: cli._read_yaml(str(folder.options))  # noqa: E731
    assert read()["blr"] == 1e-3 and capsys.readouterr().err == ""
    draw = random.Random(0)
    first, last = whole.index(b"\n"), whole.rindex(b"#")
    places = [draw.randrange(len(whole)) for _ in range(100)]
    for place in [*places, *range(0, first + 1, 5), *range(last, len(whole), 5), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        folder.options.write_bytes(changed)
        try:
            read()
        except OptionError as error:
            assert str(folder.options) in str(error)
        else:
            assert f"--config '{folder.options}' was changed since" in capsys.readouterr().err
    lines = whole.decode().splitlines(keepends=True)
    folder.options.write_text("".join(lines[1:-1]).replace("blr: 0.001", "blr: 0.002"))
    assert read()["blr"] == 0.002 and capsys.readouterr().err == ""


def test_warnings_about_weights_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the main process; warnings of others look as they always do."""
    import warnings

    from convmae.config import WeightsWarning

    plain = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", plain)  # and put back
    missing = str(tmp_path / "nowhere")
    assert cli.main(["convert", "--checkpoint", missing, "--output", missing + ".pth"]) == 2
    assert f"--checkpoint '{missing}' does not exist" in capsys.readouterr().err
    where = ("file.py", 3)
    assert warnings.formatwarning("a b", WeightsWarning, *where) == "convmae: warning: a b\n"
    assert warnings.formatwarning("a", UserWarning, *where) == plain("a", UserWarning, *where)
    monkeypatch.setenv("RANK", "1")
    assert warnings.formatwarning("a b", WeightsWarning, *where) == ""


def test_pretrain_and_reconstruct_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    flags = ["--data", "demo", "--output-dir", str(output), "-b", "32", "--epochs", "1"]
    few = ["--max_samples", "1", "--warmup_epochs", "0", "--amp", "float32"]
    assert cli.main(["pretrain", *TINY, *flags, *few]) == 0
    said = capsys.readouterr().out
    assert "effective batch 32 = 32 x 1, blr 0.001, lr 1.250e-04" in said
    assert "2 steps, 1.00 epochs" in said
    assert "reconstruction.png" in said
    picture = tmp_path / "out.png"
    flags = ["--checkpoint", str(output), "--images", "demo", "--output", str(picture)]
    assert cli.main(["reconstruct", *flags]) == 0
    assert picture.is_file()
    assert cli.main(["pretrain", *TINY, "--output_dir", str(output)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = ["--output_dir", str(output), "-b", "16", "--epochs", "1000", "--log_every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "convmae", "pretrain", *TINY, *flags, "--save_every", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while time.monotonic() < until and not (
        (output / "log.txt").is_file() and os.path.getsize(output / "log.txt")
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "--resume auto" in out
    assert (output / "checkpoint" / "training_state.pt").is_file()


def test_info_tells_the_machine_and_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "threads", "bfloat16", "reference", "cpu", "convmae_tiny"):
        assert word in text
    assert "115.04 M" in text  # convmae_base


@pytest.mark.thorough
def test_a_reader_that_stops_is_no_traceback() -> None:
    code = "import sys; from convmae.cli import main; sys.exit(main(['info']))"
    command = [sys.executable, "-c", code]
    reader = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == ""


def test_every_command_on_real_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From pictures to an accuracy, to the official format and back, by the command line alone."""
    data = str(FASHION)
    small = ["--data_path", data, "--input_size", "32", "--num_workers", "0", "--device", DEVICE]
    steps = ["--max-samples", "60", "-b", "20", "--epochs", "1", "--warmup_epochs", "0.5"]
    few = [*small, *steps, "--amp", "float32"]
    folders = {name: str(tmp_path / name) for name in ("mae", "tuned", "probe", "back")}
    statistics, official = str(tmp_path / "stats.yaml"), str(tmp_path / "official.pth")

    def says(*arguments: str) -> str:
        assert cli.main(arguments) == 0
        return capsys.readouterr().out

    assert "mean: [0.287" in says("stats", "--data_path", data, "--output", statistics)
    mae = ["--model", "convmae_tiny", "--config", statistics, "--output_dir", folders["mae"]]
    assert "(as given)" in says("pretrain", *few, *mae)
    wrote = says("reconstruct", "--checkpoint", folders["mae"], "--images", data, "--output",
                 str(tmp_path / "painted.png"))  # fmt: skip
    assert "painted.png" in wrote and (tmp_path / "painted.png").is_file()
    says("convert", "--checkpoint", folders["mae"], "--output", official)
    back = ["--output", folders["back"], "--mean", "0.3", "--std", "0.36"]
    says("convert", "--checkpoint", official, *back)
    for command, folder, source in (
        ("finetune", folders["tuned"], folders["mae"]),
        ("linprobe", folders["probe"], official),
    ):
        weights = ["--initial-checkpoint", source, "--model", "convvit_tiny", "--output", folder]
        text = says(command, *few, *weights)
        accuracy = text.rpartition("accuracy ")[2].split(" ")[0]
        again = says("evaluate", "--checkpoint", folder, "--data_path", data, "--amp", "float32")
        assert f"accuracy {accuracy} %" in again and "200 pictures" in again
        assert (Path(folder) / "report.html").is_file()
