"""Connects that are refused, not answered, or filtered; and those of healthy machines that fail, too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tcpscope.diagnose import Finding, attempts, causes, process
from tcpscope.diagnose.rules import close_wait_leak
from tcpscope.diagnose.rules.connects_fail import rule
from tcpscope.diagnose.tallies import Tally
from tcpscope.filters import Filter, PortRange
from tests.diagnose.rules.connecting import HERE, NETNS, OTHER, THERE, attempt, check, found, groups, of, sockets, times
from tests.diagnose.rules.scenes import told
from tests.record import Host, Process, Script, Seen, Socket, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

CLOSED, FILTERED, OPEN, CHECKED = 9101, 9102, 9103, 9104
NOBODY = "198.51.100.7"


def began(seen: Seen, host: Host) -> list[dict[str, Any]]:
    """The findings of a host as they were told first."""
    records = [record["began"] for record in seen.run(DIAGNOSE)._records if record.keys() == {"began"}]
    return [each for each in records if each["facts"]["netns"] == host.inode]


def fail(client: Process, address: str, port: int, number: int) -> None:
    for _ in range(number):
        made = client.socket()
        made.connect(address, port, may_fail=True)
        made.close()


def begin(client: Process, address: str, port: int, number: int) -> list[Socket]:
    """So many connects that nobody answers."""
    begun = []
    for _ in range(number):
        made = client.socket()
        made.start(address, port)
        begun.append(made)
    return begun


@recorded(DIAGNOSE)
def test_refused(script: Script) -> Test:
    client = script.client.process("web")
    before = [host.counters() for host in script.hosts]
    fail(client, script.server.ipv4, CLOSED, 6)
    after = [host.counters() for host in script.hosts]
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["netns"]) == ("connects_fail", "critical", script.client.inode)
    assert facts["count"] == facts["failed"] == facts["attempts"] == 6
    assert after[0].counters["TcpAttemptFails"] - before[0].counters["TcpAttemptFails"] == 6
    assert after[1].counters["TcpOutRsts"] - before[1].counters["TcpOutRsts"] == 6
    assert facts["kinds"] == {"refused by a RST": 6}
    assert (facts["raddr"], facts["rports"]) == (script.server.ipv4, [CLOSED])
    assert (facts["comm"], facts["pids"]) == ("web", [client.pid])
    assert finding["title"] == f"web cannot connect to {script.server.ipv4}:{CLOSED}: connection refused"
    assert f"web (PID {client.pid}" in finding["who"]
    (start,) = finding["remedies"]
    assert f"sport = :{CLOSED}" in start["what"]


@recorded(DIAGNOSE)
def test_a_dead_host_is_certain_while_the_clients_wait(script: Script) -> Test:
    script.server.blackhole("198.51.100.0/24")
    client = script.client.process("web")
    before = script.client.counter("TcpExtTCPTimeouts")
    begin(client, NOBODY, CLOSED, 5)
    script.client.until_counter("TcpExtTCPTimeouts", before + 10)
    waiting = script.client.diag(state="SYN_SENT")
    client.pause(4_000_000)  # two looks, and the time after which a finding is told
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("connects_fail", "critical")
    assert (facts["raddr"], facts["rports"], facts["pids"]) == (NOBODY, [CLOSED], [client.pid])
    assert facts["count"] == facts["attempts"] == facts["failed"] + facts["waiting"] == waiting.ret == 5
    assert facts["answers"] == []
    assert "the host does not answer" in finding["title"]
    (first,) = began(seen, script.client)
    assert (first["facts"]["waiting"], first["facts"]["failed"]) == (5, 0)
    (way,) = finding["remedies"]
    assert way["command"].endswith(f"ip route get {NOBODY}")


@recorded(DIAGNOSE)
def test_a_filtered_port(script: Script) -> Test:
    """Nothing listens there, so the rule that drops is nobody's fault."""
    script.server.exec("nft", "add table inet filter")
    script.server.exec("nft", "add chain inet filter in { type filter hook input priority 0 ; }")
    script.server.exec("nft", f"add rule inet filter in tcp dport {FILTERED} drop")
    script.client.sysctl("tcp_syn_retries", 1)
    server = script.server.process("server")
    listener = server.listener(OPEN)
    client = script.client.process("web")
    begun = begin(client, script.server.ipv4, FILTERED, 5)
    works = client.socket()
    works.connect(script.server.ipv4, OPEN)
    listener.accept()
    ends = [made.outcome() for made in begun]
    script.stay()
    seen = yield
    assert len(ends) == 5
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("connects_fail", "critical")
    assert (facts["rports"], facts["answers"]) == ([FILTERED], [OPEN])
    assert (facts["failed"], facts["waiting"], facts["kinds"]) == (5, 0, {"not answered": 5})
    assert "the host answers at other ports" in finding["title"]


