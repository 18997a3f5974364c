"""Handshakes that were refused though no queue was full."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.wording import counters_agree, facts, in_namespace, of, peers, whose

CRITICAL = 5
"""So many, of two addresses or more, and no handshake was completed meanwhile: one client may have its own fault."""

WHY = (
    "The kernel also refuses a handshake if it has no route to the client or no memory, or if a security module forbids"
    " it."
)
WHY_SAMPLED = " It counts a handshake that an ICMP error ended in the same way."
WHY_UNSURE = (
    "The kernel's counters say that handshakes were refused. They do not say why, since several listeners or causes "
    "came together between two samples."
)


class OtherRefusals(Rule):
    needs = ("queues",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for history in seen.queues.troubled:
            other = history.count("OTHER")
            # Otherwise a rule about one of the queues counts them.
            unsure = 0 if history.full_seen or history.last.syncookies == 0 else history.count("UNKNOWN")
            if other or unsure:
                yield self._finding(seen.queues, history, other, unsure)

    def _finding(self, seen: QueueHistory, history: History, other: int, unsure: int) -> Finding:
        listener = history.last
        clients = {address for cause, address in history.peers if cause == "OTHER"}
        nobody = history.accepts == 0 and not history.longest_accept_queue
        all_fail = nobody and other >= CRITICAL and len(clients) > 1
        observed = [f"{other} refusals, and no queue was full"] if other else []
        observed += ["no handshake was completed meanwhile"] if all_fail else []
        observed += [f"{unsure} refusals for a cause that is not certain"] if unsure else []
        why = [WHY + ("" if seen.exact else WHY_SAMPLED)] if other else []
        why += [WHY_UNSURE] if unsure else []
        return Finding(
            rule=self.name,
            severity="critical" if all_fail else "warning",
            title=f"{'all ' if all_fail else ''}handshakes refused on {listener.name}, {whose(history)}",
            observed=[
                *observed,
                f"longest accept queue {history.longest_accept_queue}, longest SYN queue {history.longest_syn_queue}, "
                f"limit {listener.accept_limit}",
                *peers(history, "OTHER"),
                *counters_agree(seen, listener, ("ListenDrops", "ListenOverflows", "TCPReqQFullDrop")),
            ],
            why=" ".join(why),
            remedies=list(_remedies(history)) if other else [],
            **of(history),
            facts=facts(history, count=None if unsure else other),
        )


def _remedies(history: History) -> Iterator[Remedy]:
    client = next((address for cause, address in history.peers if cause == "OTHER"), None)
    yield Remedy(
        "See whether there is a route back to the clients.",
        command=in_namespace(history, f"ip route get {client}" if client else "ip route"),
    )


rule = OtherRefusals()
