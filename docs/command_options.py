"""A directive for Sphinx, `command-options`: a table of the options of a `convmae` command.

The options are the fields of the command's dataclass; what they mean is the text under each field,
which `convmae COMMAND --help` prints too.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from convmae.cli import ALIASES, COMMANDS, OWN_OUTPUT


def meanings(options: type) -> dict[str, str]:
    """The text under each field of a dataclass, those of its parents included."""
    texts: dict[str, str] = {}
    for parent in reversed(options.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        analyzer = ModuleAnalyzer.for_module(parent.__module__)
        for (owner, name), lines in analyzer.find_attr_docs().items():
            if owner == parent.__name__:
                texts[name] = " ".join(line.strip() for line in lines if line.strip())
    return texts


def default(field: dataclasses.Field) -> str:
    """What an option is where it is not given, as one writes it on the command line."""
    if field.default is not dataclasses.MISSING:
        value: Any = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "needed"
    if value in (None, ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return "``" + " ".join(map(str, value)) + "``" if value else "–"
    return f"``{value}``"


def marked_up(text: str) -> str:
    """The text in reStructuredText: flags and what stands in backquotes as code."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text)
    parts = re.split(r"(``.*?``)", text)
    for place in range(0, len(parts), 2):
        plain = re.sub(r"([*|\\])", r"\\\1", parts[place])
        plain = re.sub(r"(?<=\w)_(?!\w)", r"\\_", plain)
        parts[place] = re.sub(r"(?<![\w-])(--?[a-z][\w-]*)(?![\w`])", r"``\1``", plain)
    return "".join(parts)


class CommandOptions(SphinxDirective):
    """`{command-options} pretrain`: what the command does, and a table of its options."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in COMMANDS:
            raise self.error(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
        options = COMMANDS[name].options
        text = meanings(options)
        lines = [*marked_up(inspect.getdoc(options) or "").splitlines(), ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 26 14 60", ""]
        lines += ["   * - option", "     - default", "     - meaning"]
        short = {long: [] for long in ALIASES.values()}
        for alias, long in ALIASES.items():
            if not (long == "--output_dir" and name in OWN_OUTPUT):
                short[long].append(alias)
        if not dataclasses.fields(options):
            lines = lines[: lines.index(".. list-table::")] + ["It has no options."]
        for field in dataclasses.fields(options):
            flags = [f"--{field.name}", *short.get(f"--{field.name}", [])]
            lines += [f"   * - {', '.join(f'``{flag}``' for flag in flags)}"]
            lines += [f"     - {default(field)}", f"     - {marked_up(text[field.name])}"]
        holder = nodes.container()
        lines = ["```{eval-rst}", *lines, "```"]  # the page is Markdown; the help is not
        source = inspect.getsourcefile(options) or ""
        self.state.nested_parse(StringList(lines, source=source), 0, holder)
        return holder.children


def setup(app) -> dict[str, bool]:
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True}