@recorded(DIAGNOSE, discards=True)
def test_a_host_without_link_address(script: Script) -> Test:
    """One of two servers is gone, and the client gives up before its second SYN. The other one answers."""
    gone = "192.0.2.77"
    script.client.sysctl("ipv4/neigh/veth0/app_solicit", 1)  # after one question: a second
    listener = script.server.process("server").listener(OPEN)
    client = script.client.process("pool")
    for _ in range(5):
        works = client.socket()
        works.connect(script.server.ipv4, OPEN)
        listener.accept().close()
        works.close()
        (fails,) = begin(client, gone, OPEN, 1)
        client.pause(300_000)
        fails.close()
    told(script.client)
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], facts["raddr"], facts["rports"]) == ("connects_fail", gone, [OPEN])
    assert finding["title"] == f"pool cannot connect to {gone}:{OPEN}: nobody answers ARP for it"
    assert 3 <= facts["unresolved"] <= facts["count"] == facts["attempts"] == 5
    assert facts["pids"] == [client.pid]
    (remedy,) = finding["remedies"]
    assert remedy["command"].endswith(f"sh -c 'ip route get {gone}; ip neigh'")


@recorded(DIAGNOSE)
def test_a_route_that_says_no(script: Script) -> Test:
    """No SYN is sent: it is no router on the way."""
    address = "203.0.113.200"
    script.client.exec("ip", "route", "add", "unreachable", address)
    client = script.client.process("vpn")
    fail(client, address, OPEN, 5)
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["errno"]) == ("connects_fail", "critical", "EHOSTUNREACH")
    assert facts["unsent"] == facts["failed"] == facts["count"] == 5
    assert finding["title"] == f"vpn cannot connect to {address}:{OPEN}: a route of this host says unreachable"
    (remedy,) = finding["remedies"]
    assert f"ip route get {address}" in remedy["command"]


@recorded(DIAGNOSE)
def test_a_refused_health_check_is_for_information(script: Script) -> Test:
    """The process has another connection."""
    client = script.client.process("check")
    listener = script.server.process("server").listener(OPEN)
    near = client.socket()
    near.connect(script.server.ipv4, OPEN)
    listener.accept()
    for _ in range(4):
        fail(client, script.server.ipv4, CHECKED, 1)
        client.pause(1_000_000)
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    assert (finding["rule"], finding["severity"], finding["facts"]["count"]) == ("connects_fail", "info", 4)
    assert "health check" in finding["why"]
    assert not finding["facts"]["alone"]
    (remedy,) = finding["remedies"]
    assert remedy["what"].startswith("Start the service")


@recorded(DIAGNOSE)
def test_a_process_that_does_nothing_else_tries_again(script: Script) -> Test:
    client = script.client.process("worker")
    for _ in range(4):
        fail(client, script.server.ipv4, CHECKED, 1)
        client.pause(1_000_000)
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    where = f"{script.server.ipv4}:{CHECKED}"
    assert finding["title"] == f"worker tries again and again to connect to {where}, and was refused 4 times"
    assert (finding["severity"], finding["facts"]["alone"]) == ("info", True)
    assert "needs the service" in finding["why"]


@recorded(DIAGNOSE)
def test_a_service_that_breaks_down_while_it_is_looked_at(script: Script) -> Test:
    client, server = script.client.process("check"), script.server.process("server")
    listener = server.listener(CHECKED)
    near = client.socket()
    near.connect(script.server.ipv4, CHECKED)
    listener.accept().close()
    near.close()
    listener.close()
    for _ in range(6):
        client.pause(1_000_000)
        fail(client, script.server.ipv4, CHECKED, 1)
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    where = f"{script.server.ipv4}:{CHECKED}"
    assert (finding["rule"], finding["severity"], finding["facts"]["count"]) == ("connects_fail", "warning", 6)
    assert finding["title"] == f"check cannot connect to {where}: connection refused"
    assert any("connects of check succeeded before" in line for line in finding["observed"])
    (remedy,) = finding["remedies"]
    assert remedy["what"].startswith("Start the service")


