"""Who moves bytes now?

Every interval one row for each connection that has sent or received data in it: its owner, both ends, how many bytes,
most first. --by pid adds up the connections of a process, --by raddr those with a remote address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import add, attrgetter, sub
from typing import Any

from tcpscope.errors import UsageError
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import Batch, Run, Ticker
from tcpscope.schema import Clock, Decoder
from tcpscope.session import Session, closed_on_error
from tcpscope.tool import Stream

_MOVED = ("tx_bytes", "rx_bytes", "retrans_bytes")
_KEYS = {"connection": ("socket", "opened_ns"), "pid": ("pid", "comm"), "raddr": ("raddr",)}
_NOUNS = {"connection": "connection", "pid": "process", "raddr": "remote address"}


class Top(Stream):
    intervals = "1"
    rated = False

    def columns(self, request: Request) -> tuple[Column, ...]:
        if (by := request.options["by"]) not in _KEYS:
            raise UsageError(f"--by {by}", f"allowed: {', '.join(_KEYS)}")
        names = {"time", *_KEYS[by], *_MOVED}
        return tuple(column for column in super().columns(request) if by == "connection" or column.name in names)

    def floods(self, request: Request) -> bool:
        return False

    def ring_bytes(self, request: Request) -> int:
        return self.ring_for_all_sockets()

    def events(self, request: Request, names: Sequence[str], clock: Clock) -> Run:
        with closed_on_error(self.session(request)) as session:
            return _Moving(request, session, self.layout.select(names).decoder(clock), clock)


class _Moving(Run):
    """What has changed from look to look. A look may pass by an entry of the table: it stays known for the next one."""

    def __init__(self, request: Request, session: Session, decoder: Decoder, clock: Clock) -> None:
        super().__init__([Column.of(field) for field in decoder.fields], session)
        self.repeats = _NOUNS[request.options["by"]]
        self._session, self._clock, self._decode = session, clock, decoder.rows
        self._raw = session.spec.layout("top", internal=True).decoder(raw=True).rows
        self._key, self._numbers = attrgetter(*_KEYS[request.options["by"]]), attrgetter(*_MOVED)
        self._ticker, self._since_ns = Ticker(request.interval or 1.0), monotonic_ns()
        self._known: dict[tuple[int, int], tuple[int, bool, tuple[int, ...]]] = {}
        self._changes_owner = compiled_filter.asks_owner(request.filter)  # accept() may take it out of the filter
        self._round = self._lost = 0
        self._look()
        self._batch()

    def poll(self) -> Iterator[Batch]:
        if self._ticker.due():
            self._look()
            yield self._batch()

    def end(self) -> Iterator[Batch]:
        self._look()
        self._session.end()
        yield self._batch()

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def _look(self) -> None:
        self._round += 1
        self._session.loaded.run("look")

    def _batch(self) -> Batch:
        moved: dict[Any, tuple[Any, tuple[int, ...]]] = {}
        for records in self._session.batches():
            for raw, row in zip(self._raw(records), self._decode(records), strict=True):
                self.stats.shown += 1
                connection, numbers = (raw.socket, raw.opened_ns), self._numbers(raw)
                base = (0, 0, 0) if raw.opened_ns > self._since_ns else numbers
                _, ended, before = self._known.get(connection, (0, False, base))
                now = tuple(map(max, numbers, before))
                self._known[connection] = self._round, bool(ended or raw.ended), now
                if now != before:
                    _, sums = moved.get(self._key(raw), (None, (0, 0, 0)))
                    moved[self._key(raw)] = row, tuple(map(add, sums, map(sub, now, before)))
        self._forget()
        when = None if self._clock.mode == "none" else self._clock.read(monotonic_ns())
        for row, sums in moved.values():
            for name, value in zip(("time", *_MOVED), (when, *sums), strict=True):
                if hasattr(row, name):
                    setattr(row, name, value)
        return Batch("snapshot", [row for row, _ in sorted(moved.values(), key=lambda x: -sum(x[1]))], self._round)

    def _forget(self) -> None:
        """What neither this look nor the one before has seen, unless one of them lost something."""
        before, self._lost = self._lost, self._session.counters()["lost"]
        if self._lost == before:
            for connection in [each for each, (seen, *_) in self._known.items() if seen < self._round - 1]:
                _, ended, _ = self._known.pop(connection)
                self.stats.missed += not ended and not self._changes_owner


tool = Top(
    "top",
    ("time", *_MOVED, "pid", "comm", "raddr", "rport", "laddr", "lport"),
    important=("tx_bytes", "rx_bytes", "raddr", "comm", "pid", "retrans_bytes", "laddr"),
    aliases=("tcptop",),
    examples={
        "top -n 10": "the ten connections that move most",
        "top --by pid -i 5": "by process, every five seconds",
    },
    options=(Option(("--by",), f"Add up by one of these: {', '.join(_KEYS)}.", str, "connection", metavar="KEY"),),
)
