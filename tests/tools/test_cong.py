"""`tcpscope cong` against TCP_INFO and the kernel's counters: each visit to a state, and the times, which add up."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpscope.errors import UsageError
from tcpscope.filters import Filter
from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab
from tcpscope.request import Request
from tcpscope.session import Session
from tcpscope.tools import cong
from tests.conftest import RunningTool, until
from tests.lacks import is_refused
from tests.played_again import seen
from tests.record import Call, Script, Seen, Socket, Test, Watch, recorded
from tests.tools.pair import exchange, pair, without_timers

PORT = 6780
PORTS = f"{PORT}-{PORT + 9}"
EVENTS = Watch("cong", "--events", "--port", PORTS)
ALL = Watch("cong", "--all", "-i", "0.1", "--port", PORTS)
ONCE = Watch("cong", "-i", "86400", "--port", PORTS)
VISITS = Watch("cong", "--histogram", "--by", "netns,ca_state", "--port", PORTS, every_kernel=False)

OPEN, DISORDER, CWR, RECOVERY, LOSS = range(5)  # enum tcp_ca_state
NAMES = ("Open", "Disorder", "CWR", "Recovery", "Loss")
TIMES = ("open_us", "disorder_us", "cwr_us", "recovery_us", "loss_us")
ENTRIES = {"Recovery": ("TcpExtTCPSackRecovery", "TcpExtTCPRenoRecovery"), "CWR": ("TcpExtTCPLossProbeRecovery",)}
"""A state -> the counters of how often it was entered."""

SECOND_ALONE = ("change", "end", "destroy")
FIRST_ALONE = tuple(f"{hook}_again" for hook in SECOND_ALONE)

Row = dict[str, Any]


def must_work(seen: Seen) -> None:
    """Skips where the tool is refused, and looks at how."""
    if seen.machine.hook("congestion", "change"):
        return
    for run in seen.recording.runs.values():
        if run.argv[0] == "cong":
            assert (run.status, run.stdout) == (3, "")
            assert "the kernel has no tracepoint tcp_cong_state_set" in run.stderr
    pytest.skip("this kernel has no tracepoint tcp_cong_state_set")


def lose_one(script: Script, near: Socket, number: int = 6) -> None:
    """The first of so many segments is lost."""
    with script.client.losing():
        near.send_all(1000)
    for _ in range(number - 1):
        near.send_all(1000)


def counted(script: Script) -> dict[str, list[Call]]:
    return {name: [script.client.counter(each) for each in names] for name, names in ENTRIES.items()}


def entries(before: dict[str, list[Call]], after: dict[str, list[Call]]) -> dict[str, int]:
    """By the kernel's counters."""
    return {name: sum(c.ret for c in after[name]) - sum(c.ret for c in before[name]) for name in before}


def changes(seen: Seen, script: Script, local: Call) -> list[Row]:
    """The changes of the client's end, one following the other without a gap."""
    rows = seen.rows(EVENTS, script.client, lport=local.ret)
    assert {(row["comm"], row["raddr"]) for row in rows} <= {("client", script.server.ipv4)}
    for before, after in pairwise(rows):
        assert after["ca_state"] == before["next_state"] != after["next_state"]
    return rows


def path(rows: list[Row]) -> list[str | None]:
    """The states in their order."""
    return [rows[0]["ca_state"], *(row["next_state"] for row in rows)] if rows else []


def total(seen: Seen, watch: Watch, script: Script, local: Call) -> Row:
    """Of the whole run of the client's end. It is the sum of the intervals."""
    row = seen.row(watch, script.client, lport=local.ret, total=True)
    rows = seen.rows(watch, script.client, lport=local.ret, total=False)
    if watch == ALL:
        for name in (*TIMES, "changes"):
            assert sum(each[name] for each in rows) == row[name], name
    return row


def check(seen: Seen, script: Script, local: Call, least_us: float, most_us: float) -> list[Row]:
    """Its changes. The times of each run add up to how long the connection existed."""
    rows = changes(seen, script, local)
    for watch in (ALL, ONCE):
        row = total(seen, watch, script, local)
        assert row["changes"] == sum(each["next_state"] is not None for each in rows)
        assert least_us - 2 <= sum(row[name] for name in TIMES) <= most_us + 2
        assert (row["ca_state"], row["comm"]) == (None, "client")
        for name, column in zip(NAMES[1:], TIMES[1:], strict=True):
            assert bool(row[column]) <= (name in path(rows)), name
    return rows


