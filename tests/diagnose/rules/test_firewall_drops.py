"""Packets of handshakes and of connections that a firewall of this host drops, at the server and at the client."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

from tcpscope.diagnose import addresses, listener, peer, service
from tcpscope.diagnose import conntrack as tables
from tcpscope.diagnose.firewall import is_syn
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import no_ack
from tcpscope.diagnose.rules.firewall_drops import MANY_PEERS, SEGMENTS, rule
from tcpscope.kernel import netns
from tests.diagnose.rules.connecting import HERE, NETNS, OTHER, THERE, attempt, check, found, groups, of, sockets, times
from tests.diagnose.rules.connections import connection, track
from tests.diagnose.rules.scenes import PORT as SERVICE
from tests.diagnose.rules.scenes import only, scene, told
from tests.diagnose.rules.test_connects_fail import fail
from tests.record import Host, Script, Test, recorded
from tests.test_sampling import at
from tests.tools.queue.refusals import DIAGNOSE

RECEIVED, SENT, BOTH, COME, LEAVE, LAST, FROM, FOR = 9401, 9402, 9403, 9405, 9406, 9407, 9408, 9409


def chain(host: Host, hook: str, rule: str) -> None:
    host.exec("nft", "add table inet filter")
    host.exec("nft", f"add chain inet filter {hook} {{ type filter hook {hook} priority 0 ; }}")
    host.exec("nft", f"add rule inet filter {hook} {rule} counter drop")


def drop(host: Host, hook: str, port: int) -> None:
    chain(host, hook, f"tcp dport {port}")


@pytest.mark.parametrize("hook", ["input", "output"])
@recorded(DIAGNOSE)
def test_a_firewall(script: Script, hook: str) -> Test:
    port = RECEIVED if hook == "input" else SENT
    host = script.server if hook == "input" else script.client
    server, client = script.server.process("api"), script.client.process("web")
    script.client.sysctl("tcp_syn_retries", 1)
    server.listener(port)
    drop(host, hook, port)
    made = [client.socket() for _ in range(5)]
    for each in made:
        each.start(script.server.ipv4, port)
    for each in made:
        each.outcome()
    script.server.flush()
    rules = host.exec("nft", "list", "ruleset")
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)  # and not what the client sees of it
    facts = finding["facts"]
    assert (finding["rule"], facts["netns"]) == ("firewall_drops", host.inode)
    assert f"counter packets {facts['count']} bytes" in unquote(rules.data)
    assert facts["count"] >= 5
    owner = server if hook == "input" else client
    assert (facts["comm"], facts["pids"]) == (owner.comm, [owner.pid])
    assert f"{owner.comm} (PID {owner.pid}" in finding["who"]
    assert finding["severity"] == "critical"
    (remedy,) = finding["remedies"]
    assert remedy["command"] == f"nsenter -t {owner.pid} -n nft list ruleset"


@recorded(DIAGNOSE)
def test_two_faults_of_one_host_are_two_findings(script: Script) -> Test:
    client = script.client.process("web")
    script.client.sysctl("tcp_syn_retries", 1)
    drop(script.client, "output", BOTH)
    made = [client.socket() for _ in range(5)]
    for each in made:
        each.start(script.server.ipv4, BOTH)
    fail(client, script.server.ipv4, BOTH + 1, 7)
    for each in made:
        each.outcome()
    script.stay()
    seen = yield
    by_rule = {finding["rule"]: finding["facts"] for finding in found(seen, script.client, script.server)}
    assert by_rule.keys() == {"firewall_drops", "connects_fail"}
    assert by_rule["firewall_drops"]["rport"] == BOTH
    assert (by_rule["connects_fail"]["rports"], by_rule["connects_fail"]["count"]) == ([BOTH + 1], 7)


ANSWERS = "tcp sport {} tcp flags & (syn | ack) == syn | ack"


@pytest.mark.parametrize("hook", ["input", "output"])
@recorded(DIAGNOSE)
def test_answers_that_are_dropped(script: Script, hook: str) -> Test:
    """SYN-ACKs: where the client gets them, and where the server sends them. The SYNs pass."""
    port = COME if hook == "input" else LEAVE
    host = script.client if hook == "input" else script.server
    server, client = script.server.process("api"), script.client.process("orders")
    script.client.sysctl("tcp_syn_retries", 2)
    server.listener(port)
    chain(host, hook, ANSWERS.format(port))
    made = [client.socket() for _ in range(5)]
    for each in made:
        each.start(script.server.ipv4, port)
    for each in made:
        each.outcome()
    script.server.sysctl("tcp_synack_retries", 0)  # not once more
    client.pause(4_000_000)
    rules = host.exec("nft", "list", "ruleset")
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)  # and not what either end takes it for
    facts = finding["facts"]
    assert (finding["rule"], facts["netns"], facts["what"]) == ("firewall_drops", host.inode, "SYN-ACKs")
    assert f"counter packets {facts['count']} bytes" in unquote(rules.data)
    owner = client if hook == "input" else server
    assert (facts["comm"], facts["pids"], facts["direction"]) == (
        owner.comm,
        [owner.pid],
        "RECEIVED" if hook == "input" else "SENT",
    )
    assert (finding["severity"], facts["count"] >= 10) == ("critical", True)
    where = f"{script.server.ipv4}:{port}"
    assert (f" drops the answers of {where} to orders" if hook == "input" else f" the SYN-ACKs of {where}, api") in (
        finding["title"]
    )
    (remedy,) = finding["remedies"]
    assert "ct state established" in remedy["what"]
    assert remedy["command"] == f"nsenter -t {owner.pid} -n nft list ruleset"


@recorded(DIAGNOSE)
def test_acks_that_would_complete_handshakes(script: Script) -> Test:
    """The client believes that it is connected. The server's SYN-ACKs get no answer."""
    server, client = script.server.process("api"), script.client.process("web")
    server.listener(LAST)
    chain(script.server, "input", f"tcp dport {LAST} tcp flags & (syn | ack) == ack")
    for _ in range(6):
        client.socket().connect(script.server.ipv4, LAST)
    script.server.until_counter("TcpRetransSegs", 12)
    script.server.sysctl("tcp_synack_retries", 0)  # not once more
    client.pause(4_000_000)
    rules = script.server.exec("nft", "list", "ruleset")
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], facts["netns"], facts["what"]) == ("firewall_drops", script.server.inode, "ACKs")
    assert f"counter packets {facts['count']} bytes" in unquote(rules.data)
    assert (finding["severity"], facts["lport"], facts["pids"]) == ("critical", LAST, [server.pid])


