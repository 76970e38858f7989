"""What options must satisfy, and options from and to YAML. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from convmae.config.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

PATCH = 16  # pixels in a row or column of a patch, which is one block of the mask
TIMM = "timm:"  # what the name of a network of timm begins with
# How a first convolution becomes one of another number of channels.
ADAPT_INPUT = ("auto", "sum", "repeat", "fresh")
Config = TypeVar("Config")


# -- YAML -----------------------------------------------------------------------------------------


def config_from_mapping(config_type: type[Config], values: dict[str, Any]) -> Config:
    """A configuration from option names and values, as an `args.yaml` or a recipe holds them.

    Names are read with underscores or hyphens.

    Raises:
        OptionError: an option that does not exist (with the nearest that does) or is missing, or
            a value of another type.
    """
    hints = typing.get_type_hints(config_type)
    known = [field.name for field in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(f"unknown option {name!r} in --config{suggest(name, sorted(known))}")
        if name in read:
            raise OptionError(f"--config gives {name!r} twice, with an underscore and a hyphen")
        read[name] = _read_value(name, value, hints[name])
    try:
        return config_type(**read)
    except TypeError as error:
        raise OptionError(f"--config: {str(error).partition('() ')[2]}") from error


def config_to_mapping(config: Any) -> dict[str, Any]:
    """The options as plain values that YAML holds."""
    values = dataclasses.asdict(config)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _read_value(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type; YAML's lists become tuples, and `1e-3`, text to it, a number.

    Raises:
        OptionError: it is none of the types allowed.
    """
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        fits, converted = _convert(value, choice)
        if fits:
            return converted
    wanted = " or ".join(_in_words(choice) for choice in choices)
    raise OptionError(f"--{name} must be {wanted}, got {_shown(value)} in --config")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` can be of the type `kind`, and then the value as that type."""
    origin = get_origin(kind)
    if kind is type(None):
        return value is None, None
    if origin is Literal:
        return value in get_args(kind), value
    if origin is tuple:
        parts = [item for item in get_args(kind) if item is not Ellipsis]
        many = Ellipsis in get_args(kind)
        if not isinstance(value, list | tuple) or (not many and len(value) != len(parts)):
            return False, None
        converted = [_convert(item, parts[0 if many else i]) for i, item in enumerate(value)]
        return all(fits for fits, _ in converted), tuple(item for _, item in converted)
    if kind is float:
        if isinstance(value, str):
            try:
                return True, float(value)
            except ValueError:
                return False, None
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, kind), value


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if kind is type(None) else names.get(kind, str(kind))


def suggest(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or the whole list where nothing is near."""
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; expected one of {', '.join(known)}"


# -- values ---------------------------------------------------------------------------------------


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `OptionError` unless `value` is one of `choices`."""
    if value not in choices:
        words = ", ".join(str(choice) for choice in choices)
        raise OptionError(f"--{name} must be one of {words}, got {value!r}")


def check_text(name: str, value: Any) -> None:
    """Raises `OptionError` unless `value` is text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"--{name} must not be empty, got {value!r}")


def check_number(
    name: str,
    value: Any,
    whole: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises `OptionError` unless `value` is a finite number within the limits."""
    noun = "a whole number" if whole else "a number"
    limits = [
        f"{text} {limit:g}"
        for text, limit in (
            ("above", above),
            ("at least", at_least),
            ("at most", at_most),
            ("below", below),
        )
        if limit is not None
    ]
    fits = (
        _is_number(value)
        and (not whole or isinstance(value, int))
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not fits:
        raise OptionError(
            f"--{name} must be {noun} {' and '.join(limits)}, got {value!r}".replace("  ", " ")
        )


def check_mask_ratio(value: float) -> None:
    """Raises `OptionError` unless `value` is a number in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise OptionError(f"--mask_ratio must be in [0, 1), got {value!r}")


def check_patches(
    mask_ratio: float, height: int, width: int, patch: int = PATCH, rounding: str = "floor"
) -> None:
    """Raises `OptionError` unless a picture of that size has visible and hidden patches.

    Args:
        mask_ratio: share of hidden patches.
        height, width: of the picture.
        patch: side of a patch.
        rounding: as in `BlockMask.from_noise`.
    """
    patches = (height // patch) * (width // patch)
    share = patches * (1 - mask_ratio)
    visible = round(share) if rounding == "round" else int(share)
    if visible in (0, patches):
        what = "visible" if visible == 0 else "hidden"
        raise OptionError(
            f"--mask_ratio {mask_ratio:g} leaves no patch {what} of the {patches} of a picture of "
            f"{height} x {width} pixels; expected at least one visible and one hidden"
        )


def check_size(size: int | tuple[int, ...], unit: int = PATCH) -> None:
    """Raises `OptionError` unless `size` is one or two positive multiples of `unit` pixels."""
    try:
        height, width = as_pair(size)
    except TypeError as error:
        raise OptionError(f"--input_size must be one whole number or two, got {size!r}") from error
    if height < unit or width < unit or height % unit or width % unit:
        raise OptionError(
            f"--input_size must be multiples of {unit} pixels, at least {unit}, "
            f"got {height} x {width}"
        )


def as_pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    """One number twice, or two numbers: `(H, W)`."""
    values = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(values) == 1:
        values = values * 2
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"expected one whole number or two, got {size!r}")
    return values[0], values[1]


def check_statistics(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Raises `OptionError` unless both are given, one number a channel, or neither."""
    if (mean is None) != (std is None):
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise OptionError(f"--{given} is given without --{missing}; convmae stats prints both")
    if mean is None or std is None:
        return
    if len(mean) != len(std):
        raise OptionError(f"--mean has {len(mean)} numbers, but --std has {len(std)}")
    for value in mean:
        check_number("mean", value)
    for value in std:
        check_number("std", value, above=0)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False
