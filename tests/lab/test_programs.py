"""The lab's programs: what they report, and what is said when they fail."""

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpscope.errors import TcpscopeError
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program, until


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def server(lab: Lab, closes: str | None = None, port: int = 80) -> Program:
    return Program(
        lab.server,
        "server",
        family=socket.AF_INET,
        address=lab.server.ipv4,
        port=port,
        backlog=5,
        closes=closes,
        pause=0,
    )


def client(lab: Lab, port: int = 80) -> Program:
    program = Program(lab.client, "client", family=socket.AF_INET, address=lab.server.ipv4, port=port)
    assert program.hear("ready")["pid"] == program.pid
    return program


def test_a_connection_from_both_ends(lab: Lab) -> None:
    serving = server(lab, closes="second")
    listening = serving.hear("listening")
    assert listening["port"] == 80
    assert Path(f"/proc/{serving.pid}/comm").read_text() == "lab-server\n"
    assert f"socket:[{listening['inode']}]" in {str(fd.readlink()) for fd in Path(f"/proc/{serving.pid}/fd").iterdir()}

    calling = client(lab)
    calling.tell(do="connect", number=1)
    connected = calling.hear("connected")
    assert (connected["number"], connected["errno"]) == (0, 0)
    assert serving.hear("accepted")["port"] == connected["port"]
    calling.tell(do="finish", send=7, closes="first", pause=0)
    finished = calling.hear("finished")
    assert (finished["number"], finished["errno"]) == (0, 0)
    assert serving.hear("closed") == {"port": connected["port"], "received": 7}


def test_a_refused_connect_is_reported(lab: Lab) -> None:
    calling = client(lab)
    calling.tell(do="connect", number=2)
    assert [calling.hear("connected")["errno"] for _ in range(2)] == [errno.ECONNREFUSED] * 2


def test_a_program_that_fails_says_why(lab: Lab) -> None:
    server(lab).hear("listening")
    with pytest.raises(TcpscopeError, match=r"ended before it reported 'listening'.*Address already in use"):
        server(lab).hear("listening")


def test_silence_has_a_deadline(lab: Lab) -> None:
    with pytest.raises(TcpscopeError, match=r"did not report 'connected' within 0\.05 s"):
        client(lab).hear("connected", deadline=0.05)
    with pytest.raises(TcpscopeError, match="in vain for a miracle"):
        until(lambda: False, "a miracle", deadline=0)


def test_another_report_than_expected(lab: Lab) -> None:
    with pytest.raises(TcpscopeError, match="not 'accepted'"):
        server(lab).hear("accepted")


def test_a_killed_server_listens_no_more(lab: Lab) -> None:
    serving = server(lab)
    serving.hear("listening")
    assert [found.state for found in lab.server.sockets()] == ["LISTEN"]
    serving.kill()
    assert lab.server.sockets() == []
