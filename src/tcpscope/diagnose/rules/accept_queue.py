"""Accept queue overflow: connections come faster than the application accepts them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.queue_history import History, QueueHistory
from tcpscope.diagnose.wording import (
    counters_agree,
    facts,
    next_power,
    of,
    peers,
    program,
    raise_limit,
    seconds,
    whose,
)
from tcpscope.kernel import pidns
from tcpscope.listeners import Listener

WHY = (
    "After its handshake a connection waits in the accept queue until the application calls accept(). A queue with "
    "limit {limit} holds {most} connections. When it is full, the kernel drops new SYNs and ignores final ACKs. A "
    "client whose ACK was ignored believes that it is connected; nobody answers its data, and it retransmits."
)
_WORKERS_SHOWN = 8
WHY_RESET = " With tcp_abort_on_overflow=1 the kernel sends such a client a RST instead."


class AcceptQueue(Rule):
    needs = ("queues",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for history in seen.queues.troubled:
            unsure = history.count("UNKNOWN") if history.full_seen else 0
            if history.count("ACCEPT_QUEUE_FULL") or unsure:
                yield self._finding(seen.queues, history, unsure)
            elif history.full_seen:
                yield self._full(history)

    def _finding(self, seen: QueueHistory, history: History, unsure: int) -> Finding:
        listener = history.last
        count = history.count("ACCEPT_QUEUE_FULL")
        at_syn = at_ack = None
        if seen.exact:
            at_syn, at_ack = (
                history.count("ACCEPT_QUEUE_FULL", step="SYN"),
                history.count("ACCEPT_QUEUE_FULL", step="ACK"),
            )
            refused = f"{count} refusals: {at_syn} SYNs, {at_ack} final ACKs; each retransmission counts again"
        else:
            refused = _sampled(history, count, unsure)
        observed = [
            refused,
            f"longest accept queue {history.longest_accept_queue}, limit {listener.accept_limit}; full in "
            f"{history.full_seen} of {history.looks} samples; {_accepts(history)}{_waiting(history)}",
            listener.about_limit,
            *peers(history, "ACCEPT_QUEUE_FULL"),
            *counters_agree(seen, listener, ("ListenOverflows",)),
        ]
        return Finding(
            rule=self.name,
            severity="critical",
            title=f"accept queue overflow on {listener.name}, {whose(history)}",
            observed=observed,
            why=_why(listener) + (WHY_RESET if listener.abort_on_overflow else ""),
            remedies=list(_remedies(history)),
            **of(history),
            facts=facts(
                history,
                clients_in_burst=None if unsure else history.accept_burst.most,
                count=None if unsure else count,
                at_syn=at_syn,
                at_ack=at_ack,
            ),
        )

    def _full(self, history: History) -> Finding:
        listener = history.last
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"accept queue full on {listener.name}, {whose(history)}",
            observed=[
                f"longest accept queue {history.longest_accept_queue}, limit {listener.accept_limit}; full in "
                f"{history.full_seen} of {history.looks} samples, but nothing was refused meanwhile; "
                f"{_accepts(history)}{_waiting(history)}",
                listener.about_limit,
            ],
            why=_why(listener),
            remedies=list(_remedies(history)),
            **of(history),
            facts=facts(history, count=0),
        )


def _why(listener: Listener) -> str:
    return WHY.format(limit=listener.accept_limit, most=listener.accept_limit + 1)


def _sampled(history: History, count: int, unsure: int) -> str:
    """The number of refusals, and of packets: if it has no other refusals, these tell the step."""
    refused = f"{count} refusals (sampled)" + (f", and {unsure} for this or another cause" if unsure else "")
    packets = f"{history.drops} packets dropped"
    if not unsure and history.count("ACCEPT_QUEUE_FULL", step="SYN") == count:
        return f"{refused}, all SYNs; {packets}"
    others = sum(n for (_, cause), n in history.refused.items() if cause not in ("ACCEPT_QUEUE_FULL", "COOKIE_SENT"))
    if not others and history.drops == count:
        return f"{refused}; {packets}, one for each, as for SYNs"
    if not others and history.drops == 2 * count:
        return f"{refused}; {packets}, two for each, as for final ACKs"
    return f"{refused}; {packets} (one for a refused SYN, two for a refused final ACK)"


def _accepts(history: History) -> str:
    if history.accepts is None:
        return "accepted connections are not known on this kernel"
    return f"the application accepted {history.accepts}"


def _waiting(history: History) -> str:
    wait = history.last.oldest_wait_us
    return f"; the oldest connection has waited {seconds(wait)}" if wait is not None else ""


def _remedies(history: History) -> Iterator[Remedy]:
    listener = history.last
    rate = history.accepts_per_s
    if history.too_slow and rate:
        wait = seconds(round(listener.accept_limit / rate * 1e6))
        yield Remedy(
            f"Let {program(listener)} accept faster, or give it less to do. It accepts {rate:.1f} a second, so a "
            f"connection waits {wait} behind {listener.accept_limit} others. In a longer queue it would wait longer.",
        )
        return
    workers = list(dict.fromkeys((own.comm, own.pid) for own in listener.workers))
    if history.accepts == 0 and workers and not history.gone:
        names = ", ".join(dict.fromkeys(comm for comm, _ in workers))
        pids = [str(pid) for _, pid in workers[:_WORKERS_SHOWN]]
        states = f"ps -L -p {','.join(pids)} -o pid,tid,stat,wchan:32,comm; cat /proc/{pids[0]}/stack"
        yield Remedy(
            f"Find out what {names} waits for: it accepted no connection. Until it accepts, a longer queue only delays "
            "the overflow.",
            command=None if pidns.inner() else states,  # PIDs are those of the first PID namespace
        )
    for remedy in raise_limit(history, next_power(listener.accept_limit + max(history.accept_burst.most, 1))):
        if history.accepts == 0:
            remedy = msgspec.structs.replace(remedy, what=f"If bursts fill the queue while it accepts: {remedy.what}")
        yield remedy


rule = AcceptQueue()
