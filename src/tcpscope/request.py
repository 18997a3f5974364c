"""What the user asked for, and the options that a tool has of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.output import Column


@dataclass(frozen=True)
class Option:
    """A tool's own option. `type` is a Python type or a tuple of allowed values; a bool is a flag."""

    flags: tuple[str, ...]
    help: str
    type: Any = bool
    default: Any = None

    @property
    def name(self) -> str:
        return max(self.flags, key=len).lstrip("-").replace("-", "_")

    @property
    def unset(self) -> Any:
        """Its value for who did not give it."""
        return False if self.type is bool else self.default


@dataclass
class Request:
    """The same for every tool, and the tool's own options in `options`. `time` is iso, elapsed or none."""

    filter: Filter = field(default_factory=Filter)
    output: str = "table"
    columns: tuple[str, ...] | None = None
    header: bool = True
    time: str = "iso"
    duration: float | None = None
    max_events: int | None = None
    interval: float | None = None
    stats: bool = False
    strict: bool = False
    explain: bool = False
    buffer: int | None = None
    debug: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def choose(self, columns: Sequence[Column], shown: Sequence[str], drawn: Sequence[str] = ()) -> tuple[Column, ...]:
        """The columns that were asked for; else those `shown` in a table, and all in the machine formats.

        A table has those `drawn` in any case. UsageError for a name that is none of `columns`.
        """
        known = {column.name: column for column in columns if column.kind != "time" or self.time != "none"}
        default = [name for name in shown if name in known] if self.output == "table" else [*known]
        for name in self.columns or ():
            if name not in known:
                raise UsageError(f"unknown column '{name}'",
                                 did_you_mean(name, known) or f"there are {', '.join(known)}")  # fmt: skip
        also = drawn if self.output == "table" else ()
        return tuple(known[name] for name in dict.fromkeys((*(self.columns or default), *also)))

    def refuse_peers(self, why: str) -> None:
        """UsageError if the filter asks for a remote end where there is none."""
        for option, value in self.filter.describe():
            if option in ("--rport", "--raddr"):
                raise UsageError(f"{option} {value}", why)
