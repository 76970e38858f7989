"""The command line: `convmae COMMAND`. Only running one imports torch.

A new command is a line of `COMMANDS`: its options, a dataclass that can be imported without torch,
and where the function is that takes them, prints, and returns the exit status. A command may have
two words, as `segment train`; the first alone lists those that begin with it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import signal
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from convmae.config import (
    ConvertConfig,
    DetectConvertConfig,
    DetectEvaluateConfig,
    DetectPredictConfig,
    DetectTrainConfig,
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    InfoConfig,
    LinprobeConfig,
    MessageError,
    OptionError,
    PredictConfig,
    PretrainConfig,
    ReconstructConfig,
    SegmentEvaluateConfig,
    SegmentPredictConfig,
    SegmentTrainConfig,
    StatsConfig,
    WeightsWarning,
    config_from_mapping,
    read_yaml,
    suggest,
)
from convmae.files import was_changed

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Command:
    """The options of a command, and `module:function`, which runs it."""

    options: type
    function: str

    def run(self, config: Any) -> int:
        """Runs the command; returns the exit status."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)(config)


COMMANDS = {
    "pretrain": Command(PretrainConfig, "convmae.tasks.pretrain:main"),
    "finetune": Command(FinetuneConfig, "convmae.tasks.finetune:main"),
    "linprobe": Command(LinprobeConfig, "convmae.tasks.probe:main"),
    "evaluate": Command(EvaluateConfig, "convmae.commands.evaluate:main"),
    "predict": Command(PredictConfig, "convmae.commands.predict:main"),
    "segment train": Command(SegmentTrainConfig, "convmae.tasks.segment:main"),
    "segment evaluate": Command(SegmentEvaluateConfig, "convmae.commands.segment_evaluate:main"),
    "segment predict": Command(SegmentPredictConfig, "convmae.commands.segment_predict:main"),
    "embed": Command(EmbedConfig, "convmae.commands.embed:main"),
    "detect train": Command(DetectTrainConfig, "convmae.tasks.detect:main"),
    "detect evaluate": Command(DetectEvaluateConfig, "convmae.commands.detect_evaluate:main"),
    "detect predict": Command(DetectPredictConfig, "convmae.commands.detect_predict:main"),
    "detect convert": Command(DetectConvertConfig, "convmae.commands.detect_convert:main"),
    "reconstruct": Command(ReconstructConfig, "convmae.commands.reconstruct:main"),
    "convert": Command(ConvertConfig, "convmae.commands.convert:main"),
    "stats": Command(StatsConfig, "convmae.commands.stats:main"),
    "info": Command(InfoConfig, "convmae.commands.info:main"),
}

# Other names of flags, for hands that are used to them.
ALIASES = {
    "-b": "--batch_size",
    "-j": "--num_workers",
    "--workers": "--num_workers",
    "--data": "--data_path",
    "--img_size": "--input_size",
    "--output": "--output_dir",
    "--initial_checkpoint": "--finetune",
    "--num_classes": "--nb_classes",
    "--torchcompile_backend": "--torchcompile",
}
# There --output is a file.
OWN_OUTPUT = (
    *("reconstruct", "convert", "evaluate", "predict", "embed", "stats", "segment evaluate"),
    *("detect evaluate", "detect predict", "detect convert"),
)
_FORMAT = warnings.formatwarning
FAILED, BAD_OPTION, INTERRUPTED = 1, 2, 130  # exit statuses
HELP = ("-h", "--help")
OPEN_CHOICE = "bool | None"  # type of an option that is yes, no, or left to the command
# How often a thread of GNU's OpenMP looks for work before it sleeps; by default 300,000 times. So
# long it takes the cores from other programs, and from the thread that it waits for: beside busy
# neighbours a step takes many times as long (`python -m benchmarks.shared_machine`).
SPIN = "1000"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    A bad option, unusable data or a run that had to stop prints one line, `convmae: error: ...`,
    and no traceback: status 2 for what was asked, 1 for what went wrong later. A training that
    Ctrl-C ends saves and returns 130; one that SIGTERM or the like ends saves and returns 0.
    """
    _set_environment()
    warnings.formatwarning = _one_line
    given = list(sys.argv[1:] if argv is None else argv)
    given = _joined(given)
    command = given[0] if given else ""
    arguments = [_canonical(argument, command) for argument in given]
    try:
        if arguments and arguments[0] in ("--version", "-V"):
            return _print_version()
        if _beginning(command):
            return _list_commands(arguments)
        _check_names(arguments)
        config = _parse(arguments)
        return COMMANDS[arguments[0]].run(config)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)  # of a training that had not begun
        _to_stderr(
            f"convmae: interrupted by {signal.Signals(number).name}, before the first step"
            if hasattr(stop, "number")
            else "convmae: interrupted"
        )
        return INTERRUPTED if number == signal.SIGINT else 0
    except BrokenPipeError:  # of `convmae info | head`; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except MessageError as error:
        return _report(error, BAD_OPTION if isinstance(error, ValueError) else FAILED)


def _one_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> str:
    """A warning about weights in one line, of the main process; others as Python prints them."""
    if not issubclass(category, WeightsWarning):
        return _FORMAT(message, category, *where, **more)
    return f"convmae: warning: {message}\n" if os.environ.get("RANK", "0") == "0" else ""


def _report(error: MessageError, status: int) -> int:
    """Prints an error in one line, options as flags; returns the exit status."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    _to_stderr(f"convmae: error{where}: {error.with_flags}")
    return status


def _to_stderr(text: str) -> None:
    with suppress(OSError):  # of a terminal that is closed
        print(text, file=sys.stderr, flush=True)


def _set_environment() -> None:
    """Sets what libraries read once, when they are loaded; what the user has set stays."""
    # Large tensors in large pages (Linux): else page faults take some of every step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)