@pytest.mark.parametrize("what", ["ACKs", "FINs"])
@recorded(DIAGNOSE)
def test_what_comes_in_for_open_connections(script: Script, what: str) -> Test:
    """ACKs for the client, or its FINs for the server. They are few, but connections stall for them."""
    made = scene(script)
    host, other = (script.client, script.server) if what == "ACKs" else (script.server, script.client)
    chain(host, "input", f"tcp sport {SERVICE}" if what == "ACKs" else "tcp flags & fin == fin")
    for near in made.nears:
        near.send_all(100)
        if what == "FINs":
            near.until_acknowledged()
            near.close()
    if what == "ACKs":
        made.until_timeouts(4)
    made.client.pause(5_000_000)
    if what == "FINs":
        made.connect(2)
    told(host)
    seen = yield
    finding = only(seen, script, "firewall_drops", host)  # and not that the other end does not answer
    facts = finding["facts"]
    assert (finding["severity"], facts["direction"], facts["raddr"]) == ("critical", "RECEIVED", other.ipv4)
    process = made.client if what == "ACKs" else made.server
    assert (facts["pids"], facts["comm"], facts["stalled"]) == ([process.pid], process.comm, 3)
    assert finding["title"].startswith(f"a firewall of this host drops what {other.ipv4} sends: ")


CONTAINERS = "203.0.113"


