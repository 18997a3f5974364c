"""A local address runs out of local ports for connections to one service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import takewhile
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, process, processes, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.pools import NEAR
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import in_netns, is_in
from tcpscope.kernel import pidns
from tcpscope.output import endpoint

HALF = 100 * NEAR

LEAST_USED = 16
"""A socket with a narrow IP_LOCAL_PORT_RANGE fills it at once, as it was told to."""

PROPOSED_FIRST, PROPOSED_LAST = 10_240, 65_535
_ON_LOOPBACK = 2
_LONG_SEARCH_US = 1000

_Failures = dict[tuple[str, int | None, str | None], Tally]
_Owners = dict[int | None, str | None]


class NoLocalPorts(Rule):
    needs = ("ports",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for key, failures in seen.ports.failed.items():
            row = seen.ports.at_failure[key]
            yield self._finding(row, seen.ports.first.get(key), failures)
        nearest = takewhile(lambda row: (row.percent or 0) >= HALF, seen.ports.now)  # to their end: they come first
        for row in filter(_is_short, nearest):
            key = seen.ports.key(row)
            if key not in seen.ports.failed:
                yield self._finding(row, seen.ports.first.get(key), {})

    def _finding(self, row: Any, first: Any, failures: _Failures) -> Finding:
        failed = sum(tally.count for tally in failures.values())
        _, failing_pid, failing_comm = max(failures, key=lambda call: failures[call].count, default=("", None, None))
        pid, comm = (row.pid, row.comm) if row.pid else (failing_pid, failing_comm)
        to = f"to {endpoint(row.raddr, row.rport)} " if row.raddr else ""
        about = {service(row.netns, row.raddr, row.rport)} if row.raddr else set()
        about |= {process(each) for each in (pid, failing_pid) if each}
        what = _cause(row)
        return Finding(
            rule=self.name,
            severity="critical" if failed else "warning",
            title=f"{row.laddr} {'has no local port left' if failed else f'uses {row.percent:g} % of its local ports'} "
            f"{'for connections ' if row.raddr else ''}{to}".rstrip()
            + f": {_TITLES[what].format(comm=comm or '?')}",
            observed=list(_observed(row, first, failures)),
            why=_WHY[what],
            remedies=list(_remedies(row, what, failed, {pid: comm, failing_pid: failing_comm})),
            facts={
                "netns": row.netns,
                "laddr": row.laddr,
                "raddr": row.raddr,
                "rport": row.rport,
                "cause": what,
                "pid": pid,
                "comm": comm,
                "held": row.held,
                "used": row.used,
                "available": row.available,
                "percent": row.percent,
                "established": row.established,
                "time_wait": row.time_wait,
                "bound": row.bound,
                "failed": failed,
                "failed_pid": failing_pid,
                "count": failed,
            },
            who=None if pid is None or pidns.inner() else processes.read(pid, comm).name,
            look=(f"ports -i 1{f' --raddr {row.raddr} -R {row.rport}' if row.raddr else ''}",),
            about=frozenset(about),
            first_s=min((tally.first_s for tally in failures.values()), default=None),
            last_s=max((tally.last_s for tally in failures.values()), default=None),
            subject=(row.netns, row.family, row.laddr, row.raddr, row.rport),
        )


def _is_short(row: Any) -> bool:
    """Whether half of the ports are in use, without those in TIME_WAIT that connect() may take again."""
    if row.percent is None or row.used < LEAST_USED:
        return False
    again = row.time_wait if _reuses(row) else 0
    return bool(row.percent >= HALF and 100 * (row.used - again) >= HALF * row.available)


def _reuses(row: Any) -> bool:
    return row.tw_reuse == 1 or (row.tw_reuse == _ON_LOOPBACK and ip_address(row.laddr).is_loopback)


def _cause(row: Any) -> str:
    """What has most of the ports."""
    numbers = Counter(
        bound=row.bound,
        time_wait=row.time_wait,
        open=row.syn_sent + row.established + row.closing,
    )
    return "bound" if row.raddr is None else max(numbers, key=lambda name: numbers[name])


_TITLES = {
    "bound": "bind() has taken them",
    "time_wait": "closed connections wait in TIME_WAIT",
    "open": "{comm} keeps its connections open",
}
_WHY = {
    "bound": (
        "bind() with port 0 before connect() takes a port for all destinations, so all connections of this address "
        "share one range. With IP_BIND_ADDRESS_NO_PORT connect() chooses the port, and each destination has a range."
    ),
    "time_wait": (
        "Connections to one remote address and port each need a local port of their own. The end that closes first "
        "keeps the port in TIME_WAIT for 60 s, so many short connections use up the range."
    ),
    "open": (
        "Connections to one remote address and port each need a local port of their own. These are open: a pool "
        "without a limit, or connections that are never closed."
    ),
}


def _observed(row: Any, first: Any, failures: _Failures) -> Iterator[str]:
    for (errno, pid, comm), tally in sorted(failures.items(), key=lambda call: -call[1].count)[:3]:
        call = "connect()" if errno == "EADDRNOTAVAIL" else "bind()"
        yield f"{call} found no port {tally.count} times ({errno}){f', of {comm} (PID {pid})' if pid else ''}"
    states = [
        f"{number} {name}"
        for number, name in (
            (row.established, "ESTABLISHED"),
            (row.time_wait, "in TIME_WAIT"),
            (row.syn_sent, "in SYN_SENT"),
            (row.closing, "closing"),
            (row.bound, "taken by bind()"),
        )
        if number
    ]
    of = "" if row.available is None else f" of {row.available}"
    places = "" if row.first_port is None else f" ({row.first_port} to {row.last_port})"
    yield f"{row.used}{of} local ports{places} are in use: {', '.join(states)}"
    if row.held:
        yield f"{row.comm} (PID {row.pid}) holds {row.held} of them"
    if first and row.used > first.used:
        yield f"{row.used - first.used} more than in the first snapshot"
    if (row.search_max_us or 0) >= _LONG_SEARCH_US:
        yield f"connect() looked for a port for up to {row.search_max_us} us in a second"


def _remedies(row: Any, what: str, failed: int, owners: _Owners) -> Iterator[Remedy]:
    inside = [pid for pid, comm in owners.items() if pid and is_in(pid, row.netns, comm)]
    if what == "open":
        yield Remedy(
            f"Limit and close the connections of {row.comm or 'the program'}: a pool of a fixed size, one connection "
            "for many requests. A wider range only postpones the end, if they are never closed."
        )
    elif what == "bound":
        yield Remedy(
            f"Let {row.comm or 'the program'} set the socket option IP_BIND_ADDRESS_NO_PORT before bind().",
            name="IP_BIND_ADDRESS_NO_PORT",
            present=0,
            proposed=1,
        )
    else:
        yield Remedy("Keep connections open for many requests (keepalive, a pool), or let the other end close first.")
        if row.tw_reuse is not None and not _reuses(row):
            yield Remedy(
                "Let connect() take ports that are in TIME_WAIT for a second or longer.",
                command=in_netns(row.netns, "sysctl -w net.ipv4.tcp_tw_reuse=1", inside),
                name="net.ipv4.tcp_tw_reuse",
                present=row.tw_reuse,
                proposed=1,
                risk="It needs TCP timestamps at both ends, which are on unless somebody has switched them off.",
            )
    wider = _wider(row)
    if wider:
        yield Remedy(
            "Widen the range of local ports.",
            command=in_netns(row.netns, f'sysctl -w net.ipv4.ip_local_port_range="{wider}"', inside),
            name="net.ipv4.ip_local_port_range",
            present=f"{row.first_port} {row.last_port}",
            proposed=wider,
            risk="connect() may take a port of a service that starts later: list those in ip_local_reserved_ports.",
        )
    elif row.raddr:
        yield Remedy("Use more local addresses, or more addresses of the service: each pair has a range of its own.")
    if row.step_width == 0 and row.reserved and not failed:
        yield Remedy(
            "Let the search for a port step over the reserved ones.",
            command=in_netns(row.netns, f"sysctl -w net.ipv4.ip_local_port_step_width={4 * row.reserved}", inside),
            name="net.ipv4.ip_local_port_step_width",
            present=0,
            proposed=4 * row.reserved,
            risk="The search takes longer when few ports are left.",
        )


def _wider(row: Any) -> str | None:
    """A range of at least half as many ports more."""
    if row.first_port is None:
        return None
    first, last = min(row.first_port, PROPOSED_FIRST), max(row.last_port, PROPOSED_LAST)
    present = row.last_port - row.first_port + 1
    return f"{first} {last}" if last - first + 1 >= 1.5 * present else None


rule = NoLocalPorts()