def _print_version() -> int:
    """Prints the versions, and which kernels run here; returns the exit status."""
    import torch

    import convmae_kernels

    print(f"convmae {convmae_kernels.__version__}\ntorch {torch.__version__}")
    kernels = convmae_kernels.info()
    for name in ("cpu", "cuda", "triton"):
        print(f"kernels, {name}: {kernels[name]}")
    return 0


def _joined(arguments: list[str]) -> list[str]:
    """The arguments, with the two words of a command such as `segment train` as one."""
    name = " ".join(arguments[:2])
    return [name, *arguments[2:]] if name in COMMANDS else arguments


def _beginning(word: str) -> list[str]:
    """The commands of two words of which `word` is the first."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def _list_commands(arguments: list[str]) -> int:
    """Lists the commands that begin with the first argument; returns the exit status.

    Raises:
        OptionError: something else than a call for help follows it.
    """
    first, *rest = arguments
    names = _beginning(first)
    if rest and rest[0] not in HELP:
        name = f"{first} {rest[0]}"
        raise OptionError(f"unknown command {name!r}{suggest(name, names)}")
    actions = ",".join(name.partition(" ")[2] for name in names)
    lines = [f"usage: convmae {first} {{{actions}}} ...", ""]
    width = max(map(len, names))
    for name in names:
        meaning = (COMMANDS[name].options.__doc__ or "").splitlines()[0]
        lines.append(f"  {name:{width}}  {meaning}")
    lines += ["", f"`convmae {names[0]} --help` lists its options."]
    print("\n".join(lines), file=sys.stdout if rest else sys.stderr)
    return 0 if rest else BAD_OPTION


def _check_names(arguments: list[str]) -> None:
    """Raises `OptionError` at a command or an option that does not exist."""
    if not arguments or arguments[0] in HELP or arguments[0].startswith("--tyro"):
        return
    command = arguments[0]
    if command not in COMMANDS:
        known = [*COMMANDS, *dict.fromkeys(n.split()[0] for n in COMMANDS if " " in n)]
        raise OptionError(f"unknown command {command!r}{suggest(command, known)}")
    known = ["--config"]
    for option in dataclasses.fields(COMMANDS[command].options):
        known.append(f"--{option.name}")
        if option.type in (bool, "bool", OPEN_CHOICE):
            known.append(f"--no_{option.name}")
    for argument in arguments[1:]:
        name = argument.partition("=")[0]
        is_name = re.match("--?[A-Za-z]", name) and not name.startswith("--tyro")
        if is_name and name not in (*known, *HELP, "-c"):
            near = difflib.get_close_matches(name, known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"see `convmae {command} --help`"
            raise OptionError(f"convmae {command} has no option {name}; {way_out}")


def _canonical(argument: str, command: str) -> str:
    """`--mask-ratio=0.5` -> `--mask_ratio=0.5`, `-b` -> `--batch_size`."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
    if name == "--output" and command in OWN_OUTPUT:
        return name + equals + value
    return ALIASES.get(name, name) + equals + value


def _parse(arguments: list[str]) -> Any:
    """The configuration of the command asked for: default, then `--config FILE`, then flags."""
    import tyro

    arguments, file = _take_config(arguments)
    arguments = _with_values(arguments)
    defaults: dict[str, Any] = {}
    if file is not None:
        name = arguments[0]
        defaults[name] = config_from_mapping(COMMANDS[name].options, _read_yaml(file))
    commands: Any = Union[  # noqa: UP007 (built at run time)
        tuple(_subcommand(name, defaults.get(name)) for name in COMMANDS)
    ]
    return tyro.cli(
        commands,
        args=arguments,
        prog="convmae",
        description=(
            "Masked-image pretraining of convolution-transformer hybrids that skips what is "
            "hidden. Flags are read with underscores or hyphens; every command takes --config "
            "FILE, a YAML file of options (such as those in recipes/, or a run's args.yaml), which "
            "flags override."
        ),
        use_underscores=True,
    )


def _with_values(arguments: list[str]) -> list[str]:
    """`--sync_bn` and `--no_sync_bn` with the value that an option of three values needs."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    options = dataclasses.fields(command.options) if command is not None else ()
    open_choices = {option.name for option in options if option.type == OPEN_CHOICE}
    given = []
    for place, argument in enumerate(arguments):
        name = argument.removeprefix("--")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if name in open_choices and following not in ("True", "False", "None"):
            given += [argument, "True"]
        elif name.removeprefix("no_") in open_choices - {name}:
            given += [f"--{name.removeprefix('no_')}", "False"]
        else:
            given.append(argument)
    return given


def _subcommand(name: str, default: Any) -> Any:
    """A command of that name, with the defaults that a file gave it, if one did."""
    import tyro

    given = {} if default is None else {"default": default}
    return Annotated[COMMANDS[name].options, tyro.conf.subcommand(name, **given)]


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` (or `-c FILE`) out of the arguments of a command."""
    rest: list[str] = []
    file: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if arguments[0] not in COMMANDS or name not in ("--config", "-c"):
            rest.append(argument)
            continue
        file = value if equals else next(remaining, None)
        if not file:
            raise OptionError("--config needs a file")
    return rest, file


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        values = read_yaml(file)
    except OptionError as error:
        raise OptionError(f"--config {file!r} cannot be read: {error.with_flags}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise OptionError(f"--config {file!r} must hold options and values, found {found}")
    if was_changed(Path(file).read_text(encoding="utf-8-sig")):
        print(
            f"convmae: note: --config {file!r} was changed since a run wrote it, by somebody or by "
            "damage: the digest in its last line is of other options (without that line and the "
            "first, nothing is compared)",
            file=sys.stderr,
        )
    return values
