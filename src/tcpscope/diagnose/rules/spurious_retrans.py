"""Segments are sent again that had arrived: packets come late, or in another order, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Rule, paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Again, Peer, Sent
from tcpscope.diagnose.rules.loss import SEGMENTS, SHARE
from tcpscope.diagnose.tallies import Tally
from tcpscope.kernel.features import Kernel

# Users feel a timeout that ran out in vain: it stops a connection for 200 ms or more. What ACKs or a loss probe made
# TCP send again costs some bandwidth, and the kernel undoes its reaction. A healthy machine whose two processors were
# overloaded sent 480 segments again in such a way, since a packet overtook another between them.
TIMEOUTS = 10
PART = 0.5  # of what was sent again: with less, losses are the better name for it

WHY_ORDER = (
    "Packets take ways of different length and overtake one another. ACKs then look as if some were lost, so TCP "
    "sends them "
    "again and slows down. It learns how far they are apart, and needs time for that on every new connection."
)
WHY_DELAY = (
    "ACKs came later than the timeout of the sender, and then said that all had arrived. Something holds packets back "
    "for a time: a queue on the way, a virtual machine that was paused, a radio link, or a busy remote host. Or ACKs "
    "are lost on the way back, and a later one says it for all."
)


class SpuriousRetrans(Rule):
    needs = ("sockets", "retrans", "counters")
    explains = ("loss",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for where, again in paths.again(seen).items():
            needless = paths.needless(seen, where, again)
            if needless < SEGMENTS or needless < PART * again.segs:
                continue
            sent = paths.sent(seen, where, again)
            if sent.all and sent.again >= SHARE * sent.all:
                yield self._finding(seen, where, again, needless, sent)

    def _finding(self, seen: Evidence, where: Peer, again: Again, needless: int, sent: Sent) -> Finding:
        twice = seen.sockets.twice.get(where, Tally())
        late = again.kinds["RTO"] + again.kinds["SLOW_START"] + again.kinds["LOSS_PROBE"]
        reordered = 2 * late < again.segs
        cause = "come in another order" if reordered else "are late"
        return Finding(
            rule=self.name,
            severity="info" if reordered or again.kinds["RTO"] < TIMEOUTS else "warning",
            title=f"packets to or from {where[1]} {cause}: {needless:,} needless retransmissions",
            observed=[
                sent.said,
                f"sent again to it in all: {again.said}",
                f"not needed: {again.spurious:,} as the kernel found out, {twice.count:,} as {where[1]} reported "
                "(DSACK)",
                *([f"reordering was seen {paths.number(twice.sum, 'time')}"] if twice.sum else []),
            ],
            why=WHY_ORDER if reordered else WHY_DELAY,
            remedies=[],
            **paths.of(where, again.owners, "retrans", "rtt", "cong") | {"about": paths.both(where, again.connections)},
            first_s=again.first_s,
            last_s=again.last_s,
            facts=paths.facts(
                where,
                again.owners,
                len(again.connections),
                needless=needless,
                spurious=again.spurious,
                dsack=twice.count,
                reordering_seen=twice.sum,
                retransmitted=again.segs,
                sent=sent.all,
                case="order" if reordered else "delay",
                kinds=dict(again.kinds),
            ),
        )

    def unseen(self, seen: Evidence) -> Iterator[str]:
        if not Kernel().has_typedef("btf_trace_tcp_cong_state_set"):
            yield "spurious_retrans: only DSACKs tell what was not needed: this kernel does not show undone reactions"


rule = SpuriousRetrans()
