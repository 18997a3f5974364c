"""`list` against `ss -tanpe`, with two thousand sockets and in every state.

`ss` runs before and after. Some kernels create a socket's cookie only when a program asks for it; `ss` asks for all.
"""

from __future__ import annotations

import base64
import gzip
import os
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest

import tcpscope
from tcpscope.kernel.loaded import Loaded
from tcpscope.lab.hosts import Lab
from tests.conftest import DEADLINE, RunningTool
from tests.record import Call, Host, Script, Test, Watch, recorded

PAIRS = 1000
MANY, STATES, MAPPED, SIX, WAITING, REQUESTS = range(7000, 7006)
NOBODY = "198.51.100.0/24"
IPPROTO_MPTCP = 262
LIST = Watch("list", moment=True)
OF_ALICE = Watch("list", "--comm", "alice", "-R", str(MANY), moment=True, every_kernel=False)
OF_CHILD = Watch("list", "--comm", "bobs child", moment=True, every_kernel=False)
OF_PORTS = Watch("list", "-L", f"{SIX}-{WAITING}", moment=True, every_kernel=False)
OF_IPV6 = Watch("list", "-6", moment=True, every_kernel=False)
WITH_NOBODY = Watch("list", "--raddr", NOBODY, moment=True, every_kernel=False)
SS_STATES = {
    "ESTAB": "ESTABLISHED",
    "SYN-SENT": "SYN_SENT",
    "SYN-RECV": "SYN_RECV",
    "FIN-WAIT-1": "FIN_WAIT1",
    "FIN-WAIT-2": "FIN_WAIT2",
    "TIME-WAIT": "TIME_WAIT",
    "UNCONN": "CLOSE",
    "CLOSE-WAIT": "CLOSE_WAIT",
    "LAST-ACK": "LAST_ACK",
    "LISTEN": "LISTEN",
    "CLOSING": "CLOSING",
}

Rows = list[dict[str, Any]]


class Shown(NamedTuple):
    """What both ss and `list` say of a socket."""

    state: str
    recv_q: int
    send_q: int
    local: tuple[str, int]
    remote: tuple[str, int]
    cookie: int
    holders: tuple[tuple[int, str, int], ...]


def ss(host: Host) -> Call:
    """`ss -tanpe`: for `by_ss`. Packed, because an answer has no room for the lines of two thousand sockets."""
    return host.exec("sh", "-c", "ss -HtanpeO | gzip -n | base64 -w0")


def by_ss(call: Call) -> dict[int, Shown]:
    """What ss showed, by cookie."""
    found = {}
    for line in gzip.decompress(base64.b64decode(call.data)).decode().splitlines():
        state, recv_q, send_q, local, remote, *rest = line.split()
        details = " ".join(rest)
        cookie = int(re.search(r"sk:([0-9a-f]+)", details)[1], 16)  # type: ignore[index]
        holders = re.findall(r'\("([^"]*)",pid=(\d+),fd=(\d+)\)', details)
        found[cookie] = Shown(
            SS_STATES[state],
            int(recv_q),
            int(send_q),
            end(local),
            end(remote),
            cookie,
            tuple(sorted((int(pid), comm, int(fd)) for comm, pid, fd in holders)),
        )
    return found


def end(text: str) -> tuple[str, int]:
    """Address and port as ss writes them; nothing is ("", 0)."""
    address, _, port = text.rpartition(":")
    address = address.strip("[]").partition("%")[0].removeprefix("::ffff:")
    return ("" if port == "*" else address, 0 if port == "*" else int(port))


def shown(row: dict[str, Any]) -> Shown:
    # ss writes the address of a dual-stack listener as "*".
    dual = row["family"] == 6 and row["laddr"] == "::" and row["state"] == "LISTEN"
    return Shown(
        row["state"],
        row["accept_queue"] if row["state"] == "LISTEN" else row["rx_queue_bytes"],
        row["accept_limit"] if row["state"] == "LISTEN" else row["tx_queue_bytes"],
        ("*" if dual else row["laddr"], row["lport"]),
        (row["raddr"] or "", row["rport"] or 0),
        row["cookie"],
        tuple(sorted((held["pid"], held["comm"], held["fd"]) for held in row["holders"])),
    )


