"""A process that hangs: it reads nothing of what its clients have sent, whether they have given up or still wait."""

from __future__ import annotations

import math
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

WAIT_SECONDS = 10.0
"""Where the clients are still there: for so long nothing of it was read, and the process has done nothing else. One
request may take five seconds, and others wait for their turn meanwhile."""

_LOOKED_SECONDS = 2.0
"""In the looks of this time nothing of it was read."""

WAITS_FOR_EVENTS = frozenset({"ep_poll", "inet_csk_accept", "inet_csk_wait_for_connect", "io_cqring_wait"})
"""Kernel functions in which an idle server sleeps. A process all of whose threads are there would wake up for what it
wants to read: it has forgotten these connections, and close_wait_leak says so."""

_STATES_SHOWN = 4
_MARK, _WAITS = "request_left", "client_waits"
_WHY_WAITS = (
    "A server that works reads what its clients send. This process reads and sends nothing, on none of its "
    "connections: its threads wait for something else, as a lock, a database or a disk. Its clients are connected, and "
    "get no answer until it goes on or they give up."
)
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


def _waits(row: Any, before: Any) -> bool:
    """Whether a client has not closed, and the process has read nothing of it since the look before."""
    if row.state != "ESTABLISHED" or row.role != "PASSIVE" or not row.has_file or not row.unread:
        return False
    return bool(before is not None and before.unread and before.read_seq == row.read_seq)


def _idle_s(track: Track) -> float:
    """For how long the process has sent nothing on this connection, and read nothing, at the most; inf: not known."""
    row, before = track.last, track.before
    if before is not None and before.read_seq != row.read_seq:
        return 0.0
    sent_us = row.since_sent_us if row.sent_bytes else math.inf
    read_us = row.since_received_us if row.received_bytes and row.unread <= row.has_fin else math.inf
    return float(min(sent_us, read_us)) / 1e6


class WorkerHangs(Rule):
    needs = ("sockets", "attempts")
    marks = {_MARK: _left, _WAITS: _waits}
    explains = ("close_wait_leak", "orphans")

    def __init__(self) -> None:
        self._worked: dict[tuple[int, int, str], float] = {}
        """When a look last saw a process work. A look finds only connections that wait for something, so a later one
        may not see those that were served. Entries are deleted after WAIT_SECONDS."""

    def check(self, seen: Evidence) -> Iterator[Finding]:
        if seen.request.filter.names_ends:
            return  # what the process does on its other connections is not looked at
        owners: dict[tuple[int, int, str], list[Track]] = {}
        for track in seen.sockets.now:
            if track.last.pid is not None:
                owners.setdefault((track.last.netns, track.last.pid, track.last.comm), []).append(track)
        self._remember(seen.now_s, owners)
        for (netns, pid, comm), tracks in owners.items():
            left = [track for track in tracks if _is_old(track)]
            waits = [track for track in tracks if track.held_s(_WAITS) >= WAIT_SECONDS]
            gave_up = len(left) >= LEAST
            if not gave_up and (len(left) + len(waits) < LEAST or any(map(_is_sending, tracks))):
                continue
            stuck, quiet_s = (left, SECONDS) if gave_up else ([*left, *waits], WAIT_SECONDS)
            if seen.now_s - self._worked.get((netns, pid, comm), -math.inf) < quiet_s:
                continue
            if _connects(seen, netns, pid, quiet_s) or not any(_asks(seen, track) for track in tracks):
                continue
            if _closes(seen, netns, pid, tracks, stuck):
                continue
            files = processes.files(pid)
            if files is not None and files < len(stuck):
                continue  # its children have them, and it need not read
            states = processes.threads(pid)
            if states and all(wchan in WAITS_FOR_EVENTS for _, wchan in states):
                continue
            yield self._finding(netns, processes.read(pid, comm), tracks, left, stuck, states)

    def _remember(self, now_s: float, owners: dict[tuple[int, int, str], list[Track]]) -> None:
        for owner, tracks in owners.items():
            at_s = now_s - min(map(_idle_s, tracks))
            self._worked[owner] = max(at_s, self._worked.get(owner, at_s))
        self._worked = {owner: at_s for owner, at_s in self._worked.items() if now_s - at_s < WAIT_SECONDS}

    def _finding(
        self,
        netns: int,
        owner: processes.Process,
        tracks: list[Track],
        left: list[Track],
        stuck: list[Track],
        states: Counter[tuple[str, str | None]],
    ) -> Finding:
        gone = [track.last for track in left]
        waiting = [t.last for t in tracks if t.last.state == "ESTABLISHED" and t.last.has_file and t.last.unread]
        more, unread = gone and waiting, sum(row.unread - row.has_fin for row in gone or waiting)
        longest_s = max(track.last.since_received_us for track in left or stuck) / 1e6
        ports = Counter(track.last.lport for track in stuck)
        name = f"{owner.comm} (PID {owner.pid})"
        does = [f"{n} in state {state}{f' in {wchan}' if wchan else ''}" for (state, wchan), n in states.most_common()]
        oldest = f"with {unread:,} unread bytes; the oldest has waited for {span(longest_s)}"
        observed = [
            f"{number(len(gone), 'connection')} whose clients have gone, {oldest}"
            if gone
            else f"{number(len(waiting), 'client')} wait for an answer, {oldest}",
            *([f"{number(len(waiting), 'client')} more still wait: their data is not read either"] if more else []),
            f"nothing was read or sent on any of its connections meanwhile; local ports: {listed(ports)}",
            *([f"its threads: {', '.join(does[:_STATES_SHOWN])}"] if does else []),
        ]
        what = f"it neither reads nor closes {number(len(gone), 'connection')}"
        if len(gone) < LEAST:
            what = f"it reads nothing from {number(len(gone) + len(waiting), 'client')}"
        return Finding(
            rule=self.name,
            severity="critical" if gone else "warning",
            title=f"{name} hangs: {what}" + (f", and {owner.does}" if owner.does else ""),
            observed=observed,
            why=_WHY if gone else _WHY_WAITS,
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
            first_s=max(track.last_s for track in stuck) - longest_s,
            facts={
                "netns": netns,
                "count": len(gone) + len(waiting),
                "left": len(gone),
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


def _is_sending(track: Track) -> bool:
    """Whether the remote end has to answer or to read first, as the backend of a proxy: that may be the cause."""
    row = track.last
    return bool(row.has_file and (row.unsent or row.unacked))


def _asks(seen: Evidence, track: Track) -> bool:
    """Whether a client has sent something during the watch that nobody reads. Without it the process may be idle."""
    row = track.last
    return bool(row.unread > row.has_fin and row.since_received_us < seen.watched_s * 1e6)


def _connects(seen: Evidence, netns: int, pid: int, quiet_s: float) -> bool:
    """Whether it has called connect() lately: it works, and what it received from elsewhere it has forgotten."""
    return any(tally.since(seen.now_s - quiet_s) for _, tally in seen.attempts.where(netns=netns, pid=pid))


def _closes(seen: Evidence, netns: int, pid: int, tracks: list[Track], stuck: list[Track]) -> bool:
    """Whether it has accepted more connections, since the oldest of these was left, than it has open now.

    Only of a listener that no other process has: these may work.
    """
    queues = getattr(seen, "queues", None)
    since_s = max(track.last_s for track in stuck) - max(track.last.since_received_us for track in stuck) / 1e6
    ports = {track.last.lport for track in stuck}
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
