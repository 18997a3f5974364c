"""Handshakes that rp_filter drops: SYNs of clients, and SYN-ACKs for processes of this host."""

from __future__ import annotations

from socket import SOL_SOCKET
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding
from tcpscope.diagnose.rules.rp_filter import COUNTER, LEAST, MANY, rule
from tests.diagnose.rules.connecting import NETNS, OTHER, THERE, found, groups, of, times
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9420
ELSEWHERE = "198.51.100.7"
"""The server knows no way to this address of the client; the client has one to this of the server for bound sockets."""
SO_BINDTODEVICE = 25


@pytest.mark.parametrize("dropped", ["SYNs", "SYN-ACKs"])
@recorded(DIAGNOSE)
def test_handshakes(script: Script, dropped: str) -> Test:
    syns = dropped == "SYNs"
    client, server = script.client, script.server
    here, there = (client, server) if syns else (server, client)
    here.exec("ip", "addr", "add", f"{ELSEWHERE}/32", "dev", "veth0")
    there.sysctl("conf/veth0/rp_filter", 1)
    target = server.ipv4 if syns else ELSEWHERE
    if not syns:  # a bound socket has a route of its own, which rp_filter does not look at
        client.exec("ip", "route", "add", ELSEWHERE, "via", server.ipv4, "dev", "veth0", "table", 100)
        client.exec("ip", "rule", "add", "oif", "veth0", "lookup", 100)
    client.sysctl("tcp_syn_retries", 1)
    api, web = server.process("api"), client.process("web")
    api.listener(PORT, target)
    before = there.counter(COUNTER)
    made = [web.socket() for _ in range(MANY)]
    for each in made:
        if syns:
            each.bind(ELSEWHERE, 0)
        else:
            each.option(SOL_SOCKET, SO_BINDTODEVICE, b"veth0\0")
        each.start(target, PORT)
    for each in made:
        each.outcome()
    after = there.counter(COUNTER)
    there.until_rows(DIAGNOSE, 1, since=0)
    script.stay()
    seen = yield
    (finding,) = found(seen, client, server)  # and not what the other end sees of it
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("rp_filter", "critical")
    assert (facts["netns"], facts["what"]) == (there.inode, dropped)
    assert facts["count"] >= MANY
    assert MANY <= after.ret - before.ret <= facts["counted"]
    assert facts["peers"] == {ELSEWHERE: facts["count"]}
    assert facts["ports"] == {str(PORT): facts["count"]}
    assert "rp_filter=2" in (finding["remedies"][0]["command"] or "rp_filter=2")


def check(number: int, counted: int | None = None, **columns: Any) -> list[Finding]:
    given = {"netns": NETNS, "pid": None, "comm": None, "laddr": THERE, "lport": 80, "raddr": OTHER, "rport": 40_000}
    given |= {"direction": "RECEIVED", "kind": "LOST", "flags": "SYN", "reason": "IP_RPFILTER", "location": "f+0x1"}
    counters = SimpleNamespace(grown=lambda netns, name: counted if name == COUNTER else None)
    seen: Any = SimpleNamespace(drops=groups({of(**given | columns): times(number)}), counters=counters)
    return list(rule.check(seen))


@pytest.mark.parametrize(
    ("number", "severity"), [(LEAST - 1, []), (LEAST, ["warning"]), (MANY - 1, ["warning"]), (MANY, ["critical"])]
)
def test_three_handshakes(number: int, severity: list[str]) -> None:
    assert [finding.severity for finding in check(number)] == severity


@pytest.mark.parametrize(
    ("columns", "counted", "expected"),
    [
        ({"flags": "ACK"}, 9, 0),
        ({"flags": "SYN|ACK"}, 9, 1),
        ({"reason": "TCP_CSUM"}, 9, 0),
        ({"reason": None, "location": "ip_rcv_finish_core.isra.0+0x1a"}, 9, 1),
        ({"reason": None, "location": "ip_rcv_finish_core.isra.0+0x1a"}, 2, 0),
        ({"reason": None, "location": "tcp_v4_rcv+0x1"}, 9, 0),
        ({"direction": "SENT"}, 9, 0),
    ],
)
def test_what_is_no_handshake_or_no_rp_filter(columns: dict[str, Any], counted: int, expected: int) -> None:
    assert len(check(9, counted, **columns)) == expected
