"""Handshakes that rp_filter drops: SYNs of clients, and SYN-ACKs for processes of this host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from socket import SOL_SOCKET
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tcpscope.diagnose import Finding, causes, listener, paths, service
from tcpscope.diagnose.rules import connects_fail, drops, rp_filter, synack_unanswered
from tcpscope.diagnose.rules.drops import AT_LEAST
from tcpscope.diagnose.rules.rp_filter import COUNTER, LEAST, MANY, rule
from tcpscope.diagnose.tallies import Tally
from tcpscope.kernel import netns
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
    assert facts["rp_filter"] is None  # it is that of another network namespace
    route, looser = finding["remedies"]
    assert ELSEWHERE in route["what"]
    assert (looser["present"], looser["proposed"]) == ("1, or 2 and no route at all", 2)
    assert "rp_filter=2" in (looser["command"] or "rp_filter=2")


def dropped(**columns: Any) -> Any:
    given = {"netns": NETNS, "pid": None, "comm": None, "laddr": THERE, "lport": 80, "raddr": OTHER, "rport": 40_000}
    given |= {"direction": "RECEIVED", "kind": "LOST", "flags": "SYN", "reason": "IP_RPFILTER", "location": "f+0x1"}
    return of(**given | {"counter": None} | columns)


def check_all(given: dict[Any, Tally], counted: int | None = None) -> list[Finding]:
    counters = SimpleNamespace(grown=lambda netns, name: counted if name == COUNTER else None)
    seen: Any = SimpleNamespace(drops=groups(given), counters=counters)
    findings = [*rule.check(seen), *drops.rule.check(seen)]
    rule.name, drops.rule.name = "rp_filter", "drops"
    named = [
        msgspec.structs.replace(each, rule="drops" if "reason" in each.facts else "rp_filter") for each in findings
    ]
    return causes(named, [rule, drops.rule])


def check(number: int, counted: int | None = None, **columns: Any) -> list[Finding]:
    return check_all({dropped(**columns): times(number)}, counted)


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """What rp_filter is set to in the tool's own network namespace, which is that of the made-up drops."""

    def write(**values: int) -> None:
        for name, value in values.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "rp_filter").write_text(f"{value}\n")

    monkeypatch.setattr(rp_filter, "_CONF", tmp_path)
    monkeypatch.setattr(netns, "own", lambda: NETNS)
    known = (rp_filter._read, paths._entered)
    for function in known:
        function.cache_clear()
    yield write
    for function in known:
        function.cache_clear()


@pytest.mark.parametrize(
    ("number", "severity"), [(LEAST - 1, []), (LEAST, ["warning"]), (MANY - 1, ["warning"]), (MANY, ["critical"])]
)
def test_three_handshakes(number: int, severity: list[str]) -> None:
    assert [finding.severity for finding in check(number)] == severity


def forged(addresses: int, each: int = 1, **columns: Any) -> dict[Any, Tally]:
    return {dropped(raddr=f"10.0.{n // 256}.{n % 256}", **columns): times(each) for n in range(addresses)}


@pytest.mark.parametrize("flags", ["SYN", "SYN|ACK"])
def test_one_packet_from_each_of_many_addresses_is_what_it_is_for(flags: str) -> None:
    assert check_all(forged(AT_LEAST - 1, flags=flags)) == []
    for each in range(1, LEAST):
        (finding,) = check_all(forged(500, each, flags=flags))  # and not what `drops` would say of it
        assert (finding.rule, finding.severity, finding.remedies) == ("rp_filter", "info", [])
        assert finding.title.endswith(f"of 500 addresses: {500 * each}, fewer than 3 of each")
    clients = {dropped(flags=flags): times(MANY)}
    (finding,) = check_all(forged(500, flags=flags) | clients)
    assert (finding.severity, finding.facts["count"], finding.facts["peers"]) == ("critical", MANY, {OTHER: MANY})
    assert "beside them 500 of 500 more addresses, fewer than 3 of each: these may be forged" in finding.observed


def test_other_packets_are_told_beside_forged_handshakes() -> None:
    given = forged(500) | {dropped(flags="ACK"): times(AT_LEAST)}
    assert [each.rule for each in check_all(given)] == ["rp_filter", "drops"]
    given[dropped(flags="ACK")] = times(AT_LEAST - 1)
    assert [each.rule for each in check_all(given)] == ["rp_filter"]


@pytest.mark.parametrize(("flags", "told"), [("SYN", True), ("SYN|ACK", False)])
def test_a_flood_is_not_explained_by_syns_that_were_dropped(flags: str, told: bool) -> None:
    """A SYN that is dropped has no SYN-ACK. A SYN-ACK that its receiver drops here is never answered."""
    (finding,) = check(MANY, flags=flags)
    about = frozenset({listener(NETNS, 80), service(NETNS, OTHER, 40_000)})
    flood = Finding("synack_unanswered", "critical", "SYN flood", [], "", [], {}, about=about)
    synack_unanswered.rule.name = "synack_unanswered"
    assert causes([finding, flood], [rule, synack_unanswered.rule]) == [finding, *[flood] * told]
    refused = Finding("connects_fail", "critical", "", [], "", [], {}, about=finding.about)
    connects_fail.rule.name = "connects_fail"
    assert causes([finding, refused], [rule, connects_fail.rule]) == [finding]


STRICT, LOOSE, EITHER = "With rp_filter=1 the kernel", "With rp_filter=2 the kernel", "with 2 only if"
ROUTE, UNKNOWN = None, "1, or 2 and no route at all"


@pytest.mark.parametrize(
    ("values", "said", "modes", "remedies", "why"),
    [
        ({"all": 1, "eth0": 0}, "is 1; with it 1 counts at eth0", [1], [1, ROUTE], STRICT),
        ({"all": 0, "eth0": 1, "lo": 2}, "is 0; with it 1 counts at eth0", [1], [0, ROUTE], STRICT),
        ({"all": 0, "a": 1, "b": 0, "default": 2}, "is 0; with it 0 counts at b, 1 at a", [0, 1], [0, ROUTE], STRICT),
        ({"all": 0, "a": 1, "b": 2}, "is 0; with it 1 counts at a, 2 at b", [1, 2], [ROUTE, 0], EITHER),
        ({"all": 2} | dict.fromkeys("abcde", 1), "2 counts at a, b, c and 2 more devices", [2], [ROUTE], LOOSE),
        ({"all": 0, "eth0": 0}, "is 0; with it 0 counts at eth0", [0], [ROUTE], EITHER),  # it was changed meanwhile
        ({}, "rp_filter's value is not known", None, [ROUTE, UNKNOWN], EITHER),
    ],
)
def test_what_it_is_set_to(
    conf: Callable[..., None], values: dict[str, int], said: str, modes: Any, remedies: list[Any], why: str
) -> None:
    conf(**values)
    (finding,) = check(MANY)
    assert said in finding.observed[2]
    assert finding.facts["rp_filter"] == modes
    assert [each.present for each in finding.remedies] == remedies
    assert [each.command for each in finding.remedies if each.present is None] == [f"ip route get {OTHER}"]
    assert why in finding.why
    assert (EITHER in finding.why) == (why == EITHER)


def test_of_another_network_namespace_it_is_not_known(conf: Callable[..., None]) -> None:
    conf(all=1, eth0=1)
    (finding,) = check(MANY, netns=NETNS + 1)
    assert finding.facts["rp_filter"] is None
    assert "not known" in finding.observed[2]


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