class Site:
    """Sockets of the server in every state, those of `alice` and of `bob`, at the moment. Before and after it, ss."""

    def __init__(self, script: Script, pairs: int) -> None:
        self.host, self.other = script.server, script.client
        self.alice, self.bob = self.host.process("alice"), self.host.process("bob")
        self.far = self.other.process("far")
        # Nothing may end by itself meanwhile.
        for name in ("tcp_orphan_retries", "tcp_synack_retries", "tcp_syn_retries"):
            self.host.sysctl(name, 15)
        self.host.sysctl("tcp_fin_timeout", 600)
        self.host.sysctl("tcp_syncookies", 0)
        self.other.blackhole(NOBODY)
        # All of alice's: established sockets, both ends in one host.
        self.many = self.alice.listener(MANY, backlog=128)
        for _ in range(pairs):
            self.alice.socket().connect(self.host.ipv4, MANY)
            self.many.accept()
        script.rest()  # TIME_WAIT lasts a minute, whatever is set
        self.listen()
        self.connect()
        self.end_some()
        with self.other.held():
            self.hang()
            self.before = ss(self.host)
            script.moment()
            self.after = ss(self.host)

    def listen(self) -> None:
        self.states = self.bob.listener(STATES)
        self.mapped = self.bob.listener(MAPPED, "::", dual=True, backlog=7)
        self.six = self.bob.listener(SIX, self.host.ipv6, backlog=8)
        self.queue = self.bob.listener(WAITING, backlog=3)
        self.child = self.bob.fork("bobs child")  # it holds these four
        self.bob.listener(REQUESTS, backlog=64)

    def connect(self) -> None:
        self.ends, self.kept = [self.far.socket() for _ in range(8)], []
        for made in self.ends:
            made.connect(self.host.ipv4, STATES)
            self.kept.append(self.states.accept())
        to_mapped, to_six = self.far.socket(), self.far.socket("6")
        to_mapped.connect(self.host.ipv4, MAPPED)
        unread = self.mapped.accept()
        to_mapped.send("x" * 1234)
        unread.until_received(1234)
        to_six.connect(self.host.ipv6, SIX)
        self.six.accept()
        waits = [self.far.socket() for _ in range(3)]
        for made in waits:
            made.connect(self.host.ipv4, WAITING)
        waits[0].send("x" * 10)
        waits[1].close()
        # Half open: requests of peers that never answer.
        for number in range(1, 6):
            self.other.segment(f"198.51.100.{number}", 10_000, self.host.ipv4, REQUESTS)

    def end_some(self) -> None:
        """FIN_WAIT2 with an owner and without, CLOSE_WAIT, TIME_WAIT."""
        self.kept[0].shutdown()
        self.kept[1].close()
        self.ends[2].close()
        self.ends[3].close()
        self.kept[3].until_end()
        self.kept[3].close()  # as second: LAST_ACK, gone
        self.kept[4].close()
        self.ends[4].until_end()
        self.ends[4].close()  # bob closed first: TIME_WAIT
        one = self.alice.socket()
        one.connect(self.host.ipv4, MANY)
        child = self.many.accept()
        one.close()
        child.until_end()
        child.close()
        self.ends[7].close()
        self.kept[7].until_end()
        # A FIN alone is acknowledged by a timer, and all acknowledgements must be here before none comes any more.
        for state in ("LAST_ACK", "FIN_WAIT1"):
            self.host.until_sockets(0, "==", state=state)
        for state, number in (("FIN_WAIT2", 2), ("CLOSE_WAIT", 3), ("TIME_WAIT", 2), ("SYN_RECV", 5)):
            self.host.until_sockets(number, "==", state=state)
        self.host.until_sockets(10, "==", "recv_q", state="ESTABLISHED", lport=WAITING)

    def hang(self) -> None:
        """Nothing comes back any more: FIN_WAIT1 with an owner and without, LAST_ACK, SYN_SENT."""
        self.kept[5].shutdown()
        self.kept[6].close()
        self.kept[7].close()
        self.bob.socket().start("198.51.100.77", 9)
        for state, number in (("FIN_WAIT1", 2), ("LAST_ACK", 1), ("SYN_SENT", 1)):
            self.host.until_sockets(number, "==", state=state)


def by_cookie(rows: Iterable[dict[str, Any]]) -> Rows:
    """In that order, without the time of the snapshot: each socket is there as often as it was shown."""
    without = [{name: value for name, value in row.items() if name != "time"} for row in rows]
    return sorted(without, key=lambda row: int(row["cookie"]))


