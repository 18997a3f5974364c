"""Counts events by group in the kernel (bpf/groups.bpf.h). A flood then costs no event and no row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tcpscope.aggregate import Aggregate, distribution
from tcpscope.errors import UsageError
from tcpscope.kernel.spec import Spec
from tcpscope.output.histogram import Histogram
from tcpscope.schema import Clock, Field, Layout
from tcpscope.session import Session

MAPS = ("groups_even", "groups_odd")
_WORD = 8
_MOST_WORDS = 12  # GROUP_WORDS


def counts(spec: Spec) -> bool:
    """Whether an object can count its events in the kernel."""
    return "grouping" in spec.variables


def distributes(spec: Spec) -> bool:
    """Whether the groups that it counts are distributions of a number, not sums."""
    return counts(spec) and any(field.name == "buckets" for field in spec.layout("group", internal=True).fields)


@dataclass(frozen=True)
class Group:
    """What was counted: a row with the columns of the group, how many events, the times of the first and the last one,
    and the sum of a number of theirs, or its distribution."""

    row: Any
    count: int
    first_ns: int
    last_ns: int
    sum: int
    values: Histogram | None


class Counting(NamedTuple):
    """What a `Session` needs of an object that counts its events, or could and sends them: the names are its own."""

    constants: dict[str, Any]
    entries: dict[str, int]
    key_bytes: dict[str, int]


def counting(layout: Layout, by: Sequence[str], number: str | None) -> Counting:
    """To count by these columns; without any, to send events. UsageError if they are too many.

    `number` is the column that is summed, or whose distribution is made.
    """
    if not by:
        return Counting({}, dict.fromkeys(MAPS, 1), {})
    if alone := [name for name in by if not layout.field(name).counted]:
        raise UsageError(f"--by {alone[0]}", "rows cannot be grouped by it; each row has it")
    masks = _masks(layout, by)
    if len(masks) > _MOST_WORDS:
        raise UsageError(
            f"--by {','.join(by)}", f"too many columns: they take {len(masks)} words, there are {_MOST_WORDS}"
        )
    parts = [{"mask": mask, "word": word, "shift": 0} for word, mask in masks.items()]
    unused = {"mask": 0, "word": 0, "shift": 0}
    constants = {
        "grouping": True,
        "group_by": parts + [unused] * (_MOST_WORDS - len(parts)),
        "group_sum": _number(layout.field(number)) if number else unused,
    }
    return Counting(constants, {}, dict.fromkeys(MAPS, _WORD * len(parts)))


def _masks(layout: Layout, names: Sequence[str]) -> dict[int, int]:
    """Word of an event -> its bits that belong to these columns, in the order of the event."""
    masks: dict[int, int] = {}
    for name in names:
        field = layout.field(name)
        for at in range(field.offset, field.offset + field.size):
            masks[at // _WORD] = masks.get(at // _WORD, 0) | 0xFF << 8 * (at % _WORD)
    return dict(sorted(masks.items()))


def _number(field: Field) -> dict[str, int]:
    shift = 8 * (field.offset % _WORD)
    return {"mask": ((1 << 8 * field.size) - 1) << shift, "word": field.offset // _WORD, "shift": shift}


class Counted:
    """The groups of an object that counts its `event` by the columns `by`.

    `frame` gives the name of a function's address.
    """

    def __init__(self, session: Session, event: str, by: Sequence[str], frame: Callable[[int], str] = hex) -> None:
        layout = session.spec.layout(event).named(session.kernel.enumerators)
        self._words, self._size = list(_masks(layout, by)), layout.size
        self._decode = layout.select(by).decoder(Clock("none"), frame=frame).rows
        self._aggregate = Aggregate(session.loaded, "groups", _WORD * len(self._words), "group")
        self._distributes = distributes(session.spec)
        session.kernel.release()

    def take(self) -> Iterator[Group]:
        """What was counted since the last call."""
        for key, group in self._aggregate.take():
            event = bytearray(self._size)
            for at, word in enumerate(self._words):
                event[word * _WORD : (word + 1) * _WORD] = key[at * _WORD : (at + 1) * _WORD]
            values = distribution(group) if self._distributes else None
            row = self._decode(bytes(event))[0]
            yield Group(row, group.count, group.first_ns, group.last_ns, group.sum, values)
