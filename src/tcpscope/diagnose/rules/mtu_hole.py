"""Large segments to an address are lost, small ones arrive: a smaller MTU on the way that nobody tells."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Finding, Remedy, Rule, paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Peer
from tcpscope.diagnose.silence import FULL, SEGMENTS, Lives, is_full, is_silent, stalled_us
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.wording import seconds

# FIELD.md, fault 11: two timeouts of a full segment, on three connections. One alone may be a lost connection.
TIMEOUTS = 2
CONNECTIONS = 3

WHY = (
    "A link on the way takes only smaller packets, and the ICMP message that says so (fragmentation needed, packet too "
    "big) does not come: a firewall drops it. So handshakes and small requests pass, and the first full segment never "
    "arrives."
)


class MtuHole(Rule):
    needs = ("sockets", "attempts", "retrans")
    explains = (
        "no_ack",
        "loss",
        "spurious_retrans",
        "queue_on_path",
        "zero_window",
        "window_limited",
        "nagle",
        "orphans",
        "ends_by_timeout",
        "drops",
    )

    def check(self, seen: Evidence) -> Iterator[Finding]:
        lives = Lives(seen)
        for where, tracks in paths.by_peer(seen.sockets.now).items():
            large = [track for track in tracks if _is_full(track)]
            if len(large) < CONNECTIONS or any(map(_takes_full, tracks)):
                continue
            others, opened = lives.since(where, tracks, large)
            later = _answered_later(large)
            behind = sum(map(_smaller_arrived, large))
            if others or opened or later or behind:
                yield self._finding(seen, where, large, others, opened, later, behind)

    def _finding(
        self, seen: Evidence, where: Peer, large: list[Track], others: int, opened: int, later: int, behind: int
    ) -> Finding:
        rows = [track.last for track in large]
        longest = max(map(stalled_us, large))
        mss = max(row.mss for row in rows)
        answers = opened + others + later
        return Finding(
            rule=self.name,
            severity="critical",
            title=f"full segments to {where[1]} do not arrive, small ones do: "
            f"{paths.number(len(large), 'connection')} stalled",
            observed=[
                f"{paths.number(len(large), 'connection')} ({paths.ports(large)}) without an ACK of a segment of "
                f"{mss:,} bytes, the longest for {seconds(round(longest))} and "
                f"{paths.number(max(map(paths.timeouts, rows)), 'timeout')}",
                *([f"{paths.meanwhile(opened, others + later)}, none with a full segment"] if answers else ()),
                *([f"on {behind} of them smaller segments behind it have arrived (SACK)"] if behind else ()),
            ],
            why=WHY,
            remedies=list(_remedies(where, large, mss)),
            **paths.of(where, paths.owners(large), "retrans", "drop"),
            first_s=seen.now_s - longest / 1e6 if longest / 1e6 < seen.watched_s else None,
            facts=paths.facts(
                where,
                paths.owners(large),
                len(large),
                mss=mss,
                stalled_s=round(longest / 1e6, 1),
                opened_meanwhile=opened,
                answered_meanwhile=others + later,
                answered_behind=behind,
                mtu_probing=rows[0].mtu_probing,
            ),
        )


def _is_full(track: Track) -> bool:
    """The oldest segment that has no ACK is as large as it can be, or was until probing began."""
    return is_silent(track, TIMEOUTS) and is_full(track)


def _takes_full(track: Track) -> bool:
    """Its segments that arrived since it was first looked at were full ones."""
    if track.holds("no_ack"):
        return False
    sent = track.grown("sent_bytes") - track.grown("retrans_bytes") - track.last.unacked
    segments = track.grown("data_segs_out") - track.grown("total_retrans")
    return segments >= SEGMENTS and sent >= FULL * segments * track.last.mss


def _smaller_arrived(track: Track) -> bool:
    """Segments behind the oldest one have arrived (SACK), and they were smaller: had those without an ACK been full,
    those that arrived would have half of their size, or less.
    """
    row = track.last
    full = row.out_segs - row.sacked_segs / 2
    return bool(row.sacked_segs > 0 and row.unacked < full * row.mss)


def _answered_later(large: list[Track]) -> int:
    """How many had an ACK of something smaller while another of them had been waiting."""
    longest = max(map(stalled_us, large))
    return sum(track.last.since_ack_us < longest - track.last.rto_us for track in large)


def _remedies(where: Peer, large: list[Track], mss: int) -> Iterator[Remedy]:
    row, owners = large[0].last, paths.owners(large)
    if row.mtu_probing == 0:
        yield Remedy(
            "Let TCP look for the size that passes when full segments get no answer. Connections that wait go on, some "
            "timeouts later.",
            command=paths.command(where[0], owners, "sysctl -w net.ipv4.tcp_mtu_probing=1"),
            name="net.ipv4.tcp_mtu_probing",
            present=0,
            proposed=1,
            risk="a connection that stalls for another cause gets smaller segments, too",
        )
    overhead = 60 if ":" in where[1] else 40
    yield Remedy(
        f"Find the link: packets of up to {mss + overhead + 12} bytes are sent. Then allow ICMP through the firewall "
        "before "
        "it, or lower the MTU of the route to what passes.",
        command=paths.command(where[0], owners, f"tracepath -n {where[1]}"),
    )


rule = MtuHole()
