"""Every reason to stop ends a wait."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcpscope.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with Stop() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_nohup(number: signal.Signals) -> None:
    """Who starts us with a signal ignored wants us to go on."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), number)
            assert not stop
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_signal_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line knows its status then, and ignores signals until it exits."""
    before = {number: signal.getsignal(number) for number in Stop.SIGNALS}
    monkeypatch.setattr(Stop, "afterwards", signal.SIG_IGN)
    try:
        with Stop():
            pass
        for number in Stop.SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_stop() -> None:
    with Stop() as stop:
        stop.stop()
        assert stop
        stop.wait(60)  # does not wait
    stop.stop()  # after its end it is no error
    with Stop(0.05) as stop:
        stop.wait(0.1)
        assert not stop  # the time has not begun
        stop.begin()
        begin = time.monotonic()
        stop.wait(60)
        assert time.monotonic() - begin < 30
        assert stop
    read, write = os.pipe()
    with Stop() as stop:
        os.write(write, b"x")
        stop.wait(60, read)  # nor does it while there is something to read
        assert not stop
    os.close(read), os.close(write)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_the_reader_of_the_output_goes_away(kind: str) -> None:
    """Who has nothing to write notices it, too."""
    read, write = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    with Stop(output=write) as stop:
        stop.wait(0)
        os.close(read)
        with pytest.raises(BrokenPipeError):
            stop.wait(60)
        assert not stop
    os.close(write)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    """It is always ready, which ends no wait."""
    with (tmp_path / "rows").open("wb") as file, Stop(output=file.fileno()) as stop:
        begin = time.monotonic()
        stop.wait(0.05)
        assert time.monotonic() - begin >= 0.04


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["click", "tcpscope.tools.states"])
@pytest.mark.parametrize("caught", [False, True])
def test_a_signal_while_modules_are_imported(tmp_path: Path, number: int, module: str, caught: bool) -> None:
    """It ends the command with status 0 and without a word, however early it comes, also in code that catches all."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, os, sys\n"
        "class Signals(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        try:\n"
        f"            if name == {module!r}: os.kill(os.getpid(), {int(number)})\n"
        f"        except BaseException:\n"
        f"            if not {caught}: raise\n"
        "sys.meta_path.insert(0, Signals())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tcpscope", "states", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("number", Stop.SIGNALS)
def test_a_signal_does_not_replace_the_status(number: int) -> None:
    """It comes between the account and the exit."""
    code = f"""if True:
        import os, sys
        from tcpscope import __main__, cli, errors, stop

        def show(*_):
            with stop.Stop():
                raise errors.LossError("events were lost")

        def fail(*_, real=cli._fail):
            os.kill(os.getpid(), {int(number)})
            return real(*_)

        cli.show, cli._fail, sys.argv = show, fail, ["tcpscope", "states"]
        __main__.main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (5, "", "tcpscope: events were lost\n")