@pytest.mark.parametrize("way", ["from", "for"])
@recorded(DIAGNOSE)
def test_a_host_that_forwards(script: Script, way: str) -> Test:
    """The server is the host, and the client a container: it connects through the host, or has what is published there.

    What comes to the container's address is sent by the container itself, but takes the way through the host.
    """
    host, inside = script.server, script.client
    port, target = (FROM, f"{CONTAINERS}.7") if way == "from" else (FOR, f"{CONTAINERS}.8")
    host.sysctl("ip_forward", 1)
    for device in ("all", "veth0"):
        host.sysctl(f"conf/{device}/send_redirects", 0)
    host.exec("ip", "route", "add", f"{CONTAINERS}.0/24", "dev", "veth0")
    inside.exec("ip", "route", "add", f"{CONTAINERS}.0/24", "via", host.ipv4)
    inside.sysctl("tcp_syn_retries", 1)
    client, web = inside.process("orders"), inside.process("web")
    if way == "for":
        inside.sysctl("ip_nonlocal_bind", 1)
        web.listener(port, target)
    proxy = host.process("proxy")
    proxy.listener(port)  # diagnose reads the addresses of the host through a process that listens there
    chain(host, "forward", f"tcp dport {port}")
    made = [client.socket() for _ in range(5)]
    for each in made:
        each.start(target, port)
    for each in made:
        each.outcome()
    rules = host.exec("nft", "list", "ruleset")
    script.stay()
    seen = yield
    (finding,) = found(seen, host, inside)  # and not that the other end does not answer
    facts = finding["facts"]
    owner = client if way == "from" else web
    assert (finding["rule"], facts["netns"], facts["forwarded"]) == ("firewall_drops", host.inode, True)
    assert (finding["severity"], facts["comm"], facts["pids"]) == ("critical", owner.comm, [owner.pid])
    assert f"counter packets {facts['count']} bytes" in unquote(rules.data)
    assert f" {target}:{port}" in finding["title"]
    assert any(f"forwards them, for network namespace {inside.inode}" in line for line in finding["observed"])
    (remedy,) = finding["remedies"]
    assert remedy["command"] == f"nsenter -t {proxy.pid} -n nft list ruleset"  # there the rules are


LATE = "add rule inet filter output tcp sport {} tcp flags & (syn | fin | rst | psh) == 0 counter drop"


@recorded(DIAGNOSE)
def test_acks_that_never_leave(script: Script) -> Test:
    """The server's firewall drops its ACKs. Its answer acknowledges the request, too: so ACKs seem to be late."""
    made = scene(script, 6)
    server = script.server
    server.exec("nft", "add table inet filter")
    server.exec("nft", "add chain inet filter output { type filter hook output priority 0 ; }")
    server.exec("nft", LATE.format(SERVICE))
    for _ in range(2):
        for near in made.nears:
            near.send_all(100)
        made.until_timeouts(2)
        for near, far in made.ends:
            far.read(100)
            far.send("answer")
            near.receive()
    rules = server.exec("nft", "list", "ruleset")
    told(server)
    seen = yield
    finding = only(seen, script, "firewall_drops", server)  # and not what the client takes it for
    facts = finding["facts"]
    assert (finding["severity"], facts["direction"], facts["raddr"]) == ("warning", "SENT", script.client.ipv4)
    assert (facts["pids"], facts["comm"]) == ([made.server.pid], "database")
    assert f"counter packets {facts['count']} bytes" in unquote(rules.data)
    assert facts["count"] == facts["acks"] >= SEGMENTS


@pytest.mark.parametrize(
    ("columns", "number", "out", "expected"),
    [
        ({}, 20, 2000, 1),
        ({}, 19, 100, 0),
        ({}, 20, 2001, 0),
        ({}, 20, None, 0),  # not known: a firewall drops late segments now and then
        ({"flags": "ACK|RST"}, 90, 100, 0),
        ({"direction": "RECEIVED"}, 90, 100, 0),  # of no connection that is known: it has ended, or never was
        ({"direction": "RECEIVED", "pid": 7, "comm": "api"}, 20, 1980, 1),
        ({"direction": "RECEIVED", "pid": 7, "comm": "api"}, 19, 100, 0),
        ({"direction": "RECEIVED", "pid": 7, "comm": "api"}, 20, 1981, 0),
        ({"direction": "RECEIVED", "pid": 7, "comm": "api"}, 20, None, 0),
    ],
)
def test_twenty_segments_and_one_in_a_hundred(columns: Any, number: int, out: int | None, expected: int) -> None:
    own = dropped(**{"direction": "SENT", "flags": "ACK"} | columns)
    counters = SimpleNamespace(grown=lambda netns, name: {"TcpOutSegs": out, "TcpInSegs": out}.get(name))
    queues = SimpleNamespace(histories={})
    assert len(check(rule, drops=groups({own: times(number)}), queues=queues, counters=counters)) == expected


CONNECTION = {"laddr": THERE, "lport": 80, "raddr": OTHER, "rport": 40_000}


def stalled(**columns: Any) -> Any:
    """A connection whose remote end does not answer."""
    waits = {"out_segs": 1, "backoff": 3, "retransmits": 3, "since_ack_us": 9_000_000, "rto_us": 1_600_000}
    row = connection(**{"netns": NETNS, "peer_window": 65_536, "unacked": 100} | waits | CONNECTION | columns)
    return track(no_ack.rule, [row] * 2)