def severities(given: Any, *rows: Any) -> list[str]:
    return [finding.severity for finding in check(rule, attempts=groups(given), sockets=sockets(*rows))]


def waiting(number: int, rport: int | None = 80) -> list[Any]:
    row = SimpleNamespace(
        netns=NETNS,
        pid=7,
        comm="client",
        laddr=HERE,
        raddr=THERE,
        rport=rport,
        state="SYN_SENT",
        role="ACTIVE",
        retransmits=1,
        opened_ns=108 * 10**9,
        since_ack_us=0,
    )
    return [row] * number


@pytest.mark.parametrize(
    ("failed", "connected", "expected"),
    [
        (2, 0, []),
        (3, 0, ["warning"]),
        (3, 12, ["warning"]),  # a fifth
        (3, 13, []),
        (5, 0, ["critical"]),
        (5, 1, ["warning"]),
    ],
)
def test_three_and_a_fifth(failed: int, connected: int, expected: list[str]) -> None:
    given = {attempt("TIMED_OUT", "ETIMEDOUT"): times(failed)}
    assert severities(given | ({attempt("ESTABLISHED"): times(connected)} if connected else {})) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((1, 1, 1, 1, 1, 1), ["info"]), ((1, 0, 1, 0, 1), ["info"]), ((2, 2, 2), ["critical"]), ((5,), ["critical"])],
)
def test_a_steady_pace_is_a_health_check(counts: tuple[int, ...], expected: list[str]) -> None:
    assert severities({attempt("REFUSED", "ECONNREFUSED"): times(*counts)}) == expected


@pytest.mark.parametrize(("apart_s", "expected"), [(1.0, ["info"]), (0.7, ["warning"])])
def test_a_steady_pace_that_is_read_late(apart_s: float, expected: list[str]) -> None:
    """The first three are read together."""
    tally, other = Tally(), Tally()
    tally.add(103.0, 3, between_ns=(10**9, int((1 + 2 * apart_s) * 1e9)))
    other.add(104.0, 1, between_ns=(int((1 + 3 * apart_s) * 1e9),) * 2)
    given = {attempt("REFUSED", "ECONNREFUSED"): tally, attempt("REFUSED", "ECONNREFUSED", pid=8): other}
    assert severities(given) == expected


AGAIN, ONCE = "client tries again and again to connect", "as those do that are started for each check."


def holds(*pids: int) -> Any:
    """A listener."""
    own = SimpleNamespace(netns=NETNS, lport=81, laddr=HERE, holders=[SimpleNamespace(pid=pid) for pid in pids])
    return SimpleNamespace(histories={0: SimpleNamespace(last=own, gone=False, peers={})})


@pytest.mark.parametrize(
    ("tries", "more", "rows", "serving", "company"),
    [
        ({7: 4}, {}, [], [], "none"),
        ({7: 4}, {attempt("ESTABLISHED", rport=81): times(1)}, [], [], "These processes have other"),
        ({7: 4}, {}, [SimpleNamespace(pid=7, state="ESTABLISHED", role="PASSIVE")], [], "These processes have other"),
        ({7: 4}, {}, [SimpleNamespace(pid=8, state="ESTABLISHED", role="PASSIVE")], [], "none"),
        ({7: 4}, {}, [], [7], "These processes have other"),
        ({7: 4}, {}, [], [8], "none"),
        ({7: 8, 8: 8, 9: 8, 10: 8}, {}, [], [], "none"),  # workers
        ({7: 2, 8: 2}, {}, [], [8], "Some of these processes have other connections, too."),
        ({7: 2, 8: 2}, {}, [], [7, 8], "These processes have other connections, too."),
        ({7: 3, 8: 1}, {}, [], [], f"Some of these processes have tried once only, {ONCE}"),
        ({7: 1, 8: 1, 9: 1}, {}, [], [], f"Each of these processes has tried once, {ONCE}"),
        ({7: 3, None: 1}, {}, [], [], "Whether these processes have other connections was not watched."),
    ],
)
def test_who_does_nothing_else_tries_again_and_is_no_health_check(
    tries: dict[int | None, int], more: Any, rows: list[Any], serving: list[int], company: str
) -> None:
    """Each of the processes once in a second, one after the other."""
    given = {
        attempt("REFUSED", "ECONNREFUSED", pid=pid): times(*[*[0] * n, *[1, *[0] * (len(tries) - 1)] * number])
        for n, (pid, number) in enumerate(tries.items())
    }
    (finding,) = check(rule, attempts=groups(given | more), sockets=sockets(*rows), queues=holds(*serving))
    alone = company == "none"
    assert (finding.severity, finding.facts["alone"]) == ("info", None if None in tries else alone)
    assert finding.title.startswith(AGAIN) == alone
    assert alone or company in finding.why
    assert ("do nothing else" in finding.why, "does nothing else" in finding.why) == (
        alone and len(tries) > 1,
        alone and len(tries) == 1,
    )
    assert any("has another connection" in line for line in finding.observed) == (alone and len(tries) > 1)


