"""What exists now: every TCP socket, with its owners, queues and cookie.

Like `ss -tanpe`, for all network namespaces that can be seen, without walking /proc: the holders come from the kernel's
own list of open files. Sockets without a file are there too: handshakes, TIME_WAIT, what waits in an accept queue.
Where ss writes a listener's accept queue and its limit under Recv-Q and Send-Q, here they have columns of their own.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from tcpscope.errors import NotPermittedError, TcpscopeError
from tcpscope.filters import Filter
from tcpscope.kernel import filtering, netns
from tcpscope.kernel.features import has_capability
from tcpscope.kernel.spec import Spec
from tcpscope.listeners import Holder
from tcpscope.output import Column
from tcpscope.schema import comm_text
from tcpscope.session import Session, Stats
from tcpscope.stop import Stop
from tcpscope.tool import Request, Tool

_TABLE = ("state", "rx_queue_bytes", "tx_queue_bytes", "accept_queue", "accept_limit", "laddr", "lport", "raddr",
          "rport", "holders")  # fmt: skip


_Key = tuple[int, int]  # address and cookie of a socket


class List(Tool):
    probes = ("sockets",)
    for_more: ClassVar = {
        "CAP_SYS_ADMIN": "other network namespaces than its own",
        "CAP_SYS_PTRACE": "network namespaces without a name",
    }
    timed = False

    def run(self, request: Request) -> None:
        extra = (
            Column("pid", doc="first process that holds it"),
            Column("comm", "comm", doc="name of that process"),
            Column("holders", "list", doc="every process that holds it: PID, name, user, file descriptor"),
        )
        columns = request.choose((*map(Column.of, Spec.of("sockets").layout("existing").fields), *extra), _TABLE)
        with Stop(request.duration) as stop, Session("sockets", None, request.filter, debug=request.debug) as session:
            sink = request.sink(columns)
            if not request.ready(stop, session, keep=tuple(self.for_more)):
                return
            type_ = msgspec.defstruct("Socket", [(column.name, Any) for column in columns])
            seen = shown = 0
            for batch in sockets(session, request.filter):
                if stop.stopped:  # it ends by itself, so no duration cuts it
                    break
                rows = [type_(*(row[column.name] for column in columns)) for row in batch]
                if request.max_events is not None:
                    rows = rows[: request.max_events - shown]
                seen, shown = seen + len(batch), shown + len(rows)
                sink.rows(rows)
            if shown == 0:
                sink.rows([])
            request.stream.flush()
            if request.stats or request.strict:
                request.finish(Stats(seen=seen, shown=shown, filtered=seen - shown), sink)


def sockets(session: Session, filter: Filter) -> Iterator[list[dict[str, Any]]]:
    """All sockets that the filter wants, as mappings of the columns, a namespace at a time.

    Holders are looked for last: all sockets have a cookie by then. It tells a socket from a later one at its address.
    """
    found = list(_pieces(session, filter))
    holders, wanted = _holders(session)
    owner_asked = filtering.asks_owner(filter)
    layout = session.spec.layout("existing", internal=True)
    decode, names = layout.decoder().rows, [field.name for field in layout.fields]
    raw = layout.decoder(raw=True).rows
    for pieces in found:
        rows = []
        for piece in pieces:
            for row, plain in zip(decode(piece), raw(piece), strict=True):
                key = (plain.socket, plain.cookie)
                if owner_asked and key not in wanted:
                    continue
                if not filtering.matches(session.residual, plain):
                    continue
                own = holders.get(key, ())
                values = {name: getattr(row, name) for name in names}
                values["holders"] = list(own)
                values["pid"] = own[0].pid if own else None
                values["comm"] = own[0].comm if own else None
                rows.append(values)
        yield rows


def _pieces(session: Session, filter: Filter) -> Iterator[list[bytes]]:
    """The records of each namespace."""
    for descriptor in _namespaces(filter):
        try:
            yield list(session.loaded.iterate("existing", descriptor))
        except PermissionError:
            if filter.netns is not None:
                raise NotPermittedError(
                    f"cannot enter network namespace {filter.netns}", "needs CAP_SYS_ADMIN", ("CAP_SYS_ADMIN",)
                ) from None
            print("tcpscope: other network namespaces cannot be entered without CAP_SYS_ADMIN", file=sys.stderr)
            return


def _holders(session: Session) -> tuple[dict[_Key, tuple[Holder, ...]], set[_Key]]:
    """Socket -> its holders, and the sockets that a wanted process holds."""
    decode = session.spec.layout("holder", internal=True).decoder(raw=True).rows
    found = defaultdict(set)
    wanted = set()
    for piece in session.loaded.iterate("holders"):
        for record in decode(piece):
            key = (record.socket, record.cookie)
            found[key].add(Holder(record.pid, comm_text(record.comm), record.uid, record.fd))
            if record.wanted:
                wanted.add(key)
    return {key: tuple(sorted(own)) for key, own in found.items()}, wanted


def _namespaces(filter: Filter) -> Iterator[int]:
    """A file descriptor of each namespace to look at; -1 for this process's own, which needs no privilege."""
    visible = netns.visible()
    own = netns.inode_of("/proc/self/ns/net")
    refused = visible.hidden_processes
    without = "" if has_capability("CAP_SYS_PTRACE") else " without CAP_SYS_PTRACE"
    if filter.netns is not None and filter.netns not in visible.namespaces:
        number = f"network namespace {filter.netns}"
        if refused and without:
            raise NotPermittedError(f"cannot find {number}", "needs CAP_SYS_PTRACE", ("CAP_SYS_PTRACE",))
        raise TcpscopeError(f"cannot enter {number}", "no process that can be seen is in it, and it has no name")
    for inode, namespace in visible.namespaces.items():
        if filter.netns not in (None, inode):
            continue
        if inode == own:
            yield -1
            continue
        try:
            descriptor = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            refused += 1
            continue
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    if refused and filter.netns is None:
        number = f"{refused} process{'' if refused == 1 else 'es'}"
        print(f"tcpscope: could not look into the network namespaces of {number}{without}", file=sys.stderr)


tool = List()