@pytest.mark.parametrize(
    ("columns", "number", "sockets", "expected"),
    [
        ({}, 3, [stalled()], ["critical"]),
        ({}, 2, [stalled()], []),
        ({}, 3, [stalled(lport=81)], []),  # another connection
        ({}, 3, [stalled(role="PASSIVE")], []),  # one client
        ({}, 3, [stalled(backoff=1, retransmits=1)], []),
        ({"direction": "SENT"}, 3, [stalled()], ["critical"]),
        (
            {"pid": 7, "comm": "api"},
            3,
            [stalled(netns=1, laddr=OTHER, lport=40_000, raddr=THERE, rport=80)],
            ["critical"],
        ),
        ({}, 3, [stalled(netns=1, laddr=OTHER, lport=40_000, raddr=THERE, rport=80)], []),  # is it for this host?
        ({"flags": "RST"}, 3, [stalled()], []),
    ],
)
def test_few_segments_of_connections_that_stall(columns: Any, number: int, sockets: Any, expected: list[str]) -> None:
    own = dropped(**{"flags": "ACK"} | columns)
    seen: Any = {"sockets": SimpleNamespace(now=sockets), "queues": SimpleNamespace(histories={})}
    made = check(rule, drops=groups({own: times(number)}), **seen)
    assert [each.severity for each in made] == expected
    for each in made:
        assert peer(sockets[0].last.netns, sockets[0].last.raddr) in each.about  # as that which no_ack finds


def test_a_firewall_explains_what_its_drops_look_like() -> None:
    assert {"connects_fail", "synack_unanswered", "no_ack"} <= {*rule.explains}


@pytest.mark.parametrize(
    ("outcomes", "waiting", "expected"),
    [
        ({}, {}, []),  # nobody has asked for them
        ({}, {"netns": NETNS}, ["critical"]),
        ({}, {"netns": NETNS, "rport": 81}, []),
        ({}, {"netns": NETNS + 1}, []),  # of another host's container
        ({"TIMED_OUT": 1}, {}, ["critical"]),
        ({"ESTABLISHED": 5}, {}, []),
        ({"ESTABLISHED": 5, "TIMED_OUT": 1}, {}, ["warning"]),
    ],
)
def test_answers_for_who_waits(outcomes: dict[str, int], waiting: dict[str, Any], expected: list[str]) -> None:
    own = dropped(laddr=HERE, lport=40_000, raddr=THERE, rport=80, flags="SYN|ACK")
    made = groups({attempt(outcome): times(number) for outcome, number in outcomes.items()})
    ends = {"laddr": HERE, "raddr": THERE, "rport": 80, "pid": 7, "comm": "client", "state": "SYN_SENT"}
    rows = [SimpleNamespace(**ends | waiting)] if waiting else []
    queues = SimpleNamespace(histories={})
    answers = check(rule, drops=groups({own: times(9)}), queues=queues, attempts=made, sockets=sockets(*rows))
    assert [each.severity for each in answers] == expected


def dropped(**columns: Any) -> Any:
    given = {"netns": NETNS, "pid": None, "comm": None, "laddr": THERE, "lport": 80, "raddr": OTHER, "rport": 40_000}
    given |= {"direction": "RECEIVED", "flags": "SYN", "reason": "NETFILTER_DROP", "location": "nf_hook_slow+0x8c"}
    return of(**given | columns)


def tries(number: int, syns: int = 1, **columns: Any) -> dict[Any, Any]:
    """So many connections of one peer, with so many SYNs each."""
    return {dropped(rport=40_000 + each, **columns): times(syns) for each in range(number)}


def findings(
    given: Any,
    laddr: str = "0.0.0.0",
    accepts: int | None = 0,
    seen_at: str | None = THERE,
    connected: str = HERE,
    served: Any = (),
    **evidence: Any,
) -> list[Any]:
    """`seen_at`: there a connection of the listener with `connected` was seen. The addresses of NETNS cannot be read.

    `accepts`: so many were accepted, after the first drop. `served`: to whom connections of this port belonged.
    """
    first = at(0, 0, 0, 0, laddr=laddr, lport=80, netns=NETNS, accepts=0)
    history = History(first, first)
    history.look(first, 90.0)
    history.look(at(0, 0, 0, 0, laddr=laddr, lport=80, netns=NETNS, accepts=accepts), 105.0)
    row = SimpleNamespace(netns=NETNS, lport=80, laddr=seen_at, raddr=connected, state="ESTABLISHED")
    rows = [row] if seen_at else []
    own = sockets(*rows)
    own.served = {(NETNS, 80): dict.fromkeys(served, 95.0)}
    queues = SimpleNamespace(histories={1: history})
    return check(rule, drops=groups(given), queues=queues, sockets=own, **evidence)


