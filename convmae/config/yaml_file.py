"""YAML files of options, which may come from anybody. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.config.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 2**20  # bytes; the options of a run take about 1,500
DEEPEST = 4  # an option may be a list
MOST = 20_000  # keys and values
LONGEST = 64  # bits of a whole number


def read_yaml(file: str | Path) -> Any:
    """The value that a YAML file of options holds: plain values, lists and mappings.

    The file is looked through before anything is made of it: aliases (of which a few lines can
    stand for billions of values), tags, deep nesting and keys that occur twice are refused, and so
    is a file too large for options.

    Raises:
        OptionError: the file cannot be read, or holds one of these; without the file's name.
    """
    import yaml

    try:
        with open(file, "rb") as opened:
            data = opened.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise OptionError(f"it is larger than {LARGEST // 2**20} MiB, which no options are")
        text = data.decode("utf-8-sig")
        _look_through(text)
        values = yaml.load(text, Loader=yaml.SafeLoader)
        _check_numbers(values)
        return values
    except OSError as error:
        raise OptionError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise OptionError(f"it is no text in UTF-8 (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        raise OptionError(f"{error.problem or error.context}{_line(error.problem_mark)}") from error
    except yaml.YAMLError as error:
        raise OptionError(" ".join(str(error).split())) from error
    except OptionError:
        raise
    except ValueError as error:  # a number or a date that cannot be one
        raise OptionError(f"it holds a value that cannot be: {error}") from error


def _look_through(text: str) -> None:
    """Raises `OptionError` at what options do not need and a parser can choke on."""
    import yaml

    open_ones: list[dict[str, int] | None] = []  # of a mapping the keys, and lines; of a list None
    is_key: list[bool] = []  # whether the next value of each is a key
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        where = _line(event.start_mark)
        if isinstance(event, yaml.DocumentStartEvent) and count > 1:
            raise OptionError(f"it holds several documents (---), expected one{where}")
        if count > MOST:
            raise OptionError(f"it holds more than {MOST:,} values")
        if isinstance(event, yaml.AliasEvent):
            raise OptionError(f"*{event.anchor} is an alias, write the value out{where}")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise OptionError(f"{tag!r} is a tag, expected a plain value{where}")
        if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            _note_key(event, open_ones, is_key, where)
        if isinstance(event, yaml.CollectionStartEvent):
            mapping = isinstance(event, yaml.MappingStartEvent)
            open_ones.append({} if mapping else None)
            is_key.append(mapping)
            if len(open_ones) > DEEPEST:
                raise OptionError(f"it is nested more than {DEEPEST} deep{where}")
        elif isinstance(event, yaml.CollectionEndEvent):
            open_ones.pop()
            is_key.pop()


def _note_key(
    event: Any, open_ones: list[dict[str, int] | None], is_key: list[bool], where: str
) -> None:
    """Keeps the keys of the mapping that is open; each must be text and new."""
    import yaml

    keys = open_ones[-1] if open_ones else None
    if keys is None:
        return
    if is_key[-1]:
        plain = isinstance(event, yaml.ScalarEvent)
        if not plain or not _is_text(event):
            found = event.value if plain else "a list or mapping"
            raise OptionError(f"a name must be text, found {found}{where}")
        if event.value in keys:
            first = keys[event.value]
            raise OptionError(f"{event.value!r} is given twice, first in line {first}{where}")
        keys[event.value] = event.start_mark.line + 1
    is_key[-1] = not is_key[-1]


def _is_text(event: Any) -> bool:
    """Whether a scalar is text to YAML, not a number, a date, yes, or nothing."""
    import yaml

    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, event.value, event.implicit)
    return tag == "tag:yaml.org,2002:str"


def _check_numbers(value: Any) -> None:
    """Raises `OptionError` at a whole number that no option takes: printing it may take minutes."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item)
    elif isinstance(value, int) and value.bit_length() > LONGEST:
        raise OptionError(f"it holds a whole number of more than {LONGEST} bits")


def _line(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1})"
