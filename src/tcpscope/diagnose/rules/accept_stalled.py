"""Connections wait, and nobody accepts them: the workers hang, the process is stopped, or a service did not start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, halted, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History, Stall
from tcpscope.diagnose.processes import Process, without_files
from tcpscope.diagnose.wording import (
    WORKERS_SHOWN,
    counters_agree,
    facts,
    full_share,
    of,
    other_symptoms,
    peers,
    refusal_facts,
    refusals,
    seconds,
    states_of,
    whose,
)
from tcpscope.kernel import pidns
from tcpscope.listeners import Holder
from tcpscope.output import endpoint

CRITICAL_SECONDS = 5.0
"""Of waiting. Many clients and load balancers give up after five seconds."""

WAKES_AT = 2 / 3
"""Of the send buffer: so much of it at most is in use when the kernel wakes up who waits for room in it
(sk_stream_is_writeable)."""

WHY = (
    "The kernel completes handshakes by itself, so clients are connected before the application knows of them. They "
    "get no answer until it calls accept()."
)
WHY_ONE = (
    "The kernel gives each new connection to one of the sockets that share this address (SO_REUSEPORT), by a hash. It "
    "does not know that the process of that socket hangs, and no other one can accept the connection."
)
WHY_FULL = " When the accept queue is full, the kernel drops new SYNs and ignores final ACKs."
_DOES = {"S": "sleeps", "R": "runs"}
_ANY = ("0.0.0.0", "::")


@dataclass(frozen=True)
class _Wait:
    """A connection for which the only thread of a process waits, most probably.

    how  `send()` to a remote end that does not read, `connect()` to one that does not answer
    """

    worker: Process
    how: str
    whom: str

    @property
    def observed(self) -> str:
        what = "has a full send buffer, and the remote end does not read"
        if self.how == "connect()":
            what = "waits for an answer to connect()"
        return f"its only thread sleeps, and its connection to {self.whom} {what}"

    @property
    def remedy(self) -> Remedy:
        name = self.worker.comm
        options = "SO_SNDTIMEO, TCP_USER_TIMEOUT" if self.how == "send()" else "of a second or two"
        return Remedy(
            f"Most probably {name} waits in {self.how} for {self.whom}, and serves nobody else meanwhile. Give that "
            f"call a timeout ({options}), or let {name} have a thread for each client, or sockets that do not block.",
            command=states_of([self.worker.pid]),
        )


class AcceptStalled(Rule):
    """Thresholds: STALL_SECONDS and STALL_INTERVALS of listener_history.py."""

    needs = ("queues", "sockets")
    explains = ("accept_queue", "backlog_cut", "connects_fail", "worker_hangs", "close_wait_leak", "zero_window")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        stuck: dict[_Address, list[tuple[Stall, History]]] = {}
        for history in seen.queues.histories.values():
            if stall := history.stalled:
                stuck.setdefault(_address(history), []).append((stall, history))
        groups: dict[_Address, list[History]] = {}
        for history in seen.queues.histories.values() if stuck else ():
            groups.setdefault(_address(history), []).append(history)
        for address, found in stuck.items():
            yield _finding(self.name, seen, groups[address], sorted(found, key=lambda each: -each[0].seconds))


_Address = tuple[int, str, int]


def _address(history: History) -> _Address:
    own = history.last
    return own.netns, own.laddr, own.lport


def _finding(rule: str, seen: Evidence, group: list[History], stuck: list[tuple[Stall, History]]) -> Finding:
    stall, history = stuck[0]
    own = history.last
    goes_on = stall is history.stall and not history.gone
    stalled = [each for _, each in stuck]
    others = [each for each in group if each not in stalled and not each.gone]
    waiting = sum(each.waiting for each, _ in stuck)
    left, unread = _gave_up(seen, history) if goes_on else (0, 0)
    wait_s = max(stall.seconds, (stall.wait_us or 0) / 1e6)
    numbers = [refusal_facts(seen.queues, each) for each in stalled]
    refused = _sum(numbers, "refused")
    workers = accepting(stalled) if goes_on else []
    wait = next(filter(None, (_wait(seen, worker) for worker in workers)), None)
    critical = wait_s >= CRITICAL_SECONDS or left or refused != 0
    span = seconds(round(wait_s * 1e6))
    return Finding(
        rule=rule,
        severity="critical" if critical else "warning",
        title=f"connections to {own.name} are not accepted, {_culprit(workers, history)}"
        if goes_on
        else f"connections to {own.name} were not accepted for {seconds(round(stall.seconds * 1e6))}, {whose(history)}",
        observed=[
            f"{waiting} {'connections wait' if goes_on else 'connections waited'} for accept(), the first for {span}; "
            f"nothing was accepted for {seconds(round(stall.seconds * 1e6))} of it",
            *([f"{left} of them were closed by their clients meanwhile; {unread} bytes wait unread"] if left else ()),
            *(line for each in stalled for line in refusals(seen.queues, each)),
            *([full_share(history)] if history.full_seen else ()),
            *_states(workers),
            *([wait.observed] if wait else ()),
            *_siblings(others),
            *other_symptoms(history),
            *peers(history, "ACCEPT_QUEUE_FULL"),
            *(counters_agree(seen.queues, own, ("ListenOverflows",)) if refused != 0 else ()),
        ],
        why=(WHY_ONE if others else WHY) + (WHY_FULL if refused != 0 else ""),
        remedies=list(_remedies(history, workers, others, waiting, wait)) if goes_on else [],
        **of(history)
        | {
            "who": ", ".join(each.name for each in workers[:WORKERS_SHOWN]) or of(history)["who"],
            "look": (f"queue -L {own.lport}", f"accept --count -L {own.lport}", f"list -L {own.lport}"),
            "about": frozenset(halted(own.pid) for each in stalled for own in _accepters(each)).union(
                *(of(each)["about"] for each in stalled)
            ),
            "subject": ("address", own.netns, own.laddr, own.lport),
            "first_s": stall.began_s,
            "last_s": stall.last_s,
        },
        facts=facts(
            history,
            count=waiting,
            waiting=waiting,
            stalled_s=round(stall.seconds, 1),
            wait_s=round(wait_s, 1),
            gave_up=left,
            **{name: _sum(numbers, name) for name in numbers[0]},
            stuck_pids=[each.pid for each in workers],
            states=[each.state for each in workers],
            wchan=[each.wchan for each in workers],
            waits_in=wait.how if wait else None,
            waits_for=wait.whom if wait else None,
            sockets=len(group),
            stuck_sockets=len(stuck),
            siblings_accepted=sum(each.accepts or 0 for each in others) if others else None,
        ),
    )


def _sum(numbers: Sequence[dict[str, int | None]], name: str) -> int | None:
    each = [one[name] for one in numbers]
    return None if None in each else sum(one for one in each if one is not None)


def _gave_up(seen: Evidence, history: History) -> tuple[int, int]:
    """How many connections wait for accept() that their clients have closed, and the bytes in them."""
    own = history.last

    def is_one(row: Any) -> bool:
        there = row.netns == own.netns and row.lport == own.lport and (row.laddr == own.laddr or own.laddr in _ANY)
        return there and row.state == "CLOSE_WAIT" and not row.has_file and not row.accepted

    found = [track.last for track in seen.sockets.now if is_one(track.last)]
    return len(found), sum(row.unread - 1 for row in found)  # the FIN counts


def accepting(stuck: Sequence[History]) -> list[Process]:
    """The processes that should accept, as they are now."""
    if pidns.inner():
        return []
    holders = dict.fromkeys((own.pid, own.comm) for each in stuck for own in _accepters(each))
    return [processes.read(pid, comm) for pid, comm in list(holders)[:WORKERS_SHOWN]]


def _accepters(history: History) -> Sequence[Holder]:
    return history.last.workers or history.last.holders


def _wait(seen: Evidence, worker: Process) -> _Wait | None:
    """What its only thread waits for, if one of its connections can hold it up.

    What its children have may be theirs. An event loop would accept, though one connection waits.
    """
    if worker.state != "S" or processes.children(worker.pid) or processes.threads(worker.pid).total() != 1:
        return None
    for track in seen.sockets.now:
        row = track.last
        if row.pid != worker.pid or not row.has_file:
            continue
        if row.state == "SYN_SENT":
            return _Wait(worker, "connect()", endpoint(row.raddr, row.rport))
        if row.timer == "ZERO_WINDOW" and row.unsent and row.memory > WAKES_AT * row.sndbuf:
            return _Wait(worker, "send()", row.raddr if row.role == "PASSIVE" else endpoint(row.raddr, row.rport))
    return None


def _culprit(workers: Sequence[Process], history: History) -> str:
    words = whose(history)
    states = {worker.does for worker in workers}
    if len(states) == 1 and (state := states.pop()):
        return f"{words} {state}"
    return words


def _states(workers: Sequence[Process]) -> Iterator[str]:
    """What each process does, those in the same state in one line."""
    groups: dict[str, list[Process]] = {}
    for each in workers:
        if each.state is not None:
            does = _DOES.get(each.state, f"is in state {each.state}")
            groups.setdefault(each.does or does + (f" in {each.wchan}" if each.wchan else ""), []).append(each)
    yield from map(processes.said_of_files, filter(without_files, workers))
    if len(groups) == 1 and all(each.does for each in workers):
        return  # the title says so
    for words, group in groups.items():
        yield f"{', '.join(f'{each.comm} (PID {each.pid})' for each in group)} {words}"


def _siblings(others: Sequence[History]) -> Iterator[str]:
    if others:
        count, accepts = len(others), sum(each.accepts or 0 for each in others)
        yield (
            f"{count} other socket{'s' * (count != 1)} of this address accepted {accepts} in this watch; "
            f"{sum(each.last.accept_queue for each in others)} wait there"
        )


def _remedies(
    history: History, workers: Sequence[Process], others: Sequence[History], waiting: int, wait: _Wait | None = None
) -> Iterator[Remedy]:
    own = history.last
    if own.holders and not own.workers and own.by_systemd:
        yield Remedy(
            "Start the service of this socket: only systemd holds it. See why the unit did not start.",
            command=f"systemctl list-sockets | grep -w {own.lport}",
        )
        return
    stopped = [each for each in workers if each.state == "T"]
    frozen = [each for each in workers if each.frozen]
    blocked = [each for each in workers if each.state == "D"]
    if stopped:
        yield Remedy(
            f"Let {_names(stopped)} go on: SIGSTOP, or Ctrl-Z in its terminal, has stopped it.",
            command=f"kill -CONT {' '.join(str(each.pid) for each in stopped)}",
            risk="Somebody may have stopped it on purpose.",
        )
    elif frozen:
        yield Remedy(
            f"Let {_names(frozen)} go on: its cgroup is frozen, as a paused container is.",
            command=_thaw(frozen[0]),
            risk="Somebody may have paused it on purpose.",
        )
    elif blocked:
        yield Remedy(
            f"See what {_names(blocked)} waits for in the kernel: a disk, a network file system, memory.",
            command=f"cat /proc/{blocked[0].pid}/stack",
        )
    elif full := [each for each in workers if without_files(each)]:
        yield more_files(full)
    elif workers:
        yield from [wait.remedy] if wait else []
        yield Remedy(
            f"Find out what {'else ' if wait else ''}{_names(workers)} waits for instead of calling accept(): a lock, "
            "a database, another service. A longer queue only delays the overflow.",
            command=states_of(each.pid for each in workers),
        )
    if others and workers and not stopped and not frozen:
        yield Remedy(
            f"Restart {_names(workers)}: until it accepts, a part of all new connections waits for it.",
            risk=f"The {waiting} connections in its queue are reset, unless net.ipv4.tcp_migrate_req is 1.",
        )


def more_files(full: Sequence[Process]) -> Remedy:
    """For processes that can open no further one."""
    return processes.more_files(
        full,
        2 * max(each.open_files or 0 for each in full),
        f"Let {_names(full)} have more open files, or find out what it leaves open: accept() fails with EMFILE.",
    )


def _thaw(frozen: Process) -> str:
    """The command of what has frozen it; if that is not known, one that shows its cgroup.

    Whoever makes a cgroup chooses its name.
    """
    if frozen.by_docker:
        return f"docker unpause {frozen.container}"
    if frozen.unit and not frozen.container:
        return f"systemctl thaw -- {quote(frozen.unit)}"
    return f"cat /proc/{frozen.pid}/cgroup"


def _names(found: Sequence[Process]) -> str:
    return ", ".join(dict.fromkeys(each.comm for each in found))


rule = AcceptStalled()
