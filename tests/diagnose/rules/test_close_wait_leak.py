"""CLOSE_WAIT that piles up, and half-closed connections that do not."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import processes
from tcpscope.diagnose.rules import close_wait_leak
from tcpscope.diagnose.rules.close_wait_leak import LEAST, Growth, rising, rule
from tcpscope.diagnose.sockets import Track
from tests.diagnose.rules.endings import NETNS, check, findings
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9503
MORE = 8


def left_open(script: Script) -> Any:
    """A client that closes, and a server that does not: a function that makes one more such connection."""
    server, client = script.server.process("leaky"), script.client.process("web")
    listener = server.listener(PORT)

    def one() -> Any:
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send("request")
        far.receive()
        near.close()
        far.until_state("CLOSE_WAIT")
        return far

    return server, one


@recorded(DIAGNOSE)
def test_a_server_that_never_closes(script: Script) -> Test:
    with script.older():
        server, one = left_open(script)
        for _ in range(LEAST):
            one()
        server.pause(2_500_000)  # in a shorter time a close() may still come, so the first look would not count them
    server.pause(4_000_000)
    for _ in range(MORE):
        server.pause(1_000_000)
        one()
    server.pause(4_500_000)
    left = script.server.diag(state="CLOSE_WAIT", lport=PORT)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("close_wait_leak", "warning")
    assert facts["netns"] == script.server.inode
    assert (facts["pid"], facts["comm"]) == (server.pid, "leaky")
    assert facts["count"] == left.ret == LEAST + MORE
    assert facts["old"] >= LEAST
    assert 3 <= facts["grown"] <= MORE
    assert facts["per_s"] > 0
    assert finding["who"].startswith(f"leaky (PID {server.pid}")


@recorded(DIAGNOSE)
def test_a_server_that_waits_in_connect(script: Script) -> Test:
    """Its clients have given up, and it cannot know: each thread waits for a host that does not answer."""
    with script.older():
        script.client.blackhole("198.51.100.0/24")
        server, one = left_open(script)

        def held_up() -> None:
            server.socket().start("198.51.100.7", 5432)
            one()

        for _ in range(LEAST):
            held_up()
    server.pause(4_000_000)
    for _ in range(MORE):
        server.pause(1_000_000)
        held_up()
    server.pause(4_500_000)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    assert (finding["rule"], finding["severity"]) == ("connects_fail", "critical")
    assert f"{LEAST + MORE} clients of PID {server.pid} have closed meanwhile" in finding["observed"]


@recorded(DIAGNOSE)
def test_a_child_that_keeps_what_its_parent_has_closed(script: Script) -> Test:
    many = 40  # more than the parent has files open
    server, one = left_open(script)
    job = server.fork("job")

    def passed() -> None:
        far = one()
        job.take(far)
        far.close()

    for _ in range(many):
        passed()
    server.pause(6_000_000)
    for _ in range(MORE):
        server.pause(1_000_000)
        passed()
    server.pause(4_500_000)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    if not facts["kept_by_others"]:  # before 6.2 that needs a privilege
        assert facts["open_files"] is None
        return
    assert (finding["rule"], finding["severity"], facts["pid"]) == ("close_wait_leak", "warning", server.pid)
    assert facts["count"] == many + MORE > facts["open_files"]
    assert finding["title"].endswith("are kept open by other processes")
    assert facts["children"] == [job.pid]
    assert "its children: job (1)" in finding["observed"]
    (remedy,) = finding["remedies"]
    assert remedy["command"] is None
    assert finding["look"] == [f"list -L {PORT}"]


@recorded(DIAGNOSE)
def test_half_closed_streams_are_healthy(script: Script) -> Test:
    """Some are silent for long, and others go on sending. One more than a leak needs, of each kind."""
    with script.older():
        server, client = script.server.process("stream"), script.client.process("viewer")
        listener = server.listener(PORT)
        streams = []
        for _ in range(LEAST + 1):
            near = client.socket()
            near.connect(script.server.ipv4, PORT)
            streams.append((near, listener.accept()))
        for near, _ in streams:
            near.shutdown()
    for _ in range(13):
        for _, far in streams[::2]:
            far.send("more")
        server.pause(1_000_000)
    script.stay()
    seen = yield
    assert findings(seen, script) == []


def track(**values: Any) -> Track:
    """A connection that has been left open for 20 s."""
    row: dict[str, Any] = {
        "netns": NETNS, "pid": 7, "comm": "leaky", "state": "CLOSE_WAIT", "role": "PASSIVE", "has_file": True,
        "unsent": 0, "unacked": 0, "since_sent_us": 20_000_000, "since_ack_us": 20_000_000,
        "lport": 80, "raddr": "192.0.2.1", "rport": 50000,
    }  # fmt: skip
    made = SimpleNamespace(**row | values)
    found = Track(made, made, 100.0, 100.0)
    found._look(made, 100.0, rule.marks)
    return found


def seen_of(tracks: list[Track], numbers: list[int]) -> Any:
    looks = deque((100.0 + n, number) for n, number in enumerate(numbers))
    return SimpleNamespace(sockets=SimpleNamespace(now=tracks, numbers={("close_wait_leak", NETNS, 7): looks}))


GROWS = [10, 11, 12, 13]


@pytest.fixture(autouse=True)
def owner(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    values: dict[str, Any] = {"open_files": 1024, "open_files_hard": 65536, "files": 100, "state": "S"}

    def read(pid: int, comm: str) -> processes.Process:
        return processes.Process(pid, comm, **{name: value for name, value in values.items() if name != "files"})

    monkeypatch.setattr(close_wait_leak.processes, "read", read)
    monkeypatch.setattr(close_wait_leak.processes, "files", lambda pid: values["files"])
    return values


@pytest.mark.parametrize(
    ("number", "values", "numbers", "found"),
    [
        (10, {}, GROWS, True),
        (9, {}, GROWS, False),
        (10, {}, [10, 11, 12, 12], False),  # in two looks there were more
        (10, {}, [10, 11, 12, 11], False),  # one was closed
        (10, {}, [10, 11, 12, 13, 13, 13, 13, 13, 13, 13], False),  # that is over
        (10, {"since_ack_us": 9_000_000}, GROWS, False),
        (10, {"since_sent_us": 9_000_000}, GROWS, False),  # the application still sends
        (10, {"unacked": 1}, GROWS, False),
        (10, {"unsent": 1}, GROWS, False),
        (10, {"has_file": False}, GROWS, False),  # it waits for accept()
        (10, {"state": "ESTABLISHED"}, GROWS, False),
    ],
)
def test_thresholds(number: int, values: dict[str, Any], numbers: list[int], found: bool) -> None:
    tracks = [track(**values) for _ in range(number)]
    assert len(check(rule, "close_wait_leak", seen_of(tracks, numbers))) == found


def test_a_leak_that_has_taken_half_of_the_files(owner: dict[str, Any]) -> None:
    owner["open_files"] = 20
    (finding,) = check(rule, "close_wait_leak", seen_of([track() for _ in range(10)], [10, 10]))
    assert finding.facts["seconds_left"] is None


def test_the_owner_cannot_have_all_of_them(owner: dict[str, Any]) -> None:
    tracks = [track() for _ in range(10)]
    for files, others in ((10, False), (9, True), (None, False)):
        owner["files"] = files
        (finding,) = check(rule, "close_wait_leak", seen_of(tracks, GROWS))
        assert finding.facts["kept_by_others"] == others
        assert (not any(remedy.command for remedy in finding.remedies)) == others
    owner.update(open_files=20, files=9)
    assert not check(rule, "close_wait_leak", seen_of(tracks, [10, 10]))  # its limit says nothing of theirs
    owner["state"] = None  # it has ended, and another process may have its number
    assert not check(rule, "close_wait_leak", seen_of(tracks, GROWS))


def test_what_is_left_of_the_limit(owner: dict[str, Any]) -> None:
    owner.update(open_files=1000, files=500)
    (finding,) = check(rule, "close_wait_leak", seen_of([track() for _ in range(10)], GROWS))
    assert (finding.facts["per_s"], finding.facts["seconds_left"], finding.severity) == (1.0, 500, "warning")
    assert "3 more in 3.0 s, 1.0 a second, and the number did not fall" in finding.observed
    owner["files"] = 900
    (finding,) = check(rule, "close_wait_leak", seen_of([track() for _ in range(10)], GROWS))
    assert finding.severity == "critical"


@pytest.mark.parametrize(("limit", "proposed", "named"), [(512, 1024, False), (1024, 2048, True)])
def test_more_than_select_can_take(owner: dict[str, Any], limit: int, proposed: int, named: bool) -> None:
    owner["open_files"] = limit
    (finding,) = check(rule, "close_wait_leak", seen_of([track() for _ in range(10)], GROWS))
    remedy = finding.remedies[1]
    assert remedy.proposed == proposed
    assert ("select()" in (remedy.risk or "")) == named


@pytest.mark.parametrize(("hard", "limits"), [(2048, "2048:"), (2047, "2048:2048"), (1024, "2048:2048")])
def test_the_hard_limit_is_raised_where_it_is_lower(owner: dict[str, Any], hard: int, limits: str) -> None:
    owner["open_files_hard"] = hard
    (finding,) = check(rule, "close_wait_leak", seen_of([track() for _ in range(10)], GROWS))
    remedy = finding.remedies[1]
    assert (remedy.command, remedy.present, remedy.proposed) == (f"prlimit --pid 7 --nofile={limits}", 1024, 2048)
    assert (f"The hard limit is {hard}" in (remedy.risk or "")) == (hard < 2048)


def test_a_limit_that_cannot_be_read(owner: dict[str, Any]) -> None:
    owner.update(open_files=None, files=500)
    (finding,) = check(rule, "close_wait_leak", seen_of([track() for _ in range(10)], GROWS))
    assert "it has 500 files open; its limit (RLIMIT_NOFILE) cannot be read" in finding.observed
    assert [remedy.name for remedy in finding.remedies] == [None]


def test_rising() -> None:
    assert rising([]) == rising([(1.0, 5)]) == rising([(1.0, 5), (2.0, 5)]) == Growth()
    assert rising([(1.0, 5), (2.0, 4), (3.0, 6), (5.0, 6)]) == Growth(1, 2, 3.0, 2.0)
