"""What the tests of `rtt` stand on.

The rule, for one end of a connection: the handshake gives a sample, each acknowledgement that delivers something of
this end gives one, and so does that of its FIN. A client that makes N requests, each after the answer to the one
before, has N + 2 samples when all is over; so has the server with its N answers. Nothing is sent twice.

Rows of `rtt` do not say of which network namespace they are, and all scenarios have the same addresses: so the server
of each scenario has a port that no other one has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.record import Call, Script, Seen, Socket, Watch
from tests.record.recording import Run

FAMILIES = ("4", "6", "mapped")
PORTS = range(6500, 6600)
WATCH = Watch("rtt", "--by", "connection", "-i", "0.3", "--port", f"{PORTS[0]}-{PORTS[-1]}")
IPPROTO_TCP, TCP_NODELAY = 6, 1
DEVICE = "veth0"

Row = dict[str, Any]
Rows = list[Row]


@dataclass(eq=False)
class Pair:
    """A connection: `near` is the client's end, `far` the server's, which has accepted it."""

    family: str
    port: int
    near: Socket
    far: Socket
    connected: Call
    local: Call
    exchanges: int = 0
    rounds: list[tuple[Call, Call]] = field(default_factory=list)
    """From the first call to the last: of the handshake, of each exchange, of the end."""
    ended: bool = False

    @property
    def ends(self) -> tuple[Socket, Socket]:
        return self.near, self.far

    def exchange(self, number: int = 1) -> None:
        """So many requests, each after the answer to the one before."""
        for _ in range(number):
            asked = self.near.send("request")
            self.far.read(7)
            self.far.send("answer")
            self.rounds.append((asked, self.near.read(6)))
            self.exchanges += 1

    def settle(self) -> None:
        for end in self.ends:
            end.until_acknowledged()

    def end(self, first: str = "client") -> None:
        """One side closes, then the other, and all has been acknowledged."""
        self.settle()
        one, other = self.ends if first == "client" else self.ends[::-1]
        closed = one.close()
        other.until_end()
        other.close()
        self.rounds.append((closed, self.gone(first)))

    def gone(self, first: str = "client") -> Call:
        """Wait until nothing is left but the TIME_WAIT of the side that has closed first."""
        one, other = self.ends if first == "client" else self.ends[::-1]
        for end, state in ((other, "any"), (one, "TIME_WAIT")):
            lport, rport = self.ports_of(end)
            last = end.process.host.until_sockets(int(end is one), "==", state=state, lport=lport, rport=rport)
        self.ended = True
        return last

    def ports_of(self, end: Socket) -> tuple[object, object]:
        """In the script: as numbers `numbers_of`."""
        return (self.local, self.port) if end is self.near else (self.port, self.local)

    def numbers_of(self, end: Socket) -> tuple[int, int]:
        return (self.local.ret, self.port) if end is self.near else (self.port, self.local.ret)

    def addresses_of(self, end: Socket) -> tuple[str, str]:
        host = end.process.host
        return host.address(self.kind), host.peer.address(self.kind)

    @property
    def kind(self) -> str:
        """Of what is on the wire."""
        return "6" if self.family == "6" else "4"

    @property
    def samples(self) -> int:
        """At either end, when it is over."""
        return 1 + self.exchanges + 1

    @property
    def took_us(self) -> list[float]:
        """Of the rounds."""
        return [last.end_us - first.begin_us for first, last in self.rounds]


class Site:
    """The hosts of a scenario with a process each, and the connections between these."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._routed: set[str] = set()
        be_patient(script)
        self.client, self.server = script.client.process("client"), script.server.process("server")
        self.pairs: list[Pair] = []

    def route(self, kind: str, *metrics: str) -> None:
        """At both hosts, unless it was done."""
        if kind not in self._routed:
            for host in self.script.hosts:
                host.exec(*route(host.ipv4, kind, *metrics))
        self._routed.add(kind)

    def listen(self, port: int, family: str = "4") -> Socket:
        """At "mapped" for both families."""
        address = "::" if family == "mapped" else self.script.server.address(family)
        return self.server.listener(port, address, backlog=64, dual=family == "mapped")

    def pair(self, port: int, listener: Socket, family: str = "4") -> Pair:
        """A connection that is made now; at "mapped" the client is an IPv4 one."""
        kind = "6" if family == "6" else "4"
        self.route(kind)
        near = self.client.socket(kind)
        connected = near.connect(self.script.server.address(kind), port)
        return self.add(Pair(family, port, near, listener.accept(), connected, near.name()))

    def add(self, pair: Pair) -> Pair:
        for end in pair.ends:
            end.option(IPPROTO_TCP, TCP_NODELAY, 1)
        pair.rounds.append((pair.connected, pair.connected))
        self.pairs.append(pair)
        return pair

    def new(self, port: int, family: str = "4") -> Pair:
        """The only connection to a listener of its own."""
        return self.pair(port, self.listen(port, family), family)

    def until_rows(self, watch: Watch, number: int, **columns: object) -> None:
        """Wait until a tool has written so many rows of a connection, or more, since it runs."""
        words = [word for name, value in columns.items() for word in (name, value)]
        self.client.until("rows", f"{watch.name}.out", 0, *words, op=">=", value=number)

    def over(self, first: str = "client") -> None:
        """The end of the scenario, and of the connections that have not ended."""
        for pair in self.pairs:
            if not pair.ended:
                pair.end(first)
        for host in self.script.hosts:  # a SYN is sent again after a second, whatever `route` says
            self.script.suppose(host.counter("TcpRetransSegs"), 0, f"TCP of the {host.role} sent something again")

    def watched(self, seen: Seen) -> dict[Socket, Rows]:
        """Of each end the rows of its intervals, as WATCH saw them: they sum to its total, and nobody else has any."""
        ports, rows = {pair.port for pair in self.pairs}, rows_of(seen, WATCH)
        assert all((row["lport"] in PORTS) != (row["rport"] in PORTS) for row in rows)
        rows = [row for row in rows if {row["lport"], row["rport"]} & ports]
        totals = {ends_of(row): row for row in rows if row["total"]}
        assert len(totals) == sum(row["total"] for row in rows)
        found: dict[Socket, Rows] = {}
        for pair in self.pairs:
            for end in pair.ends:
                total = totals.pop(pair.addresses_of(end) + pair.numbers_of(end))
                found[end] = [row for row in rows if not row["total"] and ends_of(row) == ends_of(total)]
                check_sum(total, found[end])
                assert (total["pid"], total["comm"]) == (end.process.pid, end.process.comm)
        assert not totals
        assert sum(map(len, found.values())) == sum(not row["total"] for row in rows)
        return found


