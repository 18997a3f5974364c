"""Connections come faster than the application accepts them, all the time: no queue is long enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from tcpscope.diagnose import Finding, Remedy, Rule, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.rules.accept_stalled import accepting, more_files
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

FULL_SHARE = 0.98
"""Of its limit of open files: while connections end, a place is free now and then, until the next accept() takes it.
Of a limit of 1,024 these are 20, as many as end in a second."""

WHY = (
    "Connections come faster than the application accepts them. So each of them waits behind all others in the accept "
    "queue, and when that is full, clients are refused."
)
WHY_FILES = (
    "accept() needs a file descriptor, and fails with EMFILE when the process has all open that it may. So connections "
    "are accepted only as fast as others are closed. The rest waits in the accept queue, and when that is full, "
    "clients are refused."
)


_Full = dict[int, tuple[processes.Process, str]]
"""PID -> the process when it had no file descriptors left, and what to say of it later."""


class AcceptSlow(Rule):
    """Thresholds: History.too_slow."""

    needs = ("queues",)
    explains = ("accept_queue", "backlog_cut", "connects_fail")

    def __init__(self) -> None:
        self._full: dict[Any, _Full] = {}
        """Of each listener that is too slow, as long as it is: which of its processes were without files. The finding
        stays when they have some again, and so does its cause."""

    def check(self, seen: Evidence) -> Iterator[Finding]:
        slow = {key: history for key, history in seen.queues.histories.items() if history.too_slow}
        self._full = {key: self._full.get(key, {}) for key in slow}
        for key, history in slow.items():
            yield self._finding(seen.queues, history, self._full[key])

    def _finding(self, seen: QueueHistory, history: History, known: _Full) -> Finding:
        own = history.last
        refused = history.count("ACCEPT_QUEUE_FULL") + unsure_refusals(history)
        numbers = refusal_facts(seen, history)
        rate, behind = _pace(history)
        workers = [] if history.gone else accepting([history])
        lines = _files(workers, known)
        full = [each for each, _ in known.values()]
        all_full = bool(full) and known.keys() >= {each.pid for each in workers}
        return Finding(
            rule=self.name,
            severity="critical" if refused else "warning",
            title=f"connections are accepted too slowly on {own.name}, {whose(history)}"
            + (": no file descriptors left" if all_full else ""),
            observed=[
                *lines,
                f"it accepts {rate:.1f} connections a second; each waits about {seconds(round(behind / rate * 1e6))} "
                f"behind {behind:.0f} others",
                f"{full_share(history)}; {accepted(history)}",
                *refusals(seen, history),
                *other_symptoms(history),
                *peers(history, "ACCEPT_QUEUE_FULL"),
                *(counters_agree(seen, own, ("ListenOverflows",)) if refused else ()),
            ],
            why=WHY_FILES if all_full else WHY,
            remedies=[
                *([_more_files(history, full)] if full else ()),
                *(() if all_full else (_remedy(history, rate),)),
            ],
            **of(history),
            facts=facts(
                history,
                count=numbers["refused"] if refused else own.accept_queue,
                accepts_per_s=round(rate, 1),
                wait_s=round(behind / rate, 1),
                without_files=[each.pid for each in full],
                **numbers,
            ),
        )


def _files(workers: list[processes.Process], known: _Full) -> list[str]:
    """What to say of those without file descriptors, which are known from now on, and of those that had none."""
    lines = {pid: said for pid, (_, said) in known.items()}
    for each in workers:
        if processes.without_files(each, FULL_SHARE):
            lines[each.pid] = processes.said_of_files(each)
            known[each.pid] = each, processes.said_of_files(each, "had")
    return list(lines.values())


def _pace(history: History) -> tuple[float, float]:
    """How many it accepts in a second, and how many wait, while they come too fast."""
    overload = history.overload
    if overload and overload.accepted and overload.last_s > overload.began_s:
        return overload.accepted / (overload.last_s - overload.began_s), overload.queued / overload.looks
    return history.accepts_per_s or 1.0, history.queued / history.looks


def _more_files(history: History, full: list[processes.Process]) -> Remedy:
    """Of a listener that is gone, the PIDs may be those of others now."""
    remedy = more_files(full)
    return msgspec.structs.replace(remedy, command=None) if history.gone else remedy


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
