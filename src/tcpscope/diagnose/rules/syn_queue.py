"""SYN queue overflow: more handshakes wait for their final ACK than the queue holds."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.wording import (
    counters_agree,
    facts,
    in_namespace,
    next_power,
    of,
    peers,
    raise_limit,
    whose,
)

WHY = (
    "A handshake waits in the SYN queue from its SYN to its final ACK. The SYN queue has the same limit as the accept "
    "queue. "
)
WHY_DROP = (
    "When it is full and SYN cookies are off, the kernel drops further SYNs; clients retransmit them after 1, 3, 7 s. "
)
WHY_RESERVED = (
    "Without SYN cookies the kernel reserves the last quarter of tcp_max_syn_backlog for peers that it knows from "
    "earlier connections. It drops the SYNs of all others. "
)
WHY_COOKIE = (
    "When it is full, the kernel answers a SYN with a SYN cookie and does not remember it. The client can still "
    "connect, but loses window scaling and SACK if it sends no TCP timestamps. "
)
CAUSE_SECONDS = 5.0
"""So long after the first refusal synack_unanswered knows whether the SYNs in the queue are ever answered."""

CAUSES = "Either this is a flood of SYNs whose senders never answer, or final ACKs are lost or late."


class SynQueue(Rule):
    needs = ("queues",)
    explains = ("connects_fail",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for history in seen.queues.troubled:
            full = history.count("SYN_QUEUE_FULL")
            reserved = history.count("SYN_QUEUE_RESERVED")
            cookies = history.count("COOKIE_SENT")
            # With cookies nothing is reserved; with a full accept queue it is that which refuses.
            possible = not history.full_seen and history.last.syncookies == 0
            unsure = history.count("UNKNOWN") if possible else 0
            always = history.last.syncookies == 2  # cookies for every SYN: no sign of an overflow
            if history.count("ACCEPT_QUEUE_FULL"):
                continue  # handshakes that the full accept queue refused fill it: accept_queue and others say so
            undecided = history.last.syn_queue and not seen.ended
            if undecided and history.first_s and seen.now_s - history.first_s < CAUSE_SECONDS:
                continue
            if full + reserved + unsure or (cookies and not always):
                yield self._finding(seen.queues, history, full, reserved, unsure, cookies)

    def _finding(
        self, seen: QueueHistory, history: History, full: int, reserved: int, unsure: int, cookies: int
    ) -> Finding:
        listener = history.last
        dropped = full + reserved + unsure
        observed = [
            *syns_refused(full, reserved, unsure, cookies),
            f"longest SYN queue {history.longest_syn_queue}, limit {listener.accept_limit}; "
            f"tcp_syncookies={listener.syncookies}, tcp_max_syn_backlog={listener.max_syn_backlog}",
            listener.about_limit,
            *peers(history, "SYN_QUEUE_FULL", "SYN_QUEUE_RESERVED", "COOKIE_SENT"),
            *counters_agree(seen, listener, ("TCPReqQFullDrop", "TCPReqQFullDoCookies")),
        ]
        why = WHY + (WHY_DROP if full or unsure else "") + (WHY_RESERVED if reserved or unsure else "")
        why += WHY_COOKIE if cookies else ""
        return Finding(
            rule=self.name,
            severity="critical" if dropped else "warning",
            title=f"SYN queue overflow on {listener.name}, {whose(history)}",
            observed=observed,
            why=why + CAUSES,
            remedies=list(_remedies(history, full, reserved + unsure, cookies)),
            **of(history),
            facts=facts(
                history,
                count=None if unsure else dropped + cookies,
                dropped=None if unsure else full,
                reserved=None if unsure else reserved,
                cookies=cookies,
            ),
        )


def syns_refused(full: int, reserved: int, unsure: int, cookies: int) -> Iterator[str]:
    """How many SYNs the SYN queue had no room for, and what became of them."""
    if dropped := full + reserved + unsure:
        parts = [f"{full} because the queue was full"] if full else []
        parts += [f"{reserved} because the last quarter is reserved"] if reserved else []
        if unsure:
            parts.append(f"{unsure} for a cause that is not certain (queue full, or last quarter reserved)")
        yield f"{dropped} SYNs dropped: {', '.join(parts)}"
    if cookies:
        yield f"{cookies} SYNs answered with a SYN cookie"


def enable_cookies(history: History) -> Iterator[Remedy]:
    if history.last.syncookies == 0:
        yield Remedy(
            "Enable SYN cookies: when the queue is full, connections lose some TCP options but are made.",
            command=in_namespace(history, "sysctl -w net.ipv4.tcp_syncookies=1"),
            name="net.ipv4.tcp_syncookies",
            present=0,
            proposed=1,
        )


def _remedies(history: History, full: int, reserved: int, cookies: int) -> Iterator[Remedy]:
    listener = history.last
    yield from enable_cookies(history)
    proposed = next_power(listener.max_syn_backlog + max(history.syn_burst.most, 1))
    if reserved and proposed > listener.max_syn_backlog:
        yield Remedy(
            "Raise tcp_max_syn_backlog: three quarters of it are for peers that the kernel does not know yet.",
            command=in_namespace(history, f"sysctl -w net.ipv4.tcp_max_syn_backlog={proposed}"),
            name="net.ipv4.tcp_max_syn_backlog",
            present=listener.max_syn_backlog,
            proposed=proposed,
        )
    if full or cookies:
        yield from raise_limit(history, next_power(listener.accept_limit + max(history.syn_burst.most, 1)))


rule = SynQueue()
