"""Local ports in use, as `ports` shows them: a snapshot each second, or less often where there are many pools."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tcpscope.diagnose.tallies import Tally
from tcpscope.request import Request
from tcpscope.run import Batch
from tcpscope.tool import find

_INTERVAL_SECONDS = 1.0
_SHARE = 100  # snapshots take at most this part of one processor,
_PAUSE_AT_MOST_SECONDS = 5.0  # unless the pause between two were longer; what fails meanwhile is counted in the kernel
_POOLS_AT_MOST = 1024
NEAR = 0.5
"""From here on connect() has tried every second port in vain, and looks through the others, too."""


class First(NamedTuple):
    """A pool in the first snapshot: how many of its ports were in use."""

    used: int


class Pools:
    """A source.

    now     rows of the last snapshot, of pools near to their end or whose calls have failed, the nearest first: the
            columns of `ports`
    first   key of such a pool -> what it used in the first snapshot
    failed  key of a pool -> (errno, PID, name) -> calls that found no port; the process whose calls failed most in a
            snapshot stands for all of that snapshot
    at_failure  key of a pool -> its row in the last snapshot in which calls failed
    """

    is_full = False
    """A pool found no room."""

    def __init__(self, request: Request) -> None:
        tool = find("ports")
        options = {option.name: option.taken(option.unset) for option in tool.options}
        asked = Request(
            filter=request.filter,
            output="json",
            interval=_INTERVAL_SECONDS,
            time="none",
            debug=request.debug,
            options=options,
        )
        self.run = tool.open(asked)
        self.now: list[Any] = []
        self.run.least = NEAR  # type: ignore[attr-defined]
        self.first: dict[tuple[Any, ...], First] = {}
        self.failed: dict[tuple[Any, ...], dict[tuple[str, int | None, str | None], Tally]] = {}
        self.at_failure: dict[tuple[Any, ...], Any] = {}
        self._round = -1
        self._next_s = 0.0

    def begin(self) -> None:
        self.run.look()  # type: ignore[attr-defined]

    def poll(self) -> None:
        if time.monotonic() < self._next_s:
            return
        spent = time.thread_time()
        self._take(self.run.poll())
        self._next_s = time.monotonic() + min(_SHARE * (time.thread_time() - spent), _PAUSE_AT_MOST_SECONDS)

    def end(self) -> None:
        """The state at the end is that of the last snapshot: connections end while the watch does."""
        now = self.now
        self._take([self.run.look()])  # type: ignore[attr-defined]
        self.now = now
        self._take(self.run.end())

    def blind_spots(self) -> Iterator[str]:
        """What is not known, a line each."""
        if self.is_full:
            yield f"only the first {_POOLS_AT_MOST:,} local addresses with destinations were looked at for local ports"

    def forget(self, before_s: float) -> None:
        """Leave out calls that failed before this time."""
        for key, failed in list(self.failed.items()):
            for call, tally in list(failed.items()):
                tally.forget(before_s)
                if not tally.count:
                    del failed[call]
            if not failed:
                del self.failed[key], self.at_failure[key]

    @staticmethod
    def key(row: Any) -> tuple[Any, ...]:
        return (row.netns, row.family, row.laddr, row.raddr, row.rport)

    def _take(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            if batch.kind != "snapshot":
                continue
            for row, pool in zip(batch.rows, self.run.pools, strict=True):  # type: ignore[attr-defined]
                if len(self.first) < _POOLS_AT_MOST or self.key(row) in self.first:
                    self.first.setdefault(self.key(row), First(pool.used_first))
                else:
                    self.is_full = True
            if batch.round != self._round:
                self.now, self._round = [], batch.round
            self.now += batch.rows
            for row in batch.rows:
                if row.failed and len(self.failed) >= _POOLS_AT_MOST and self.key(row) not in self.failed:
                    self.is_full = True
                elif row.failed:
                    calls = self.failed.setdefault(self.key(row), {})
                    self.at_failure[self.key(row)] = row
                    call = (row.errno, row.failed_pid, row.failed_comm)
                    calls.setdefault(call, Tally()).add(time.monotonic(), row.failed)
