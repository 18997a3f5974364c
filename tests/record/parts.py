"""A recording is made in parts, one after the other: a scenario is played while few other tools than its own run.

Each event costs every tool that runs. With all tools at once a scenario pays for fifty, of which it asks two or three,
and on a slow machine a kernel was not done after forty minutes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tests.record.watch import Watch

Item = TypeVar("Item")

TOOLS = 12
"""At most in a part, unless its tests ask for more."""
RECORDED = "recorded"
"""Beside a recording of this machine: nothing more will be recorded."""
SCRIPT = "script"


def split(items: Sequence[tuple[Item, Collection[Watch]]], tools: int = TOOLS) -> Iterator[list[Item]]:
    """Put the items into parts: those that have a watch in common into the same one, each in the given order."""
    groups: list[tuple[set[Watch], set[int]]] = []
    for number, (_, watches) in enumerate(items):
        asked, members = set(watches), {number}
        apart = []
        for other in groups:
            if other[0] & asked:
                asked, members = asked | other[0], members | other[1]
            else:
                apart.append(other)
        groups = [*apart, (asked, members)]
    parts: list[tuple[set[Watch], set[int]]] = []
    for asked, members in sorted(groups, key=lambda group: -len(group[0])):
        for part in parts:
            if len(part[0]) + len(asked) <= tools:
                part[0].update(asked)
                part[1].update(members)
                break
        else:
            parts.append((asked, members))
    for _, members in parts:
        yield [items[number][0] for number in sorted(members)]


def of(folder: Path) -> list[Path]:
    """The folders of a recording's parts, in their order."""
    return sorted((script.parent for script in folder.glob(f"*/{SCRIPT}")), key=lambda part: int(part.name))
