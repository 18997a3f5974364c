"""Which connections wait in vain for an ACK, and the words for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Again, Peer
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.tallies import INTERVAL_SECONDS, Tally
from tcpscope.diagnose.wording import seconds

# FIELD.md, fault 10: three RTOs, and no ACK for 3 s and ten round trips. A lossy path of 10 % has three losses of one
# segment in a row once in a thousand, and a peer with a full processor was not silent for longer than 0.3 s.
TIMEOUTS = 3
SILENT_US = 3_000_000
ROUND_TRIPS = 10
FULL = 0.9  # a connection whose segments have on average this part of its MSS shows that the path takes full ones
SEGMENTS = 4  # so many segments make an average
FINS = 3  # so many connections, all that get no answer, had an ACK of all but their FIN


def cannot_send(row: Any) -> bool:
    """Nothing is on its way though the window is open: the kernel has tried, and found no route, or no link.

    The timer is that of a closed window then (tcp_check_probe_timer()).
    """
    is_open = row.peer_window >= min(row.mss, row.unsent)
    return bool(not row.out_segs and row.unsent and row.timer == "ZERO_WINDOW" and is_open)


def unanswered(row: Any, before: Any) -> bool:
    """A timeout has run out, and nothing was acknowledged since."""
    return bool((row.out_segs or cannot_send(row)) and paths.timeouts(row) and row.state in paths.SENDING)


def unmoved(row: Any, before: Any) -> bool:
    """Something waits for its ACK, and nothing was acknowledged since the look before."""
    return bool((row.out_segs or cannot_send(row)) and (before is None or before.acked_seq == row.acked_seq))


def stalled_us(track: Track) -> float:
    """How long the oldest data has waited for its ACK at the least: the timeouts that ran out, or as it was watched."""
    row = track.last
    ran_out = row.rto_us * (1 - 2.0**-row.backoff)
    return float(max(ran_out, track.held_s("unmoved") * 1e6))


def stalled_s(track: Track) -> float:
    """When it stalled, at the latest, in seconds of the monotonic clock. Each time it is sent again is one, too."""
    row = track.last
    ran_out = row.rto_us * (1 - 2.0**-row.backoff)
    return float(track.last_s - max(stalled_us(track), ran_out + row.since_sent_us) / 1e6)


def is_one_way(track: Track) -> bool:
    """Packets of the remote end come, and acknowledge nothing new."""
    return bool(track.last.since_ack_us < max(SILENT_US, ROUND_TRIPS * (track.last.srtt_us or 0)))


def is_silent(track: Track, least: int = TIMEOUTS) -> bool:
    if not track.holds("no_ack") or paths.timeouts(track.last) < least:
        return False
    return not is_one_way(track) or track.held_s("no_ack") * 1e6 >= SILENT_US


def is_full(track: Track) -> bool:
    """The oldest segment that has no ACK is as large as it can be."""
    return bool(track.last.unacked >= track.last.mss)


def took_full(track: Track) -> bool:
    """What had arrived on it before were full segments."""
    row = track.last
    arrived = row.sent_bytes - row.retrans_bytes - row.unacked
    segments = row.data_segs_out - row.total_retrans - row.out_segs
    return bool(segments >= SEGMENTS and arrived >= FULL * segments * row.mss)


def only_fin(row: Any) -> bool:
    """All that was sent has an ACK, but for the FIN."""
    return row.state in ("FIN_WAIT1", "CLOSING", "LAST_ACK") and row.unacked == 1 and not row.unsent


def is_stuck(track: Track) -> bool:
    """It could not be sent, or not again when a timeout ran out: nothing shows that it has left this host."""
    row, first = track.last, track.first
    if cannot_send(row) or not row.total_retrans:
        return True
    return paths.timeouts(row) > paths.timeouts(first) and row.total_retrans == first.total_retrans


class Lives:
    """What shows that an address lives: asked for each that stalls, and gathered for the first."""

    def __init__(self, seen: Evidence) -> None:
        self._seen = seen
        self._opened: dict[Peer, list[Tally]] | None = None

    def since(self, where: Peer, tracks: list[Track], silent: list[Track]) -> tuple[int, int]:
        """How many other connections had an answer, and how many were opened, since the first of these stalled."""
        if self._opened is None:
            self._opened = {}
            for group, tally in self._seen.attempts.tallies.items():
                if group.outcome == "ESTABLISHED":
                    self._opened.setdefault((group.netns, group.raddr), []).append(tally)
        longest_us = max(map(stalled_us, silent))
        others = sum(t.last.since_ack_us < longest_us and not t.holds("no_ack") for t in tracks)
        # An interval may be read a moment after its end. One that ended so long after it stalled began after that, too.
        began_s = min(track.last_s - stalled_us(track) / 1e6 for track in silent)
        whole_s = began_s + 2 * INTERVAL_SECONDS
        return others, sum(tally.since(whole_s) for tally in self._opened.get(where, ()))


def are_fins(silent: list[Track]) -> bool:
    return len(silent) >= FINS and all(only_fin(track.last) for track in silent)


def first_s(seen: Evidence, silent: list[Track]) -> float | None:
    """When the first of them stalled, if that was within the watch."""
    began_s = seen.now_s - max(map(stalled_us, silent)) / 1e6
    return began_s if began_s > seen.began_s else None


def closed(silent: list[Track]) -> int:
    return sum(not track.last.has_file for track in silent)


def span(us: list[float]) -> str:
    least, most = round(min(us)), round(max(us))
    return seconds(least) if most - least < 1_000_000 else f"{seconds(least)} to {seconds(most)}"


def waits(silent: list[Track]) -> Iterator[str]:
    rows = [track.last for track in silent]
    longest, most = max(map(stalled_us, silent)), max(map(paths.timeouts, rows))
    here = all(map(cannot_send, rows))
    what = "that could send nothing" if here else "without an ACK of what was sent"
    yield (
        f"{paths.number(len(silent), 'connection')} ({paths.ports(silent)}) {what}, the "
        f"longest for {seconds(round(longest))} and {paths.number(most, 'attempt' if here else 'timeout')}; the last "
        "packet of any came "
        f"{seconds(min(row.since_ack_us for row in rows))} ago"
    )
    waiting = sum(row.unsent for row in rows)
    if here:
        yield f"{waiting:,} bytes wait to be sent, and none was"
        return
    more = f", {waiting:,} more wait to be sent" if waiting else ""
    yield f"{sum(row.unacked for row in rows):,} bytes are not acknowledged{more}"
    if orphans := closed(silent):
        yield f"{orphans} of them closed by the application, no process has them any more"


def sent_again(again: Again | None, silent: list[Track]) -> Iterator[str]:
    """What the kernel did at these timeouts; it may not have been able to send at all."""
    if again and again.kinds:
        yield f"sent again to it: {again.said}"
    if again and again.failed:
        yield f"could not be sent again by this host: {paths.listed(again.failed)}"
    elif not any(track.last.total_retrans or cannot_send(track.last) for track in silent):
        yield "this host has sent none of it again: its link is down, it has no route, or its own queue does not move"
