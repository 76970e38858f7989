"""The command line: `convmae COMMAND`. Only running one imports torch.

A new command is a line of `COMMANDS`: its options, a dataclass that can be imported without torch,
and where the function is that takes them, prints, and returns the exit status.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Union

from convmae.config import (
    ConvertConfig,
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
    StatsConfig,
    config_from_mapping,
)

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
    "embed": Command(EmbedConfig, "convmae.commands.embed:main"),
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
OWN_OUTPUT = ("reconstruct", "convert", "evaluate", "predict", "embed", "stats")
FAILED, BAD_OPTION, INTERRUPTED = 1, 2, 130  # exit statuses


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    A bad option, unusable data or a run that had to stop prints one line, `convmae: error: ...`,
    and no traceback: status 2 for what was asked, 1 for what went wrong later. A training that
    Ctrl-C ends saves and returns 130; one that SIGTERM ends saves and returns 0.
    """
    # Large tensors in large pages (Linux): else page faults take some of every step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it once
    given = list(sys.argv[1:] if argv is None else argv)
    command = given[0] if given else ""
    arguments = [_canonical(argument, command) for argument in given]
    try:
        config = _parse(arguments)
        return COMMANDS[arguments[0]].run(config)
    except KeyboardInterrupt:
        print("convmae: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `convmae info | head`; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except MessageError as error:
        return _report(error, BAD_OPTION if isinstance(error, ValueError) else FAILED)


def _report(error: MessageError, status: int) -> int:
    """Prints an error in one line, options as flags; returns the exit status."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"convmae: error{where}: {error.with_flags}", file=sys.stderr)
    return status


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
    import yaml

    try:
        with open(file, encoding="utf-8") as opened:
            values = yaml.safe_load(opened)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {file!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise OptionError(f"--config {file!r} must hold options and values, found a {found}")
    return values
