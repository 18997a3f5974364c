"""Segments to an address are lost: they are sent again, and were needed."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule, paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Again, Peer, Sent

# FIELD.md, fault 14: 204 of 6,302 were lost; a healthy server had none in 78,444. At 1 % a connection of 100 ms gets
# some 1.4 Mbit/s at most (Mathis and others: 1.2 MSS / (RTT sqrt(p))), with less it is the rule on wide-area paths.
SHARE = 0.01
SEGMENTS = 20
ANSWERED = 0.5  # if more than this is sent again, nothing arrives: that is no loss

WHY = (
    "The network, or a queue before the remote end, drops packets. TCP takes a loss for congestion and sends more "
    "slowly; "
    "what is lost at the end of a message is only sent again after a timeout of 200 ms or more."
)


class Loss(Rule):
    needs = ("sockets", "retrans", "counters")
    explains = ("window_limited", "ends_by_timeout")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for where, again in paths.again(seen).items():
            needless = paths.needless(seen, where, again)
            if again.segs - needless < SEGMENTS:
                continue
            waiting = _waiting(seen, where, again)
            needed = again.segs - needless - waiting
            if needed < SEGMENTS:
                continue
            sent = paths.sent(seen, where, again)
            lost = sent.again * needed / again.segs
            if sent.all and SHARE * sent.all <= lost and sent.again < ANSWERED * sent.all:
                yield self._finding(where, again, needed, waiting, sent)

    def _finding(self, where: Peer, again: Again, needed: int, waiting: int, sent: Sent) -> Finding:
        lost = sent.again * needed / again.segs
        number = paths.number(len(again.connections), "connection")
        title = f"{needed:,} segments to {where[1]} were lost"
        if sent.of_peer:
            title = f"{paths.percent(lost, sent.all)} of the segments to {where[1]} are lost"
        arrived = again.segs - needed - waiting
        observed = [
            sent.said,
            f"sent again to it in all: {again.said}",
            *([f"{arrived:,} of these had arrived already"] if arrived else []),
            *([f"{waiting:,} of these wait for their ACK, and do not count"] if waiting else []),
            f"{number} had to send something again",
        ]
        return Finding(
            rule=self.name,
            severity="warning",
            title=title,
            observed=observed,
            why=WHY,
            remedies=[
                Remedy(
                    "Find where they are lost: see whether other addresses behind the same link lose as much, look for "
                    "errors of the device, and for discards by the remote host with 'tcpscope drop' there.",
                    command=paths.command(where[0], again.owners, "ip -s -s link"),
                )
            ],
            **paths.of(where, again.owners, "retrans", "cong") | {"about": paths.both(where, again.connections)},
            first_s=again.first_s,
            last_s=again.last_s,
            facts=paths.facts(
                where,
                again.owners,
                len(again.connections),
                retransmitted=again.segs,
                needed=needed,
                sent=sent.all,
                share=round(lost / sent.all, 4) if sent.of_peer else None,
                kinds=dict(again.kinds),
            ),
        )


def _waiting(seen: Evidence, where: Peer, again: Again) -> int:
    """How much of it waits for its ACK, as of the last look. The ACK may say that all had arrived."""
    found = 0
    for track in seen.sockets.now:
        row = track.last
        if (row.netns, row.raddr) == where and row.state in paths.SENDING:
            counted = again.connections[row.laddr, row.lport, row.raddr, row.rport]
            found += min(row.retransmits + row.retrans_segs, counted)
    return found


rule = Loss()
