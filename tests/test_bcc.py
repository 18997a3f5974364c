"""Hints for the flags of bcc's tools: each is needed, and names options that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from tcpscope import bcc, cli, tool


def commands() -> Iterator[cli.Command]:
    for name in cli.tcpscope.list_commands(click.Context(cli.tcpscope)):
        command = cli.tcpscope.get_command(click.Context(cli.tcpscope), name)
        if isinstance(command, cli.Command):
            yield command


def options(command: click.Command) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts}


def test_a_hint_is_for_what_is_missing() -> None:
    assert set(bcc._TOOLS) <= set(tool.names())
    for command in commands():
        assert not set(bcc._TOOLS.get(command.name or "", ())) & options(command)


def test_a_hint_names_options_that_there_are() -> None:
    known = {flag for command in commands() for flag in options(command)}
    for hint in bcc._ALL.values():
        assert set(re.findall(r"(?<!\w)--?[a-z]+", hint, re.I)) <= known, hint
    for name, hints in bcc._TOOLS.items():
        known = options(cli.command_of(tool.find(name)))
        for hint in hints.values():
            assert set(re.findall(r"(?<!\w)--?[a-z]+", hint, re.I)) <= known, hint


@pytest.mark.parametrize(("name", "flag"), [("states", "--nonsense"), ("states", "ARGUMENT"), ("nosuch", "-P")])
def test_no_hint(name: str, flag: str) -> None:
    assert bcc.hint(name, flag) == ""
