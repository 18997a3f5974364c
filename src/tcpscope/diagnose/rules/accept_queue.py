"""Accept queue overflow: the application does not accept connections as fast as they come."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.listening import History, Listening
from tcpscope.diagnose.wording import (
    counters_agree,
    facts,
    next_power,
    peers,
    raise_limit,
    seconds,
    whose,
)

WHY = (
    "A connection whose handshake is complete waits in the listener's accept queue until the application calls "
    "accept(). The queue is full when it is longer than its limit, so it holds one connection more; then new SYNs are "
    "dropped, and of handshakes under way the final ACK is ignored: such a client believes it is connected, sends, and "
    "retransmits until a place is free or it gives up."
)
WHY_RESET = " With tcp_abort_on_overflow=1 these clients are sent a RST instead."


class AcceptQueue(Rule):
    source = Listening

    def check(self, seen: Listening) -> Iterator[Finding]:
        for history in seen.histories.values():
            unsure = history.count("UNKNOWN") if history.full_seen else 0
            if history.count("ACCEPT_QUEUE_FULL") or unsure:
                yield self._finding(seen, history, unsure)
            elif history.full_seen:
                yield self._full(history)

    def _finding(self, seen: Listening, history: History, unsure: int) -> Finding:
        listener = history.last
        count = history.count("ACCEPT_QUEUE_FULL")
        at_syn = at_ack = None
        if seen.exact:
            at_syn, at_ack = (
                history.count("ACCEPT_QUEUE_FULL", step="SYN"),
                history.count("ACCEPT_QUEUE_FULL", step="ACK"),
            )
            refused = f"{count} refusals, {at_syn} at the SYN, {at_ack} at the final ACK; repeats count again"
        else:
            refused = f"{count} refusals" + (f", and {unsure} for this or another reason" if unsure else "")
            refused += f" (sampled); {history.drops} packets dropped, a refused final ACK counts twice there"
        observed = [
            refused,
            f"accept queue {history.longest_accept_queue} at most, limit {listener.accept_limit}; "
            f"{_accepts(history)}{_waiting(history)}",
            listener.about_limit,
            *peers(history, "ACCEPT_QUEUE_FULL"),
            *counters_agree(seen, listener, ("ListenOverflows",)),
        ]
        return Finding(
            rule=self.name,
            severity="critical",
            title=f"accept queue overflow on {listener.name}, {whose(listener)}",
            observed=observed,
            why=WHY + (WHY_RESET if listener.abort_on_overflow else ""),
            remedies=list(_remedies(history, count + unsure)),
            facts=facts(history, count=None if unsure else count, at_syn=at_syn, at_ack=at_ack),
        )

    def _full(self, history: History) -> Finding:
        listener = history.last
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"accept queue full on {listener.name}, {whose(listener)}",
            observed=[
                f"accept queue {history.longest_accept_queue}, limit {listener.accept_limit}, full in "
                f"{history.full_seen} of {history.looks} looks; nothing was refused in this time; "
                f"{_accepts(history)}{_waiting(history)}",
                listener.about_limit,
            ],
            why=WHY,
            remedies=list(_remedies(history, 1)),
            facts=facts(history, count=0),
        )


def _accepts(history: History) -> str:
    if history.accepts is None:
        return "accepts not known on this kernel"
    return f"{history.accepts} accepted in this time"


def _waiting(history: History) -> str:
    wait = history.last.oldest_wait_us
    return f"; the oldest connection waits for {seconds(wait)}" if wait is not None else ""


def _remedies(history: History, count: int) -> Iterator[Remedy]:
    listener = history.last
    owner = listener.owner
    if history.accepts == 0 and owner:
        yield Remedy(
            f"{owner.comm} accepted nothing in this time: find out what it does instead. A longer queue only delays "
            "the overflow as long as nobody accepts",
            command=f"cat /proc/{owner.pid}/stack /proc/{owner.pid}/wchan; ps -Lp {owner.pid} -o tid,stat,wchan,comm",
            name="accepts in this time",
            present=0,
        )
    yield from raise_limit(listener, next_power(listener.accept_limit + count))


rule = AcceptQueue()
