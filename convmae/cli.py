"""The command line: `convmae pretrain | reconstruct | info`. Only running one imports torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union

from convmae.training.config import (
    OptionError,
    PretrainConfig,
    ReconstructConfig,
    config_from_mapping,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Other names of flags, for hands that are used to them.
ALIASES = {
    "-b": "--batch_size",
    "-j": "--num_workers",
    "--workers": "--num_workers",
    "--data": "--data_path",
    "--img_size": "--input_size",
}
FAILED, BAD_OPTION, INTERRUPTED = 1, 2, 130  # exit statuses


@dataclass
class InfoConfig:
    """Tell versions, devices, what runs the operators here, and the models with their sizes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    A bad option, unusable data or a run that had to stop prints one line, `convmae: error: ...`,
    and no traceback: status 2 for what was asked, 1 for what went wrong later. 130: interrupted.
    """
    # Large tensors in large pages (Linux): else page faults take some of every step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it once
    arguments = [_canonical(argument) for argument in (sys.argv[1:] if argv is None else argv)]
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
    print(f"convmae: error: {error}", file=sys.stderr)
    return status


def _canonical(argument: str) -> str:
    """`--mask-ratio=0.5` -> `--mask_ratio=0.5`, `-b` -> `--batch_size`."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
    return ALIASES.get(name, name) + equals + value


def _parse(arguments: list[str]) -> Any:
    """The configuration of the command asked for: default, then `--config FILE`, then flags."""
    import tyro

    arguments, file = _take_config(arguments)
    defaults = PretrainConfig() if file is None else config_from_mapping(_read_yaml(file))
    commands = Union[  # noqa: UP007 (built at run time)
        Annotated[PretrainConfig, tyro.conf.subcommand("pretrain", default=defaults)],
        Annotated[ReconstructConfig, tyro.conf.subcommand("reconstruct")],
        Annotated[InfoConfig, tyro.conf.subcommand("info")],
    ]
    return tyro.cli(
        commands,
        args=arguments,
        prog="convmae",
        description=(
            "Masked-image pretraining of convolution-transformer hybrids that skips what is "
            "hidden. Flags are read with underscores or hyphens; convmae pretrain also takes "
            "--config FILE, a YAML file of options (such as a run's args.yaml), which flags "
            "override."
        ),
        use_underscores=True,
    )


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` (or `-c FILE`) out of the arguments of `pretrain`."""
    rest: list[str] = []
    file: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if arguments[0] != "pretrain" or name not in ("--config", "-c"):
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

    summary = pretrain(config)
    print(
        f"{summary.steps} steps, {summary.epochs:.2f} epochs in {summary.output_dir}: loss "
        f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}, "
        f"{summary.images_per_s:.1f} images/s over {summary.seconds:.0f} s"
    )
    if summary.unreadable:
        print(f"{len(summary.unreadable)} unreadable pictures were skipped (named in log.txt)")
    if summary.interrupted:
        print(f"interrupted; go on with --output_dir {summary.output_dir} --resume auto")
        return INTERRUPTED
    print(f"see {summary.output_dir / 'reconstruction.png'} and {summary.output_dir / 'loss.png'}")
    return 0


def _reconstruct(config: ReconstructConfig) -> int:
    from convmae.training import reconstruct

    print(f"wrote {reconstruct(config)}")
    return 0


def _info(config: InfoConfig) -> int:
    from convmae.training.machine import machine_info, model_sizes

    for name, text in machine_info().items():
        print(f"{name:10} {text}")
    print("\nmodel            parameters")
    for name, parameters in model_sizes():
        print(f"{name:16} {parameters / 1e6:8.2f} M")
    return 0


COMMANDS: dict[type, Callable[[Any], int]] = {
    PretrainConfig: _pretrain,
    ReconstructConfig: _reconstruct,
    InfoConfig: _info,
}
