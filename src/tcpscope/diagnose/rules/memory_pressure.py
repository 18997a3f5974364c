"""The memory of all TCP sockets together is at its limit: the kernel shrinks windows, discards and aborts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, process, processes
from tcpscope.diagnose.evidence import Evidence

ABORTED = "TcpExtTCPAbortOnMemory"
ENTERED = "TcpExtTCPMemoryPressures"
SHRUNK = ("TcpExtPruneCalled", "TcpExtRcvPruned", "TcpExtTCPRcvQDrop", "TcpExtTCPOFODrop")
"""They grow with a single receive buffer that is full, too, so alone they are no sign."""

_HOLDERS_SHOWN = 3
_SUBJECT = ("tcp memory",)
"""It is one for all network namespaces."""


class MemoryPressure(Rule):
    needs = ("counters", "sockets")
    explains = ("drops", "window_limited")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        memory = seen.counters.memory
        grown = {
            name: sum(seen.counters.grown(inode, name) or 0 for inode in seen.counters.namespaces)
            for name in (ABORTED, ENTERED, *SHRUNK)
        }
        # Too many orphans count as aborts for memory as well: without pressure that is the rule "orphans".
        pressed = bool(grown[ENTERED]) or (memory is not None and memory.pages > memory.pressure)
        if pressed:
            yield self._finding(seen, grown)

    def unseen(self, seen: Evidence) -> Iterator[str]:
        if seen.counters.memory is None:
            yield "memory_pressure: tcp_mem cannot be read in this network namespace; only counters are judged"

    def _finding(self, seen: Evidence, grown: dict[str, int]) -> Finding:
        memory = seen.counters.memory
        held: Counter[tuple[int, int | None, str | None]] = Counter()
        for track in seen.sockets.now:
            held[track.last.netns, track.last.pid, track.last.comm] += track.last.memory
        holders = [(whose, n) for whose, n in held.most_common(_HOLDERS_SHOWN) if n]
        first = holders[0][0] if holders else None
        owner = processes.read(first[1], first[2]) if first and first[1] is not None else None
        observed = [
            f"{ENTERED} {grown[ENTERED]:+d}, {ABORTED} {grown[ABORTED]:+d}, "
            + ", ".join(f"{name.removeprefix('TcpExt')} {grown[name]:+d}" for name in SHRUNK)
        ]
        if memory is not None:
            observed.insert(
                0,
                f"TCP takes {memory.pages} pages; pressure begins at {memory.pressure}, and ends below {memory.low}; "
                f"the limit is {memory.limit} (tcp_mem, in pages of {memory.page_bytes} bytes)",
            )
        if holders:
            observed.append(
                "most is held by "
                + ", ".join(f"{comm or 'no process'} (PID {pid}): {_size(n)}" for (_, pid, comm), n in holders)
            )
        unread = sum(track.last.unread for track in seen.sockets.now)
        unsent = sum(track.last.unacked + track.last.unsent for track in seen.sockets.now)
        observed.append(
            f"in all connections {_size(unread)} are not read, and {_size(unsent)} not sent or acknowledged"
        )
        return Finding(
            rule=self.name,
            severity="critical" if grown[ABORTED] else "warning",
            title="TCP is short of memory"
            + (
                f": {grown[ABORTED]} connections aborted"
                if grown[ABORTED]
                else ": windows shrink, segments may be discarded"
            ),
            observed=observed,
            why=(
                "All TCP sockets of the machine share the memory of net.ipv4.tcp_mem. Above the second number no "
                "buffer may grow, above the third the kernel discards what comes and aborts connections that close."
            ),
            remedies=list(_remedies(seen, owner)),
            who=owner.name if owner else None,
            look=(f"list -p {owner.pid}",) if owner else ("list",),
            about=frozenset({_SUBJECT, ("PROTO_MEM",)} | ({process(owner.pid)} if owner else set())),
            subject=_SUBJECT,
            facts={
                "netns": first[0] if first else None,
                "count": grown[ABORTED],
                "pressures": grown[ENTERED],
                "pages": memory.pages if memory else None,
                "tcp_mem": [memory.low, memory.pressure, memory.limit] if memory else None,
                "holders": [{"pid": pid, "comm": comm, "bytes": n} for (_, pid, comm), n in holders],
            },
        )


def _remedies(seen: Evidence, owner: Any) -> Iterator[Remedy]:
    if owner:
        yield Remedy(
            f"See why {owner.comm} holds so much: data that it does not read, or that its peers do not take. "
            "Fewer connections, or smaller buffers, are better than a higher limit.",
        )
    if memory := seen.counters.memory:
        doubled = [2 * memory.low, 2 * memory.pressure, 2 * memory.limit]
        yield Remedy(
            "Let TCP have more memory.",
            command=f"sysctl -w net.ipv4.tcp_mem='{' '.join(map(str, doubled))}'",
            name="net.ipv4.tcp_mem",
            present=f"{memory.low} {memory.pressure} {memory.limit}",
            proposed=" ".join(map(str, doubled)),
            risk=f"Up to {_size(doubled[2] * memory.page_bytes)} that no program can use; it cannot be swapped out.",
        )


def _size(number: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} bytes"


rule = MemoryPressure()