@pytest.mark.parametrize(
    ("filter", "alone"),
    [(Filter(pid=(7,)), True), (Filter(rport=(PortRange(80, 80),)), None), (Filter(family=4), None)],
)
def test_a_filter_hides_what_else_a_process_does(filter: Filter, alone: bool | None) -> None:
    given = {attempt("REFUSED", "ECONNREFUSED"): times(1, 1, 1, 1)}
    (finding,) = check(rule, filter, attempts=groups(given), sockets=sockets())
    assert (finding.severity, finding.facts["alone"]) == ("info", alone)
    assert ("was not watched" in finding.why) == (alone is None)


def test_a_restart_is_for_information() -> None:
    refused = {attempt("REFUSED", "ECONNREFUSED"): times(0, 20, 20)}
    assert severities(refused | {attempt("ESTABLISHED"): times(30)}) == []  # it may come back at once
    assert severities(refused | {attempt("ESTABLISHED"): times(30, 0, 0, 30)}) == ["info"]
    longer = {attempt("REFUSED", "ECONNREFUSED"): times(0, 20, 20, 20, 20)}
    assert severities(longer | {attempt("ESTABLISHED"): times(30)}) == ["critical"]


def test_what_succeeded_before_does_not_hide_that_nothing_does_now() -> None:
    ok = {attempt("ESTABLISHED"): times(*[100] * 20)}
    assert severities(ok | {attempt("REFUSED", "ECONNREFUSED"): times(5, 5, 5, 5, first_s=120)}) == ["critical"]
    assert severities(ok | {attempt("REFUSED", "ECONNREFUSED"): times(5, 5, 5, 5, first_s=112)}) == []
    assert severities(ok, *waiting(5)) == []  # since second 108
    assert severities({attempt("ESTABLISHED"): times(*[100] * 7)}, *waiting(5)) == ["critical"]


def test_a_host_that_answered_before_it_died_is_dead() -> None:
    for answered_s, expected in ((100, []), (109, [22])):
        given = {attempt("ESTABLISHED", rport=22): times(9, first_s=answered_s)}
        (finding,) = check(rule, attempts=groups(given), sockets=sockets(*waiting(5)))
        assert finding.facts["answers"] == expected


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ((15,), "client: 15 of 55 connects to 192.0.2.2:80 fail: no answer"),  # it may go on
        ((5, 10, 10), "client cannot connect to 192.0.2.2:80: the host does not answer"),
        ((5, 10, 10, 10), "client cannot connect to 192.0.2.2:80: the host does not answer"),
    ],
)
def test_when_an_attempt_began_is_not_known_to_the_second(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...], said: str
) -> None:
    """It dies at second 114, and the first attempt ends in 119: it may have begun in 113, before others succeeded."""
    monkeypatch.setattr(attempts, "_linear_timeouts", lambda: 4)
    given = {
        attempt("ESTABLISHED"): times(*[20] * 5, first_s=110),
        attempt("ESTABLISHED", rport=22): times(*[20] * 5, first_s=110),
        attempt("GAVE_UP", syn_retrans=4): times(*failing, first_s=119),
    }
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.title == said
    given[attempt("ESTABLISHED", rport=22)].add(116.0, 1)
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.facts["answers"] == [22]


def test_another_ip_version_works() -> None:
    refused = {attempt("REFUSED", "ECONNREFUSED", raddr="::1", laddr="::1"): times(20)}
    assert severities(refused) == ["critical"]
    assert severities(refused | {attempt("ESTABLISHED", raddr="127.0.0.1"): times(17)}) == ["critical"]
    assert severities(refused | {attempt("ESTABLISHED", raddr="127.0.0.1"): times(18)}) == ["info"]  # one under way
    assert severities(refused | {attempt("ESTABLISHED", raddr=OTHER): times(20)}) == ["critical"]  # no localhost


