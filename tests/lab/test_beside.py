"""A tool beside a scenario: waits for it, shows its lines, ends it, says when it has failed."""

import sys
from collections.abc import Iterator

import pytest

from tcpscope.errors import TcpscopeError
from tcpscope.lab.beside import Tool, arguments
from tcpscope.lab.hosts import Lab

READY = "import os, signal, sys\nos.write(int(os.environ['TCPSCOPE_READY_FD']), b'ready\\n')\n"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """The tool is a Python text given as its second argument."""
    monkeypatch.setattr(Tool, "command", (sys.executable, "-u", "-c", "import sys; sys.argv.pop(0); exec(sys.argv[1])"))
    yield []


def start(code: str, lines: list[tuple[str, str]]) -> Tool:
    return Tool(["queue", code], lambda who, line: lines.append((who, line)))


@pytest.mark.root
def test_namespaces_in_arguments() -> None:
    with Lab() as lab:
        client, server = str(lab.client.inode), str(lab.server.inode)
        assert arguments(["queue"], lab) == ["queue", "--netns", server]
        assert arguments(["queue", "--netns", "{client}"], lab) == ["queue", "--netns", client]
        assert arguments(["queue", "--netns=7"], lab) == ["queue", "--netns=7"]
        assert arguments(["queue", "{server}/{client}/{other}"], lab)[1] == f"{server}/{client}/{{other}}"


def test_output_until_the_interrupt(lines: list[tuple[str, str]]) -> None:
    code = (
        "signal.signal(signal.SIGINT, lambda *_: (print('last'), sys.exit()))\n"
        "print('first')\n" + "print('stats', file=sys.stderr)\n" + READY.partition("\n")[2] + "signal.pause()\n"
    )
    tool = start(READY.partition("\n")[0] + "\n" + code, lines)
    tool.wait_until_ready()
    tool.end()
    assert lines == [("queue", "first"), ("queue", "stats"), ("queue", "last")]
    tool.kill()  # once more is no error


def test_a_bad_status_is_passed_on(lines: list[tuple[str, str]]) -> None:
    tool = start(READY + "print('no such kernel', file=sys.stderr); sys.exit(3)", lines)
    tool.wait_until_ready()
    with pytest.raises(TcpscopeError, match="'tcpscope queue' ended with status 3") as caught:
        tool.end(interrupt=False)
    assert caught.value.exit_status == 3
    assert lines == [("queue", "no such kernel")]


def test_ends_before_it_is_ready(lines: list[tuple[str, str]]) -> None:
    tool = start("import sys; print('what is this?'); sys.exit(2)", lines)
    with pytest.raises(TcpscopeError, match="ended with status 2"):
        tool.wait_until_ready()
    assert lines == [("queue", "what is this?")]
    tool = start("print('all is well')", lines)
    with pytest.raises(TcpscopeError, match="ended before it watched anything"):
        tool.wait_until_ready()


def test_never_ready(lines: list[tuple[str, str]]) -> None:
    tool = start("import signal; signal.pause()", lines)
    try:
        with pytest.raises(TcpscopeError, match=r"not ready after 0\.05 s"):
            tool.wait_until_ready(deadline=0.05)
    finally:
        tool.kill()


def test_deaf_to_the_interrupt(lines: list[tuple[str, str]]) -> None:
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    tool = start(deaf + READY + "while True: signal.pause()", lines)
    tool.wait_until_ready()
    with pytest.raises(TcpscopeError, match="did not end within"):
        tool.end(deadline=0.05)