@recorded(LIST)
def test_all_sockets_as_ss_shows_them(script: Script) -> Test:
    site = Site(script, PAIRS)
    seen = yield
    rows, expected = seen.rows(LIST, site.host), by_ss(site.after)
    assert by_ss(site.before) == expected  # nothing has changed meanwhile
    assert len(expected) > 2 * PAIRS
    assert len(rows) == len({row["cookie"] for row in rows})  # each once
    found = {row["cookie"]: shown(row) for row in rows}
    cookies = expected.keys() | found.keys()
    assert [(expected.get(c), found.get(c)) for c in cookies if expected.get(c) != found.get(c)] == []
    assert Counter(row["state"] for row in rows)["ESTABLISHED"] == 2 * PAIRS + 4


@recorded(LIST)
def test_the_states_are_all_there(script: Script) -> Test:
    site = Site(script, 1)
    seen = yield
    rows = seen.rows(LIST, site.host)
    assert Counter(row["state"] for row in rows) == {
        "LISTEN": 6,
        "SYN_SENT": 1,
        "SYN_RECV": 5,
        "ESTABLISHED": 6,
        "FIN_WAIT1": 2,
        "FIN_WAIT2": 2,
        "TIME_WAIT": 2,
        "CLOSE_WAIT": 2,
        "LAST_ACK": 1,
    }
    # The other ones of FIN_WAIT1 and FIN_WAIT2 were closed, and what waits in an accept queue has no file yet.
    owned = Counter(row["state"] for row in rows if row["holders"])
    assert owned == {"LISTEN": 6, "SYN_SENT": 1, "ESTABLISHED": 4, "FIN_WAIT1": 1, "FIN_WAIT2": 1, "CLOSE_WAIT": 1}


@recorded(LIST)
def test_queues(script: Script) -> Test:
    site = Site(script, 0)
    seen = yield
    rows = [row for row in seen.rows(LIST, site.host) if row["lport"] in (MAPPED, WAITING)]
    (listener,) = (row for row in rows if (row["lport"], row["state"]) == (WAITING, "LISTEN"))
    assert (listener["accept_queue"], listener["accept_limit"]) == (3, 3)
    assert listener["rx_queue_bytes"] is listener["tx_queue_bytes"] is None
    assert all(row["accept_queue"] is row["accept_limit"] is None for row in rows if row["state"] != "LISTEN")
    waiting = [row for row in rows if row["lport"] == WAITING and row["state"] != "LISTEN"]
    assert sorted((row["state"], row["rx_queue_bytes"]) for row in waiting) == [
        ("CLOSE_WAIT", 1),
        ("ESTABLISHED", 0),
        ("ESTABLISHED", 10),
    ]
    assert [row["holders"] for row in waiting] == [[], [], []]  # nobody has accepted them
    (unread,) = (row for row in rows if (row["lport"], row["state"]) == (MAPPED, "ESTABLISHED"))
    assert (unread["rx_queue_bytes"], unread["family"], unread["raddr"]) == (1234, 4, site.other.ipv4)


@recorded(LIST)
def test_every_holder(script: Script) -> Test:
    bob = script.server.process("bob")
    listener = bob.listener(WAITING)
    fd = listener.fd()
    child = bob.fork("bobs child")
    script.moment()
    seen = yield
    row = seen.row(LIST, script.server)
    holders = sorted((process.pid, process.comm, fd.ret) for process in (bob, child))
    assert [(held["pid"], held["comm"], held["fd"]) for held in row["holders"]] == holders
    assert (row["pid"], row["comm"]) == holders[0][:2]
    assert {held["uid"] for held in row["holders"]} == {0}


@recorded(LIST)
def test_cookies_are_those_of_the_sockets(script: Script) -> Test:
    listener = script.server.process("bob").listener(WAITING)
    cookie = listener.cookie()
    script.moment()
    seen = yield
    assert seen.row(LIST, script.server)["cookie"] == cookie.ret


@recorded(LIST, OF_ALICE, OF_CHILD, OF_PORTS, OF_IPV6, WITH_NOBODY)
def test_filters(script: Script) -> Test:
    site = Site(script, 20)
    seen = yield
    everything = seen.rows(LIST, site.host)
    rows = seen.rows(OF_CHILD, site.host)
    assert sorted(row["lport"] for row in rows) == [STATES, MAPPED, SIX, WAITING]
    assert all(len(row["holders"]) == 2 for row in rows)  # one holder is asked for, all are shown
    rows = seen.rows(OF_PORTS, site.host)
    assert by_cookie(rows) == by_cookie(row for row in everything if row["lport"] in (SIX, WAITING))
    rows = seen.rows(OF_IPV6, site.host)
    assert by_cookie(rows) == by_cookie(row for row in everything if row["family"] == 6)
    assert {row["lport"] for row in rows if row["state"] == "ESTABLISHED"} == {SIX}
    assert Counter(row["state"] for row in seen.rows(WITH_NOBODY, site.host)) == {"SYN_RECV": 5, "SYN_SENT": 1}
    assert len(seen.rows(OF_ALICE, site.host)) == 20