@pytest.mark.parametrize("sack", [True, False])
@recorded(EVENTS, ALL, ONCE)
def test_recovery(script: Script, sack: bool) -> Test:
    """One segment is lost: those after it are acknowledged, and it is sent again before a timer expires."""
    without_timers(script)
    for host in script.hosts:
        host.sysctl("tcp_sack", int(sack))
    script.client.sysctl("tcp_congestion_control", "reno")
    near, far, local = pair(script, PORT).ends
    exchange(near, far)
    begun, before = near.field("ca_state"), counted(script)
    lose_one(script, near)
    far.read(6000)
    exchange(near, far)  # without SACK it stays in Recovery until newer data is acknowledged
    over, after = near.until_field("ca_state", OPEN, "=="), counted(script)
    near.close()
    far.until_end()
    seen = yield
    must_work(seen)
    rows = [row for row in changes(seen, script, local) if row["next_state"]]
    assert (begun.ret, over.ret) == (OPEN, OPEN)
    assert path(rows)[0] == path(rows)[-1] == "Open"
    assert {name: path(rows).count(name) for name in ENTRIES} == entries(before, after)
    assert path(rows).count("Recovery") == 1
    assert set(path(rows)) <= {"Open", "Disorder", "Recovery"}
    for row in rows:
        assert (row["state"], row["cwnd"] > 0) == ("ESTABLISHED", True)
    (entry,) = (row for row in rows if row["next_state"] == "Recovery")
    assert entry["ssthresh"] == max(entry["cwnd"] // 2, 2)  # tcp_reno_ssthresh()
    assert all(row["ssthresh"] is None for row in rows[: rows.index(entry)])
    away = sum(row["visit_us"] for row in rows[1:])
    assert 0 < away <= over.end_us - begun.begin_us


@recorded(EVENTS, ALL, ONCE)
def test_loss(script: Script) -> Test:
    """Nothing arrives until the RTO has expired."""
    client, server = script.client.process("client"), script.server.process("server")
    script.client.sysctl("tcp_early_retrans", 0)
    listener = server.listener(PORT)
    near = client.socket()
    opened = near.connect(script.server.ipv4, PORT)
    far, local = listener.accept(), near.name()
    exchange(near, far)
    timeouts = script.client.counter("TcpExtTCPTimeouts")
    with script.client.losing():
        sent = near.send_all(3000)
        lost = near.until_field("ca_state", LOSS, "==")
        expired = script.client.until_counter("TcpExtTCPTimeouts", timeouts + 2)
        there = near.field("ca_state")
    far.read(3000)
    near.until_acknowledged()
    over = near.until_field("ca_state", OPEN, "==")
    far.close()
    near.until_end()
    closed = near.close()
    gone = script.client.until_sockets(0, "==", lport=local)
    seen = yield
    must_work(seen)
    assert (lost.ret, there.ret, over.ret) == (LOSS, LOSS, OPEN)
    assert expired.ret >= timeouts.ret + 2
    rows = check(seen, script, local, closed.begin_us - opened.end_us, gone.end_us - opened.begin_us)
    assert path(rows)[:3] == ["Open", "Loss", "Open"]  # the second RTO finds it in Loss
    assert path(rows)[-1] is None
    assert path(rows).count("Loss") == 1
    first, loss = rows[:2]
    assert sent.begin_us - opened.end_us - 2 <= first["visit_us"] <= lost.end_us - opened.begin_us + 2
    assert there.end_us - lost.end_us - 2 <= loss["visit_us"] <= over.end_us - sent.begin_us + 2
    assert first["cwnd"] == 1  # tcp_enter_loss(): what is in flight, and one more
    for watch in (ALL, ONCE):
        assert there.end_us - lost.end_us - 2 <= total(seen, watch, script, local)["loss_us"]


@recorded(EVENTS, ALL, ONCE)
def test_a_lost_tail(script: Script) -> Test:
    """The loss probe repairs it: the kernel enters CWR and leaves it within one ACK."""
    near, far, local = pair(script, PORT).ends
    exchange(near, far)
    before, probes = counted(script), script.client.counter("TcpExtTCPLossProbes")
    with script.client.losing():
        near.send_all(1000)
    far.read(1000)
    exchange(near, far)  # only the acknowledgement of newer data tells the kernel that the probe was needed
    after, probed = counted(script), script.client.counter("TcpExtTCPLossProbes")
    near.close()
    far.until_end()
    seen = yield
    must_work(seen)
    rows = [row for row in changes(seen, script, local) if row["next_state"]]
    assert {name: path(rows).count(name) for name in ENTRIES} == entries(before, after)
    assert (probed.ret - probes.ret, path(rows)) == (1, ["Open", "CWR", "Open"])
    assert total(seen, ALL, script, local)["changes"] == 2


MARKING = "table inet marking { chain out { type filter hook output priority 0; tcp dport %d ip ecn set ce; }; }"


@recorded(EVENTS, ALL, ONCE)
def test_a_mark_of_congestion(script: Script) -> Test:
    """A packet gets CE on its way (ECN). The kernel leaves CWR when it has told so: newer data is acknowledged."""
    without_timers(script)
    for host in script.hosts:
        host.sysctl("tcp_ecn", 1)
    script.client.sysctl("tcp_congestion_control", "reno")
    near, far, local = pair(script, PORT).ends
    exchange(near, far)
    before, marks = counted(script), script.server.counter("IpExtInCEPkts")
    script.client.exec("nft", MARKING % PORT)
    sent = near.send_all(100)
    reduced = near.until_field("ca_state", CWR, "==")
    there, marked = near.info(), script.server.counter("IpExtInCEPkts")
    script.client.exec("nft", "delete", "table", "inet", "marking")
    far.read(100)
    exchange(near, far)
    over, after = near.until_field("ca_state", OPEN, "=="), counted(script)
    near.close()
    far.until_end()
    seen = yield
    must_work(seen)
    rows = [row for row in changes(seen, script, local) if row["next_state"]]
    assert (marked.ret - marks.ret, path(rows)) == (1, ["Open", "CWR", "Open"])
    assert entries(before, after) == {"Recovery": 0, "CWR": 0}
    entry, left = rows
    assert entry["ssthresh"] == max(entry["cwnd"] // 2, 2) == there.info["ssthresh"]
    least_us, most_us = there.end_us - reduced.end_us - 2, over.end_us - sent.begin_us + 2
    assert least_us <= left["visit_us"] <= most_us
    for watch in (ALL, ONCE):
        row = total(seen, watch, script, local)
        assert least_us <= row["cwr_us"] <= most_us
        assert (row["changes"], row["disorder_us"], row["recovery_us"], row["loss_us"]) == (2, 0, 0, 0)


@recorded(EVENTS, ALL, ONCE)
def test_a_full_queue_of_this_host(script: Script) -> Test:
    """The device's queue drops a packet. The kernel takes that for congestion, and sends it again."""
    near, far, local = pair(script, PORT).ends
    exchange(near, far)
    before = counted(script)
    script.client.exec("tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", 0)
    sent = near.send_all(1000)
    reduced = near.until_field("ca_state", CWR, "==")
    there = near.info()
    # Without a queue for a moment it would drop the packet, and say that it was sent (noop_enqueue()).
    script.client.exec("tc", "qdisc", "change", "dev", "veth0", "root", "pfifo", "limit", 100)
    far.read(1000)
    exchange(near, far)
    over, after = near.until_field("ca_state", OPEN, "=="), counted(script)
    near.close()
    far.until_end()
    seen = yield
    must_work(seen)
    rows = [row for row in changes(seen, script, local) if row["next_state"]]
    assert path(rows) == ["Open", "CWR", "Open"]
    assert there.info["retrans"] == 0  # it has not left
    assert entries(before, after) == {"Recovery": 0, "CWR": 0}
    for us in (rows[1]["visit_us"], *(total(seen, watch, script, local)["cwr_us"] for watch in (ALL, ONCE))):
        assert there.end_us - reduced.end_us - 2 <= us <= over.end_us - sent.begin_us + 2


@recorded(EVENTS, ALL, ONCE)
def test_a_lost_syn(script: Script) -> Test:
    """The RTO puts it into Loss while it is in SYN_SENT; the SYN-ACK takes it out."""
    listener = script.server.process("server").listener(PORT)
    with script.client.losing():
        near = script.client.process("client").socket()
        connecting = near.connect(script.server.ipv4, PORT, wait=False)
        lost = script.client.until_counter("TcpRetransSegs", 1)
    found = script.client.counter("TcpRetransSegs")
    connecting.join()
    local, far = near.name(), listener.accept()
    info = near.field("ca_state")
    near.close()
    far.until_end()
    seen = yield
    must_work(seen)
    rows = changes(seen, script, local)
    assert path(rows) == ["Open", "Loss", "Open", None]
    assert info.ret == OPEN
    assert [row["state"] for row in rows[:2]] == ["SYN_SENT", rows[1]["state"]]
    assert found.begin_us - lost.end_us - 2 <= rows[1]["visit_us"] <= connecting.took_us + 2
    assert rows[0]["visit_us"] + rows[1]["visit_us"] <= connecting.took_us + 2


@recorded(EVENTS, ALL, ONCE)
def test_older_than_the_tool(script: Script) -> Test:
    """It is in Loss when the tool begins. How long that has been is not known; what it does from now on is."""
    with script.older():
        near, far, local = pair(script, PORT).ends
        quiet, other, still = pair(script, PORT + 1).ends
        exchange(near, far)
        script.client.lose()
        near.send_all(1000)
        lost = near.until_field("ca_state", LOSS, "==")
    began = near.field("ca_state")
    script.client.find()
    far.read(1000)
    near.until_acknowledged()
    over = near.until_field("ca_state", OPEN, "==")
    exchange(quiet, other)
    script.stay()
    seen = yield
    must_work(seen)
    assert (lost.ret, began.ret, over.ret) == (LOSS, LOSS, OPEN)
    (row,) = changes(seen, script, local)
    assert (row["ca_state"], row["next_state"], row["visit_us"]) == ("Loss", "Open", None)
    assert not changes(seen, script, still)
    assert not seen.rows(ONCE, script.client, lport=still.ret)
    for watch in (ALL, ONCE):
        row = total(seen, watch, script, local)
        assert (row["changes"], row["ca_state"]) == (1, "Open")
        assert row["disorder_us"] == row["cwr_us"] == row["recovery_us"] == 0
    one, other_one = (total(seen, ALL, script, each) for each in (local, still))
    assert sum(one[name] for name in TIMES) == other_one["open_us"]
    assert (other_one["changes"], other_one["ca_state"]) == (0, "Open")
    intervals = [seen.rows(ALL, script.client, lport=each.ret, total=False) for each in (local, still)]
    assert [sum(row[name] for name in TIMES) for row in intervals[0]] == [row["open_us"] for row in intervals[1]]


@recorded(EVENTS, ALL, ONCE)
def test_it_ends_in_loss(script: Script) -> Test:
    """The application resets it. The next connection of the same socket begins in Open."""
    script.client.sysctl("tcp_early_retrans", 0)
    near, far, first = pair(script, PORT).ends
    exchange(near, far)
    with script.client.losing():
        sent = near.send_all(1000)
        lost = near.until_field("ca_state", LOSS, "==")
        there = near.field("ca_state")
        ended = near.disconnect()
    listener = script.server.process("other").listener(PORT + 1)
    near.connect(script.server.ipv4, PORT + 1)
    other, second = listener.accept(), near.name()
    exchange(near, other)
    near.close()
    other.until_end()
    seen = yield
    must_work(seen)
    rows = changes(seen, script, first)
    assert path(rows) == ["Open", "Loss", None]
    assert there.end_us - lost.end_us - 2 <= rows[-1]["visit_us"] <= ended.end_us - sent.begin_us + 2
    row = total(seen, ALL, script, first)
    assert (row["changes"], row["ca_state"]) == (1, None)
    assert not changes(seen, script, second)
    row = total(seen, ALL, script, second)
    assert (row["changes"], row["ca_state"], row["loss_us"]) == (0, None, 0)
    assert not seen.rows(ONCE, script.client, lport=second.ret)


@recorded(EVENTS, VISITS)
def test_visits(script: Script) -> Test:
    """As many as there are rows, and as long as they must be."""
    script.client.sysctl("tcp_early_retrans", 0)
    near, far, local = pair(script, PORT).ends
    exchange(near, far)
    with script.client.losing():
        sent = near.send_all(3000)
        lost = near.until_field("ca_state", LOSS, "==")
        there = near.field("ca_state")
    far.read(3000)
    near.until_acknowledged()
    over = near.until_field("ca_state", OPEN, "==")
    near.close()
    far.until_end()
    seen = yield
    must_work(seen)
    rows = changes(seen, script, local)
    groups = {row["ca_state"]: row for row in seen.rows(VISITS, script.client)}
    assert {state: group["count"] for state, group in groups.items()} == Counter(row["ca_state"] for row in rows)
    loss = groups["Loss"]
    assert (loss["count"], loss["total"]) == (1, True)
    assert there.end_us - lost.end_us - 2 <= loss["min_us"] == loss["max_us"] <= over.end_us - sent.begin_us + 2


def ca_state(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 2)[1]


def spent(row: Row) -> int:
    return sum(row[name] for name in TIMES)


def ends_us(row: Row) -> int:
    return round(datetime.fromisoformat(row["time"]).timestamp() * 1e6)


@contextlib.contextmanager
def connected(lab: Lab) -> Iterator[socket.socket]:
    """A connection of the lab's client."""
    if is_refused("congestion", Kernel()):
        pytest.skip("this kernel has no tracepoint tcp_cong_state_set")
    with lab.server.socket(socket.AF_INET) as listener:
        listener.bind((lab.server.ipv4, 0))
        listener.listen()
        with lab.client.run(socket.create_connection, listener.getsockname()) as made:
            yield made


def lose(lab: Lab, connection: socket.socket) -> None:
    """What it sends does not arrive, until its RTO has expired."""
    lab.client.hold()
    connection.sendall(b"x")
    until(lambda: ca_state(connection) == LOSS, "Loss")


def recover(lab: Lab, connection: socket.socket) -> None:
    lab.client.release()
    until(lambda: ca_state(connection) == OPEN, "Open")


@pytest.mark.kernel
@seen
def test_a_visit_over_many_borders(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Each interval has its own part, to the microsecond; as has that of a connection without a change."""
    with connected(lab) as connection:
        check_borders(lab, run_tool, connection)


def check_borders(lab: Lab, run_tool: type[RunningTool], connection: socket.socket) -> None:
    port = connection.getsockname()[1]

    def last(rows: list[Row], number: int, column: str) -> bool:
        """Was the connection in this state in the last intervals?"""
        own = [row for row in rows if row["lport"] == port][-number:]
        return len(own) == number and all(row[column] == spent(row) for row in own)

    with (
        lab.client.run(socket.create_connection, connection.getpeername()),
        run_tool("cong", "--all", "-i", "0.2", "--netns", str(lab.client.inode)) as tool,
    ):
        tool.wait_for(lambda rows: last(rows, 2, "open_us"))
        lose(lab, connection)
        tool.wait_for(lambda rows: last(rows, 3, "loss_us"))
        recover(lab, connection)
        tool.wait_for(lambda rows: last(rows, 2, "open_us"))
        rows = tool.stop().rows
    own = [row for row in rows if row["lport"] == port and not row["total"]]
    other = [row for row in rows if row["lport"] != port and not row["total"]]
    assert [(row["time"], spent(row)) for row in own] == [(row["time"], row["open_us"]) for row in other]
    for before, row in pairwise(own):
        assert spent(row) == ends_us(row) - ends_us(before)
    totals = {row["lport"] == port: row for row in rows if row["total"]}
    for name in (*TIMES, "changes"):
        assert totals[True][name] == sum(row[name] for row in own)
    assert (totals[True]["changes"], totals[False]["changes"]) == (2, 0)
    assert spent(totals[True]) == totals[False]["open_us"]
    elsewhere = [index for index, row in enumerate(own) if row["loss_us"]]
    assert elsewhere == list(range(elsewhere[0], elsewhere[-1] + 1))
    states = ["Loss" if index in elsewhere[:-1] else "Open" for index in range(len(own))]
    assert [row["ca_state"] for row in own] == states


@contextlib.contextmanager
def watching(lab: Lab, skip: tuple[str, ...] = ()) -> Iterator[tuple[Session, list[Any]]]:
    """The probe, and the events of the lab's client when the block has ended."""
    events: list[Any] = []
    with Session("congestion", "congestion", Filter(netns=lab.client.inode), skip=("look", *skip)) as session:
        assert session.layout is not None
        cong.tool.begin(session, Request())
        yield session, events
        session.end()
        events += [event for batch in session.batches() for event in session.layout.decoder().rows(batch)]


@pytest.mark.kernel
@pytest.mark.parametrize("skip", [(), SECOND_ALONE, FIRST_ALONE], ids=["both", "second alone", "first alone"])
@seen
def test_each_change_once(lab: Lab, skip: tuple[str, ...]) -> None:
    """Without the first copy of a program everything is as if it had been skipped each time."""
    with connected(lab) as connection, watching(lab, skip) as (session, events):
        lose(lab, connection)
        recover(lab, connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    changes = [(event.ca_state, event.next_state, event.visit_us is None) for event in events]
    # The first visit began before the probe. What one copy alone has interrupted itself in is in no event.
    skipped = sum(missed for *_, missed in session.loaded.program_info().values()) if skip else 0
    assert skipped or changes == [("Open", "Loss", True), ("Loss", "Open", False), ("Open", None, False)]
    rescued = session.counters()["rescued"]
    assert (skip == SECOND_ALONE) <= (rescued >= len(changes))
    assert (skip == FIRST_ALONE) <= (rescued == 0)
    assert skip or session.account().missed == 0


@pytest.mark.kernel
@seen
def test_a_missed_change(lab: Lab) -> None:
    """No program saw the change to Loss. The next one tells, and not how long it was in Loss."""
    programs = ("change", "change_again")
    with connected(lab) as connection, watching(lab) as (session, events):
        lose(lab, connection)
        recover(lab, connection)
        session.loaded.detach(*programs)
        lose(lab, connection)
        for program in programs:
            session.loaded.attach(program)
        recover(lab, connection)
    changes = [(event.ca_state, event.next_state, event.visit_us is None) for event in events]
    assert changes == [("Open", "Loss", True), ("Loss", "Open", False), ("Loss", "Open", True)]
    assert session.account().missed == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"events": True, "histogram": True}, "--events and --histogram; one of them at a time"),
        ({"events": True, "interval": 1.0}, "--interval 1; with --events rows come as events happen"),
        ({"events": True, "all": True}, "--all; it goes with neither --events nor --histogram"),
        ({"histogram": True, "all": True}, "--all; it goes with neither --events nor --histogram"),
        ({"rate": 5}, "--rate 5; needs --events"),
        ({"by": "pid"}, "--by pid; needs --histogram"),
        ({"columns": "times"}, "unknown column 'times'; did you mean 'time'?"),
    ],
    ids=str,
)
def test_wrong_usage(options: dict[str, Any], error: str) -> None:
    asked = {name: options[name] for name in ("interval", "rate", "columns") if name in options}
    chosen = {option.name: options.get(option.name, option.unset) for option in cong.tool.options}
    with pytest.raises(UsageError) as raised:
        cong.tool.open(Request(options=chosen, **asked))
    assert str(raised.value) == error


