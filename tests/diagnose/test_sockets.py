"""What is kept of connections that a look has found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import sockets
from tcpscope.diagnose.sockets import Sockets


@pytest.fixture
def found() -> Sockets:
    made = Sockets.__new__(Sockets)
    made.served, made._served, made.sent, made.twice = {}, 0, {}, {}
    return made


def row(raddr: str, opened_s: float, lport: int = 80) -> Any:
    return SimpleNamespace(netns=1, lport=lport, raddr=raddr, opened_ns=round(opened_s * 1e9))


def test_peers_that_were_served_are_forgotten_in_time(found: Sockets) -> None:
    for each in (row("192.0.2.1", 5), row("192.0.2.1", 3), row("192.0.2.2", 9), row("192.0.2.1", 1, lport=81)):
        found._serve(each)
    assert found.served == {(1, 80): {"192.0.2.1": 5.0, "192.0.2.2": 9.0}, (1, 81): {"192.0.2.1": 1.0}}
    found.forget(6.0)
    assert found.served == {(1, 80): {"192.0.2.2": 9.0}}


def test_their_number_is_bounded(found: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_PEERS_AT_MOST", 3)
    for host in range(9):
        found._serve(row(f"192.0.2.{host}", host, lport=80 + host))
    found._serve(row("192.0.2.0", 20))
    assert found.served == {
        (1, 80): {"192.0.2.0": 20.0},
        (1, 81): {"192.0.2.1": 1.0},
        (1, 82): {"192.0.2.2": 2.0},
    }
    found.forget(10.0)
    found._serve(row("192.0.2.9", 21))
    assert found.served == {(1, 80): {"192.0.2.0": 20.0, "192.0.2.9": 21.0}}
