"""The command line: `convmae COMMAND`. Only running one imports torch."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any, Union

from convmae.training.config import (
    ConvertConfig,
    EvaluateConfig,
    FinetuneConfig,
    InfoConfig,
    LinprobeConfig,
    OptionError,
    PretrainConfig,
    ReconstructConfig,
    StatsConfig,
    config_from_mapping,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from convmae.training import RunSummary

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
OWN_OUTPUT = ("reconstruct", "convert", "evaluate", "stats")  # there --output is a file
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
        return COMMANDS[type(config)](config)
    except KeyboardInterrupt:
        print("convmae: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `convmae info | head`; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OptionError as error:
        return _tell(error, BAD_OPTION)
    except (ValueError, RuntimeError) as error:
        from convmae.data import DataError
        from convmae.training import TrainingError

        if isinstance(error, DataError | TrainingError):
            return _tell(error, BAD_OPTION if isinstance(error, DataError) else FAILED)
        raise


def _tell(error: Exception, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"convmae: error{where}: {error}", file=sys.stderr)
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
    kinds = dict(NAMES)
    read: dict[type, Any] = {}
    if file is not None:
        kind = kinds[arguments[0]]
        read[kind] = config_from_mapping(kind, _read_yaml(file))
    commands: Any = Union[  # noqa: UP007 (built at run time)
        tuple(_subcommand(name, kind, read) for name, kind in NAMES)
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


def _subcommand(name: str, kind: type, read: dict[type, Any]) -> Any:
    """A command of that name, with the defaults that a file gave it, if one did."""
    import tyro

    if kind in read:
        return Annotated[kind, tyro.conf.subcommand(name, default=read[kind])]
    return Annotated[kind, tyro.conf.subcommand(name)]


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` (or `-c FILE`) out of the arguments of a command."""
    rest: list[str] = []
    file: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if arguments[0] not in dict(NAMES) or name not in ("--config", "-c"):
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


# -- the commands ---------------------------------------------------------------------------------


def _pretrain(config: PretrainConfig) -> int:
    from convmae.training import pretrain

    return _told(pretrain(config), ("reconstruction.png", "report.html"))


def _finetune(config: FinetuneConfig) -> int:
    from convmae.training import finetune

    return _told(finetune(config), ("best/model.safetensors", "report.html"))


def _linprobe(config: LinprobeConfig) -> int:
    from convmae.training import linprobe

    return _told(linprobe(config), ("best/model.safetensors", "report.html"))


def _told(summary: RunSummary, results: Sequence[str]) -> int:
    """Prints what a run came to, in the main process; returns the exit status."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{summary.steps} steps, {summary.epochs:.2f} epochs in {summary.output_dir}: loss "
            f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}, "
            f"{summary.images_per_s:.1f} images/s over {summary.seconds:.0f} s"
        )
        if summary.evaluation:
            figures = summary.evaluation
            print(f"accuracy {figures['acc1']:.2f} % (best of 5: {figures['acc5']:.2f} %)")
        if summary.unreadable:
            count = len(summary.unreadable)
            print(f"{count} unreadable pictures were skipped (named in log.txt)")
        if summary.skipped:
            print(f"{summary.skipped} steps were skipped: not finite (in log.txt)")
        if summary.interrupted:
            print(f"interrupted; go on with --output_dir {summary.output_dir} --resume auto")
        else:
            print("see " + " and ".join(str(summary.output_dir / name) for name in results))
    return INTERRUPTED if summary.signal == signal.SIGINT else 0


def _evaluate(config: EvaluateConfig) -> int:
    from convmae.training import evaluate

    result = evaluate(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"accuracy {result['acc1']:.2f} % (best of 5: {result['acc5']:.2f} %), loss "
            f"{result['loss']:.4f} on {result['images']} pictures, "
            f"{result['images_per_s']:.1f} images/s"
        )
    return 0


def _reconstruct(config: ReconstructConfig) -> int:
    from convmae.training import reconstruct

    print(f"wrote {reconstruct(config)}")
    return 0


def _convert(config: ConvertConfig) -> int:
    from convmae.training import convert

    print(convert(config))
    return 0


def _stats(config: StatsConfig) -> int:
    from convmae.training import stats

    print(stats(config), end="")
    return 0


def _info(config: InfoConfig) -> int:
    from convmae.training.machine import machine_info, model_sizes

    for name, text in machine_info().items():
        print(f"{name:10} {text}")
    print("\nmodel                parameters")
    for name, parameters in model_sizes():
        print(f"{name:20} {parameters / 1e6:8.2f} M")
    return 0


COMMANDS: dict[type, Callable[[Any], int]] = {
    PretrainConfig: _pretrain,
    FinetuneConfig: _finetune,
    LinprobeConfig: _linprobe,
    EvaluateConfig: _evaluate,
    ReconstructConfig: _reconstruct,
    ConvertConfig: _convert,
    StatsConfig: _stats,
    InfoConfig: _info,
}
NAMES = [(kind.__name__.removesuffix("Config").lower(), kind) for kind in COMMANDS]