@given(
    visits=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=12),
    looks=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=8),
    ends=st.booleans(),
)
def test_what_comes_after_a_border_is_for_the_next_interval(
    visits: list[tuple[int, int]], looks: list[tuple[int, int]], ends: bool
) -> None:
    """A look comes later than the border, and changes come in between."""
    begin = 1000
    times = [begin, *accumulate((us for _, us in visits), initial=begin + 1)]
    times[1:2] = []
    parts = [(state, since, until_us) for (state, _), (since, until_us) in zip(visits, pairwise(times), strict=True)]
    if not ends:
        parts[-1] = (*parts[-1][:2], 1 << 40)
    following = [*(state for state, _, _ in parts[1:]), 255]
    connection, read_us, border, told = cong._Connection(begin), begin, begin, 0
    for length, late in looks:
        before, border = border, read_us + length
        read_us = border + late
        while told < len(parts) and parts[told][2] <= read_us:
            connection.visit(raw(*parts[told], following[told]), border)
            told += 1
        if told < len(parts):
            state, since, _ = parts[told]
            connection.visit(raw(state, since, read_us, state), border)
        did = connection.end_interval(border)
        expected = [0] * 5
        for state, since, until_us in parts:
            expected[state] += max(0, min(until_us, border) - max(since, before))
        assert did.us == expected
        changed = [at for (old, _, at), new in zip(parts, following, strict=True) if new not in (old, 255)]
        assert did.changes == sum(before < at <= border for at in changed)
        assert connection.has_ended(border) == (ends and parts[-1][2] <= border)
        now = [state for state, since, until_us in parts if since <= border < until_us]
        assert connection.at_border == (now[0] if now else 255)


def raw(state: int, since_us: int, until_us: int, following: int) -> SimpleNamespace:
    """An event of the kernel."""
    return SimpleNamespace(ca_state=state, next_state=following, since_ns=since_us * 1000, time=until_us * 1000)
