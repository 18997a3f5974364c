"""All TCP sockets that exist now, with the processes that hold them.

Like `ss -tanpe`, but for all network namespaces that can be seen. The processes come from the kernel's own walk over
open files, not from /proc/PID/fd. Sockets without a file are listed too: handshakes, TIME_WAIT, connections that wait
in an accept queue. ss shows a listener's accept queue and its limit as Recv-Q and Send-Q; here they have columns of
their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, ClassVar

import msgspec

from tcpscope.errors import NotPermittedError
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.kernel.spec import Spec
from tcpscope.listeners import Holder
from tcpscope.namespaces import numbers, opened
from tcpscope.output import Column
from tcpscope.request import Request
from tcpscope.run import Batch, Run, Ticker
from tcpscope.schema import Clock, comm_text
from tcpscope.session import Session, Stats
from tcpscope.tool import Tool

_Key = tuple[int, int]  # address and cookie of a socket


_TIME = Column("time", "time", doc="when the tool began to read the sockets")
_HOLDERS = (
    Column("pid", width=7, doc="process that holds it; of several the one that started first", nullable=True),
    Column("comm", "comm", doc="name of that process", nullable=True),
    Column("holders", "list", doc="every process that holds it: PID, name, user, file descriptor"),
)


class List(Tool):
    probes = ("sockets",)
    shown = (
        "state",
        "rx_queue_bytes",
        "tx_queue_bytes",
        "accept_queue",
        "accept_limit",
        "laddr",
        "lport",
        "raddr",
        "rport",
        "holders",
    )
    examples = {
        "list -L 443": "sockets of one port",
        "list --netns pid:4711 -o csv": "in the network namespace of a process, as CSV",
        "list -i 5 --raddr 10.0.0.0/8": "those to a network, again every five seconds",
    }
    important = ("laddr", "raddr", "state", "holders")
    for_more: ClassVar = {
        "CAP_SYS_ADMIN": "other network namespaces than its own",
        "CAP_SYS_PTRACE": "network namespaces without a name",
    }
    once = True
    intervals = "once"

    def columns(self, request: Request) -> tuple[Column, ...]:
        return (_TIME, *map(Column.of, Spec.of("sockets").layout("existing").fields), *_HOLDERS)

    def open(self, request: Request) -> Run:
        shown = self.shown if request.interval is None else ("time", *self.shown)
        columns = request.choose(self.columns(request), shown)
        self.check_duration(request)
        session = Session("sockets", None, request.filter, debug=request.debug)
        return _Existing(columns, session, request)


class _Existing(Run):
    """One snapshot or many, a batch for each network namespace. With -n it reads no more sockets than it needs."""

    keep = tuple(List.for_more)
    accounts = False
    counted = True

    def __init__(self, columns: Sequence[Column], session: Session, request: Request) -> None:
        super().__init__(columns, session)
        self._session, self._filter, self._most = session, request.filter, request.max_events
        self._clock = Clock(request.time)
        self._row = msgspec.defstruct("Socket", [(column.name, Any) for column in columns])
        self.done, self._round = request.interval is None, 0
        self.repeats = "" if self.done else "socket"
        self._ticker, self._said = Ticker(request.interval, at_once=True), set[str]()

    def poll(self) -> Iterator[Batch]:
        if not (self.done or self._ticker.due()):
            return
        self._round += 1
        when = None if self._clock.mode == "none" else self._clock.read(monotonic_ns())
        for found in self._sockets():
            self.stats.seen += len(found)
            self.stats.shown += len(found)
            rows = [self._row(*((row | {"time": when})[column.name] for column in self.columns)) for row in found]
            yield Batch("snapshot", rows, self._round)

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def end(self) -> Iterator[Batch]:
        yield from ()

    def account(self) -> Stats:
        return self.stats

    def _sockets(self) -> Iterator[list[dict[str, Any]]]:
        """All sockets that the filter wants, as mappings of the columns, a namespace at a time.

        Holders are looked for last: all sockets have a cookie by then, which tells one from a later one at its address.
        """
        owner_asked = compiled_filter.asks_owner(self._filter)
        layout = self._session.spec.layout("existing", internal=True)
        notes: list[str] = []
        found = list(self._pieces(layout.size, None if owner_asked else self._most, notes))
        self.notes += [note for note in notes if note not in self._said]
        self._said.update(notes)
        decode, names = layout.decoder().rows, [field.name for field in layout.fields]
        raw = layout.decoder(raw=True).rows
        everything = owner_asked or self._most is None
        only = None if everything else set(map(_key, chain.from_iterable(map(raw, chain.from_iterable(found)))))
        holders, wanted = _holders(self._session, only)

        def shown(piece: bytes) -> Iterator[dict[str, Any]]:
            for row, plain in zip(decode(piece), raw(piece), strict=True):
                if owner_asked and _key(plain) not in wanted:
                    continue
                own = holders.get(_key(plain), ())
                values = {name: getattr(row, name) for name in names}
                values["holders"] = list(own)
                values["pid"] = own[0].pid if own else None
                values["comm"] = own[0].comm if own else None
                yield values

        room = self._most
        for pieces in found:
            rows = list(islice(chain.from_iterable(map(shown, pieces)), room))
            yield rows
            if room is not None and (room := room - len(rows)) <= 0:
                return

    def _pieces(self, size: int, most: int | None, notes: list[str]) -> Iterator[list[bytes]]:
        """The records of each namespace. They end behind the piece that has the last of the `most` records."""
        wanted, room = self._filter.netns, most
        for descriptor in opened(wanted, notes):
            pieces = []
            try:
                for piece in self._session.loaded.iterate("existing", descriptor):
                    pieces.append(piece)
                    if room is not None and (room := room - len(piece) // size) <= 0:
                        break
            except PermissionError:
                if wanted:
                    raise NotPermittedError(
                        f"cannot enter network namespace {numbers(wanted)}", "needs CAP_SYS_ADMIN", ("CAP_SYS_ADMIN",)
                    ) from None
                notes.append("other network namespaces cannot be entered without CAP_SYS_ADMIN")
                return
            yield pieces
            if room is not None and room <= 0:
                return


def _key(record: Any) -> _Key:
    return record.socket, record.cookie


def _holders(session: Session, only: set[_Key] | None) -> tuple[dict[_Key, tuple[Holder, ...]], set[_Key]]:
    """Socket -> its holders, and the sockets that a wanted process holds. With `only`: of these sockets."""
    decode = session.spec.layout("holder", internal=True).decoder(raw=True).rows
    found = defaultdict(set)
    started = {}
    wanted = set()
    for piece in session.loaded.iterate("holders"):
        for record in decode(piece):
            key = _key(record)
            if only is not None and key not in only:
                continue
            found[key].add(Holder(record.pid, comm_text(record.comm), record.uid, record.fd))
            started[record.pid] = record.started_ns
            if record.wanted:
                wanted.add(key)
    return {
        key: tuple(sorted(own, key=lambda holder: (started[holder.pid], holder))) for key, own in found.items()
    }, wanted


tool = List()
