"""`connlat` against the client's own clock, and its summaries against its rows.

Each test has the same calls played, at ports of its own: a summary does not say of which network namespace it is.
"""

from __future__ import annotations

from collections import Counter
from statistics import mean

from tests.record import Call, Script, Test, Watch, recorded

SILENT, NOWHERE = "198.51.100.7", "203.0.113.7"
KINDS = QUICK, SLOW, REFUSED, GIVEN_UP, UNROUTED, OLDER = range(6)
TIMES = 20
LEAST_US = 500_000
POLLOUT = 4

ROWS, SLOW_ONES, WHOLE, DRAWN = range(6600, 6640, 10)


def connlat(base: int, *words: str) -> Watch:
    """Only the events themselves depend on the kernel, so the one without options is for every kernel."""
    return Watch("connlat", *words, "--rport", f"{base}-{base + len(KINDS) - 1}", every_kernel=not words)


EACH = connlat(ROWS)
SLOW_ALONE = connlat(SLOW_ONES, "--min", "0.5s")
BY_KIND = connlat(WHOLE, "--histogram", "--by", "outcome,rport", "-i", "0.5")
TABLE = connlat(DRAWN, "--histogram", "--time", "none", "-o", "table")


class Connect:
    """A connect(), which took at least and at most so long by the client's clock."""

    def __init__(self, calls: Calls, kind: int, address: str) -> None:
        self.kind = kind
        self.socket = calls.client.socket()
        self.began = self.socket.start(address, calls.base + kind)
        self._waited: Call | None = None
        self._info: Call | None = None
        self._closed: Call | None = None

    def waited(self, now: Call) -> None:
        """It is not over yet."""
        self._waited = now

    def finish(self) -> None:
        self.socket.until_ready(POLLOUT)
        # Takes the socket's lock, so whatever woke us up has done its work. No data was sent: what was sent again are
        # SYNs, and the smoothed RTT, if there is one, is that of the SYN, which is a part of the latency; of a repeated
        # one it is in ms.
        self._info = self.socket.info()
        self.socket.close()

    def give_up(self) -> None:
        self._closed = self.socket.close()

    @property
    def syn_retrans(self) -> int:
        assert self._info is not None
        return self._info.info["retrans"]

    @property
    def least_us(self) -> float:
        waited = self._waited.begin_us - self.began.end_us if self._waited else 0.0
        return max(waited, self._info.info["srtt_us"]) if self._info and not self.syn_retrans else waited

    @property
    def most_us(self) -> float:
        over = self._info or self._closed
        assert over is not None
        return over.end_us - self.began.begin_us


class Calls:
    """Connections of every kind, many of some: `made` are those that are younger than the tool."""

    def __init__(self, script: Script, base: int) -> None:
        self.base, self.made = base, list[Connect]()
        host, server = script.client, script.server
        with script.older():
            server.blackhole("198.51.100.0/24")
            listening = server.process("server")
            for kind in (QUICK, SLOW):
                listening.listener(base + kind, backlog=2 * TIMES)
            self.client = host.process("client")
            host.sysctl("tcp_syn_retries", 10)  # however long it takes, the client gives up, not the kernel
            older = Connect(self, OLDER, SILENT)
        for kind in (QUICK, REFUSED):
            for _ in range(TIMES):
                self.connect(kind, server.ipv4).finish()
        for kind in (QUICK, REFUSED):  # the answer is kept back: it takes so long at least
            with server.held():
                made = self.connect(kind, server.ipv4)
                self.client.pause(50_000)
                made.waited(self.client.now())
            made.finish()
        with server.held():
            made = self.connect(SLOW, server.ipv4)
            host.until_sockets(field="retransmits", rport=base + SLOW)  # a second SYN
            made.waited(self.client.now())
        made.finish()
        made = self.connect(GIVEN_UP, SILENT)
        self.client.pause(600_000)
        made.waited(self.client.now())
        made.give_up()
        self.connect(UNROUTED, NOWHERE).finish()
        older.give_up()

    def connect(self, kind: int, address: str) -> Connect:
        self.made.append(Connect(self, kind, address))
        return self.made[-1]

    def of(self, kind: int) -> list[Connect]:
        return [made for made in self.made if made.kind == kind]