@pytest.mark.parametrize(
    ("count", "accepts", "expected"),
    [(2, 0, []), (3, 0, ["warning"]), (5, 0, ["critical"]), (5, 9, ["warning"]), (5, None, ["warning"])],
)
def test_three_connections_of_one_peer(count: int, accepts: int | None, expected: list[str]) -> None:
    assert [each.severity for each in findings(tries(count), accepts=accepts)] == expected


def test_scanners_and_ports_that_do_not_listen_are_no_finding() -> None:
    assert findings({dropped(raddr=f"198.51.100.{host}"): times(1) for host in range(100)}) == []
    assert findings(tries(20, lport=81)) == []
    assert findings(tries(20), laddr="127.0.0.1") == []


BOT = "9.9.9.9"
"""An address of the Internet."""


def test_a_bot_that_sends_its_syn_again_is_no_finding() -> None:
    assert findings({dropped(raddr=BOT): times(1, 1, 0, 1, 0, 0, 0, 1)}) == []
    assert findings(tries(2, syns=5, raddr=BOT)) == []
    bots = {dropped(raddr=f"9.9.9.{host}"): times(5) for host in range(MANY_PEERS - 1)}
    assert findings(bots) == []


@pytest.mark.parametrize("accepts", [0, 9])
def test_a_stranger_that_comes_again_is_for_information(accepts: int) -> None:
    (finding,) = findings(tries(9, syns=5, raddr=BOT), accepts=accepts)
    assert (finding.severity, finding.facts["connections"], finding.facts["count"]) == ("info", 9, 45)
    assert "looks for services" in finding.why


@pytest.mark.parametrize(
    "more",
    [
        {"served": [BOT]},
        {"connected": BOT},
        {"seen_at": None, "laddr": THERE, "attempts": {"laddr": BOT}},  # a client on this machine
        {"seen_at": None, "laddr": THERE, "attempts": {"outcome": "ESTABLISHED", "laddr": THERE, "raddr": BOT}},
    ],
)
def test_a_peer_of_which_more_is_known(more: Any) -> None:
    if "attempts" in more:
        more["attempts"] = groups({attempt(**{"outcome": "TIMED_OUT"} | more["attempts"]): times(1)})
    assert [each.severity for each in findings(tries(5, raddr=BOT), **more)] == ["critical"]


@pytest.mark.parametrize("more", [{"served": [BOT]}, {"connected": BOT}])
def test_one_connect_that_waits_of_a_peer_of_which_more_is_known(more: Any) -> None:
    """It is one client: a warning. Its SYN is sent again and again."""
    assert [each.severity for each in findings({dropped(raddr=BOT): times(1, 1, 0, 1)}, **more)] == ["warning"]
    assert findings({dropped(raddr=BOT): times(1, 1)}, **more) == []
    assert [each.severity for each in findings({dropped(raddr="10.0.0.5"): times(1, 1, 0, 1)})] == ["warning"]


def test_many_clients_that_wait_where_nobody_is_accepted_any_more() -> None:
    clients = {dropped(raddr=f"9.9.9.{host}"): times(1, 1) for host in range(MANY_PEERS)}
    assert [each.severity for each in findings(clients)] == ["critical"]
    assert findings(clients, accepts=9) == []  # a firewall keeps them out, and lets others in
    assert findings({dropped(raddr=f"9.9.9.{host}"): times(1) for host in range(100)}) == []


def test_accepts_that_stop_when_the_drops_begin() -> None:
    first = at(0, 0, 0, 0, laddr=THERE, lport=80, netns=NETNS, accepts=0)
    history = History(first, first)
    history.look(first, 90.0)
    history.look(at(0, 0, 0, 0, laddr=THERE, lport=80, netns=NETNS, accepts=50), 99.0)
    queues = SimpleNamespace(histories={1: history})
    (finding,) = check(rule, drops=groups(tries(5)), queues=queues)
    assert (finding.severity, finding.facts["accepts"]) == ("critical", 50)


