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
"""Part of the busy time in which the buffer was the reason that nothing was sent: 44 and 45 % were seen, since the time
in which the window is not yet full counts as busy only. A sender that paces (bbr) spreads a bufferful over the round
trip: 28 to 49 % of each second, with few of them below 30. (SO_SNDBUF 2000000 at 60 MB/s had 23 to 31 %;
4000000 moved two fifths more.)"""

BUSY_US = 500_000
"""Busy for half of the time between two looks, which is a second or more."""

LOOKS = 3
SHARE = 0.5
"""Limited in so many looks, and in half of them: a transfer of a second is not worth a change."""

MATCH = 0.3
"""The rate in a look is buffer / RTT, but for so much. If it is far from that, something else limits it: a slow reader.

Where the clock of the send buffer runs, it may be less: a third of the buffer is free before the application goes on,
and what waits for its turn is not on its way. 43 % were seen.
"""

QUEUED = 2.0
FAR_US = 1_000
"""The RTT is at most so many times the smallest one, and no less than this: it comes from the length of the path. Where
packets wait in a queue, or for a processor, a larger buffer only makes them wait longer."""

_SEQUENCES = 1 << 32
_NEAR = 1 << 24
_BUFFERS = {"rwnd": "receive buffer", "sndbuf": "send buffer"}


@dataclass
class _Second:
    """What happened between two looks. All is asked of each such time: one late look does not undo the others."""

    row: Any
    before: Any

    @property
    def busy_us(self) -> int:
        return int(self.row.busy_us - self.before.busy_us)

    @property
    def srtt_us(self) -> float:
        return float(self.row.srtt_us + self.before.srtt_us) / 2

    @property
    def rate(self) -> float:
        """Bytes a second, of the time in which there was something to send."""
        return float(self.row.sent_bytes - self.before.sent_bytes) / self.busy_us * 1e6

    @property
    def is_far(self) -> bool:
        smallest = self.row.min_rtt_us
        return bool(smallest is not None and smallest >= FAR_US and 0 < self.srtt_us <= QUEUED * smallest)

    def part(self, column: str) -> float:
        """Of the busy time."""
        return float(getattr(self.row, column) - getattr(self.before, column)) / self.busy_us

    def of(self, window: int) -> float:
        """The rate as a part of window / RTT."""
        return self.rate * self.srtt_us / 1e6 / window if window else 0.0


def _second(row: Any, before: Any) -> _Second | None:
    """None: there was no other look, it was idle, the path is short, or how long it is was not measured yet."""
    if before is None or row.busy_us - before.busy_us < BUSY_US or None in (row.srtt_us, before.srtt_us):
        return None
    second = _Second(row, before)
    return second if second.is_far else None


def _rwnd_limited(row: Any, before: Any) -> bool:
    second = _second(row, before)
    if second is None or second.part("rwnd_us") < LIMITED_SHARE:
        return False
    return abs(second.of(max(row.peer_window, before.peer_window)) - 1) <= MATCH


def _sndbuf_limited(row: Any, before: Any) -> bool:
    """The kernel's clock runs only if data was sent while the application waited already (tcp_cwnd_validate()), so a
    sender with large writes may have none. Its buffer is full, all of it is on its way, and neither window nor
    congestion window is.

    An application that waits goes on when a third of the buffer is free.
    """
    second = _second(row, before)
    if second is None or not row.sndbuf_set:
        return False
    part = second.of(max(each.unacked + each.unsent for each in (row, before)))
    if second.part("sndbuf_us") >= LIMITED_SHARE:
        return 0 < part <= 1 + MATCH
    is_full = 3 * row.memory >= 2 * row.sndbuf and not row.unsent
    return bool(is_full and not row.cwnd_limited and 2 * row.unacked <= row.peer_window and abs(part - 1) <= MATCH)


@dataclass
class _Limit:
    """What a sender is limited by. `receiver` is the other end, if it is on this host."""

    kind: str
    sender: Track
    window: int
    receiver: Track | None = None

    @property
    def second(self) -> _Second:
        """The time between the last two looks. The finding takes rate, window and RTT from it."""
        return _Second(self.sender.last, self.sender.before)

    @property
    def clock(self) -> float:
        """The part of the busy time for which the kernel names this buffer."""
        return self.sender.grown(f"{self.kind}_us") / max(self.sender.grown("busy_us"), 1)

    @property
    def share(self) -> float:
        return self.sender.share("sndbuf_limited") if self.kind == "sndbuf" else self.clock

    @property
    def is_told_by_clock(self) -> bool:
        """Of the send buffer. It is then not always full: the rate may be less than buffer / RTT."""
        return self.kind == "sndbuf" and self.second.part("sndbuf_us") >= LIMITED_SHARE


class WindowLimited(Rule):
    needs = ("sockets",)
    marks = {"rwnd_limited": _rwnd_limited, "sndbuf_limited": _sndbuf_limited}

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
                if limit:
                    row = track.last
                    found.setdefault((kind, row.netns, row.pid, row.raddr), []).append(limit)
        for limits in found.values():
            yield self._finding(limits)

    def _limit(self, kind: str, track: Track, by_ends: dict[tuple[Any, ...], list[Track]]) -> _Limit | None:
        rows = (track.before, track.last)
        if kind == "sndbuf":
            window = max(row.unacked + row.unsent for row in rows)
            return _Limit(kind, track, window) if track.last.sndbuf_set else None
        receiver = _other_end(track, by_ends)
        if receiver and not receiver.last.rcvbuf_set:
            return None  # the kernel sizes its buffer
        return _Limit(kind, track, max(row.peer_window for row in rows), receiver)

    def _finding(self, limits: list[_Limit]) -> Finding:
        limit = max(limits, key=lambda limit: limit.sender.grown("sent_bytes"))
        row, kind, second = limit.sender.last, limit.kind, limit.second
        # Who can change the buffer: the sender its own, the remote end the other one.
        owned = row if kind == "sndbuf" else limit.receiver.last if limit.receiver else None
        owner = processes.read(owned.pid, owned.comm) if owned is not None and owned.pid is not None else None
        whose = f"{owned.comm} (PID {owned.pid})" if owner and owned is not None else f"remote end {row.raddr}"
        option = "SO_SNDBUF" if kind == "sndbuf" else "SO_RCVBUF"
        buffer = None if owned is None else owned.sndbuf if kind == "sndbuf" else owned.rcvbuf
        sender = row.comm or "a process"
        observed = [
            f"{_rate(second.rate)} from {sender} to {endpoint(row.raddr, row.rport)} while it had something to send; "
            f"{limit.window} bytes, which the "
            f"{_BUFFERS[kind]} holds, in an RTT of {second.srtt_us / 1000:.1f} ms are "
            f"{'at most ' if limit.is_told_by_clock else ''}{_rate(limit.window / second.srtt_us * 1e6)}",
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
        if limit.is_told_by_clock:
            observed.append(
                f"by the kernel's clock, nothing was left to send for {limit.clock:.0%} of the busy time, while the "
                "application waited for room"
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
                f"So the rate is {'at most ' if limit.is_told_by_clock else ''}buffer / RTT, however fast the path is."
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
                "rate_bytes_per_s": round(second.rate),
                "window_bytes": limit.window,
                "buffer_bytes": buffer,
                "srtt_us": round(second.srtt_us),
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
