"""Manual pages (man(7)), made of the same texts as --help: `tcpscope help --man DIRECTORY`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click


def write(root: click.Context, directory: Path) -> list[Path]:
    """Write a page for each command, `tcpscope.1` and `tcpscope-NAME.1`. Returns their paths. Makes the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for context in _contexts(root):
        path = directory / f"{context.command_path.replace(' ', '-')}.1"
        path.write_text(page(context))
        written.append(path)
    return written


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """The contexts of a command and of all commands below it."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            yield from _contexts(click.Context(command, parent=context, info_name=name))


def page(context: click.Context) -> str:
    """The manual page of a command."""
    command, name = context.command, context.command_path.replace(" ", "-")
    text = inspect.cleandoc(command.help or "")
    lines = [f'.TH {name.upper()} 1 "" tcpscope', ".SH NAME", rf"{_plain(name)} \- {_plain(_sentence(text))}"]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines += [".SH SYNOPSIS", f".B {_plain(usage)}", ".SH DESCRIPTION", *_paragraphs(text)]
    examples: Mapping[str, str] = getattr(command, "examples", {})
    lines += _section("EXAMPLES", [(f"tcpscope {line}", what) for line, what in examples.items()])
    groups: Mapping[str, Sequence[click.Parameter]] = getattr(command, "groups", {"Options": command.params})
    for title, parameters in groups.items():
        records = [parameter.get_help_record(context) for parameter in parameters]
        lines += _section(title.partition(" (")[0].upper(), [record for record in records if record])
    if isinstance(command, click.Group):
        below = [(below, command.get_command(context, below)) for below in command.list_commands(context)]
        lines += _section("COMMANDS", [(each, found.get_short_help_str(200)) for each, found in below if found])
    if context.parent:
        lines += [".SH SEE ALSO", rf".BR {_plain(context.parent.command_path.replace(' ', '-'))} (1)"]
    return "\n".join([*lines, ""])


def _section(title: str, entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    if entries:
        yield f".SH {title}"
        for what, text in entries:
            yield from (".TP", f".B {_plain(what)}", _plain(" ".join(text.split())))


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        if paragraph.startswith("\b\n"):  # click's mark for lines that stay as they are
            yield from (".nf", *map(_plain, paragraph.splitlines()[1:]), ".fi")
        else:
            yield _plain(" ".join(paragraph.split()))


def _sentence(text: str) -> str:
    return " ".join(text.removeprefix("\b\n").partition("\n\n")[0].split()).rstrip(".")


def _plain(text: str) -> str:
    r"""Text that man(7) prints as it is: no escapes, no hyphens in place of minus signs, no macro at its beginning."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("|", r"|\:")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped
