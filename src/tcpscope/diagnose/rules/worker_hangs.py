"""A process that hangs: it neither reads nor closes connections whose clients have given up meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, listener, process, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import listed, number
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.text import span
from tcpscope.diagnose.wording import states_of

LEAST = 5
SECONDS = 5.0
"""So many clients have sent a request and closed, and the process has read nothing of it for so long. Many clients give
up after five seconds; a process that is only slow reads one request in that time."""

_LOOKED_SECONDS = 2.0
"""In the looks of this time nothing of it was read."""

WAITS_FOR_EVENTS = frozenset({"ep_poll", "inet_csk_accept", "inet_csk_wait_for_connect", "io_cqring_wait"})
"""Kernel functions in which an idle server sleeps. A process all of whose threads are there would wake up for what it
wants to read: it has forgotten these connections, and close_wait_leak says so."""

_STATES_SHOWN = 4
_MARK = "request_left"
_WHY = (
    "A server that works reads a request, and so notices that its client has closed. This process does neither, on "
    "none of its connections: its threads wait for something else, as a lock, a database or a disk. The kernel keeps "
    "each connection in CLOSE_WAIT until it goes on."
)


def _left(row: Any, before: Any) -> bool:
    """The client has closed, and there is data of it that nobody reads."""
    if row.state != "CLOSE_WAIT" or not row.has_file or row.unread <= row.has_fin:
        return False
    return bool(before is None or before.read_seq == row.read_seq)


def works(track: Track) -> bool:
    """Whether the process has lately sent something on this connection, or read what came."""
    row, before = track.last, track.before
    if row.sent_bytes and row.since_sent_us < SECONDS * 1e6:
        return True
    if before is not None and before.read_seq != row.read_seq:
        return True
    read = row.received_bytes and row.unread <= row.has_fin
    return bool(read and row.since_received_us < SECONDS * 1e6)


class WorkerHangs(Rule):
    needs = ("sockets", "attempts")
    marks = {_MARK: _left}
    explains = ("close_wait_leak", "orphans")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        if seen.request.filter.names_ends:
            return  # what the process does on its other connections is not looked at
        owners: dict[tuple[int, int, str], list[Track]] = {}
        for track in seen.sockets.now:
            if track.last.pid is not None:
                owners.setdefault((track.last.netns, track.last.pid, track.last.comm), []).append(track)
        for (netns, pid, comm), tracks in owners.items():
            left = [track for track in tracks if _is_old(track)]
            if len(left) < LEAST or any(map(works, tracks)) or _connects(seen, netns, pid):
                continue
            if not any(_asks(seen, track) for track in tracks):
                continue
            if _closes(seen, netns, pid, tracks, left):
                continue
            files = processes.files(pid)
            if files is not None and files < len(left):
                continue  # its children have them, and it need not read
            states = processes.threads(pid)
            if states and all(wchan in WAITS_FOR_EVENTS for _, wchan in states):
                continue
            yield self._finding(netns, processes.read(pid, comm), tracks, left, states)

    def _finding(
        self,
        netns: int,
        owner: processes.Process,
        tracks: list[Track],
        left: list[Track],
        states: Counter[tuple[str, str | None]],
    ) -> Finding:
        rows = [track.last for track in left]
        unread = sum(row.unread - row.has_fin for row in rows)
        waiting = [t.last for t in tracks if t.last.state == "ESTABLISHED" and t.last.has_file and t.last.unread]
        longest_s = max(row.since_received_us for row in rows) / 1e6
        ports = Counter(row.lport for row in rows)
        name = f"{owner.comm} (PID {owner.pid})"
        does = [f"{n} in state {state}{f' in {wchan}' if wchan else ''}" for (state, wchan), n in states.most_common()]
        observed = [
            f"{number(len(left), 'connection')} whose clients have gone, with {unread:,} unread bytes; the oldest has "
            f"waited for {span(longest_s)}",
            *([f"{number(len(waiting), 'client')} more still wait: their data is not read either"] if waiting else []),
            f"nothing was read or sent on any of its connections meanwhile; local ports: {listed(ports)}",
            *([f"its threads: {', '.join(does[:_STATES_SHOWN])}"] if does else []),
        ]
        return Finding(
            rule=self.name,
            severity="critical",
            title=f"{name} hangs: it neither reads nor closes {number(len(left), 'connection')}"
            + (f", and {owner.does}" if owner.does else ""),
            observed=observed,
            why=_WHY,
            remedies=[
                Remedy(
                    f"Find out what {owner.comm} waits for: what its threads do now, and their stacks (gdb, py-spy, "
                    "jstack). More file descriptors or a longer queue only delay the failure.",
                    command=states_of([owner.pid]),
                ),
                Remedy(
                    f"Until that is known, restart {owner.unit or owner.comm}. A timeout for what it waits for lets it "
                    "go on by itself."
                ),
            ],
            who=owner.name,
            look=(f"list -p {owner.pid}", f"pktlat -p {owner.pid}"),
            about=frozenset({process(owner.pid), *(listener(netns, port) for port in ports)}),
            subject=("process", netns, owner.pid),
            first_s=max(track.last_s for track in left) - longest_s,
            facts={
                "netns": netns,
                "count": len(left) + len(waiting),
                "left": len(left),
                "waiting": len(waiting),
                "unread_bytes": unread,
                "wait_s": round(longest_s, 1),
                "pid": owner.pid,
                "comm": owner.comm,
                "lports": dict(ports.most_common(10)),
                "state": owner.state,
                "threads": [{"state": state, "wchan": wchan, "count": n} for (state, wchan), n in states.most_common()],
            },
        )


def _is_old(track: Track) -> bool:
    return track.held_s(_MARK) >= _LOOKED_SECONDS and track.last.since_received_us >= SECONDS * 1e6


def _asks(seen: Evidence, track: Track) -> bool:
    """Whether a client has sent something during the watch that nobody reads. Without it the process may be idle."""
    row = track.last
    return bool(row.unread > row.has_fin and row.since_received_us < seen.watched_s * 1e6)


def _connects(seen: Evidence, netns: int, pid: int) -> bool:
    """Whether it has called connect() lately: it works, and what it received from elsewhere it has forgotten."""
    return any(tally.since(seen.now_s - SECONDS) for _, tally in seen.attempts.where(netns=netns, pid=pid))


def _closes(seen: Evidence, netns: int, pid: int, tracks: list[Track], left: list[Track]) -> bool:
    """Whether it has accepted more connections, since the oldest of these was left, than it has open now.

    Only of a listener that no other process has: these may work.
    """
    queues = getattr(seen, "queues", None)
    since_s = max(track.last_s for track in left) - max(track.last.since_received_us for track in left) / 1e6
    ports = {track.last.lport for track in left}
    accepted = sum(
        history.accepted_since(since_s)
        for history in (queues.histories.values() if queues else ())
        if history.last.netns == netns
        and history.last.lport in ports
        and {own.pid for own in history.last.holders} == {pid}
    )
    began_ns = (since_s - 1) * 1e9
    return bool(accepted - sum(track.last.opened_ns >= began_ns for track in tracks) >= LEAST)


rule = WorkerHangs()
