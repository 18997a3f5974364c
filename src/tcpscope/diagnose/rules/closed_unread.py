"""A server that closes connections before it has read what the client sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, endpoint, listener, process, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.tallies import Tally

LEAST = 5
SHARE = 1 / 20
"""A healthy busy server had 12 RSTs of any cause in 1,774 ends; with the fault it was 68 of 68."""

BURST_SECONDS = 2.0
"""What comes in two seconds and then no more is one event: a process that ends closes all its connections."""

_SHOWN = 3
_WHY = (
    "close() of a connection with unread data sends a RST in place of a FIN. It overtakes the answer or throws it "
    "away, so the client gets ECONNRESET, even though the server believes that it has answered."
)


class ClosedUnread(Rule):
    needs = ("resets", "queues")
    explains = ("reset_in_request",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        # In CLOSE_WAIT the client has sent its FIN and mostly waits for nothing: a TLS client's last message, say,
        # which servers seldom read. So only ESTABLISHED counts.
        ports: dict[tuple[int, int], list[tuple[Any, Tally]]] = {}
        for group, tally in seen.resets.where(direction="SENT", cause="UNREAD_DATA", state="ESTABLISHED"):
            ports.setdefault((group.netns, group.lport), []).append((group, tally))
        for (netns, lport), found in ports.items():
            if sum(tally.count for _, tally in found) < LEAST:
                continue
            histories = _histories(seen, netns, lport)
            accepted = _accepted(histories)
            total = Tally()
            for _, tally in found:
                total.merge(tally)
            if accepted is not None and total.count >= SHARE * accepted:
                yield self._finding(histories[0], found, total, accepted)

    def unseen(self, seen: Evidence) -> Iterator[str]:
        if any(history.last.accepts is None for history in seen.queues.histories.values()):
            yield "closed_unread finds nothing: accept() cannot be hooked, so the share of connections is not known"

    def _finding(self, history: History, found: list[tuple[Any, Tally]], total: Tally, accepted: int) -> Finding:
        own = history.last
        owners, clients = Counter[tuple[Any, Any]](), Counter[str]()
        for group, tally in found:
            owners[group.pid, group.comm] += tally.count
            clients[group.raddr] += tally.count
        (pid, comm), _ = owners.most_common(1)[0]
        server = f"{comm} (PID {pid})" if pid is not None else "a process that is not known"
        more = len(clients) - _SHOWN
        observed = [
            f"{total.count} connections were closed with unread data in them, and the kernel sent a RST; accepted in "
            f"the same time: {accepted}",
            f"clients: {', '.join(f'{address} ({n})' for address, n in clients.most_common(_SHOWN))}"
            + (f" and {more} more addresses" if more > 0 else ""),
        ]
        if len(owners) > 1:
            shown = ", ".join(f"{comm} (PID {pid}): {n}" for (pid, comm), n in owners.most_common(_SHOWN))
            observed.append(f"processes: {shown}")
        burst = total.last_s - total.first_s < BURST_SECONDS
        return Finding(
            rule=self.name,
            severity="info" if burst else "critical",
            title=f"{server} closes connections of {own.name} before it has read the request"
            + (", once" if burst else ""),
            observed=observed,
            why=_WHY,
            remedies=[
                Remedy(
                    f"Let {comm or 'it'} read the request to its end before it closes. Or let it answer, call "
                    "shutdown(SHUT_WR), read until the client has closed, then close (nginx: lingering_close)."
                ),
                Remedy(
                    "If it closes because a request is too large or not wanted, see its limits and its log: the client "
                    "never gets to see the error that it answers."
                ),
            ],
            who=processes.read(pid, comm).name if pid is not None else None,
            look=(f"reset -L {own.lport}", f"life -L {own.lport}"),
            about=frozenset(
                {
                    listener(own.netns, own.lport),
                    *({process(pid)} if pid is not None else ()),
                    *(endpoint(own.netns, group.laddr, own.lport) for group, _ in found),
                }
            ),
            subject=listener(own.netns, own.lport),
            first_s=total.first_s,
            last_s=total.last_s,
            facts={
                "netns": own.netns,
                "count": total.count,
                "laddr": own.laddr,
                "lport": own.lport,
                "accepted": accepted,
                "pids": [pid for (pid, _), _ in owners.most_common() if pid is not None],
                "comm": comm,
            },
        )


def _histories(seen: Evidence, netns: int, lport: int) -> list[History]:
    return [
        history
        for history in seen.queues.histories.values()
        if history.last.netns == netns and history.last.lport == lport
    ]


def _accepted(histories: list[History]) -> int | None:
    """By all listeners of the port; None: there is none, or it is not known."""
    accepts = [history.accepts for history in histories]
    return sum(filter(None, accepts)) if accepts and None not in accepts else None


rule = ClosedUnread()
