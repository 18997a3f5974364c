"""Makes Python values of the text in a run's rows."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from operator import attrgetter
from typing import Any

import msgspec

from tcpscope import rows
from tcpscope.output import Column


def converter(tool: str, columns: Sequence[Column]) -> Callable[[Any], Any]:
    """A function that converts a row of these columns: to a class of `rows`, if one has exactly these columns."""
    names = tuple(column.name for column in columns)
    classes = (getattr(rows, name, None) for name in (tool.title(), f"{tool.title()}Events"))
    made = next((each for each in classes if each and each.__struct_fields__ == names), None)
    type_: Any = made or msgspec.defstruct(tool.title(), [(name, Any) for name in names], frozen=True)
    conversions = [(at, found) for at, column in enumerate(columns) if (found := _conversion(column))]
    values_of = attrgetter(*names) if len(names) > 1 else lambda row: (getattr(row, names[0]),)

    def convert(row: Any) -> Any:
        values = list(values_of(row))
        for at, conversion in conversions:
            if values[at] is not None:
                values[at] = conversion(values[at])
        return type_(*values)

    return convert


def _conversion(column: Column) -> Callable[[Any], Any] | None:
    if column.kind == "enum":
        enum: Any = getattr(rows, class_of(column.enum), None)
        if enum is None:  # of a tool from another package
            return None
        members = {member.value: member for member in enum}
        return lambda text: members.get(text, text)  # a kernel may know more of them
    plain: dict[str, Callable[[Any], Any]] = {"address": _address, "time": _time, "errno": _errno}
    return plain.get(column.kind)


def class_of(enum: str) -> str:
    """tcp_state -> TcpState"""
    return enum.title().replace("_", "")


@lru_cache(1 << 14)
def _address(text: str) -> IPv4Address | IPv6Address:
    return ip_address(text)


def _time(read: str | float) -> datetime | float:
    return datetime.fromisoformat(read) if isinstance(read, str) else read


_NUMBERS = {name: number for number, name in errno.errorcode.items()} | {"none": 0}


def _errno(text: str) -> int:
    return _NUMBERS[text] if text in _NUMBERS else int(text)