@recorded(LIST)
def test_mptcp(script: Script) -> Test:
    """An MPTCP socket holds a TCP socket, which ss shows as the process's."""
    script.server.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    owner = script.server.process("owner")
    listener = owner.listener(7100, "0.0.0.0", protocol=IPPROTO_MPTCP, backlog=4, may_fail=True)
    told = ss(script.server)
    script.moment()
    seen = yield
    if listener.made.errno != "none":
        assert not seen.machine.kernel.has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    row = seen.row(LIST, script.server)
    (expected,) = (found for found in by_ss(told).values() if found.local[1] == 7100)
    assert [held["pid"] for held in row["holders"]] == [owner.pid]
    assert (row["state"], row["accept_limit"]) == (expected.state, expected.send_q) == ("LISTEN", 4)


@pytest.mark.kernel
def test_a_process_and_a_namespace(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Their numbers are not known before: one holder is asked for, all are shown, of that namespace alone."""
    made = [host.socket(socket.AF_INET) for host in (lab.server, lab.server, lab.client)]
    for port, listener in enumerate(made, 7000):
        listener.bind(("0.0.0.0", port))
        listener.listen()
    child = lab.server.spawn(["sleep", "infinity"], pass_fds=[made[0].fileno(), made[2].fileno()])
    with run_tool("list", "--netns", str(lab.server.inode), "-p", str(child.pid)) as tool:
        (row,) = tool.wait().rows
    assert (row["lport"], {held["pid"] for held in row["holders"]}) == (7000, {os.getpid(), child.pid})
    with run_tool("list", "--netns", str(lab.client.inode)) as tool:
        (row,) = tool.wait().rows
    assert (row["lport"], row["netns"]) == (7002, lab.client.inode)
    for listener in made:
        listener.close()


@pytest.mark.kernel
def test_every_interval(lab: Lab) -> None:
    """Each snapshot has what exists then, as one round, and its own time."""
    first, second = (lab.server.socket(socket.AF_INET) for _ in range(2))
    for port, listener in ((7000, first), (7001, second)):
        listener.bind(("127.0.0.1", port))
        listener.listen()
    ports = defaultdict(set)
    with tcpscope.open("list", netns=lab.server.inode, interval=0.1, duration=DEADLINE) as rows:
        for row in rows:
            ports[row.time].add(row.lport)
            if len(ports) == 3:
                first.close()
            if {7001} in ports.values() and len(ports) > 3:
                break
        rows.stop()
    second.close()
    seen = list(ports.values())
    assert seen[0] == seen[1] == {7000, 7001}
    assert {7000} not in seen
    assert {7001} in seen


@pytest.mark.kernel
def test_the_first_few_need_no_look_at_all(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = [lab.server.socket(socket.AF_INET) for _ in range(1200)]
    for port, listener in enumerate(listeners, 10000):
        listener.bind(("127.0.0.1", port))
        listener.listen()
    read: list[int] = []
    iterate = Loaded.iterate

    def counting(loaded: Loaded, hook: str, *rest: int) -> Iterator[bytes]:
        for piece in iterate(loaded, hook, *rest):
            if hook == "existing":
                read.append(len(piece))
            yield piece

    monkeypatch.setattr(Loaded, "iterate", counting)

    def seen(**options: Any) -> tuple[int, int]:
        read.clear()
        with tcpscope.open("list", netns=lab.server.inode, **options) as rows:
            shown = list(rows)
        assert all(row.pid == os.getpid() for row in shown)
        return len(shown), sum(read)

    number, whole = seen()
    assert number == 1200
    number, few = seen(max_events=5)
    assert number == 5
    assert few < whole / 2
    number, few = seen(max_events=800)
    assert number == 800
    assert few < whole
    assert seen(max_events=5, pid=os.getpid()) == (5, whole)  # only the holders tell which are wanted
    for listener in listeners:
        listener.close()