def test_processes_of_one_name_count_together() -> None:
    given = {attempt("TIMED_OUT", "ETIMEDOUT", pid=pid): times(1) for pid in range(100, 106)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert (finding.severity, finding.facts["pids"]) == ("critical", list(range(100, 106)))


def test_giving_up_before_the_second_syn_is_no_failure_if_another_address_answers() -> None:
    elsewhere = {attempt("ESTABLISHED", raddr=OTHER): times(20)}
    assert severities({attempt("GAVE_UP"): times(20)} | elsewhere) == []  # another address of the name was faster
    assert severities({attempt("GAVE_UP"): times(20)}) == ["critical"]
    assert severities({attempt("GAVE_UP", syn_retrans=1): times(20)}) == ["critical"]
    assert severities({attempt("FAILED", "EADDRNOTAVAIL"): times(20)}) == []  # no_local_ports says it


def discarded(number: int, **columns: Any) -> Any:
    """SYNs that waited for a link address."""
    given: dict[str, Any] = {
        "netns": NETNS, "raddr": THERE, "direction": "SENT", "flags": "SYN", "reason": "NEIGH_FAILED",
        "location": "neigh_invalidate+0x7e",
    }  # fmt: skip
    return groups({of(**given | columns): times(number)})


@pytest.mark.parametrize(
    ("drops", "found"),
    [
        (discarded(3), True),
        (discarded(2), False),  # a neighbour may answer late
        (discarded(3, reason=None), True),
        (discarded(3, reason=None, location="kfree_skb_list+0x1"), False),
        (discarded(3, reason="QDISC_DROP"), False),
        (discarded(3, raddr=OTHER), False),
        (discarded(3, flags="ACK"), False),
        (discarded(3, direction="RECEIVED"), False),
    ],
)
def test_giving_up_is_a_failure_if_no_syn_has_left(drops: Any, found: bool) -> None:
    given = {attempt("GAVE_UP"): times(5), attempt("ESTABLISHED", raddr=OTHER): times(20)}
    findings = check(rule, attempts=groups(given), sockets=sockets(), drops=drops)
    assert [(each.severity, each.facts["unresolved"]) for each in findings] == [("critical", 3)] * found


def test_unreachable_for_want_of_a_link_address() -> None:
    given = {attempt("UNREACHABLE", "EHOSTUNREACH"): times(5)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets(), drops=discarded(5))
    assert finding.title.endswith("nobody answers ARP for it")
    answers = given | {attempt("ESTABLISHED", rport=22): times(0, 1)}
    (finding,) = check(rule, attempts=groups(answers), sockets=sockets(), drops=discarded(5))
    assert finding.title.endswith(": an ICMP message says unreachable, though the host answers at other ports")


@pytest.mark.parametrize(
    ("outcome", "errno", "sent", "title"),
    [
        ("UNREACHABLE", "ENETUNREACH", False, "no route to it"),
        ("UNREACHABLE", "EHOSTUNREACH", False, "a route of this host says unreachable"),
        ("UNREACHABLE", "EHOSTUNREACH", True, "host unreachable"),
        ("FAILED", "EPERM", False, "this host forbids it"),
        ("FAILED", "EACCES", False, "this host forbids it"),
        ("FAILED", "EINVAL", False, "connect() fails with EINVAL"),
        ("FAILED", "ENOMEM", False, "connect() fails with ENOMEM"),
    ],
)
def test_who_says_no(outcome: str, errno: str, sent: bool, title: str) -> None:
    given = {attempt(outcome, errno, syn_sent=sent): times(5)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.title.endswith(f": {title}")
    assert ("no packet leaves this host" in finding.why) == (not sent and errno != "ENOMEM")


@pytest.mark.parametrize(("left", "explained"), [(5, True), (6, False), (0, False)])
def test_who_waits_in_connect_does_not_close(left: int, explained: bool) -> None:
    row = SimpleNamespace(pid=7, state="CLOSE_WAIT", role="PASSIVE", has_file=True)
    (finding,) = check(rule, attempts=groups({}), sockets=sockets(*waiting(5), *[row] * left))
    leak = Finding("close_wait_leak", "warning", "", [], "", [], {}, about=frozenset({process(7)}))
    rule.name, close_wait_leak.rule.name = "connects_fail", "close_wait_leak"
    finding = msgspec.structs.replace(finding, rule=rule.name)
    assert causes([leak, finding], [rule, close_wait_leak.rule]) == ([finding] if explained else [leak, finding])
    assert (f"{left} clients of PID 7 have closed meanwhile" in finding.observed) == explained


def test_a_loopback_address_is_that_of_its_namespace() -> None:
    def listens(netns: int, lport: int = 80, gone: bool = False) -> Any:
        owner = SimpleNamespace(comm="postgres", pid=9)
        own = SimpleNamespace(netns=netns, lport=lport, laddr="127.0.0.1", name=f"127.0.0.1:{lport}", owner=owner)
        return SimpleNamespace(last=SimpleNamespace(**vars(own), holders=()), gone=gone, peers={})

    refused = {attempt("REFUSED", "ECONNREFUSED", laddr="127.0.0.1", raddr="127.0.0.1"): times(5)}
    for history, pids in (
        (listens(NETNS + 1), [9]),
        (listens(NETNS + 1, 81), []),
        (listens(NETNS + 1, gone=True), []),
    ):
        queues = SimpleNamespace(histories={0: history})
        (finding,) = check(rule, attempts=groups(refused), sockets=sockets(), queues=queues)
        assert finding.facts["listens_elsewhere"] == pids
        assert len(finding.remedies) == 1 + len(pids)
    elsewhere = {attempt("REFUSED", "ECONNREFUSED"): times(5)}
    queues = SimpleNamespace(histories={0: listens(NETNS + 1)})
    (finding,) = check(rule, attempts=groups(elsewhere), sockets=sockets(), queues=queues)
    assert finding.facts["listens_elsewhere"] == []


def test_a_socket_that_waited_and_has_ended_counts_once() -> None:
    (finding,) = check(
        rule,
        attempts=groups({attempt("TIMED_OUT", "ETIMEDOUT"): times(4, first_s=111)}),
        sockets=sockets(*waiting(5)),
    )
    assert (finding.facts["failed"], finding.facts["waiting"], finding.facts["count"]) == (4, 1, 5)


def test_ports_of_a_host_that_does_not_answer_are_one_finding() -> None:
    rows = [*waiting(3, 80), *waiting(3, 443)]
    (finding,) = check(rule, attempts=groups({}), sockets=sockets(*rows))
    assert (finding.facts["rports"], finding.facts["count"]) == ([80, 443], 6)
    since = times(1, first_s=110)
    given = {attempt("ESTABLISHED", rport=22): since, attempt("ESTABLISHED", raddr=OTHER): since}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets(*rows))
    assert finding.facts["answers"] == [22]


def test_an_icmp_message_now_and_then_tells_of_all() -> None:
    """Hosts send one in a second, and clients come faster."""
    silent = {attempt("GAVE_UP", syn_retrans=3): times(5, 5, 5, 5)}
    for outcome, errno, said in (
        ("UNREACHABLE", "EHOSTUNREACH", "host unreachable"),
        ("REJECTED", "ECONNREFUSED", "rejected by an ICMP message, as of a firewall"),
    ):
        some = {attempt(outcome, errno): times(2, 2, 2, 2)}
        (before,) = check(rule, attempts=groups(silent), sockets=sockets())
        assert before.title.endswith(": the host does not answer")
        (finding,) = check(rule, attempts=groups(silent | some), sockets=sockets(*waiting(3)))
        assert (finding.title, finding.facts["count"]) == (f"client cannot connect to {THERE}:80: {said}", 31)
        assert "net.ipv4.icmp_ratelimit" in finding.why
        assert finding.key == before.key
        (finding,) = check(rule, attempts=groups(some), sockets=sockets())
        assert "net.ipv4.icmp_ratelimit" not in finding.why


def test_a_firewall_that_rejects_one_port_is_told_from_a_host_that_is_gone() -> None:
    given = {attempt("UNREACHABLE", "EHOSTUNREACH"): times(5), attempt("ESTABLISHED", rport=22): times(1)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert f"other ports of {THERE} answer: 22" in finding.observed
    assert finding.title.endswith(": an ICMP message says unreachable, though the host answers at other ports")
    assert "firewall" in finding.why
    assert "firewall" in finding.remedies[0].what
    (gone,) = check(rule, attempts=groups({attempt("UNREACHABLE", "EHOSTUNREACH"): times(5)}), sockets=sockets())
    assert gone.title.endswith(": host unreachable")


def test_one_icmp_message_of_many_attempts_does_not_tell_of_all() -> None:
    given = {attempt("GAVE_UP", syn_retrans=3): times(*[10] * 20), attempt("UNREACHABLE", "EHOSTUNREACH"): times(0, 1)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.title.endswith(": the host does not answer")


def test_a_port_without_an_answer_is_not_told_as_one_that_is_rejected() -> None:
    given = {
        attempt("TIMED_OUT", "ETIMEDOUT", syn_retrans=3): times(20),
        attempt("REJECTED", "ECONNREFUSED", rport=443): times(5),
    }
    silent, rejected = check(rule, attempts=groups(given), sockets=sockets())
    assert (silent.facts["rports"], rejected.facts["rports"]) == ([80], [443])
    assert silent.title == f"client cannot connect to {THERE}:80: the host does not answer"
    assert rejected.title == f"client cannot connect to {THERE}:443: rejected by an ICMP message, as of a firewall"
    assert silent.key != rejected.key


def test_the_errno_is_that_of_what_is_told() -> None:
    given = {
        attempt("TIMED_OUT", "ETIMEDOUT", syn_retrans=3): times(20),
        attempt("UNREACHABLE", "ENETUNREACH"): times(2),
    }
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert (finding.facts["errno"], finding.title[-14:]) == ("ENETUNREACH", "no route to it")


def test_the_limit_of_icmp_messages_is_that_of_the_ip_version() -> None:
    ends = {"raddr": "2001:db8::2", "laddr": "2001:db8::1"}
    silent = {attempt("GAVE_UP", syn_retrans=3, **ends): times(5)}
    some = {attempt("REJECTED", "ECONNREFUSED", **ends): times(2)}
    (finding,) = check(rule, attempts=groups(silent | some), sockets=sockets())
    assert "net.ipv6.icmp.ratelimit" in finding.why


@pytest.mark.parametrize(("outcome", "answers"), [("TIMED_OUT", [22]), ("GAVE_UP", [])])
def test_the_kernel_gives_up_when_the_next_syn_would_be_sent(
    monkeypatch: pytest.MonkeyPatch, outcome: str, answers: list[int]
) -> None:
    """After 7 s, if the last SYN was sent after 3; an application may have given up at once after that."""
    monkeypatch.setattr(attempts, "_linear_timeouts", lambda: 0)
    given = {
        attempt("ESTABLISHED", rport=22): times(1, first_s=114),
        attempt(outcome, "ETIMEDOUT", syn_retrans=2): times(5, 5, 5, first_s=120),
    }
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.facts["answers"] == answers


@pytest.mark.parametrize(("linear", "number", "seconds"), [(0, 1, 1), (0, 7, 127), (0, 9, 367), (4, 5, 5), (4, 6, 7)])
def test_when_a_syn_is_sent_again(monkeypatch: pytest.MonkeyPatch, linear: int, number: int, seconds: int) -> None:
    monkeypatch.setattr(attempts, "_linear_timeouts", lambda: linear)
    assert attempts._until_syn(number) == seconds


@pytest.mark.parametrize(
    ("refused", "answered", "expected"),
    [
        ([1] * 20, [], "info"),
        ([1] * 20, [1], "warning"),  # it breaks down while it is looked at
        ([0, 1, 1, 1, 1], [1], "warning"),
        ([0, 1, 1, 0, 1, 1], [1], "warning"),
        ([0, 0, 1, 0, 0, 1, 0, 0, 1], [1], "warning"),
        ([0, 0, 1, 0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1], "info"),  # it has refused two since
        ([1] * 20, [1] + [0] * 19 + [1], "info"),  # it is back
        ([1] * 20, [1] * 20, "info"),  # some of each
    ],
)
def test_a_service_that_breaks_down_is_no_health_check(refused: list[int], answered: list[int], expected: str) -> None:
    given = {attempt("REFUSED", "ECONNREFUSED"): times(*refused), attempt("ESTABLISHED"): times(*answered)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.severity == expected
    assert "restarted" not in finding.why
    broken = expected == "warning"
    assert (finding.title == f"client cannot connect to {THERE}:80: connection refused") == broken
    last_s = 100 + len(refused) - 1
    said = f"connects of client succeeded before, and none in the last {last_s - 100} s"
    assert (said in finding.observed) == broken
    assert ("others succeed" in finding.why) == (sum(answered) > 1)


def test_a_watch_remembers_that_a_service_has_answered() -> None:
    """It looks at the last minute, and the service is down for longer."""
    refused, answered = times(*[1] * 100), times(5)
    given = groups({attempt("REFUSED", "ECONNREFUSED"): refused, attempt("ESTABLISHED"): answered})
    (finding,) = check(rule, attempts=given, sockets=sockets())
    assert finding.severity == "warning"
    given.forget(140)
    assert len(given.tallies) == 1
    (finding,) = check(rule, attempts=given, sockets=sockets())
    assert finding.severity == "warning"
    assert "connects of client succeeded before, and none in the last 99 s" in finding.observed
    given.forget(200)
    assert check(rule, attempts=given, sockets=sockets()) == []
    later = groups({attempt("REFUSED", "ECONNREFUSED"): times(*[1] * 20, first_s=300)})
    given.tallies = later.tallies  # nobody asked meanwhile, so it may have answered
    for each in (given, later):
        (finding,) = check(rule, attempts=each, sockets=sockets())
        assert finding.severity == "info"


@pytest.mark.parametrize(
    ("filter", "said"),
    [
        (Filter(), "the host does not answer"),
        (Filter(netns=(NETNS,), family=4), "the host does not answer"),
        (Filter(pid=(7,)), "no answer"),
        (Filter(rport=(PortRange(80, 80),)), "no answer"),
    ],
)
def test_a_filter_hides_whether_the_host_answers(filter: Filter, said: str) -> None:
    (finding,) = check(rule, filter, attempts=groups({}), sockets=sockets(*waiting(5)))
    assert finding.title == f"client cannot connect to {THERE}:80: {said}"
    assert any("the filter of this watch" in line for line in finding.observed) == (said == "no answer")


def test_attempts_that_began_before_the_watch_are_not_those_of_another_program() -> None:
    given = {
        attempt("TIMED_OUT", "ETIMEDOUT"): times(5),
        attempt("TIMED_OUT", "ETIMEDOUT", pid=None, comm=None): times(9),
    }
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.title == f"client cannot connect to {THERE}:80: the host does not answer"
    assert not any(line.startswith("processes") for line in finding.observed)
    assert (finding.facts["comm"], finding.facts["pids"], finding.facts["count"]) == ("client", [7], 14)
    given[attempt("TIMED_OUT", "ETIMEDOUT", pid=8, comm="other")] = times(5)
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.title.startswith("client and 1 more program cannot connect")


@pytest.mark.parametrize(("linear", "answers"), [("4", []), ("0", [22]), (None, [22])])
def test_how_long_ago_the_first_syn_was_sent_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear: str | None, answers: list[int]
) -> None:
    """Three SYNs that were sent again took 4 s at most, or 15 s."""
    if linear is not None:
        (tmp_path / "linear").write_text(f"{linear}\n")
    monkeypatch.setattr(attempts, "_LINEAR", tmp_path / "linear")
    attempts._linear_timeouts.cache_clear()
    given = {
        attempt("ESTABLISHED", rport=22): times(1, first_s=110),
        attempt("GAVE_UP", syn_retrans=3): times(5, first_s=120),
    }
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    attempts._linear_timeouts.cache_clear()
    assert finding.facts["answers"] == answers


def test_a_port_scan_is_one_finding_for_information() -> None:
    def scan(ports: int) -> list[tuple[str, int]]:
        given = {attempt("REFUSED", "ECONNREFUSED", rport=port): times(5) for port in range(1000, 1000 + ports)}
        found = check(rule, attempts=groups(given), sockets=sockets())
        return [(finding.severity, finding.facts["count"]) for finding in found]

    assert scan(9) == [("critical", 5)] * 9
    assert scan(1000) == [("info", 5000)]


def test_port_0_is_a_port() -> None:
    """A program whose port is not set asks for it. Columns of ports have None for 0."""
    nowhere = attempt("REFUSED", "ECONNREFUSED", rport=None)
    silent = attempt("TIMED_OUT", "ETIMEDOUT", rport=443, syn_retrans=3)
    (finding,) = check(rule, attempts=groups({nowhere: times(5)}), sockets=sockets())
    assert (finding.facts["rports"], finding.title) == ([0], f"client cannot connect to {THERE}:0: connection refused")
    assert finding.look == (f"connect --failed --raddr {THERE}",)
    given = {nowhere: times(1, first_s=110), attempt("ESTABLISHED", rport=22): times(1, first_s=110), silent: times(5)}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.facts["answers"] == [0, 22]
    (finding,) = check(rule, attempts=groups({silent: times(5)}), sockets=sockets(*waiting(3, None)))
    assert finding.facts["rports"] == [0, 443]
    ports = [None, *range(1000, 1011)]
    given = {attempt("REFUSED", "ECONNREFUSED", rport=port): times(5) for port in ports}
    (finding,) = check(rule, attempts=groups(given), sockets=sockets())
    assert finding.facts["rports"][:2] == [0, 1000]