INSIDE, FAR = "172.17.0.2", "10.1.1.7"
"""The address of a container, and one that it connects to."""


@pytest.mark.parametrize(
    ("local", "waiting", "expected"),
    [
        (False, {}, ["orders"]),
        (True, {}, []),  # then the host drops what is for itself
        (None, {}, []),
        (False, {"laddr": OTHER}, []),  # another container
        (False, {"rport": 443}, []),
        (False, {"state": "ESTABLISHED"}, []),
    ],
)
@pytest.mark.parametrize("what", ["SYNs", "SYN-ACKs"])
def test_what_a_container_sends(
    monkeypatch: pytest.MonkeyPatch, what: str, local: bool | None, waiting: Any, expected: list[str]
) -> None:
    far, near = {"laddr": FAR, "lport": 5432}, {"raddr": INSIDE, "rport": 40_000}
    if what == "SYN-ACKs":
        far, near = {"raddr": FAR, "rport": 5432}, {"laddr": INSIDE, "lport": 40_000}
    monkeypatch.setattr(addresses, "has", lambda inode, address, listeners: local if inode == NETNS else True)
    ends = {"laddr": INSIDE, "raddr": FAR, "rport": 5432, "pid": 7, "comm": "orders", "state": "SYN_SENT"}
    row = SimpleNamespace(**{"netns": NETNS + 1} | ends | waiting)
    own = dropped(flags="SYN" if what == "SYNs" else "SYN|ACK", **far, **near)
    queues = SimpleNamespace(histories={})
    made = check(rule, drops=groups({own: times(30)}), queues=queues, sockets=sockets(row))
    assert [each.facts["comm"] for each in made] == expected
    for each in made:
        assert (each.severity, each.facts["netns"], each.facts["what"]) == ("critical", NETNS, what)
        assert service(NETNS + 1, FAR, 5432) in each.about  # as that which cannot connect


@pytest.mark.parametrize(
    ("listens", "local", "knows", "expected"),
    [
        (INSIDE, False, None, 1),
        (INSIDE, True, None, 0),
        ("0.0.0.0", False, True, 1),
        ("0.0.0.0", False, None, 0),  # whether it has this address is not known
        ("0.0.0.0", False, False, 0),
        (OTHER, False, True, 0),
    ],
)
def test_what_is_for_a_container(
    monkeypatch: pytest.MonkeyPatch, listens: str, local: bool, knows: bool | None, expected: int
) -> None:
    monkeypatch.setattr(addresses, "has", lambda inode, address, listeners: local)
    monkeypatch.setattr(addresses, "is_local", lambda address, own: knows)
    first = at(0, 0, 0, 0, laddr=listens, lport=80, netns=NETNS + 1, accepts=0)
    queues = SimpleNamespace(histories={1: History(first, first)})
    made = check(rule, drops=groups(tries(5, laddr=INSIDE)), queues=queues)
    assert len(made) == expected
    for each in made:
        assert (each.severity, each.facts["netns"], each.facts["forwarded"]) == ("critical", NETNS, True)
        assert f" drops connections to {INSIDE}:80, " in each.title
        assert listener(NETNS + 1, 80) in each.about


