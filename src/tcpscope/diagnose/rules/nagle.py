"""Nagle's algorithm against delayed ACKs: small writes that wait 40 ms each for an ACK."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, listener, peer, process, processes, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.sockets import Track
from tcpscope.output import endpoint

SHARE = 1 / 3
"""Part of the looks that found a small segment waiting: a third of the time is lost, or more. A look is a sample of
the time, so it is the part of the time, too."""

LOOKS = 3
"""So many looks have found one: a single one may be an accident."""

NEAR_US = 5_000
"""The path answers within this time: then an ACK that takes longer was delayed by the remote end, not by the way."""

DELAYED_US = (5_000, 250_000)
"""A delayed ACK comes after 40 ms on Linux, after up to 200 ms elsewhere. Every second sample of the RTT is one, so the
smoothed RTT is between its half and itself; with fewer it is lower."""


def _held_back(row: Any, before: Any) -> bool:
    """A segment that is not full waits, because one that was sent is not acknowledged."""
    return bool(
        row.nagle
        and row.state in ("ESTABLISHED", "CLOSE_WAIT")  # otherwise the FIN may be what waits
        and row.out_segs == 1
        and 0 < row.unsent < row.mss
        and row.unsent <= row.peer_window
        and not row.lost_segs + row.retrans_segs
    )


def _is_slow(track: Track) -> bool:
    row = track.last
    return bool(
        track.share("held_back") >= SHARE
        and round(track.share("held_back") * track.looks) >= LOOKS
        and row.min_rtt_us is not None
        and row.srtt_us is not None
        and row.min_rtt_us < NEAR_US
        and DELAYED_US[0] <= row.srtt_us <= DELAYED_US[1]
    )


class Nagle(Rule):
    needs = ("sockets",)
    marks = {"held_back": _held_back}

    def check(self, seen: Evidence) -> Iterator[Finding]:
        found: dict[tuple[Any, ...], list[Track]] = {}
        for track in seen.sockets.now:
            if track.share("held_back") and _is_slow(track):
                row = track.last
                ends = (row.raddr, row.rport) if row.role == "ACTIVE" else (None, row.lport)
                found.setdefault((row.netns, row.pid, row.comm, *ends), []).append(track)
        for key, tracks in found.items():
            yield self._finding(key, tracks)

    def _finding(self, key: tuple[Any, ...], tracks: list[Track]) -> Finding:
        track = max(tracks, key=lambda track: track.share("held_back"))
        row = track.last
        owner = processes.read(row.pid, row.comm) if row.pid is not None else None
        name = f"{row.comm} (PID {row.pid})" if owner else "a process"
        many = f"{len(tracks)} connections" if len(tracks) > 1 else "its connection"
        ends = f"to {endpoint(row.raddr, row.rport)}" if row.role == "ACTIVE" else f"on port {row.lport}"
        of = f"of the connection {ends}" if len(tracks) == 1 else f"of the slowest, with {row.raddr}"
        held = round(track.share("held_back") * track.looks)
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"{name} waits for delayed ACKs: small writes on {many} {ends}",
            observed=[
                f"in {held} of {track.looks} looks {of} {_size(track)} "
                f"waited behind a segment that was not acknowledged; TCP_NODELAY is not set",
                f"smoothed RTT {row.srtt_us / 1000:.1f} ms, smallest RTT {row.min_rtt_us / 1000:.3g} ms: "
                "the path is fast, the ACKs are late",
                f"{track.grown('data_segs_out')} segments of data sent in {track.watched_s:.0f} s",
            ],
            why=(
                "Nagle's algorithm holds a small segment back while a segment before it is not acknowledged. The "
                "remote end delays its ACK by 40 ms (Linux; others up to 200 ms), since it hopes to send it with an "
                "answer, but its application answers only when it has the segment that is held back."
            ),
            remedies=[
                Remedy(
                    f"Let {row.comm or 'the application'} write a request in one call (writev(), a buffer), or set "
                    "TCP_NODELAY on the socket.",
                    name="TCP_NODELAY",
                    present=0,
                    proposed=1,
                    risk="With TCP_NODELAY each small write is a packet of its own: more packets, if it makes many.",
                )
            ],
            who=owner.name if owner else None,
            look=(
                f"rtt --histogram --lport {row.lport}"
                if row.role == "PASSIVE"
                else f"rtt --histogram --rport {row.rport}",
            ),
            about=frozenset(_about(row)),
            subject=key,
            first_s=min(track.first_s for track in tracks),
            facts={
                "netns": row.netns,
                "count": len(tracks),
                "pid": row.pid,
                "comm": row.comm,
                "raddr": row.raddr,
                "held_back": held,
                "looks": track.looks,
                "srtt_us": row.srtt_us,
                "min_rtt_us": row.min_rtt_us,
            },
        )


def _size(track: Track) -> str:
    """Of what is held back, if it is to be seen in one of the rows."""
    rows = (row for row in (track.last, track.before, track.first) if row and 0 < row.unsent < row.mss)
    return next((f"a segment of {row.unsent} bytes" for row in rows), "a small segment")


def _about(row: Any) -> Iterator[tuple[Any, ...]]:
    if row.role == "ACTIVE":
        yield peer(row.netns, row.raddr)
        yield service(row.netns, row.raddr, row.rport)
    else:
        yield listener(row.netns, row.lport)
    if row.pid is not None:
        yield process(row.pid)


rule = Nagle()
