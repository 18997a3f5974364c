"""Connections that the remote end resets while this host waits for an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tcpscope import diagnose
from tcpscope.diagnose import Finding, Remedy, Rule, peer, processes, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.tallies import Tally
from tcpscope.output import endpoint

LEAST = 5
SHARE = 1 / 20
"""A busy server with a rolling restart had 12 RSTs in 1,774 connections; with the fault it was 51 of 81."""

CRITICAL_SHARE = 1 / 2

BURST_SECONDS = 2.0
"""What comes in two seconds and then no more is one event, such as a restart."""

WHILE_OPEN = frozenset({"ESTABLISHED", "CLOSE_WAIT"})
_SHOWN = 3

_WHY = (
    "The remote end gave the connection up while this host waited for the answer: its process ended, or closed the "
    "connection without reading the request, or a load balancer, NAT or firewall between them knows the connection no "
    "more. The application gets ECONNRESET, and cannot know whether its request was carried out."
)
_WHY_CLOSED = (
    "The remote end had closed the connection before the request reached it: it closes idle connections earlier than "
    "this host stops using them. The request was lost. Its RST comes after its FIN, so the application is told of "
    "the end first: a read returns 0 bytes, as if the answer were empty, and a further write fails with EPIPE."
)
_CAUSES = {
    "UNREAD_DATA": "it closes connections before it has read the request",
    "LINGER": "it closes with SO_LINGER of 0",
    "LISTENER_CLOSED": "its listener was closed before accept()",
    "DATA_AFTER_CLOSE": "it had closed the connection",
    "NO_CONNECTION": "the connection had ended",
    "ABORT_ON_OVERFLOW": "its accept queue is full, and tcp_abort_on_overflow is 1",
    "KILLED": "ss -K or a BPF program ended the connection",
}
_Found = list[tuple[Any, Tally]]


class ResetInRequest(Rule):
    needs = ("resets", "attempts")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        services: dict[tuple[int, str, int], _Found] = {}
        for group, tally in seen.resets.where(direction="RECEIVED", state=WHILE_OPEN, unanswered=True):
            services.setdefault((group.netns, group.raddr, group.rport), []).append((group, tally))
        for where, found in services.items():
            # The same local port again and again is a listener's, and the others are clients that have gone.
            if sum(tally.count for _, tally in found) < LEAST or len({group.lport for group, _ in found}) == 1:
                continue
            netns, raddr, rport = where
            opened = seen.attempts.total(netns=netns, raddr=raddr, rport=rport, outcome="ESTABLISHED").count
            total = Tally()
            for _, tally in found:
                total.merge(tally)
            if total.count >= SHARE * opened:
                yield self._finding(seen, where, found, total, opened)

    def _finding(
        self, seen: Evidence, where: tuple[int, str, int], found: _Found, total: Tally, opened: int
    ) -> Finding:
        netns, raddr, rport = where
        name = endpoint(raddr, rport)
        owners, states = Counter[tuple[Any, Any]](), Counter[str]()
        for group, tally in found:
            owners[group.pid, group.comm] += tally.count
            states[group.state] += tally.count
        (pid, comm), _ = owners.most_common(1)[0]
        client = processes.read(pid, comm) if pid is not None else None
        caller = f"{comm} (PID {pid})" if pid is not None else "a process that is not known"
        closed = states["CLOSE_WAIT"]
        of = f"of {opened} connections that were opened" if opened >= total.count else "connections"
        observed = [f"{total.count} {of} were reset while this host waited for an answer"]
        if opened < total.count:
            observed[0] += f"; opened in the same time: {opened}"
        if closed:
            observed.append(f"in {closed} of them the remote end had sent its FIN before")
        if len(owners) > 1:
            shown = ", ".join(f"{comm} (PID {pid}): {n}" for (pid, comm), n in owners.most_common(_SHOWN))
            observed.append(f"processes: {shown}")
        sender = self._sender(seen, raddr, rport, found, total.count)
        if sender:
            who, cause, number = sender
            observed.append(f"{number} of these RSTs were sent on this machine: {who.name}, cause {cause}")
        burst = total.last_s - total.first_s < BURST_SECONDS
        severe = 1 if not opened else total.count / opened
        after_close = 2 * closed >= total.count
        about = {service(*where), peer(netns, raddr), diagnose.endpoint(*where)}
        return Finding(
            rule=self.name,
            severity="info" if burst else "critical" if severe >= CRITICAL_SHARE else "warning",
            title=f"{name} resets connections of {caller} in the middle of a request" + (", once" if burst else ""),
            observed=observed,
            why=_WHY_CLOSED if after_close else _WHY,
            remedies=[
                _keep_shorter(caller, name) if after_close else _look_there(name, sender),
            ],
            who=sender[0].name if sender else client.name if client else None,
            look=(f"reset --raddr {raddr} -R {rport}", f"life --raddr {raddr} -R {rport}"),
            about=frozenset(about),
            first_s=total.first_s,
            last_s=total.last_s,
            facts={
                "netns": netns,
                "count": total.count,
                "raddr": raddr,
                "rport": rport,
                "opened": opened,
                "after_fin": closed,
                "pids": [pid for (pid, _), _ in owners.most_common() if pid is not None],
                "sent_by": sender[0].pid if sender else None,
                "cause": sender[1] if sender else None,
            },
        )

    @staticmethod
    def _sender(
        seen: Evidence, raddr: str, rport: int, found: _Found, count: int
    ) -> tuple[processes.Process, str, int] | None:
        """Who sent most of them, if that was on this machine, why, and how many."""
        ends = {(group.laddr, group.lport) for group, _ in found}
        sent = Counter[tuple[int, str, str]]()
        for group, tally in seen.resets.where(direction="SENT", laddr=raddr, lport=rport):
            if (group.raddr, group.rport) in ends and group.pid is not None and group.cause is not None:
                sent[group.pid, group.comm, group.cause] += tally.count
        for (pid, comm, cause), number in sent.most_common(1):
            if 2 * number >= count:
                return processes.read(pid, comm), cause, number
        return None


def _keep_shorter(caller: str, name: str) -> Remedy:
    return Remedy(
        f"Let {caller} close idle connections before {name} does: set the time for which it keeps them below the "
        "keep-alive timeout there."
    )


def _look_there(name: str, sender: tuple[processes.Process, str, int] | None) -> Remedy:
    if sender:
        process, cause, _ = sender
        return Remedy(f"Look into {process.comm} (PID {process.pid}): {_CAUSES.get(cause, 'it sends the RST')}.")
    return Remedy(
        f"Look at {name} at these times, with tcpscope reset: its rows SENT say which process ends the connections, "
        "and why. If it sends none, a device between the two hosts does."
    )


rule = ResetInRequest()
