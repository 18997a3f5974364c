"""A buffer of fixed size that is too small for the path: the sender waits a round trip for each bufferful."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, peer, process, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.sockets import Track
from tcpscope.output import endpoint

LIMITED_SHARE = 0.3
"""Part of the busy time in which the buffer was the reason that nothing was sent (44 and 45 % were seen, since the time
in which the window is not yet full counts as busy only)."""

BUSY_US = 500_000
"""Busy for half of the time between two looks, which is a second or more."""

LOOKS = 3
SHARE = 0.5
"""Limited in so many looks, and in half of them: a transfer of a second is not worth a change."""

MATCH = 0.3
"""The rate is buffer / RTT, but for so much. If it is far from that, something else limits it: a slow reader."""

QUEUED = 2.0
FAR_US = 1_000
"""The RTT is at most so many times the smallest one, and no less than this: it comes from the length of the path. Where
packets wait in a queue, or for a processor, a larger buffer only makes them wait longer."""

_SEQUENCES = 1 << 32
_NEAR = 1 << 24
_BUFFERS = {"rwnd": "receive buffer", "sndbuf": "send buffer"}


def _limited(column: str) -> Any:
    def mark(row: Any, before: Any) -> bool:
        if before is None:
            return False
        busy = row.busy_us - before.busy_us
        return bool(busy >= BUSY_US and getattr(row, column) - getattr(before, column) >= LIMITED_SHARE * busy)

    return mark


def _sndbuf_limited(row: Any, before: Any) -> bool:
    """The kernel's clock runs only if data was sent while the application waited already, so a sender with large writes
    may have none. Its buffer is full, all of it is on its way, and neither window nor congestion window is.

    An application that waits goes on when a third of the buffer is free.
    """
    if before is None or not row.sndbuf_set or row.busy_us - before.busy_us < BUSY_US:
        return False
    is_full = 3 * row.memory >= 2 * row.sndbuf and not row.unsent
    if is_full and not row.cwnd_limited and 2 * row.unacked <= row.peer_window:
        return True
    return bool(_sndbuf_us(row, before))


_sndbuf_us = _limited("sndbuf_us")


@dataclass
class _Limit:
    """What a sender is limited by. `receiver` is the other end, if it is on this host."""

    kind: str
    sender: Track
    window: int
    receiver: Track | None = None

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.sender.grown("sent_bytes") / self.sender.watched_s

    @property
    def share(self) -> float:
        if self.kind == "sndbuf":
            return self.sender.share("sndbuf_limited")
        return self.sender.grown("rwnd_us") / max(self.sender.grown("busy_us"), 1)

    @property
    def is_certain(self) -> bool:
        row = self.sender.last
        if not row.srtt_us or row.min_rtt_us is None or not self.window:
            return False
        far = row.min_rtt_us >= FAR_US and row.srtt_us <= QUEUED * row.min_rtt_us
        return bool(far and abs(self.rate * row.srtt_us / 1e6 / self.window - 1) <= MATCH)


class WindowLimited(Rule):
    needs = ("sockets",)
    marks = {"rwnd_limited": _limited("rwnd_us"), "sndbuf_limited": _sndbuf_limited}

    def check(self, seen: Evidence) -> Iterator[Finding]:
        found: dict[tuple[Any, ...], list[_Limit]] = {}
        by_ends: dict[tuple[Any, ...], list[Track]] = {}
        for track in seen.sockets.now:
            for kind in _BUFFERS:
                mark = f"{kind}_limited"
                if not track.holds(mark) or track.share(mark) < SHARE or track.share(mark) * track.looks < LOOKS - 0.5:
                    continue
                if not by_ends:
                    for other in seen.sockets.now:
                        by_ends.setdefault(_ends(other.last), []).append(other)
                limit = self._limit(kind, track, by_ends)
                if limit and limit.is_certain:
                    row = track.last
                    found.setdefault((kind, row.netns, row.pid, row.raddr), []).append(limit)
        for limits in found.values():
            yield self._finding(limits)

    def _limit(self, kind: str, track: Track, by_ends: dict[tuple[Any, ...], list[Track]]) -> _Limit | None:
        rows = [row for row in (track.first, track.before, track.last) if row]
        if kind == "sndbuf":
            window = max(row.unacked + row.unsent for row in rows)
            return _Limit(kind, track, window) if track.last.sndbuf_set else None
        receiver = _other_end(track, by_ends)
        if receiver and not receiver.last.rcvbuf_set:
            return None  # the kernel sizes its buffer
        return _Limit(kind, track, max(row.peer_window for row in rows), receiver)

    def _finding(self, limits: list[_Limit]) -> Finding:
        limit = max(limits, key=lambda limit: limit.sender.grown("sent_bytes"))
        row, kind = limit.sender.last, limit.kind
        # Who can change the buffer: the sender its own, the remote end the other one.
        owned = row if kind == "sndbuf" else limit.receiver.last if limit.receiver else None
        owner = processes.read(owned.pid, owned.comm) if owned is not None and owned.pid is not None else None
        whose = f"{owned.comm} (PID {owned.pid})" if owner and owned is not None else f"remote end {row.raddr}"
        option = "SO_SNDBUF" if kind == "sndbuf" else "SO_RCVBUF"
        buffer = None if owned is None else owned.sndbuf if kind == "sndbuf" else owned.rcvbuf
        sender = row.comm or "a process"
        observed = [
            f"{_rate(limit.rate)} from {sender} to {endpoint(row.raddr, row.rport)}; {limit.window} bytes, which the "
            f"{_BUFFERS[kind]} holds, in an RTT of {row.srtt_us / 1000:.1f} ms are "
            f"{_rate(limit.window / row.srtt_us * 1e6)}",
            f"the {_BUFFERS[kind]} was the limit "
            + (f"in {limit.share:.0%} of {limit.sender.looks} looks" if kind == "sndbuf" else "")
            + (f"for {limit.share:.0%} of the busy time in {limit.sender.watched_s:.0f} s" if kind == "rwnd" else ""),
        ]
        if buffer is not None:
            most = "net.core.wmem_max" if kind == "sndbuf" else "net.core.rmem_max"
            observed.append(
                f"the application has set {option}: the kernel's value is {buffer}, twice what was asked for, or twice "
                f"{most} if that is less"
            )
        if len(limits) > 1:
            observed.append(f"{len(limits)} connections to this peer; the numbers are those of the busiest")
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"{_BUFFERS[kind]} of {whose} limits a transfer {'to' if kind == 'sndbuf' else 'from'} "
            f"{row.raddr if kind == 'sndbuf' else row.comm or row.laddr}",
            observed=observed,
            why=(
                f"At most one {_BUFFERS[kind]} of data can be on its way, and the next follows a round trip later. "
                "So the rate is buffer / RTT, however fast the path is."
            ),
            remedies=[_remedy(limit, option, buffer)],
            who=owner.name if owner else None,
            look=(f"top --raddr {row.raddr}", f"rtt --raddr {row.raddr}"),
            about=frozenset(
                {peer(row.netns, row.raddr)}
                | {process(each.pid) for each in (row, owned) if each is not None and each.pid is not None}
            ),
            subject=(kind, row.netns, row.pid, row.raddr),
            first_s=min(each.sender.first_s for each in limits),
            facts={
                "netns": row.netns,
                "count": len(limits),
                "buffer": "SO_SNDBUF" if kind == "sndbuf" else "SO_RCVBUF",
                "whose": "remote" if owned is None else "own",
                "pid": None if owned is None else owned.pid,
                "comm": None if owned is None else owned.comm,
                "laddr": row.laddr,
                "lport": row.lport,
                "raddr": row.raddr,
                "rport": row.rport,
                "rate_bytes_per_s": round(limit.rate),
                "window_bytes": limit.window,
                "buffer_bytes": buffer,
                "srtt_us": row.srtt_us,
                "limited_share": round(limit.share, 3),
            },
        )


def _ends(row: Any) -> tuple[Any, ...]:
    return row.laddr, row.lport, row.raddr, row.rport


def _other_end(track: Track, by_ends: dict[tuple[Any, ...], list[Track]]) -> Track | None:
    """The receiver's socket, if it is on this host: the same ends, and nearly the same place in the stream."""
    row = track.last
    for other in by_ends.get((row.raddr, row.rport, row.laddr, row.lport), ()):
        ahead = (other.last.read_seq + other.last.unread - row.acked_seq) % _SEQUENCES
        if ahead < _NEAR or ahead > _SEQUENCES - _NEAR:
            return other
    return None


def _remedy(limit: _Limit, option: str, buffer: int | None) -> Remedy:
    sysctl = "net.ipv4.tcp_wmem" if limit.kind == "sndbuf" else "net.ipv4.tcp_rmem"
    sized = f"The kernel then sizes the buffer by itself, up to the third number of {sysctl}."
    ten = f"Ten times the rate needs {limit.window * 10} bytes on their way."
    if buffer is None:
        return Remedy(
            f"On {limit.sender.last.raddr}: do not set {option}, and see whether the third number of {sysctl} is "
            f"large enough. {ten}",
        )
    return Remedy(
        f"Do not set {option}. {sized} {ten}",
        name=option,
        present=buffer // 2,
        proposed="not set",
        risk="More memory for each connection that is far away.",
    )


def _rate(bytes_per_s: float) -> str:
    for unit, factor in (("GB/s", 1e9), ("MB/s", 1e6), ("KB/s", 1e3)):
        if bytes_per_s >= factor:
            return f"{bytes_per_s / factor:.3g} {unit}"
    return f"{bytes_per_s:.0f} B/s"


rule = WindowLimited()
