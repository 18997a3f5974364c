"""Odd command lines: each is refused in one line with status 2, or means something. None ends in a traceback.

They are put together of all options and of strange values, the same ones every time, and run in this process up to the
point where a tool would ask the kernel. A line that is accepted means all of its words: without any one of its options
the request is another one.
"""

from __future__ import annotations

import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import pytest

from tcpscope import cli, session, tool
from tcpscope.diagnose import cli as diagnose_cli
from tcpscope.kernel import netns
from tcpscope.lab import cli as lab_cli
from tcpscope.lab import scenario
from tcpscope.request import Request

LINES = 120
"""For each command."""

NUMBERS = [
    "0",
    "1",
    "2",
    "-1",
    "+1",
    "1_0",
    "1e3",
    "0x10",
    "08",
    "٣",
    "１２",
    "²",
    "nan",
    "inf",
    "1.5",
    ".5",
    "9" * 400,
]
TIMES = ["5m", "1h", "200ms", "300us", "0.4us", "1h30m", "1 s", "5M", "-1s", "0s", "1" + "0" * 30 + "s", "s"]
LISTS = [
    "1,2",
    "1,,2",
    ",",
    "1,",
    "1-65535",
    "80-70",
    "1-2-3",
    "-5",
    "80,https",
    "10.0.0.0/8,::1",
    "10.0.0.1/8",
    "::/0",
]
TEXTS = ["", " ", "a b", "é", "日本", "\u202e", "\udcff", "\x1b[2J", "a\nb", "..", "/", "/dev/null", "pid:1", "pid:0"]
NAMES = [
    "localhost",
    "no.such.host",
    "root",
    "fe80::1%lo",
    "127.1",
    "http",
    "table",
    "json",
    "csv",
    "none",
    "time",
    "pid",
]
SIGNS = [
    "-",
    "--",
    "*",
    "%s",
    "{}",
    "$HOME",
    "\\",
    "'",
    "=",
    "True",
    "None",
    "pid,comm",
    "pid,pid",
    "elapsed",
    "64K",
    "4K",
]
VALUES = [*NUMBERS, *TIMES, *LISTS, *TEXTS, *NAMES, *SIGNS]
FITTING = {
    "pid": ["1"],
    "netns": ["/proc/self/ns/net"],
    "duration": ["5m"],
    "interval": ["0.5"],
    "min": ["10ms"],
    "buffer": ["64K"],
    "columns": ["pid", "time", "netns,lport"],
    "by": ["raddr", "pid"],
    "output": ["json", "csv"],
    "time": ["elapsed"],
    "max_keys": ["7"],
}
"""Values that make sense, so that not every line ends at its first word."""


class ReachedError(Exception):
    """The kernel would be asked now."""


class Outcome:
    """What became of one command line: a status with an error, or a request."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.asked: Any = None
        self.reached = False


@pytest.fixture
def play(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[list[str]], Outcome]]:
    outcome = Outcome()

    def reach(*_: Any, **__: Any) -> None:
        outcome.reached = True
        raise ReachedError

    def show(found: tool.Tool, request: Request, *_: Any) -> None:
        outcome.asked = (found.name, request)
        found.open(request)

    def connecting(request: Request, *_: Any) -> None:
        outcome.asked = request
        reach()

    def scene(*given: Any) -> None:
        outcome.asked = given
        reach()

    def look_up(name: str, *_: Any, **__: Any) -> list[Any]:
        if name != "localhost":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(session.Session, "__init__", reach)
    monkeypatch.setattr("tcpscope.kernel.features.Kernel.__init__", reach)
    monkeypatch.setattr(cli, "show", show)
    monkeypatch.setattr(diagnose_cli, "Evidence", connecting)
    monkeypatch.setattr(lab_cli, "play", scene)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(netns, "exists", lambda inode: False)

    def run(words: list[str]) -> Outcome:
        outcome.__init__()  # type: ignore[misc]
        monkeypatch.setattr(sys, "argv", ["tcpscope", *words])
        try:
            cli.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            outcome.status = end.code
        except ReachedError:
            pass
        out, err = capsys.readouterr()
        lines = [
            line
            for line in err.splitlines()
            if not re.match(r"tcpscope: localhost is |tcpscope: --max-keys \d+ takes ", line)
        ]
        if outcome.reached:
            assert lines == [], words
        elif outcome.status == 0:
            assert {"-h", "--help"} & set(words) and out, words
        else:
            assert outcome.status in (2, 4), (words, err)  # 4: the namespace of a process of somebody else
            assert len(lines) == 1 and lines[0].startswith("tcpscope: ") and lines[0].isprintable(), (words, err)
            assert len(lines[0]) < 1000, words
            assert out == "", words
        return outcome

    yield run


def commands() -> list[tuple[str, ...]]:
    return [*((name,) for name in tool.names()), ("diagnose",), *(("lab", "run", name) for name in scenario.names())]


def command_of(words: tuple[str, ...]) -> click.Command:
    command: click.Command = cli.tcpscope
    for word in words:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found
        command = found
    return command


class Given(NamedTuple):
    """An option on a command line, as its words."""

    option: click.Option
    words: list[str]
    value: str = ""


def lines_of(words: tuple[str, ...]) -> Iterator[list[Given]]:
    chance = random.Random(" ".join(words))
    options = [each for each in command_of(words).params if isinstance(each, click.Option)]
    for _ in range(LINES):
        line = []
        for option in chance.choices(options, k=chance.choice((1, 1, 2, 2, 3, 4))):
            flag = chance.choice(option.opts)
            if option.is_flag:
                line.append(Given(option, [flag]))
                continue
            fitting = [] if chance.random() < 0.4 else FITTING.get(option.name or "", [])
            if not fitting and isinstance(option.type, click.Choice) and chance.random() < 0.6:
                fitting = [str(each) for each in option.type.choices]
            value = chance.choice(fitting or VALUES)
            joined = f"{flag}={value}" if flag.startswith("--") else f"{flag}{value}"
            line.append(Given(option, chance.choice(([flag, value], [joined])), value))
        yield line


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_is_refused_in_one_line_or_means_all_of_its_words(
    words: tuple[str, ...], play: Callable[[list[str]], Outcome]
) -> None:
    accepted = refused = 0
    for line in lines_of(words):
        outcome = play([*words, *(word for given in line for word in given.words)])
        if not outcome.reached:
            refused += 1
            continue
        accepted += 1
        asked = outcome.asked
        for given in line:
            rest = [other for other in line if other is not given]
            default = given.value in (str(given.option.default), "iso")  # iso: where stdout is no terminal
            if default or any(other.option is given.option for other in rest):
                continue
            without = play([*words, *(word for other in rest for word in other.words)])
            assert not without.reached or without.asked != asked, (words, line, given)
    assert accepted > 5, (accepted, refused)
    assert refused > 5, (accepted, refused)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_no_word_is_taken_silently_as_an_argument(value: str, play: Callable[[list[str]], Outcome]) -> None:
    for words in (["states"], ["list"], ["rtt", "-i", "1"], ["diagnose"]):
        outcome = play([*words, value])
        takes_command = words[0] not in ("list", "diagnose")  # behind --, where nothing stands
        assert outcome.reached == (value == "--" and not takes_command), (words, value)
