"""A listener that nobody accepts from, and clients that it refuses: for the tests of `queue` and of diagnose's rules.

Each scenario has a server of its own, so the events of that namespace are compared with all that its counters moved
by. A run ends when its clients have been reset: nothing is sent any more, and the counters stand still.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tests.lacks import FUNCTIONS
from tests.record import PORTS, Call, Process, Script, Seen, Socket, Watch
from tests.record.script import POLLOUT, SO_LINGER, SOL_SOCKET

EVENTS = Watch("queue", "--events", "--port", PORTS)
TRACED = Watch("queue", "--events", "--port", PORTS, lacks=FUNCTIONS)
"""By tracepoints alone."""
SAMPLED = Watch(
    "queue", "--events", "--port", PORTS, lacks=(*FUNCTIONS, "consume_skb", "kfree_skb"), every_kernel=False
)
TABLE = Watch("queue", "-i", "0.5", "--port", PORTS)
DIAGNOSE = Watch("diagnose", "-d", "86400")

FAMILIES = ("4", "6", "mapped")
BACKLOG = 5
SMALL_BACKLOG = 3
PORT = 8000
NOBODY = {"4": "198.51.100.0/24", "6": "2001:db8:51::/64"}

Rows = list[dict[str, Any]]


class Run:
    """A listener that nobody accepts from, and what its clients did; the server's counters before and after.

    `family` is one of FAMILIES, or "only6" for a listener on :: that takes no IPv4.
    """

    after: Call

    def __init__(
        self,
        script: Script,
        family: str = "4",
        backlog: int = BACKLOG,
        port: int = PORT,
        *,
        owner: Process | None = None,
        client: Process | None = None,
    ) -> None:
        self.host, self.peer, self.port = script.server, script.client, port
        self.owner = owner or self.host.process("server")
        self.client = client or self.peer.process("client")
        self.kind = "6" if family in ("6", "only6") else "4"
        self.target = (self.host.address(self.kind), port)
        self.laddr = "::" if family in ("mapped", "only6") else self.target[0]
        self.before = self.host.counters()
        self.listener = self.owner.listener(port, self.laddr, backlog=backlog, dual=family == "mapped")
        self.clients: dict[Socket, Call] = {}
        self._open: list[Socket] = []

    def start(self, number: int = 1) -> list[Socket]:
        """So many connects begin."""
        return [self._client(waits=False) for _ in range(number)]

    def connect(self, number: int = 1) -> list[Socket]:
        """So many connects succeed, one after the other, as the client sees it."""
        return [self._client(waits=True) for _ in range(number)]

    def _client(self, waits: bool) -> Socket:
        made = self.client.socket(self.kind)
        made.linger(0)
        if waits:
            made.connect(*self.target)
        else:
            made.start(*self.target)
        return self.add(made)

    def add(self, made: Socket) -> Socket:
        """One of its clients, which `end()` closes."""
        self.clients[made] = made.name()
        self._open.append(made)
        return made

    def waiting(self, number: int) -> None:
        """Wait until so many connections wait for accept()."""
        self.host.until_sockets(number, "==", "recv_q", state="LISTEN", lport=self.port)

    def fill(self, number: int = BACKLOG + 1) -> None:
        """So many connects succeed, as the server sees it too: one more than the limit is full."""
        self.connect(number)
        self.waiting(number)

    def overflow_at_syn(self, number: int) -> list[Socket]:
        """The queue is full; then so many SYNs come."""
        self.fill()
        before = self.overflows()
        started = self.start(number)
        self.until_overflows(before, number)
        return started

    def overflow_at_ack(self, number: int, first: Callable[[], object] | None = None) -> None:
        """So many handshakes more than fit are at their last step when the queue becomes full; `first` comes before."""
        self.fill(BACKLOG)
        with self.host.held():
            late = self.start(number + 1)
            self.until_requests(number + 1)
            if first:
                first()
            before = self.overflows()
        for made in late:
            made.until_ready(POLLOUT)
        self.until_overflows(before, number)

    def requests(self) -> Call:
        return self.host.diag(state="SYN_RECV", lport=self.port)

    def until_requests(self, number: int) -> None:
        self.host.until_sockets(number, "==", state="SYN_RECV", lport=self.port)

    def overflows(self) -> Call:
        return self.host.counter("TcpExtListenOverflows")

    def until_overflows(self, before: Call, number: int) -> None:
        """Wait for so many refusals more; what was repeated meanwhile counts again."""
        self.host.until_counter("TcpExtListenOverflows", before + number)

    def flood(self, number: int) -> None:
        """So many SYNs of peers that never answer. All have been handled when the next step comes.

        More than four requests, and more than half of the backlog, are pruned (reqsk_timer_handler()): tests that
        count them have a smaller backlog than that.
        """
        prefix = NOBODY[self.kind]
        self.peer.blackhole(prefix)
        network = prefix.rpartition("/")[0]
        for host in range(1, number + 1):
            source = f"{network}{host:x}" if self.kind == "6" else f"{network[:-1]}{host}"
            self.peer.segment(source, 10_000, *self.target)
        self.host.flush()

    def accept(self, number: int) -> list[Socket]:
        """So many are accepted."""
        return [self.listener.accept() for _ in range(number)]

    def finish(self, *clients: Socket) -> None:
        """They send ten bytes and close, as programs do: without a reset."""
        for made in clients:
            made.option(SOL_SOCKET, SO_LINGER, bytes(8))
            made.send("ten bytes!")
            made.close()
            self._open.remove(made)

    def give_up(self, made: Socket) -> None:
        """Close a client, which sends its SYN no more."""
        made.close()
        self._open.remove(made)

    def end(self) -> None:
        """Reset the clients. What came before stays counted, and nothing comes any more."""
        for made in self._open:
            made.close()
        self._open.clear()
        self.host.flush(), self.peer.flush()  # what had left before is handled, and counted
        self.after = self.host.counters()

    # When it has been played

    def ports(self, *clients: Socket) -> set[int]:
        """The local ports of these clients, of all without one."""
        return {self.clients[made].ret for made in clients or self.clients}

    def change(self, name: str, until: Call | None = None) -> int:
        """By how much a counter of TcpExt has moved, up to the end or to a look before."""
        return moved(self.before, until or self.after)[f"TcpExt{name}"]

    def events(self, seen: Seen) -> Rows:
        """Its own events, as many as the counters of its time say."""
        rows = seen.rows(EVENTS, self.host, lport=self.port)
        check(rows, moved(self.before, self.after), exact=is_exact(seen))
        return rows


def moved(before: Call, after: Call) -> Counter[str]:
    """By how much the counters of a host did."""
    change = Counter(after.counters)
    change.subtract(before.counters)
    return change


def check(rows: Rows, change: Counter[str], *, exact: bool) -> None:
    """There is not one event too many, and not one too few."""
    causes: Counter[str] = Counter()
    for row in rows:
        causes[row["cause"]] += row["count"]
    if exact:
        assert causes["ACCEPT_QUEUE_FULL"] == change["TcpExtListenOverflows"]
        assert causes["SYN_QUEUE_FULL"] == change["TcpExtTCPReqQFullDrop"]
        assert causes["COOKIE_SENT"] == change["TcpExtSyncookiesSent"]
        assert causes.total() - causes["COOKIE_SENT"] == change["TcpExtListenDrops"]
        assert causes.total() == len(rows)
    else:
        assert causes["COOKIE_SENT"] <= change["TcpExtSyncookiesSent"]
        assert causes.total() - causes["COOKIE_SENT"] == change["TcpExtListenDrops"]
        assert causes["ACCEPT_QUEUE_FULL"] <= change["TcpExtListenOverflows"]


def all_events(seen: Seen, first: Run, last: Run | None = None) -> Rows:
    """The events of both hosts, as many as the counters say from the start of the first run to the end of the last.

    Tracepoints alone show the same, where they can.
    """
    rows = seen.rows(EVENTS)
    assert values(rows, "netns") <= {first.host.inode}
    check(rows, moved(first.before, (last or first).after), exact=is_exact(seen))
    if has_rx_sk(seen.machine.kernel):
        assert sorted(map(_content, seen.rows(TRACED))) == sorted(map(_content, rows))
    return rows


def all_samples(seen: Seen, first: Run, last: Run | None = None) -> Rows:
    """What is sampled on both hosts in that time: as many refusals as the counters say."""
    if seen.machine.kernel.enumerator("BPF_FUNC_map_lookup_percpu_elem") is None:
        pytest.skip("before 5.19 a program cannot read the counters of all processors")
    rows = seen.rows(SAMPLED)
    assert values(rows, "netns") <= {first.host.inode}
    check(rows, moved(first.before, (last or first).after), exact=False)
    return rows


def _content(row: dict[str, Any]) -> str:
    return repr([(name, value) for name, value in row.items() if name != "time"])


def findings(seen: Seen, run: Run) -> Rows:
    """What `diagnose` found about both hosts, of whatever rule."""
    found: Rows = seen.run(DIAGNOSE).summary["findings"]
    return [finding for finding in found if finding["facts"]["netns"] in (run.host.inode, run.peer.inode)]


def looks_are_rare(seen: Seen) -> bool:
    """Whether a queue that is full for less than two seconds may fall between two looks.

    In a recording an emulated machine has so many listeners that looks come only every two seconds.
    """
    return seen.machine.functions_can_be_hooked


def is_exact(seen: Seen) -> bool:
    """Whether functions can be hooked, or kfree_skb has rx_sk, which came with this function (6.11)."""
    return seen.machine.functions_can_be_hooked or has_rx_sk(seen.machine.kernel)


def has_rx_sk(kernel: Kernel) -> bool:
    return kernel.parameters("sk_skb_reason_drop") is not None


def needs_exact(seen: Seen) -> None:
    if not is_exact(seen):
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")


def values(rows: Sequence[dict[str, Any]], *columns: str) -> set[Any]:
    """The different values of these columns."""
    return {tuple(row[name] for name in columns) if len(columns) > 1 else row[columns[0]] for row in rows}
