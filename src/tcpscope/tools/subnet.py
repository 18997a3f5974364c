"""How many bytes go to which network, and come from there?

Every interval one row for each network of a list that moved data: what was sent to its addresses, and what was received
from them. Of several networks that have an address, the smallest counts. What belongs to none has a row of its own. At
the end comes a row for each network over the whole run. Without a list: loopback, private networks, everything.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tcpscope import networks
from tcpscope.filters import network_text
from tcpscope.networks import Named
from tcpscope.output import Column
from tcpscope.request import Option, Request, names_in
from tcpscope.run import Run
from tcpscope.session import Session, closed_on_error
from tcpscope.summary import TOTAL
from tcpscope.tool import Stream
from tcpscope.traffic import BYTES, RATES, SORT, TIME, Counting, Interval, Moved, moved_columns, skipped, sorted_by

_WHERE = (
    Column("network", "text", width=18, nullable=True, doc="network of the list; null: none of them has the address"),
    Column("name", "text", width=12, nullable=True, doc="its name in the list"),
)
_SUM = struct.Struct("=4Q")  # struct network_sum


class Subnet(Stream):
    intervals = "1"
    rated = False

    def columns(self, request: Request) -> tuple[Column, ...]:
        return (TIME, *_WHERE, *moved_columns(), TOTAL)

    def floods(self, request: Request) -> bool:
        return False

    def ring_bytes(self, request: Request) -> int:
        return self.ring_for_all_sockets()

    def open(self, request: Request) -> Run:
        available = self.columns(request)
        columns, sort = request.choose(available, self.shown), sorted_by(request, available)
        asked = networks.checked(_asked(request)) or networks.PRIVATE
        session = Session(
            "traffic",
            self.event,
            request.filter,
            constants={"by_network": True},
            entries={"network_sums": len(asked) + 1},
            keys={"networks": {each.key: struct.pack("=I", at) for at, each in enumerate(asked, 1)}},
            skip=skipped(request, ()),
            ring_bytes=request.buffer or self.ring_bytes(request),
            debug=request.debug,
        )
        with closed_on_error(session):
            return _Adding(request, columns, sort, session, asked)


def _asked(request: Request) -> Iterator[Named]:
    if (text := request.options["net"]) is not None:
        yield from networks.listed(names_in(text) or [""])
    if (path := request.options["net_file"]) is not None:
        yield from networks.read(path)


class _Adding(Counting):
    """Adds up by network: what the events say, and what the kernel has added up of connections without an event."""

    repeats = "network"

    def __init__(
        self, request: Request, columns: Sequence[Column], sort: str | None, session: Session, asked: Sequence[Named]
    ) -> None:
        self._where: list[dict[str, Any]] = [
            {"network": None, "name": None},
            *({"network": network_text(each.network), "name": each.name} for each in asked),
        ]
        self._sums = session.loaded.values("network_sums", _SUM.size * len(self._where))
        self._read = [(0, 0, 0, 0)] * len(self._where)
        self._moved: dict[int, Moved] = defaultdict(Moved)
        self._total: dict[int, Moved] = defaultdict(Moved)
        super().__init__(request, columns, sort, session)

    def _add(self, raw: Any, row: Any, moved: Moved, first: bool, overlaps: bool) -> None:
        self._moved[raw.network] = self._moved[raw.network].plus(moved)

    def _ended(self, interval: Interval) -> list[dict[str, Any]]:
        for number, now in enumerate(_SUM.iter_unpack(bytes(self._sums))):
            if now != (before := self._read[number]):
                readings, *more = (a - b for a, b in zip(now, before, strict=True))
                self.stats.shown += readings
                self._read[number] = now
                self._moved[number] = self._moved[number].plus(Moved(*more))
        ended, self._moved = self._moved, defaultdict(Moved)
        for number, moved in ended.items():
            self._total[number] = self._total[number].plus(moved)
        return self._rows(ended, interval, total=False)

    def _totals(self, interval: Interval) -> list[dict[str, Any]]:
        return self._rows(self._total, interval, total=True)

    def _rows(self, moved: Mapping[int, Moved], interval: Interval, total: bool) -> list[dict[str, Any]]:
        return [self._where[number] | each.values(interval.us) | {"total": total} for number, each in moved.items()]


tool = Subnet(
    "traffic",
    ("time", "network", "name", *BYTES, *RATES, "total"),
    important=("network", "name", *BYTES[:2], "total", *RATES[:2], *BYTES[2:]),
    aliases=("tcpsubnet",),
    examples={
        "subnet --net 10.0.0.0/8,2001:db8::/32 -i 5": "two networks, every five seconds",
        "subnet --net-file networks.txt": "those of a file, with their names",
    },
    options=(
        Option(("--net",), "Networks to tell apart, comma-separated.", str, names=True, metavar="NETWORKS"),
        Option(
            ("--net-file",), "A file of networks: in each line one, and its name, in either order.", str, metavar="FILE"
        ),
        SORT,
    ),
)
