"""A listener's backlog is no longer than somaxconn allows, and its queue came near to it."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Rule
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.wording import accepted, facts, full_share, next_power, of, raise_limit, whose

WHY = (
    "listen() cuts the backlog that an application asks for to net.core.somaxconn, without an error. A burst that is "
    "a little larger than the one that was seen fills the queue, and clients are refused."
)


class BacklogCut(Rule):
    """Threshold: NEAR of listener_history.py. Whether the application asked for more than somaxconn cannot be seen."""

    needs = ("queues",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for history in seen.queues.histories.values():
            if history.last.limit_from == "somaxconn" and history.near_seen:
                yield self._finding(history)

    def _finding(self, history: History) -> Finding:
        own = history.last
        return Finding(
            rule=self.name,
            severity="info",
            title=f"bursts nearly fill the accept queue of {own.name}, and somaxconn limits it, {whose(history)}",
            observed=[f"{full_share(history)}; {accepted(history)}", own.about_limit],
            why=WHY,
            remedies=list(raise_limit(history, next_power(2 * own.accept_limit))),
            **of(history),
            facts=facts(history, count=0),
        )


rule = BacklogCut()