def ends_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("laddr", "raddr", "lport", "rport"))


def count(rows: Rows) -> int:
    return sum(row["count"] for row in rows)


def check_sum(row: Row, parts: Rows) -> None:
    """Intervals and their total; and that what is said of a distribution is in order."""
    assert count(parts) == row["count"]
    assert min(part["min_us"] for part in parts) == row["min_us"]
    assert max(part["max_us"] for part in parts) == row["max_us"]
    octaves: Counter[int] = Counter()
    for low, _, number in (octave for part in parts for octave in part["histogram"]):
        octaves[low] += number
    assert {low: number for low, _, number in row["histogram"] if number} == +octaves
    assert octaves.total() == row["count"]
    assert 0 < row["min_us"] <= row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]
    assert row["min_us"] <= row["mean_us"] <= row["max_us"]


def run_of(seen: Seen, watch: Watch, *, status: int = 0, lost: int = 0) -> Run:
    """The whole run. Its account is exact: each sample shown is in a row over the whole run."""
    run = seen.run(watch) if not lost else seen.recording.runs[watch.name]
    assert run.status == status, run.stderr
    stats = run.stats
    assert stats is not None
    assert stats["seen"] == stats["shown"] + stats["filtered"] + stats["lost"]
    assert (stats["lost"], stats["table_full"]) == (lost, 0)
    assert stats["missed"] <= seen.left_out_at_most or not seen.machine.functions_can_be_hooked
    assert stats["shown"] == count([row for row in run.rows if row["total"]])
    return run


def rows_of(seen: Seen, watch: Watch, **how: int) -> Rows:
    return run_of(seen, watch, **how).rows


def totals_of(seen: Seen, watch: Watch, **how: int) -> Rows:
    return [row for row in rows_of(seen, watch, **how) if row["total"]]


def be_patient(script: Script) -> None:
    """TCP does not take for lost what is late; `route` has the rest."""
    for host in script.hosts:
        host.sysctl("tcp_no_metrics_save", 1)
        host.sysctl("tcp_early_retrans", 0)  # with several packets out, probes of the tail do not wait for rto_min


def route(ipv4: str, kind: str, *metrics: str) -> list[str]:
    """Of a host to its peer: TCP waits ten seconds before it sends data again. So nothing is, on the slowest kernel."""
    way = ("2001:db8::/64", "metric", "256") if kind == "6" else ("192.0.2.0/24", "scope", "link", "src", ipv4)
    prefix, *how = way
    return ["ip", "route", "replace", prefix, "dev", DEVICE, "proto", "kernel", *how, "rto_min", "10s", *metrics]


def delayed(script: Script, ms: float) -> list[Call]:
    """The path takes so long to and fro; `skip_without_netem` takes the calls."""
    return [host.netem(ms / 2) for host in script.hosts]


def skip_without_netem(seen: Seen, calls: list[Call]) -> None:
    """When this kernel provably has none."""
    if any(call.ret for call in calls):
        assert seen.machine.config["netem"] == "no"
        pytest.skip("this kernel has no netem")
