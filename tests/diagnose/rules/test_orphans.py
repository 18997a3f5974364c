"""Connections that no process has any more: those that pile up, and those that only take their time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.rules import orphans
from tcpscope.diagnose.rules.orphans import LEAST, rule
from tcpscope.diagnose.sockets import Track
from tests.diagnose.rules.endings import NETNS, check, findings, groups, resets
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9505


def closed(script: Script, fin_timeout: int) -> tuple[Any, Any]:
    """The server closes, and the clients do not."""
    with script.older():
        script.server.sysctl("tcp_fin_timeout", fin_timeout)
        server, client = script.server.process("server"), script.client.process("web")
        listener = server.listener(PORT)
        pairs = []
        for _ in range(LEAST + 1):
            near = client.socket()
            near.connect(script.server.ipv4, PORT)
            pairs.append((near, listener.accept()))
    for _, far in pairs:
        far.close()
    script.server.until_sockets(LEAST + 1, "==", state="FIN_WAIT2", lport=PORT)
    server.pause(8_000_000)
    return server, script.server.diag(state="FIN_WAIT2", lport=PORT)


@recorded(DIAGNOSE)
def test_clients_that_never_close(script: Script) -> Test:
    server, left = closed(script, 600)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("orphans", "warning")
    assert (facts["netns"], facts["raddr"]) == (script.server.inode, script.client.ipv4)
    assert facts["count"] == left.ret == LEAST + 1
    assert (facts["states"], facts["waits_for"]) == ({"FIN_WAIT2": LEAST + 1}, "no FIN")
    assert facts["pids"] == [server.pid]
    remedy = finding["remedies"][0]
    assert (remedy["name"], remedy["present"], remedy["proposed"]) == ("net.ipv4.tcp_fin_timeout", 600, 60)
    assert remedy["command"].endswith(" sysctl -w net.ipv4.tcp_fin_timeout=60")


@recorded(DIAGNOSE)
def test_the_remedy_leaves_timewait_sockets(script: Script) -> Test:
    _, left = closed(script, 60)
    script.stay()
    seen = yield
    assert left.ret == LEAST + 1  # as ss shows them
    assert findings(seen, script) == []


def track(**values: Any) -> Track:
    """An orphan whose FIN was not acknowledged for 20 s."""
    row: dict[str, Any] = {
        "netns": NETNS, "pid": 7, "comm": "server", "state": "FIN_WAIT1", "has_file": False, "timer": "RTO",
        "unsent": 0, "unacked": 1, "since_ack_us": 20_000_000, "raddr": "192.0.2.1", "fin_timeout_s": 60,
        "linger2_set": False, "acked_seq": 1,
    }  # fmt: skip
    made = SimpleNamespace(**row | values)
    found = Track(made, made, 100.0, 100.0)
    found._look(made, 100.0, rule.marks)
    return found


def seen_of(tracks: list[Track], killed: int = 0) -> Any:
    ended = resets(killed, direction="SENT", cause="NO_MEMORY", unanswered=None)
    return SimpleNamespace(sockets=SimpleNamespace(now=tracks), resets=groups(*ended))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    values: dict[str, Any] = {"orphans": 10, "limit": 1000}
    monkeypatch.setattr(orphans, "_number", lambda: values["orphans"])
    monkeypatch.setattr(orphans, "_limit", lambda: values["limit"])
    return values


@pytest.mark.parametrize(
    ("number", "values", "waits_for"),
    [
        (10, {}, ["no ACK"]),
        (9, {}, []),
        (10, {"since_ack_us": 4_900_000}, []),
        (10, {"has_file": True}, []),  # shutdown(): the application waits, and may
        (10, {"state": "CLOSE_WAIT"}, []),
        (10, {"state": "LAST_ACK"}, ["no ACK"]),
        (10, {"timer": "ZERO_WINDOW", "unsent": 9}, ["no room"]),
        (10, {"state": "FIN_WAIT2", "timer": "NONE"}, ["no FIN"]),
    ],
)
def test_thresholds(number: int, values: dict[str, Any], waits_for: list[str]) -> None:
    found = check(rule, "orphans", seen_of([track(**values) for _ in range(number)]))
    assert [finding.facts["waits_for"] for finding in found] == waits_for


def looked_at(acked_seqs: list[int], **values: Any) -> Track:
    """An orphan to which ACKs come, in looks a second apart."""
    found = track(since_ack_us=100_000, **values)
    for n, acked_seq in enumerate(acked_seqs, 1):
        row = SimpleNamespace(**vars(found.last) | {"acked_seq": acked_seq})
        found._look(row, 100.0 + n, rule.marks)
    return found


DRAINS, STANDS = list(range(2, 10)), [2] * 8


@pytest.mark.parametrize(
    ("acked_seqs", "values", "waits_for"),
    [
        (DRAINS, {}, []),
        (DRAINS, {"timer": "ZERO_WINDOW"}, []),
        (STANDS, {}, ["no ACK"]),
        (STANDS, {"timer": "ZERO_WINDOW"}, ["no room"]),
        (DRAINS, {"state": "FIN_WAIT2"}, ["no FIN"]),
    ],
)
def test_data_that_drains_slowly_is_no_fault(
    acked_seqs: list[int], values: dict[str, Any], waits_for: list[str]
) -> None:
    found = check(rule, "orphans", seen_of([looked_at(acked_seqs, **values) for _ in range(10)]))
    assert [finding.facts["waits_for"] for finding in found] == waits_for


def test_tcp_linger2_is_the_applications_own_choice() -> None:
    tracks = [track(state="FIN_WAIT2", linger2_set=True, fin_timeout_s=120) for _ in range(10)]
    (finding,) = check(rule, "orphans", seen_of(tracks))
    assert (finding.remedies[0].name, finding.remedies[0].present) == ("TCP_LINGER2", 120)


def test_near_the_limit(machine: dict[str, Any]) -> None:
    machine["orphans"] = 249
    assert check(rule, "orphans", seen_of([])) == []
    machine["orphans"] = 250
    (finding,) = check(rule, "orphans", seen_of([]))
    assert (finding.severity, finding.facts["count"]) == ("warning", 0)
    assert finding.title.endswith("the kernel may reset some")
    (finding,) = check(rule, "orphans", seen_of([], killed=3))
    assert (finding.severity, finding.facts["count"]) == ("critical", 3)
    assert finding.title.endswith("the kernel resets some")
    assert (finding.remedies[0].present, finding.remedies[0].proposed) == (1000, 2000)
    machine["limit"] = None
    assert check(rule, "orphans", seen_of([])) == []
