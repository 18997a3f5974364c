"""How often something happened, by group: the counts of a tool's --count, kept for the time that the rules look at."""

from __future__ import annotations

import time
from collections import deque, namedtuple
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from tcpscope.request import Request
from tcpscope.run import Batch
from tcpscope.tool import find

INTERVAL_SECONDS = 1.0
_EVER = ("outcome", "kind", "errno", "direction")
_PARTS_AT_MOST = 600
GROUPS_AT_MOST = 50_000
"""Of one tool. What is in further ones counts as lost: in a flood each packet may be a group of its own."""


@dataclass
class Tally:
    """How often it happened, and the sum of a number that each has.

    first_s, last_s  when it happened first and last: the ends of these intervals, in seconds of the monotonic clock
    between_ns       the kernel's times of the first and the last; the same twice, if the first is not known any more
    """

    count: int = 0
    sum: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    between_ns: tuple[int, int] = (0, 0)
    _parts: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, now_s: float, count: int, number: int = 0, between_ns: tuple[int, int] = (0, 0)) -> None:
        first_ns, last_ns = between_ns
        self.between_ns = (self.between_ns[0] if self._parts else first_ns, last_ns)
        self.first_s = self.first_s or now_s
        self.last_s = max(self.last_s, now_s)
        self.count += count
        self.sum += number
        if self._parts and self._parts[-1][0] == now_s:
            _, before, sum_before = self._parts.pop()
            count, number = count + before, number + sum_before
        elif len(self._parts) == _PARTS_AT_MOST:  # the two oldest become one
            (_, oldest, oldest_sum), (at, next_, next_sum) = self._parts.popleft(), self._parts.popleft()
            self._parts.appendleft((at, oldest + next_, oldest_sum + next_sum))
        self._parts.append((now_s, count, number))

    def forget(self, before_s: float) -> None:
        """Leave out what is older."""
        while self._parts and self._parts[0][0] < before_s:
            self.between_ns = (self.between_ns[1],) * 2
            _, count, number = self._parts.popleft()
            self.count -= count
            self.sum -= number
        if self._parts:
            self.first_s = self._parts[0][0]

    def is_apart(self, least_s: float) -> bool:
        """Whether the kernel saw the last one more than so many seconds after the first: counts may be read late."""
        first_ns, last_ns = self.between_ns
        return last_ns - first_ns > least_s * 1e9

    def since(self, after_s: float) -> int:
        """The count of the intervals that ended after this time."""
        return sum(count for at, count, _ in self._parts if at > after_s)

    def merge(self, other: Tally) -> None:
        self.between_ns = spanning(self.between_ns, other.between_ns)
        self.count += other.count
        self.sum += other.sum
        self.first_s = min(self.first_s or other.first_s, other.first_s)
        self.last_s = max(self.last_s, other.last_s)
        self._parts.extend(other._parts)


def spanning(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The kernel's times of the first and the last of both; 0: not known."""
    return min(filter(None, (one[0], other[0])), default=0), max(one[1], other[1])


@dataclass
class Ever:
    """The count since the watch began, and the sum, of all groups with these values."""

    outcome: str | None
    kind: str | None
    errno: str | None
    direction: str | None
    count: int = 0
    sum: int = 0


class Groups:
    """A source: the groups of a tool with --count, by the columns `by`. A group is a named tuple of them.

    `number` is the column that the tool sums.
    `ever` has the counts since the watch began, forgotten ones too, by those of the columns _EVER that there are.
    """

    def __init__(
        self, request: Request, tool: str, by: Sequence[str], number: str | None = None, **options: Any
    ) -> None:
        found = find(tool)
        defaults = {option.name: option.taken(option.unset) for option in found.options}
        asked = Request(
            filter=request.filter,
            output="json",
            interval=INTERVAL_SECONDS,
            time="none",
            debug=request.debug,
            options=defaults | {"count": True, "by": ",".join(by)} | options,
        )
        self.run = found.open(asked)
        self.tallies: dict[Any, Tally] = {}
        self.ever: dict[tuple[Any, ...], Ever] = {}
        self._group, self._by, self._number = namedtuple("Group", by), tuple(by), number

    def begin(self) -> None:
        self.run.begin_anew()  # type: ignore[attr-defined]

    def poll(self) -> None:
        self._take(self.run.poll())

    def end(self) -> None:
        self._take(self.run.end())

    def forget(self, before_s: float) -> None:
        """Leave out what happened before this time."""
        for group, tally in list(self.tallies.items()):
            tally.forget(before_s)
            if not tally.count:
                del self.tallies[group]

    def _take(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            if batch.kind != "interval":
                continue
            now_s = time.monotonic()
            for row, between_ns in zip(batch.rows, batch.times_ns, strict=True):
                group = self._group(*(getattr(row, name) for name in self._by))
                number = getattr(row, self._number) if self._number else 0
                tally = self.tallies.get(group)
                if tally is None:
                    if len(self.tallies) >= GROUPS_AT_MOST:
                        self.run.stats.shown -= row.count
                        self.run.stats.lost += row.count
                        continue
                    tally = self.tallies[group] = Tally()
                tally.add(now_s, row.count, number or 0, between_ns)
                kind: dict[str, Any] = {name: getattr(group, name, None) for name in _EVER}
                ever = self.ever.setdefault(tuple(kind.values()), Ever(**kind))
                ever.count += row.count
                ever.sum += number or 0

    def where(self, **values: Any) -> Iterator[tuple[Any, Tally]]:
        """The groups with these values in their columns; a set of values: one of them."""
        wanted = [(attrgetter(name), _among(value)) for name, value in values.items()]
        for group, tally in self.tallies.items():
            for column, among in wanted:  # all() would take twice the time: rules ask each second
                if column(group) not in among:
                    break
            else:
                yield group, tally

    def count(self, **values: Any) -> int:
        """How many there are of the groups with these values."""
        return sum(tally.count for _, tally in self.where(**values))

    def total(self, **values: Any) -> Tally:
        """One tally of the groups with these values."""
        total = Tally()
        for _, tally in self.where(**values):
            total.merge(tally)
        return total

    def together(self, *names: str, **values: Any) -> Mapping[tuple[Any, ...], Tally]:
        """The groups with these values, by these columns only."""
        found: dict[tuple[Any, ...], Tally] = {}
        for group, tally in self.where(**values):
            found.setdefault(tuple(getattr(group, name) for name in names), Tally()).merge(tally)
        return found


def _among(wanted: Any) -> Container[Any]:
    return wanted if isinstance(wanted, set | frozenset) else (wanted,)