@recorded(EACH)
def test_latency(script: Script) -> Test:
    calls = Calls(script, ROWS)
    seen = yield
    rows = seen.rows(EACH)
    assert len(rows) == len(calls.made) + 1
    found = {kind: [row["latency_us"] for row in rows if row["rport"] == ROWS + kind] for kind in KINDS}
    assert found.pop(OLDER) == found.pop(UNROUTED) == [None]
    assert [made.began.errno for made in calls.of(UNROUTED)] == ["ENETUNREACH"]
    for kind, latencies in found.items():
        made = calls.of(kind)
        assert len(latencies) == len(made)
        for us, call in zip(latencies, made, strict=True):
            assert call.least_us - 1 <= us <= call.most_us + 1, (kind, us, call.least_us, call.most_us)
    least = {kind: [made.least_us for made in calls.of(kind)] for kind in KINDS}
    assert [max(least[kind]) >= 50_000 for kind in (QUICK, REFUSED)] == [True, True]
    assert max(least[QUICK][:TIMES]) > 0
    assert min(found[SLOW]) >= 900_000
    assert min(least[GIVEN_UP]) >= 590_000
    (slow,) = calls.of(SLOW)
    assert [row["syn_retrans"] for row in rows if row["rport"] == ROWS + SLOW] == [slow.syn_retrans]
    assert slow.syn_retrans >= 1


@recorded(SLOW_ALONE)
def test_only_the_slow_ones(script: Script) -> Test:
    """What has no latency is not slow."""
    calls = Calls(script, SLOW_ONES)
    seen = yield
    run = seen.run(SLOW_ALONE)
    slow = Counter(row["rport"] - SLOW_ONES for row in seen.rows(SLOW_ALONE))
    may_be = Counter(made.kind for made in calls.made if made.most_us + 1 >= LEAST_US)
    del may_be[UNROUTED]
    assert {SLOW, GIVEN_UP} <= slow.keys()
    assert slow <= may_be  # the others only where the machine was slow
    assert all(row["latency_us"] >= LEAST_US for row in run.rows)
    assert run.stats is not None
    assert run.stats["seen"] - run.stats["filtered"] == run.stats["shown"] == slow.total()


@recorded(BY_KIND)
def test_histogram(script: Script) -> Test:
    """By outcome and port, so that each kind is one that the client has measured."""
    calls = Calls(script, WHOLE)
    seen = yield
    rows = seen.run(BY_KIND).rows
    whole = {row["rport"] - WHOLE: row for row in rows if row["total"]}
    assert len(whole) == sum(row["total"] for row in rows)
    outcomes = {
        QUICK: "ESTABLISHED",
        SLOW: "ESTABLISHED",
        REFUSED: "REFUSED",
        GIVEN_UP: "GAVE_UP",
        UNROUTED: "UNREACHABLE",
        OLDER: "GAVE_UP",
    }
    assert {kind: row["outcome"] for kind, row in whole.items()} == outcomes
    for kind, row in whole.items():
        if kind in (UNROUTED, OLDER):
            assert row["count"] == 1
            assert row["min_us"] is row["max_us"] is row["mean_us"] is row["p50_us"] is None
            assert row["histogram"] == []
            continue
        most_us = [made.most_us for made in calls.of(kind)]
        assert row["count"] == len(most_us)
        assert sum(count for *_, count in row["histogram"]) == row["count"]
        assert row["min_us"] <= row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]
        assert row["min_us"] <= min(most_us) + 1
        assert row["max_us"] <= max(most_us) + 1
        assert row["mean_us"] <= mean(most_us) + 1
    assert whole[SLOW]["min_us"] == whole[SLOW]["max_us"] >= 900_000
    parts: Counter[int] = Counter()
    for row in rows:
        if not row["total"]:
            parts[row["rport"] - WHOLE] += row["count"]
    assert parts == {kind: row["count"] for kind, row in whole.items()}


@recorded(TABLE)
def test_histogram_is_drawn(script: Script) -> Test:
    Calls(script, DRAWN)
    seen = yield
    drawn = seen.run(TABLE).stdout
    lines = drawn.splitlines()
    assert lines[0].split()[:2] == ["OUTCOME", "COUNT"]
    kinds = [line.split()[:2] for line in lines[1:] if line[:1].isalpha()]
    counts = {"ESTABLISHED": TIMES + 2, "REFUSED": TIMES + 1, "GAVE_UP": 2, "UNREACHABLE": 1}
    assert kinds == [[outcome, str(count)] for outcome, count in counts.items()]
    bars = [int(line.partition(":")[2].split()[0]) for line in lines if " -> " in line]
    assert sum(bars) == 2 * TIMES + 4  # those that have a latency
    assert "*" * 40 in drawn
