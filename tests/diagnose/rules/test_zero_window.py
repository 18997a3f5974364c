"""A window that stays closed: both ends here, a reader that pauses only, a reader that hangs."""

from __future__ import annotations

import signal
from contextlib import ExitStack, suppress
from socket import AF_INET
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding, processes
from tcpscope.diagnose.rules.zero_window import BACKOFF, SEVERAL, STALLED_SECONDS, rule
from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool, until
from tests.diagnose.rules.connections import connection, findings, track
from tests.record import Script, Socket, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT = 8300
STALL_US = 9_000_000
FULL = "TcpExtTCPToZeroWindowAdv"


def upload(script: Script) -> tuple[Socket, Socket]:
    """A client that has filled the receive buffer of a server, and its server's end."""
    listener = script.server.process("api-server").listener(PORT)
    client = script.client.process("uploader").socket()
    client.connect(script.server.ipv4, PORT)
    served = listener.accept()
    before = script.server.counter(FULL)
    client.blocking(False)
    client.send_all(16 << 20, may_fail=True)
    script.server.until_counter(FULL, before + 1)
    return client, served


@recorded(DIAGNOSE)
def test_a_stopped_reader_is_named(script: Script) -> Test:
    _, served = upload(script)
    server = served.process
    script.server.exec("kill", "-STOP", server.made)
    script.server.agent.pause(STALL_US)
    unread = script.server.diag("recv_q", state="ESTABLISHED", lport=PORT)
    unsent = script.client.diag("send_q", state="ESTABLISHED", rport=PORT)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("zero_window", "critical")
    assert (facts["netns"], facts["pid"], facts["comm"]) == (script.server.inode, server.pid, "api-server")
    assert (facts["unread_bytes"], facts["unsent_bytes"], facts["count"]) == (unread.ret, unsent.ret, 1)
    assert (facts["full"], facts["state"]) == (1, "T")
    assert facts["stalled_s"] >= STALLED_SECONDS
    assert finding["who"].startswith(f"api-server (PID {server.pid}")
    assert finding["remedies"][0]["command"] == f"kill -CONT {server.pid}"


@recorded(DIAGNOSE)
def test_a_stopped_server_is_one_fault(script: Script) -> Test:
    """It neither reads nor accepts, for one reason."""
    client, served = upload(script)
    server = served.process
    server.kill(signal.SIGSTOP)
    for _ in range(3):
        client.process.socket().connect(script.server.ipv4, PORT)
        client.process.pause(500_000)
    script.server.agent.pause(STALL_US)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    assert (finding["rule"], finding["severity"]) == ("accept_stalled", "critical")
    assert (finding["facts"]["waiting"], finding["facts"]["stuck_pids"]) == (3, [server.pid])
    assert finding["remedies"][0]["command"] == f"kill -CONT {server.pid}"


@recorded(DIAGNOSE)
def test_a_reader_that_hangs_is_named(script: Script) -> Test:
    _, served = upload(script)
    script.server.agent.pause(STALL_US)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    assert (finding["rule"], finding["severity"]) == ("zero_window", "warning")
    assert finding["facts"]["pid"] == served.process.pid
    assert finding["facts"]["state"] not in ("T", None)
    assert f"-p {served.process.pid}" in finding["remedies"][0]["command"]


@recorded(DIAGNOSE)
def test_a_reader_that_pauses_for_a_second_is_none(script: Script) -> Test:
    client, served = upload(script)
    for _ in range(5):
        script.server.agent.pause(1_500_000)
        size = served.receive(1 << 20)
        client.send_all(1 << 20, may_fail=True)
    served.close()  # or nobody reads until the end of all scenes
    client.close()
    script.stay()
    seen = yield
    assert size.ret > 0
    assert findings(seen, script) == []


