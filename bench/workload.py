"""The traffic program, workload.c, from Python. What it prints and how it works stands at the head of its source."""

import os
import subprocess
from dataclasses import dataclass

from bench.installed import WORKLOAD

CPU = (os.cpu_count() or 1) - 1
"""The traffic stays on one processor, so that it is not measured how it wanders; the tools run where they like."""

EVENTS_PER_CONNECTION = 10
"""Changes of state at both ends: 5 of the client's socket, 5 of the server's."""

EVENTS_PER_LISTENER = 2

MARK = b"127.77."
"""In every row about this traffic: the server's address."""

_BATCH = 5000


@dataclass(frozen=True)
class Made:
    """What was done: connections, the events that this is, and per batch the time of one connection in ns."""

    connections: int
    events: int
    wall_ns: tuple[int, ...] = ()
    cpu_ns: tuple[int, ...] = ()
    seconds: float = 0


def connections(batches: int, count: int, exchanges: int = 0) -> Made:
    """`batches` of `count` connections, one after the other, as fast as they go."""
    lines = _run("connections", CPU, batches, count, exchanges)
    made = batches * count
    return Made(
        connections=made,
        events=made * EVENTS_PER_CONNECTION + batches * EVENTS_PER_LISTENER,
        wall_ns=tuple(int(line.split()[0]) for line in lines),
        cpu_ns=tuple(int(line.split()[1]) for line in lines),
    )


def storm(batches: int, syns: int) -> Made:
    """`batches` of `syns` SYNs that the kernel discards, as fast as they go. Each is a connection and an event."""
    return _many("storm", batches, syns)


def sends(batches: int, count: int) -> Made:
    """`batches` of `count` sends of a kilobyte on one connection, each received at once; each is an event."""
    return _many("sends", batches, count)


def steady(batches: int, size: int, per_second: int) -> Made:
    """`batches` of a second of sends of `size` bytes at this rate, or slower where the machine is too slow."""
    return _many("steady", batches, per_second, size, per_second)


def _many(mode: str, batches: int, count: int, *more: int) -> Made:
    lines = _run(mode, CPU, batches, count, *more)
    return Made(
        connections=batches * count,
        events=batches * count,
        wall_ns=tuple(int(line.split()[0]) for line in lines),
        cpu_ns=tuple(int(line.split()[1]) for line in lines),
    )


def rate(per_second: int, seconds: int) -> Made:
    """Connections at a given rate, or slower where the machine is too slow: see `seconds`."""
    made, ns = map(int, _run("rate", CPU, per_second, seconds)[0].split())
    listeners = -(-made // _BATCH)
    events = made * EVENTS_PER_CONNECTION + listeners * EVENTS_PER_LISTENER
    return Made(connections=made, events=events, seconds=ns / 1e9)


def _run(*arguments: object) -> list[str]:
    command = [str(WORKLOAD), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


class Probe:
    """A connection every `interval_ms`, each from an address of its own, from `with` to the end of the block.

    `began[n]` is when connection n was begun (CLOCK_MONOTONIC, ns); complete after the block.
    """

    def __init__(self, interval_ms: int) -> None:
        self.began: dict[int, int] = {}
        self._interval_ms = interval_ms

    def __enter__(self) -> "Probe":
        self._process = subprocess.Popen(
            [WORKLOAD, "probe", str(self._interval_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._process.stdout
        self._first = self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        text, _unused = self._process.communicate()
        for line in (self._first + text).splitlines():
            number, ns = line.split()
            self.began[int(number)] = int(ns)
