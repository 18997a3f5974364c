"""A process that never closes connections which the remote end has closed: they stay in CLOSE_WAIT, and pile up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, process, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.text import span
from tcpscope.output import endpoint

LEAST = 10
OLD_SECONDS = 10.0
"""For so long in CLOSE_WAIT, and nothing sent: it had 166 of them, ten more each second."""

GROWN = 3
"""In so many looks there were more than before, and in none fewer: a server that takes its time closes some."""

RECENT_SECONDS = 5.0
"""The last of these looks is not older: connections that were half-closed on purpose, all at once, are older than this
before they are old."""

FULL_SHARE = 0.9
"""Of its limit of open files: from there on accept() and connect() are about to fail."""

HELD_SHARE = 0.5
"""Of its limit: a leak that has stopped growing, because nobody connects any more."""

_PASSING_SECONDS = 2.0
_SHOWN = 3
_CHILDREN_IN_FACTS = 100
_MARK = "close_wait_leak"
_WHY = (
    "The remote end has sent its FIN: it will send nothing more. The kernel waits in CLOSE_WAIT until the application "
    "calls close(), without any time limit, so a connection that the program forgets takes a file descriptor until "
    "the program ends."
)

_WHY_OTHERS = (
    " A connection stays open until the last process that has it closes it. A child has all connections that its "
    "parent had at fork(), and keeps them over exec() if they lack FD_CLOEXEC; a process can also pass them on."
)


def _left_open(row: Any, before: Any) -> bool:
    """In CLOSE_WAIT for longer than a close() takes, and nothing is being sent."""
    if row.state != "CLOSE_WAIT" or not row.has_file or row.unsent or row.unacked:
        return False
    if row.since_sent_us < _PASSING_SECONDS * 1e6:
        return False
    return bool(row.since_ack_us >= _PASSING_SECONDS * 1e6 or (before is not None and before.state == "CLOSE_WAIT"))


def _is_old(track: Track) -> bool:
    """The FIN has an ACK too, so the last ACK is no older than the FIN."""
    waited_s = max(track.last.since_ack_us / 1e6, track.held_s(_MARK))
    return bool(waited_s >= OLD_SECONDS and track.last.since_sent_us >= OLD_SECONDS * 1e6)


@dataclass(frozen=True)
class Growth:
    """By what number, in how many steps and what time; for how long it has not grown since."""

    steps: int = 0
    number: int = 0
    seconds: float = 0.0
    quiet_s: float = 0.0

    @property
    def per_s(self) -> float:
        return self.number / self.seconds if self.seconds else 0.0


class CloseWaitLeak(Rule):
    needs = ("sockets",)
    marks = {_MARK: _left_open}

    def check(self, seen: Evidence) -> Iterator[Finding]:
        owners: dict[tuple[int, int, str], list[Track]] = {}
        for track in seen.sockets.now:
            if track.holds(_MARK) and track.last.pid is not None:
                owners.setdefault((track.last.netns, track.last.pid, track.last.comm), []).append(track)
        for (netns, pid, comm), tracks in owners.items():
            old = sum(map(_is_old, tracks))
            if old < LEAST:
                continue
            growth = rising(seen.sockets.numbers.get((_MARK, netns, pid), ()))
            owner = processes.read(pid, comm)
            grows = growth.steps >= GROWN and growth.quiet_s <= RECENT_SECONDS
            held = bool(owner.open_files) and len(tracks) >= HELD_SHARE * (owner.open_files or 0)
            files = processes.files(pid)
            if files is not None and files < len(tracks):  # it cannot have all of them
                if grows and owner.state is not None:
                    yield self._of_others(netns, owner, tracks, old, growth, files)
            elif grows or held:
                yield self._finding(netns, owner, tracks, old, growth)

    def _of_others(
        self, netns: int, owner: processes.Process, tracks: list[Track], old: int, growth: Growth, files: int
    ) -> Finding:
        """The owner has opened them and has not got them any more: other processes keep them open."""
        whose, observed = _seen(tracks, old, growth)
        name = f"{owner.comm} (PID {owner.pid})"
        children = processes.children(owner.pid) or []
        names = Counter(child.comm for child in children)
        port, side = ("lport", "-L") if whose == "clients" else ("rport", "-R")
        ports = sorted({getattr(track.last, port) for track in tracks})[:_SHOWN]
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"{len(tracks)} connections of {name} that its {whose} have closed are kept open by other processes",
            observed=[
                *observed,
                f"{name} has {files} files open: it has closed most of them, or all",
                *([f"its children: {_most(names)}"] if names else []),
            ],
            why=_WHY + _WHY_OTHERS,
            remedies=[
                Remedy(
                    f"Find the processes that have them. Let each child of {owner.comm} close what it does not need, "
                    f"or let {owner.comm} set FD_CLOEXEC (SOCK_CLOEXEC at accept4() or socket()). If it "
                    "calls shutdown() before close(), the kernel sends the FIN though a child has the connection, too.",
                )
            ],
            who=owner.name,
            look=(f"list {side} {','.join(map(str, ports))}",),
            about=frozenset({process(owner.pid)}),
            subject=("kept by others", owner.pid),  # if it has just closed all, that is over before it is told
            first_s=max(track.last_s for track in tracks) - max(track.held_s(_MARK) for track in tracks),
            facts={
                "netns": netns,
                "count": len(tracks),
                "old": old,
                "grown": growth.number,
                "per_s": round(growth.per_s, 2),
                "pid": owner.pid,
                "comm": owner.comm,
                "open_files": files,
                "open_files_limit": owner.open_files,
                "seconds_left": None,
                "kept_by_others": True,
                "children": [child.pid for child in children[:_CHILDREN_IN_FACTS]],
            },
        )

    def _finding(self, netns: int, owner: processes.Process, tracks: list[Track], old: int, growth: Growth) -> Finding:
        limit, files = owner.open_files, processes.files(owner.pid)
        used = files or len(tracks)
        rate, grown = growth.per_s, growth.number
        left_s = max(limit - used, 0) / rate if limit and rate else None
        full = bool(limit) and used >= FULL_SHARE * (limit or 0)
        whose, observed = _seen(tracks, old, growth)
        observed.append(_files(files, limit, left_s))
        name = f"{owner.comm} (PID {owner.pid})"
        now_s = max(track.last_s for track in tracks)
        return Finding(
            rule=self.name,
            severity="critical" if full else "warning",
            title=f"{name} does not close {len(tracks)} connections that its {whose} have closed",
            observed=observed,
            why=_WHY,
            remedies=list(_remedies(owner, used)),
            who=owner.name,
            look=(f"list -p {owner.pid}", f"life -p {owner.pid}"),
            about=frozenset({process(owner.pid)}),
            first_s=now_s - max(track.held_s(_MARK) for track in tracks),
            facts={
                "netns": netns,
                "count": len(tracks),
                "old": old,
                "grown": grown,
                "per_s": round(rate, 2),
                "pid": owner.pid,
                "comm": owner.comm,
                "open_files": files,
                "open_files_limit": limit,
                "seconds_left": None if left_s is None else round(left_s),
                "kept_by_others": False,
            },
        )


def _seen(tracks: list[Track], old: int, growth: Growth) -> tuple[str, list[str]]:
    """Whose ends are closed, `clients` or `servers`; and what was observed."""
    rows = [track.last for track in tracks]
    # Of a service many connections have the same remote port, of clients the same local one.
    served = len({row.lport for row in rows}) <= len({row.rport for row in rows})
    ends = Counter(f"port {row.lport}" if served else endpoint(row.raddr, row.rport) for row in rows)
    peers = Counter(row.raddr for row in rows)
    return "clients" if served else "servers", [
        f"{len(tracks)} connections in CLOSE_WAIT, {old} of them for {OLD_SECONDS:g} s or longer; nothing is being "
        "sent on them",
        f"{growth.number} more in {span(growth.seconds)}, {growth.per_s:.1f} a second, and the number did not fall"
        if growth.number
        else "no more came",
        f"of {_most(ends)}; remote addresses: {_most(peers)}",
    ]


def rising(numbers: Iterable[tuple[float, int]]) -> Growth:
    """How a number has risen since it last fell, or since the first look."""
    looks = list(numbers)
    begin = max((at for at in range(1, len(looks)) if looks[at][1] < looks[at - 1][1]), default=0)
    risen = [
        now_s
        for (now_s, number), (_, before) in zip(looks[begin + 1 :], looks[begin:], strict=False)
        if number > before
    ]
    if not risen:
        return Growth()
    (first_s, first), (last_s, last) = looks[begin], looks[-1]
    return Growth(len(risen), last - first, last_s - first_s, last_s - risen[-1])


def _most(found: Counter[str]) -> str:
    more = len(found) - _SHOWN
    text = ", ".join(f"{name} ({n})" for name, n in found.most_common(_SHOWN))
    return text + (f" and {more} more" if more > 0 else "")


def _files(files: int | None, limit: int | None, left_s: float | None) -> str:
    has = "how many files it has open cannot be read" if files is None else f"it has {files} files open"
    if limit is None:
        return f"{has}; its limit (RLIMIT_NOFILE) cannot be read"
    until = f"; at this rate they are used up in {'' if files else 'at most '}{span(left_s)}" if left_s else ""
    return f"{has}, of {limit} (RLIMIT_NOFILE){until}"


def _remedies(owner: processes.Process, used: int) -> Iterator[Remedy]:
    yield Remedy(
        f"Let {owner.comm} call close() when a read returns 0 or an error. Often a branch for errors or for timeouts "
        "leaves it out, or a connection is never given back to its pool.",
    )
    limit = owner.open_files
    if limit is None:  # it has gone, or is in another PID namespace: no command would find it
        return
    yield processes.more_files(
        [owner],
        _raised(limit, used),
        f"Until then, restart {owner.unit or owner.comm} before it has no file descriptors left. "
        "A higher limit gains time.",
        risk="The leak goes on: it takes memory of the kernel for each connection.",
    )


def _raised(limit: int, used: int) -> int:
    return max(2 * limit, 1 << (2 * used - 1).bit_length())


rule = CloseWaitLeak()
