"""Nagle's algorithm and delayed ACKs: two small writes and a read, again and again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding
from tcpscope.diagnose.rules.nagle import rule
from tests.diagnose.rules.connections import connection, findings, track
from tests.record import Script, Socket, Test, recorded
from tests.record.script import IPPROTO_TCP, TCP_NODELAY
from tests.tools.queue.refusals import DIAGNOSE

PORT = 8310
EXCHANGES = 150  # of 40 ms each, or of none


def exchanges(script: Script, *, nodelay: bool, number: int = EXCHANGES) -> Socket:
    listener = script.server.process("api-server").listener(PORT)
    client = script.client.process("orders").socket()
    client.connect(script.server.ipv4, PORT)
    if nodelay:
        client.option(IPPROTO_TCP, TCP_NODELAY, 1)
    served = listener.accept()
    answers = served("answer_halves", number, wait=False)
    client("halves", number)
    answers.join()
    script.stay()
    return client


@recorded(DIAGNOSE)
def test_who_writes_in_two_parts_is_named(script: Script) -> Test:
    client = exchanges(script, nodelay=False)
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["count"]) == ("nagle", "warning", 1)
    assert (facts["netns"], facts["pid"], facts["comm"]) == (script.client.inode, client.process.pid, "orders")
    assert facts["looks"] / 3 <= facts["held_back"] <= facts["looks"]
    assert facts["min_rtt_us"] < 5_000 <= facts["srtt_us"]
    (remedy,) = finding["remedies"]
    assert (remedy["name"], remedy["present"], remedy["proposed"]) == ("TCP_NODELAY", 0, 1)


@recorded(DIAGNOSE)
def test_with_tcp_nodelay_nothing_waits(script: Script) -> Test:
    exchanges(script, nodelay=True)
    seen = yield
    assert findings(seen, script) == []


def check(*tracks: Any) -> list[Finding]:
    evidence: Any = SimpleNamespace(sockets=SimpleNamespace(now=tracks))
    return list(rule.check(evidence))


HELD = {"nagle": True, "out_segs": 1, "unsent": 100, "peer_window": 65536, "srtt_us": 20_000, "min_rtt_us": 50}


def rows(held: int, free: int, **more: Any) -> list[Any]:
    return [connection(**HELD | more)] * held + [connection(**HELD | {"unsent": 0} | more)] * free


@pytest.mark.parametrize(("held", "free", "number"), [(3, 6, 1), (3, 7, 0), (2, 0, 0), (3, 0, 1)])
def test_a_third_of_the_looks_and_three_of_them(held: int, free: int, number: int) -> None:
    assert len(check(track(rule, rows(held, free)))) == number


@pytest.mark.parametrize(
    "other",
    [
        {"nagle": False},
        {"out_segs": 2},
        {"unsent": 1448},
        {"min_rtt_us": 5_000},  # the path itself is slow
        {"srtt_us": 4_900},  # no ACK is late
        {"lost_segs": 1},  # it waits for a retransmission
        {"peer_window": 50},  # it waits for room
        {"state": "FIN_WAIT1"},
    ],
)
def test_what_else_may_make_a_segment_wait(other: dict[str, Any]) -> None:
    assert check(track(rule, rows(9, 0, **other))) == []