@pytest.fixture
def conntrack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let NETNS be our own namespace, whose table has so many entries, and may have so many."""

    def set_(count: int, most: int) -> None:
        for name, value in (("count", count), ("max", most)):
            (tmp_path / f"nf_conntrack_{name}").write_text(f"{value}\n")

    monkeypatch.setattr(tables, "SYSCTLS", tmp_path)
    monkeypatch.setattr(netns, "own", lambda: NETNS)
    monkeypatch.setattr(rule, "_tables", tables.Tables())
    return set_


@pytest.mark.parametrize(
    ("count", "most", "columns", "full"),
    [
        (65_536, 65_536, {}, True),
        (64_881, 65_536, {}, True),  # 99 %
        (64_880, 65_536, {}, False),
        (65_536, 0, {}, False),  # without a limit
        (65_536, 65_536, {"location": "nft_do_chain+0x3e8"}, False),  # there a rule drops
        (65_536, 65_536, {"location": None}, True),
    ],
)
def test_a_full_table_of_connections(
    conntrack: Callable[[int, int], None], count: int, most: int, columns: Any, full: bool
) -> None:
    conntrack(count, most)
    sent = {dropped(direction="SENT", laddr=HERE, raddr=OTHER, rport=443, **columns): times(2)}
    made = findings(tries(5, **columns) | sent, laddr=THERE)
    assert [("connection tracking" in each.title) for each in made] == [full]
    if full:
        (finding,) = made
        assert finding.title.endswith(f" is full: {count:,} of 65,536 entries")
        assert (finding.severity, finding.facts["count"]) == ("critical", 7)
        assert {listener(NETNS, 80), service(NETNS, OTHER, 443)} <= finding.about
        (remedy,) = finding.remedies
        assert (remedy.present, remedy.proposed) == (65_536, 131_072)
        assert remedy.command == "sysctl -w net.netfilter.nf_conntrack_max=131072"
        assert "42 MB" in (remedy.risk or "")


def test_a_table_that_was_full_a_moment_ago(
    conntrack: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    conntrack(65_536, 65_536)
    now_s = time.monotonic()
    for count, later_s, full in ((65_536, 0, True), (10, 30, True), (10, 61, False)):
        conntrack(count, 65_536)
        monkeypatch.setattr(time, "monotonic", lambda later_s=later_s: now_s + later_s)
        (finding,) = findings(tries(5), laddr=THERE)
        assert ("connection tracking" in finding.title) is full


def test_it_is_said_if_a_full_table_may_have_dropped_them(conntrack: Callable[[int, int], None]) -> None:
    (finding,) = findings(tries(5), laddr=THERE)  # without the sysctls
    assert "table is full" in finding.why
    (finding,) = findings(tries(5, location="nft_do_chain+0x3e8"), laddr=THERE)
    assert finding.why.startswith("A netfilter rule of this")
    conntrack(10, 65_536)
    (finding,) = findings(tries(5), laddr=THERE)
    assert finding.why.startswith("A netfilter rule of this")


def test_the_table_of_another_namespace_cannot_be_read(conntrack: Callable[[int, int], None]) -> None:
    conntrack(10, 10)
    assert tables.read(NETNS) == tables.Table(10, 10)
    assert tables.read(NETNS + 1) is None


def test_answers_that_are_dropped_are_a_fault_whosever_they_are() -> None:
    sent = tries(5, raddr=BOT, direction="SENT", flags="SYN|ACK")
    for seen_at in (THERE, None):  # what is sent has an address of this host
        (finding,) = findings(sent, seen_at=seen_at)
        assert finding.severity == "critical"


@pytest.mark.parametrize(
    ("listens", "laddr", "number"),
    [
        ("0.0.0.0", THERE, 1),
        ("::", THERE, 1),
        ("0.0.0.0", "203.0.113.5", 0),  # forwarded to another host
        ("::", "203.0.113.5", 0),
        ("203.0.113.5", "203.0.113.5", 1),
        ("0.0.0.0", "2001:db8::2", 0),
        ("::", "2001:db8::2", 1),
        ("::", "2001:db8::3", 0),
    ],
)
def test_a_listener_at_all_addresses_has_those_of_its_namespace(
    listens: str, laddr: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "is_local", lambda address, own: address in (THERE, "2001:db8::2"))
    assert len(findings(tries(9, laddr=laddr), laddr=listens, seen_at=None)) == number


def test_the_title_has_the_address_that_clients_come_to() -> None:
    (finding,) = findings(tries(9))
    assert f" drops connections to {THERE}:80, " in finding.title
    (finding,) = findings(tries(9) | tries(9, laddr="2001:db8::2"), laddr="::")
    assert f" drops connections to {THERE}:80, " in finding.title  # the other is no address of this host


def test_addresses_that_are_not_known_are_those_of_connections() -> None:
    assert len(findings(tries(9))) == 1
    assert findings(tries(9), seen_at=None) == []
    assert findings(tries(9), seen_at=OTHER) == []
    assert len(findings(tries(9), laddr=THERE, seen_at=None)) == 1


def test_before_reasons_the_function_tells() -> None:
    assert len(findings(tries(3, reason=None))) == 1
    assert findings(tries(3, reason=None, location="tcp_v4_rcv+0x1")) == []
    assert findings(tries(3, reason="TCP_CSUM")) == []


@pytest.mark.parametrize(("flags", "expected"), [("SYN", True), ("SYN|ACK", False), ("RST", False), (None, False)])
def test_syns(flags: str | None, expected: bool) -> None:
    assert is_syn(flags) is expected
