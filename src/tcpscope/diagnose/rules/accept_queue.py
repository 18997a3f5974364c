"""Accept queue overflow: a burst of connections is more than the accept queue holds.

An application that accepts nothing, or too slowly, has rules of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.wording import (
    accepted,
    counters_agree,
    facts,
    full_share,
    next_power,
    of,
    other_symptoms,
    peers,
    raise_limit,
    refusal_facts,
    refusals,
    seconds,
    states_of,
    unsure_refusals,
    whose,
)
from tcpscope.listeners import Listener

WHY = (
    "After its handshake a connection waits in the accept queue until the application calls accept(). A queue with "
    "limit {limit} holds {most} connections. When it is full, the kernel drops new SYNs and ignores final ACKs. A "
    "client whose ACK was ignored believes that it is connected; nobody answers its data, and it retransmits."
)
WHY_RESET = " With tcp_abort_on_overflow=1 the kernel sends such a client a RST instead."


class AcceptQueue(Rule):
    needs = ("queues",)
    explains = ("backlog_cut", "connects_fail")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for history in seen.queues.troubled:
            if history.too_slow:
                continue
            unsure = unsure_refusals(history)
            if history.count("ACCEPT_QUEUE_FULL") or unsure:
                yield self._finding(seen.queues, history, unsure)
            elif history.full_seen:
                yield self._full(history)

    def _finding(self, seen: QueueHistory, history: History, unsure: int) -> Finding:
        listener = history.last
        numbers = refusal_facts(seen, history)
        return Finding(
            rule=self.name,
            severity="critical",
            title=f"accept queue overflow on {listener.name}, {whose(history)}",
            observed=[
                *refusals(seen, history),
                f"{full_share(history)}; {accepted(history)}{_waiting(history)}",
                listener.about_limit,
                *other_symptoms(history),
                *peers(history, "ACCEPT_QUEUE_FULL"),
                *counters_agree(seen, listener, ("ListenOverflows",)),
            ],
            why=_why(listener),
            remedies=list(_remedies(history)),
            **of(history),
            facts=facts(history, count=numbers["refused"], **numbers),
        )

    def _full(self, history: History) -> Finding:
        listener = history.last
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"accept queue full on {listener.name}, {whose(history)}",
            observed=[
                f"{full_share(history)}, but nothing was refused meanwhile; {accepted(history)}{_waiting(history)}",
                listener.about_limit,
            ],
            why=_why(listener),
            remedies=list(_remedies(history)),
            **of(history),
            facts=facts(history, count=0),
        )


def _why(listener: Listener) -> str:
    """What an accept queue is, and what a full one does."""
    text = WHY.format(limit=listener.accept_limit, most=listener.accept_limit + 1)
    return text + (WHY_RESET if listener.abort_on_overflow else "")


def _waiting(history: History) -> str:
    wait = history.last.oldest_wait_us
    return f"; the oldest connection has waited {seconds(wait)} since its SYN-ACK" if wait is not None else ""


def _remedies(history: History) -> Iterator[Remedy]:
    listener = history.last
    workers = list(dict.fromkeys((own.comm, own.pid) for own in listener.workers))
    if history.accepts == 0 and workers and not history.gone:
        names = ", ".join(dict.fromkeys(comm for comm, _ in workers))
        yield Remedy(
            f"Find out what {names} waits for: it accepted no connection. Until it accepts, a longer queue only delays "
            "the overflow.",
            command=states_of(pid for _, pid in workers),
        )
    for remedy in raise_limit(history, next_power(listener.accept_limit + max(history.accept_burst.most, 1))):
        if history.accepts == 0:
            remedy = msgspec.structs.replace(remedy, what=f"If bursts fill the queue while it accepts: {remedy.what}")
        yield remedy


rule = AcceptQueue()
