"""SYN queue overflow: more handshakes wait for their final ACK than the listener may hold."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule
from tcpscope.diagnose.listening import History, Listening
from tcpscope.diagnose.wording import (
    counters_agree,
    facts,
    in_namespace,
    next_power,
    peers,
    raise_limit,
    whose,
)

WHY = "A SYN that was answered waits in the SYN queue for the final ACK; its limit is the accept queue's. "
WHY_DROP = (
    "When it is full and SYN cookies are off, further SYNs are dropped and the client retransmits after 1, 3, 7 s. "
)
WHY_RESERVED = (
    "Without cookies the last quarter of tcp_max_syn_backlog is kept for peers that the kernel knows from before: SYNs "
    "of all others are dropped already then. "
)
WHY_COOKIE = (
    "When it is full, SYNs are answered by a cookie instead of being remembered: the connection can be made, but "
    "window scaling and SACK survive only if the client sends timestamps. "
)
CAUSES = "Either a flood of SYNs whose senders never answer, or final ACKs that are lost or late on the way."


class SynQueue(Rule):
    source = Listening

    def check(self, seen: Listening) -> Iterator[Finding]:
        for history in seen.histories.values():
            full = history.count("SYN_QUEUE_FULL")
            reserved = history.count("SYN_QUEUE_RESERVED")
            cookies = history.count("COOKIE_SENT")
            # With cookies nothing is reserved; with a full accept queue it is that which refuses.
            possible = not history.full_seen and history.last.syncookies == 0
            unsure = history.count("UNKNOWN") if possible else 0
            always = history.last.syncookies == 2  # cookies for every SYN: no sign of an overflow
            if full + reserved + unsure or (cookies and not always):
                yield self._finding(seen, history, full, reserved, unsure, cookies)

    def _finding(
        self, seen: Listening, history: History, full: int, reserved: int, unsure: int, cookies: int
    ) -> Finding:
        listener = history.last
        dropped = full + reserved + unsure
        observed = []
        if dropped:
            parts = [f"{full} because the queue was full"] if full else []
            parts += [f"{reserved} because its last quarter is reserved"] if reserved else []
            if unsure:
                parts.append(f"{unsure} for one of these reasons or another: the queue full, its last quarter reserved")
            observed.append(f"{dropped} SYNs dropped: {', '.join(parts)}")
        if cookies:
            observed.append(f"{cookies} SYNs answered by a SYN cookie")
        observed += [
            f"SYN queue {history.longest_syn_queue} at most, limit {listener.accept_limit}; "
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
            title=f"SYN queue overflow on {listener.name}, {whose(listener)}",
            observed=observed,
            why=why + CAUSES,
            remedies=list(_remedies(history, full, reserved + unsure, cookies)),
            facts=facts(
                history,
                count=None if unsure else dropped + cookies,
                dropped=None if unsure else full,
                reserved=None if unsure else reserved,
                cookies=cookies if seen.exact else None,
            ),
        )


def _remedies(history: History, full: int, reserved: int, cookies: int) -> Iterator[Remedy]:
    listener = history.last
    if listener.syncookies == 0:
        yield Remedy(
            "switch SYN cookies on: with a full queue they cost some TCP options, not the connection",
            command=in_namespace(listener, "sysctl -w net.ipv4.tcp_syncookies=1"),
            name="net.ipv4.tcp_syncookies",
            present=0,
            proposed=1,
        )
    if reserved:
        proposed = next_power(listener.max_syn_backlog + reserved + 1)
        yield Remedy(
            "keep more room for peers that are not known yet",
            command=in_namespace(listener, f"sysctl -w net.ipv4.tcp_max_syn_backlog={proposed}"),
            name="net.ipv4.tcp_max_syn_backlog",
            present=listener.max_syn_backlog,
            proposed=proposed,
        )
    if full or cookies:
        yield from raise_limit(listener, next_power(listener.accept_limit + full + cookies))


rule = SynQueue()
