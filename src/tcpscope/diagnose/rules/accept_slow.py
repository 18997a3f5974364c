"""Connections come faster than the application accepts them, all the time: no queue is long enough."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.wording import (
    accepted,
    counters_agree,
    facts,
    full_share,
    of,
    other_symptoms,
    peers,
    program,
    refusal_facts,
    refusals,
    seconds,
    states_of,
    unsure_refusals,
    whose,
)

WHY = (
    "Connections come faster than the application accepts them. So each of them waits behind all others in the accept "
    "queue, and when that is full, clients are refused."
)


class AcceptSlow(Rule):
    """Thresholds: History.too_slow."""

    needs = ("queues",)
    explains = ("accept_queue", "backlog_cut", "connects_fail")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for history in seen.queues.histories.values():
            if history.too_slow:
                yield self._finding(seen.queues, history)

    def _finding(self, seen: QueueHistory, history: History) -> Finding:
        own = history.last
        refused = history.count("ACCEPT_QUEUE_FULL") + unsure_refusals(history)
        numbers = refusal_facts(seen, history)
        rate, behind = _pace(history)
        return Finding(
            rule=self.name,
            severity="critical" if refused else "warning",
            title=f"connections are accepted too slowly on {own.name}, {whose(history)}",
            observed=[
                f"it accepts {rate:.1f} connections a second; each waits about {seconds(round(behind / rate * 1e6))} "
                f"behind {behind:.0f} others",
                f"{full_share(history)}; {accepted(history)}",
                *refusals(seen, history),
                *other_symptoms(history),
                *peers(history, "ACCEPT_QUEUE_FULL"),
                *(counters_agree(seen, own, ("ListenOverflows",)) if refused else ()),
            ],
            why=WHY,
            remedies=[_remedy(history, rate)],
            **of(history),
            facts=facts(
                history,
                count=numbers["refused"] if refused else own.accept_queue,
                accepts_per_s=round(rate, 1),
                wait_s=round(behind / rate, 1),
                **numbers,
            ),
        )


def _pace(history: History) -> tuple[float, float]:
    """How many it accepts in a second, and how many wait, while they come too fast."""
    overload = history.overload
    if overload and overload.accepted and overload.last_s > overload.began_s:
        return overload.accepted / (overload.last_s - overload.began_s), overload.queued / overload.looks
    return history.accepts_per_s or 1.0, history.queued / history.looks


def _remedy(history: History, rate: float) -> Remedy:
    own = history.last
    workers = list(dict.fromkeys(holder.pid for holder in own.workers))
    more = "Start more workers" if len(workers) > 1 else "Let it accept in several threads or processes"
    whole = seconds(round(own.accept_limit / rate * 1e6))
    return Remedy(
        f"See what {program(own)} does between two calls of accept(). {more}, or give it less to do. A longer queue "
        f"does not help: connections would wait longer in it. It takes {whole} to accept a full one of "
        f"{own.accept_limit}.",
        command=None if history.gone else states_of(workers),
    )


rule = AcceptSlow()
