"""A remote end that acknowledges nothing: gone, deaf, or cut off from some connections."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import silence, silence_remedies
from tcpscope.diagnose.rules import no_ack
from tcpscope.diagnose.sockets import Track
from tcpscope.kernel import netns
from tests.diagnose.rules.scenes import PORT, Scene, only, scene, told
from tests.diagnose.rules.test_paths import NETNS, STALLED, evidence, found, track
from tests.record import Script, Test, recorded
from tests.record.script import NOBODYS_MAC, Host
from tests.tools.queue.refusals import DIAGNOSE

SECOND, NOWHERE = "192.0.2.77", "192.0.2.200"
"""Another address of the client, and a router that does not exist."""


@recorded(DIAGNOSE)
def test_a_peer_that_has_gone(script: Script) -> Test:
    made = scene(script)
    script.client.lose(), script.server.lose()
    for near in made.nears:
        near.send_all(1000)
    made.until_timeouts(3)
    told(script.client)
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "gone", 3)
    assert (facts["raddr"], facts["pids"], facts["comm"]) == (script.server.ipv4, [made.client.pid], "orders")
    assert (facts["unacked_bytes"], facts["orphans"], facts["opened_meanwhile"]) == (3000, 0, 0)
    assert facts["timeouts"] >= 3
    assert finding["who"].startswith(f"orders (PID {made.client.pid}")
    route, timeout = finding["remedies"]
    assert route["command"].endswith(f"ip route get {script.server.ipv4}")
    assert (timeout["name"], timeout["present"]) == ("TCP_USER_TIMEOUT", "not set")


@recorded(DIAGNOSE)
def test_a_link_that_is_down(script: Script) -> Test:
    """Nothing is sent, so nothing is sent again, and no RTO runs."""
    made = scene(script)
    before = script.client.counters()
    script.client.exec("ip", "link", "set", "dev", "veth0", "down")
    for near in made.nears:
        near.send_all(1000)
    script.client.until_rows(DIAGNOSE, 1, since=0)
    after = script.client.counters()
    script.stay()
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts, counted = finding["facts"], after.counters - before.counters
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "here", 3)
    assert counted["TcpRetransSegs"] == counted["TcpExtTCPTimeouts"] == facts["unacked_bytes"] == 0
    assert "3,000 bytes wait to be sent, and none was" in finding["observed"]
    (remedy,) = finding["remedies"]
    assert remedy["command"] == (f"nsenter -t {made.client.pid} -n sh -c 'ip route get {script.server.ipv4}; ip link'")


@recorded(DIAGNOSE)
def test_orphans_of_a_peer_that_has_gone(script: Script) -> Test:
    """The application has closed them: they wait in FIN_WAIT1 without a process."""
    made = scene(script)
    script.client.lose(), script.server.lose()
    for near in made.nears:
        near.send_all(1000)
    made.until_timeouts(3)
    for near in made.nears:
        near.close()
    script.client.until_sockets(3, state="FIN_WAIT1")
    told(script.client)
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts = finding["facts"]
    assert (facts["case"], facts["count"], facts["orphans"]) == ("gone", 3, 3)
    assert facts["unacked_bytes"] >= 3000
    assert (finding["who"], "it does not wait" in finding["why"]) == (None, True)
    (remedy,) = finding["remedies"]
    assert remedy["command"].endswith(f"ip route get {script.server.ipv4}")


@recorded(DIAGNOSE)
def test_connections_that_are_cut_off_while_others_work(script: Script) -> Test:
    """What comes from one of the client's addresses is lost on the way, as if a firewall had forgotten it.

    They are idle before that, and not for as long as firewalls wait: that may be another fault.
    """
    made = scene(script, 0)
    client, server = script.client, script.server
    client.exec("ip", "addr", "add", f"{SECOND}/32", "dev", "veth0")
    client.exec("ip", "neigh", "replace", NOWHERE, "lladdr", NOBODYS_MAC, "dev", "veth0", "nud", "permanent")
    server.exec("ip", "neigh", "replace", SECOND, "lladdr", client.mac, "dev", "veth0", "nud", "permanent")
    cut = [near for near, _ in made.connect(3, source=SECOND)]
    acknowledged = made.client.now()
    client.exec("ip", "route", "add", server.ipv4, "via", NOWHERE, "dev", "veth0", "table", 100)
    client.exec("ip", "rule", "add", "from", SECOND, "lookup", 100)
    made.client.pause(3_500_000)
    sent = [near.send_all(1000) for near in cut]
    made.until_timeouts(3, *cut)
    made.client.pause(2_000_000)  # what is opened meanwhile is counted by the second
    made.connect(2)
    told(client)
    seen = yield
    finding = only(seen, script, "no_ack", client)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "others", 3)
    assert (facts["pids"], facts["opened_meanwhile"] >= 1) == ([made.client.pid], True)
    idle_s = (sent[0].end_us - acknowledged.begin_us) / 1e6
    assert idle_s >= 3.5
    assert idle_s - 0.1 <= facts["idle_s"] <= idle_s + 2.5
    assert any(line.startswith("they were idle before that for ") for line in finding["observed"])
    route, timeout = finding["remedies"]
    assert route["command"].endswith(f"ip route get {server.ipv4}")
    assert timeout["name"] == "TCP_USER_TIMEOUT"


def lead_astray(host: Host, packets: str) -> None:
    """From now on these packets of a host take a way that leads nowhere. A firewall would be a finding of its own."""
    host.exec("ip", "neigh", "replace", NOWHERE, "lladdr", NOBODYS_MAC, "dev", "veth0", "nud", "permanent")
    host.exec("ip", "route", "add", host.peer.ipv4, "via", NOWHERE, "dev", "veth0", "table", 100)
    host.exec("ip", "rule", "add", "fwmark", 1, "lookup", 100)
    host.exec("nft", "add table ip way")
    host.exec("nft", "add chain ip way out { type route hook output priority 0 ; }")
    host.exec("nft", f"add rule ip way out {packets} meta mark set 1")


@recorded(DIAGNOSE)
def test_only_fins_are_lost(script: Script) -> Test:
    made = scene(script)
    lead_astray(script.client, "tcp flags & fin == fin")
    for near in made.nears:
        near.send_all(100)
        near.until_acknowledged()
        near.close()
    made.client.pause(5_000_000)  # what is opened meanwhile is counted by the second
    made.connect(2)
    told(script.client)
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "fins", 3)
    assert (facts["unacked_bytes"], facts["orphans"]) == (3, 3)
    assert finding["title"].endswith("get no answer to their FIN")
    (remedy,) = finding["remedies"]
    assert "FINs" in remedy["what"]


@recorded(DIAGNOSE)
def test_one_client_that_vanishes_is_no_fault_of_this_host(script: Script) -> Test:
    made = scene(script, 1)
    ((near, far),) = made.ends
    script.client.lose(), script.server.lose()
    far.send_all(1000)
    made.until_timeouts(3, far)
    told(script.server)
    seen = yield
    finding = only(seen, script, "no_ack", script.server)
    assert (finding["severity"], finding["facts"]["case"], finding["facts"]["lport"]) == ("info", "clients", PORT)
    assert (finding["facts"]["count"], finding["remedies"]) == (1, [])
    assert near


MANY = 22


def many_clients(script: Script) -> Scene:
    """Each with an address of its own, and a connection to the server."""
    made = scene(script, 0)
    for n in range(MANY):
        address = f"192.0.2.{100 + n}"
        script.client.exec("ip", "addr", "add", f"{address}/32", "dev", "veth0")
        script.server.exec(
            "ip", "neigh", "replace", address, "lladdr", script.client.mac, "dev", "veth0", "nud", "permanent"
        )
        made.connect(1, source=address)
    return made


@recorded(DIAGNOSE)
def test_all_clients_vanish_at_a_time(script: Script) -> Test:
    made = many_clients(script)
    script.client.lose(), script.server.lose()
    for _, far in made.ends:
        far.send_all(1000)
    made.until_timeouts(3, *(far for _, far in made.ends))
    made.server.pause(9_000_000)  # until nobody can be expected to answer any more
    script.server.until_rows(DIAGNOSE, 1, since=0, one_way=0)  # single clients are told before
    script.stay()
    seen = yield
    finding = only(seen, script, "no_ack", script.server)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["lport"]) == ("critical", "nobody", PORT)
    assert (facts["clients"], facts["count"], facts["unacked_bytes"]) == (MANY, MANY, 1000 * MANY)
    assert (facts["answered_meanwhile"], facts["one_way"]) == (0, 0)
    assert facts["pids"] == [made.server.pid]


@recorded(DIAGNOSE)
def test_a_link_that_is_down_on_the_way_to_all_clients(script: Script) -> Test:
    made = many_clients(script)
    script.server.exec("ip", "link", "set", "dev", "veth0", "down")
    for _, far in made.ends:
        far.send_all(1000)
    told(script.server)
    seen = yield
    finding = only(seen, script, "no_ack", script.server)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"]) == ("critical", "here")
    assert (facts["peers"], facts["count"], facts["unacked_bytes"]) == (MANY, MANY, 0)
    assert finding["title"] == f"this host cannot send to {MANY} addresses: {MANY} connections stalled"


BEHIND = 36
"""Connections from the address of a NAT that live, beside three that are lost: twelve times as many."""


@recorded(DIAGNOSE)
def test_three_clients_vanish_of_many_behind_one_address(script: Script) -> Test:
    made = scene(script, 0)
    lost = []
    for port in (40_001, 40_002, 40_003):
        near = made.client.socket()
        near.bind(script.client.ipv4, port)
        near.connect(script.server.ipv4, PORT)
        lost.append(made.listener.accept())
    others = made.connect(BEHIND)
    lead_astray(script.server, "tcp dport 40001-40003")
    for far in lost:
        far.send_all(1000)
    made.until_timeouts(2, *lost)
    for _ in range(10):  # looks are rare on a machine with many sockets and much to do
        for near, far in others:
            far.send_all(100)
            near.read(100)
        made.server.pause(1_000_000)
    made.until_timeouts(3, *lost)
    told(script.server)
    seen = yield
    finding = only(seen, script, "no_ack", script.server)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["lport"], facts["count"]) == ("info", "clients", PORT, 3)
    assert f"meanwhile {BEHIND} other connections of these addresses had an answer" in finding["observed"]


def row(**columns: Any) -> SimpleNamespace:
    """A connection that has waited long for an ACK."""
    return SimpleNamespace(
        **{
            "state": "ESTABLISHED",
            "out_segs": 1,
            "backoff": 3,
            "retransmits": 3,
            "srtt_us": 1000,
            "since_ack_us": 3_000_000,
            "rto_us": 1_600_000,
            "acked_seq": 0,
            "unsent": 0,
            "timer": "RTO",
            "peer_window": 65_536,
            "mss": 1448,
        }
        | columns
    )


@pytest.mark.parametrize(
    ("columns", "is_silent"),
    [
        ({}, True),
        ({"backoff": 0}, True),  # what could not be sent does not double the timeout
        ({"backoff": 2, "retransmits": 2}, False),
        ({"since_ack_us": 2_999_999}, False),
        ({"srtt_us": 400_000}, False),
        ({"out_segs": 0}, False),
        ({"out_segs": 0, "unsent": 100, "timer": "ZERO_WINDOW"}, True),  # and the window is open
        ({"out_segs": 0, "unsent": 100, "timer": "ZERO_WINDOW", "peer_window": 99}, False),
        ({"state": "SYN_SENT"}, False),
    ],
)
def test_three_timeouts_and_three_seconds_of_silence(columns: dict[str, Any], is_silent: bool) -> None:
    of = row(**columns)
    track = Track(of, of, 0.0, 0.0)
    track._look(of, 0.0, no_ack.rule.marks)
    assert no_ack.is_silent(track) == is_silent


def vanished(n: int = 0, number: int = 1, **columns: Any) -> list[Track]:
    """A client of port 443 that has not answered for 20 s, with so many connections."""
    stalled = STALLED | {"rto_us": 21_333_333, "since_ack_us": 21_000_000, "role": "PASSIVE", "lport": 443}
    raddr = f"198.51.{100 + n // 250}.{n % 250}"
    return [track(**stalled | {"raddr": raddr, "rport": 5000 + each} | columns) for each in range(number)]


def client(n: int, **columns: Any) -> Track:
    """One that answers: what was sent a moment ago has arrived."""
    given = {"role": "PASSIVE", "lport": 443, "raddr": f"203.0.{113 + n // 250}.{n % 250}", "data_segs_out": 1}
    one = at(track(**given | columns))
    one.looks = 1
    return one


def at(one: Track) -> Track:
    """As it was at the time of the evidence."""
    one._since = {mark: at_s + 100.0 - one.last_s for mark, at_s in one._since.items()}
    one.last_s = 100.0
    return one


def of_clients(*tracks: Track | list[Track], **more: Any) -> Any:
    flat = [at(each) for one in tracks for each in (one if isinstance(one, list) else [one])]
    return evidence(*flat, **more)


def test_all_clients_silent_is_one_critical_finding() -> None:
    """Some have three connections and more, as browsers do."""
    (finding,) = found(of_clients(*(vanished(n, 1 + n % 5) for n in range(500))))
    assert (finding.severity, finding.facts["case"]) == ("critical", "nobody")
    assert finding.title == "no client of port 443 answers any more: 500 clients, 1,500 connections stalled"
    assert (finding.facts["clients"], finding.facts["count"]) == (500, 1500)
    assert "ip route get" in (finding.remedies[0].command or "ip route get")
    assert "telephone" not in finding.why
    assert {("peer", NETNS, "198.51.100.7"), ("listener", NETNS, 443)} <= finding.about


def test_who_lives_nearby_hides_no_fault() -> None:
    (finding,) = found(of_clients(*(vanished(n) for n in range(40)), client(1)))
    assert finding.title == "40 clients of port 443 do not answer, 1 does: 40 connections stalled"
    assert "meanwhile 1 other client of this port had an answer" in finding.observed


def test_single_clients_that_vanish_beside_others() -> None:
    """Of a port with a hundred others, it is not known that their hosts have gone."""
    (finding,) = found(of_clients(*(vanished(n) for n in range(30)), *(client(n) for n in range(100))))
    assert (finding.severity, finding.facts["case"], finding.facts["clients"]) == ("info", "clients", 30)
    assert "meanwhile 100 other clients of this port had an answer" in finding.observed
    assert not finding.why.startswith("Their hosts have gone")
    (finding,) = found(of_clients(vanished()))
    assert finding.why.startswith("Probably")


def test_what_was_answered_in_an_earlier_look_counts() -> None:
    seen = of_clients(*(vanished(n) for n in range(30)))
    later = seen.sockets.now
    seen.sockets.now = [*later, *(client(n) for n in range(100))]
    assert [each.severity for each in found(seen)] == ["info"]
    seen.sockets.now, seen.now_s = later, 101.0
    assert [each.severity for each in found(seen)] == ["info"]


def test_the_same_finding_becomes_critical() -> None:
    """In the first ten seconds somebody may still answer."""
    silent = [vanished(n, 1 + 2 * (n == 0)) for n in range(30)]
    early = of_clients(*silent)
    early.began_s, early.watched_s = 95.0, 5.0
    (before,) = found(early)  # nothing of the one with three
    (after,) = found(of_clients(*silent))
    assert (before.severity, after.severity) == ("info", "critical")
    assert before.key == after.key
    assert (before.facts["clients"], after.facts["clients"]) == (29, 30)


def test_those_that_had_vanished_before_all_did_are_not_told_apart() -> None:
    older = [vanished(90, rto_us=300_000_000), vanished(91, 3, rto_us=300_000_000)]
    between = [client(n, since_sent_us=60_000_000) for n in range(100)]
    nobody, one = found(of_clients(*(vanished(n) for n in range(30)), *older, *between))
    assert (nobody.facts["case"], nobody.facts["clients"]) == ("nobody", 30)
    assert (one.facts["case"], one.facts["raddr"], one.facts["count"]) == ("gone", "198.51.100.91", 3)


def test_what_is_sent_to_all_clients_is_lost_and_they_still_send() -> None:
    (finding,) = found(of_clients(*(vanished(n, since_ack_us=100_000) for n in range(30))))
    assert (finding.facts["case"], finding.facts["one_way"]) == ("nobody", 30)
    assert any(line.startswith("packets of 30 of these connections still come in") for line in finding.observed)


def test_full_segments_to_all_clients() -> None:
    """Handshakes and small answers pass."""
    silent = [vanished(n, unacked=1448) for n in range(40)]
    small = [client(n, sent_bytes=300, opened_ns=99_000_000_000) for n in range(100)]
    (finding,) = found(of_clients(*silent, *small))
    assert (finding.severity, finding.facts["only_full"], finding.facts["count"]) == ("critical", True, 40)
    assert finding.title.startswith("full segments to 40 clients of port 443 do not arrive, small ones do")
    assert ["MTU" in remedy.what for remedy in finding.remedies] == [True, False]
    large = [client(n, sent_bytes=3000, data_segs_out=3, opened_ns=99_000_000_000) for n in range(100)]
    assert [each.severity for each in found(of_clients(*silent, *large))] == ["info"]
    (finding,) = found(of_clients(*silent))
    assert (finding.facts["only_full"], "MTU hole" in finding.why) == (True, True)


STUCK = {"out_segs": 0, "unacked": 0, "unsent": 100, "timer": "ZERO_WINDOW"}


def test_clients_to_which_this_host_cannot_send() -> None:
    (finding,) = found(of_clients(*(vanished(n, **STUCK) for n in range(30))))
    assert (finding.severity, finding.facts["case"], finding.facts["count"]) == ("critical", "here", 30)
    assert finding.title == "this host cannot send to 30 addresses: 30 connections stalled"
    assert "telephone" not in finding.why
    assert "ip link" in (finding.remedies[0].command or "ip link")


def test_what_was_under_way_when_the_link_went_down_is_the_same_fault() -> None:
    """It is sent again in vain. Clients that had vanished before are another thing."""
    older = vanished(90, total_retrans=4)
    seen = of_clients(*(vanished(n, **STUCK) for n in range(30)), *(vanished(n) for n in range(30, 40)), older)
    here, single = found(seen)
    assert (here.facts["case"], here.facts["count"], here.facts["peers"]) == ("here", 40, 40)
    assert (single.severity, single.facts["count"]) == ("info", 1)


@pytest.mark.parametrize(
    ("first", "last", "is_stuck"),
    [
        ({"total_retrans": 0}, {"total_retrans": 0, "retransmits": 3}, True),
        ({"total_retrans": 7, "retransmits": 1}, {"total_retrans": 7, "retransmits": 3}, True),  # it was sent before
        ({"total_retrans": 7, "retransmits": 3}, {"total_retrans": 7, "retransmits": 3}, False),
        ({"total_retrans": 7, "retransmits": 1}, {"total_retrans": 8, "retransmits": 3}, False),
    ],
)
def test_what_has_not_left_this_host(first: dict[str, int], last: dict[str, int], is_stuck: bool) -> None:
    one = track(out_segs=1, backoff=0, **{"retransmits": 0} | first)
    one._look(SimpleNamespace(**vars(one.last) | last), 4.0, no_ack.rule.marks)
    assert silence.is_stuck(one) == is_stuck


def test_a_client_that_has_gone_with_its_route_is_told_for_information() -> None:
    (finding,) = found(of_clients(vanished(**STUCK)))
    assert (finding.severity, finding.facts["case"]) == ("info", "here")
    assert finding.title == "this host cannot send to 198.51.100.0: 1 connection stalled"
    (finding,) = found(of_clients(vanished(**STUCK, role="ACTIVE")))
    assert finding.severity == "critical"


@pytest.mark.parametrize(("answered", "severity"), [(30, "info"), (29, "critical"), (0, "critical")])
def test_a_few_of_many_connections_behind_one_address(answered: int, severity: str) -> None:
    many = [client(0, raddr="198.51.100.0", rport=n) for n in range(answered)]
    (finding,) = found(of_clients(vanished(0, 3), *many))
    assert finding.severity == severity
    if severity == "info":
        assert finding.title == "3 connections of clients of port 443 get no answer any more"
        assert "meanwhile 30 other connections of these addresses had an answer" in finding.observed
    elif answered:
        assert "several hosts share this address" in finding.why


def test_an_address_of_many_clients_is_not_judged_at_once() -> None:
    early = of_clients(vanished(0, 3))
    early.began_s, early.watched_s = 95.0, 5.0
    assert found(early) == []
    early.ended = True
    assert [each.severity for each in found(early)] == ["critical"]


def idle(idle_s: float, **columns: Any) -> dict[str, tuple[Any, Any]]:
    """The remedies for a connection that was cut after so long: what is there now, and what is proposed."""
    stalled = STALLED | {"since_ack_us": round((idle_s + 3) * 1e6), "pid": 0x7FFFFFFF}
    (finding,) = found(evidence(track(**stalled | columns), track()))
    assert finding.facts["case"] == "idle"
    limit = f"is not known: at most {idle_s:.1f} s"
    assert all(limit in remedy.what for remedy in finding.remedies)
    return {remedy.name or "": (remedy.present, remedy.proposed) for remedy in finding.remedies}


@pytest.mark.parametrize(("idle_s", "proposed"), [(60, 30), (398, 199), (3600, 200), (8 * 3600, 200)])
def test_half_of_a_long_idle_time_tells_nothing_of_the_limit(idle_s: float, proposed: int) -> None:
    remedies = idle(idle_s)
    assert remedies.keys() == {"SO_KEEPALIVE", "net.ipv4.tcp_keepalive_time"}
    assert remedies["net.ipv4.tcp_keepalive_time"] == (7200, proposed)
    assert idle(idle_s, has_file=False) == remedies  # closed meanwhile


def test_a_program_with_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"keepalive": True, "keepalive_s": 600}
    monkeypatch.setattr(silence_remedies, "keepalive_time_s", lambda netns: 7200)
    assert idle(400, **own) == {"TCP_KEEPIDLE": (600, 200)}
    assert idle(400, keepalive=True) == {"net.ipv4.tcp_keepalive_time": (7200, 200)}
    monkeypatch.setattr(silence_remedies, "keepalive_time_s", lambda netns: 600)
    assert idle(400, **own) == {"net.ipv4.tcp_keepalive_time": (600, 200)}
    monkeypatch.setattr(silence_remedies, "keepalive_time_s", lambda netns: None)
    assert idle(400, **own) == {"idle time before keepalive probes": (600, 200)}
    assert idle(400, keepalive=True, keepalive_s=100) == {"": (None, None)}


def test_the_sysctl_of_this_network_namespace_is_read() -> None:
    here = Path("/proc/sys/net/ipv4/tcp_keepalive_time").read_text()
    assert silence_remedies.keepalive_time_s(netns.own()) == int(here)
    assert silence_remedies.keepalive_time_s(1) is None