def test_a_client_elsewhere_that_reads_nothing(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Two of its connections may be paused; from the third on it is a fault. Its own host is not watched."""

    def began(severity: str) -> list[dict[str, Any]]:
        found = [row["began"] for row in tool.rows if "began" in row]
        return [each for each in found if each["severity"] == severity]

    with ExitStack() as stack, run_tool("diagnose", "-d", "600", "--netns", str(lab.server.inode)) as tool:
        listener = stack.enter_context(lab.server.socket(AF_INET))
        listener.bind((lab.server.ipv4, PORT))
        listener.listen()
        for number in range(SEVERAL):
            near = stack.enter_context(lab.client.socket(AF_INET))
            near.connect((lab.server.ipv4, PORT))
            far = stack.enter_context(listener.accept()[0])
            far.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    far.send(bytes(1 << 20))
            if number == SEVERAL - 2:
                until(lambda: began("info"), "the two that may be paused")
                assert not began("warning")
        until(lambda: began("warning"), "the third one")
    (paused,), (stuck,) = began("info"), began("warning")
    assert (paused["rule"], paused["facts"]["lport"], paused["facts"]["count"]) == ("zero_window", PORT, SEVERAL - 1)
    assert (paused["facts"]["clients"], paused["facts"]["raddr"]) == (1, lab.client.ipv4)
    assert (stuck["rule"], stuck["facts"]["raddr"]) == ("zero_window", lab.client.ipv4)
    assert stuck["title"].startswith(f"{lab.client.ipv4} does not read: {SEVERAL} connections of ")


def check(*tracks: Any) -> list[Finding]:
    evidence: Any = SimpleNamespace(sockets=SimpleNamespace(now=tracks))
    return list(rule.check(evidence))


def stalled(looks: int, **more: Any) -> Any:
    sender = {
        "timer": "ZERO_WINDOW",
        "unsent": 100_000,
        "backoff": BACKOFF,
        "peer_window": 0,
        "since_sent_us": 60_000_000,
    }
    rows = [connection(**sender | {"busy_us": n * 1_000_000, "rwnd_us": n * 1_000_000} | more) for n in range(looks)]
    return track(rule, rows)


def test_a_sender_waits_for_five_seconds() -> None:
    assert check(stalled(5)) == []
    (finding,) = check(stalled(6))
    assert (finding.severity, finding.facts["stalled_s"], finding.facts["unsent_bytes"]) == ("warning", 5.0, 100_000)


def test_probes_tell_of_a_stall_that_is_older_than_the_watch() -> None:
    rto_us = 200_000
    assert check(stalled(1, backoff=4, rto_us=rto_us)) == []
    assert check(stalled(1, backoff=5, rto_us=rto_us))[0].facts["stalled_s"] == 6.2  # 0.2 * (2^5 - 1)


def test_a_sender_that_was_limited_by_something_else_in_between_does_not_count() -> None:
    assert check(stalled(9, rwnd_us=0)) == []


@pytest.mark.parametrize(
    ("state", "window", "severity"),
    [("T", 60_000, "critical"), ("S", 60_000, None), ("S", 0, "warning"), ("D", 0, "critical")],
)
def test_unread_data_counts_if_nothing_more_fits_or_the_owner_is_stopped(
    monkeypatch: pytest.MonkeyPatch, state: str, window: int, severity: str | None
) -> None:
    monkeypatch.setattr(processes, "read", lambda pid, comm: processes.Process(pid, comm, state))
    rows = [connection(unread=5000, own_window=window)] * 7
    assert [finding.severity for finding in check(track(rule, rows))] == ([severity] if severity else [])
    assert check(track(rule, rows[:6])) == []


def test_two_ends_on_one_machine_are_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "read", lambda pid, comm: processes.Process(pid, comm, "S"))
    sender = stalled(7, netns=1, pid=11, lport=40000, rport=80, acked_seq=500)
    far = {"netns": 2, "pid": 22, "lport": 80, "rport": 40000, "role": "PASSIVE", "own_window": 0}
    reader = track(rule, [connection(unread=400, read_seq=100, **far)] * 7)
    (finding,) = check(sender, reader)
    assert (finding.facts["netns"], finding.facts["pid"], finding.facts["unsent_bytes"]) == (2, 22, 100_000)
    other = track(rule, [connection(unread=400, read_seq=101, **far)] * 7)
    assert len(check(sender, other)) == 2


def test_a_proxy_that_waits_to_send_is_not_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {22: "S", 33: "S"}
    monkeypatch.setattr(processes, "read", lambda pid, comm: processes.Process(pid, comm, states[pid]))
    upstream = track(rule, [connection(unread=5000, own_window=0, pid=22, lport=40001)] * 7)
    downstream = stalled(7, pid=22, lport=8080, rport=50000, role="PASSIVE")
    assert [finding.facts["raddr"] for finding in check(upstream, downstream)] == ["192.0.2.2"]
    states[22] = "T"  # it does neither
    assert {finding.severity for finding in check(upstream, downstream)} == {"critical", "info"}


def test_several_connections_of_a_process_that_hangs_are_critical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "read", lambda pid, comm: processes.Process(pid, comm, "S"))
    tracks = [track(rule, [connection(unread=5000, own_window=0, lport=n)] * 7) for n in range(3)]
    assert [finding.severity for finding in check(*tracks[:2])] == ["warning"]
    assert [finding.severity for finding in check(*tracks)] == ["critical"]


def paused(address: int, **more: Any) -> Any:
    """A client of a server that waits for it with what it sends."""
    return stalled(7, **{"role": "PASSIVE", "lport": 443, "rport": 50000, "raddr": f"198.51.100.{address}"} | more)


def sends(address: int, **more: Any) -> Any:
    values = {"role": "PASSIVE", "lport": 443, "raddr": f"198.51.100.{address}", "sent_bytes": 100_000}
    return track(rule, [connection(**values | more)])


def test_viewers_that_pause_are_one_finding_and_no_fault() -> None:
    (finding,) = check(*(paused(n) for n in range(40)), *(sends(n) for n in range(40, 200)))
    assert finding.severity == "info"
    assert finding.title == "40 clients of port 443 do not read: 40 connections of app wait to send"
    assert "40 of 200 connections of this port that send" in finding.observed
    facts = finding.facts
    assert (facts["count"], facts["clients"], facts["lport"], facts["raddr"]) == (40, 40, 443, None)
    assert (finding.remedies, finding.explains) == ([], ())


@pytest.mark.parametrize(
    ("addresses", "severities"),
    [
        ([1], ["info"]),
        ([1, 1], ["info"]),
        ([1, 1, 1], ["warning"]),
        ([1, 1, 1, 2], ["info", "warning"]),
        ([1, 1, 1, 2, 2, 2], ["warning", "warning"]),
    ],
)
def test_several_connections_of_one_client_are_a_fault(addresses: list[int], severities: list[str]) -> None:
    """Whichever of the server's processes has them."""
    others = [sends(n) for n in range(100, 120)]
    found = check(*(paused(address, pid=pid) for pid, address in enumerate(addresses, 7)), *others)
    assert sorted(finding.severity for finding in found) == severities
    assert len({finding.key for finding in found}) == len(severities)


@pytest.mark.parametrize(
    ("stuck", "others", "severity"),
    [(2, 0, "info"), (3, 0, "warning"), (3, 2, "warning"), (3, 3, "info")],
)
def test_if_most_of_a_port_wait_it_is_no_single_client(stuck: int, others: int, severity: str) -> None:
    idle = [sends(n, since_sent_us=5_000_000) for n in range(100, 110)]
    elsewhere = [sends(n, lport=80) for n in range(110, 120)]
    found = check(*(paused(n) for n in range(stuck)), *(sends(n) for n in range(50, 50 + others)), *idle, *elsewhere)
    assert [finding.severity for finding in found] == [severity]
    assert bool(found[0].remedies) == (severity == "warning")


def test_each_port_is_told_by_itself() -> None:
    found = check(paused(1), paused(2, lport=80))
    assert [(finding.severity, finding.facts["lport"]) for finding in found] == [("info", 443), ("info", 80)]


@pytest.mark.parametrize("role", ["ACTIVE", "UNKNOWN"])
def test_what_is_no_client_is_a_fault_from_the_first_on(role: str) -> None:
    found = check(*(paused(n, role=role) for n in range(3)))
    assert [finding.severity for finding in found] == ["warning"] * 3
