"""What the user asks of a tool, and the options that only some tools have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.output import Column

TIMES = ("iso", "elapsed", "none")


@dataclass(frozen=True)
class Option:
    """An option of a tool. `type` is a Python type or a tuple of allowed values; a bool is a flag.

    names    it is a list of names: text with commas; in Python a sequence of names too
    repeats  it may be given several times, with further names each time
    metavar  what stands for its value in the help
    """

    flags: tuple[str, ...]
    help: str
    type: Any = bool
    default: Any = None
    names: bool = False
    repeats: bool = False
    metavar: str | None = None

    @property
    def name(self) -> str:
        return max(self.flags, key=len).lstrip("-").replace("-", "_")

    @property
    def unset(self) -> Any:
        """Its value if it is not given."""
        return False if self.type is bool else self.default

    def taken(self, value: Any) -> Any:
        """The value of a keyword, as the command line gives it. UsageError for one of another type."""
        if self.names and _is_sequence_of_text(value):
            return ",".join(value)
        if type(value) is not self.type and value is not self.unset:
            allowed = f"{self.type.__name__}{' or a sequence of them' if self.names else ''}"
            raise UsageError(f"{self.name}={value!r}", f"give a value of type {allowed}")
        return value


@dataclass
class Request:
    """The same for every tool, and the tool's own options in `options`.

    columns  names, as text with commas or as a sequence; a tuple once the request is made
    output   table, json, csv; of what repeats also screen (live)
    time     iso, elapsed, none, or for a table or screen local
    rate     at most so many rows in a second; further ones are counted. 0: no limit; None: no limit but on a terminal
    wide     all columns of a table on a terminal, also those that do not fit
    verbose  print the account also if nothing was lost
    """

    filter: Filter = field(default_factory=Filter)
    output: str = "table"
    columns: str | Sequence[str] | None = None
    header: bool = True
    wide: bool = False
    time: str = "iso"
    duration: float | None = None
    max_events: int | None = None
    interval: float | None = None
    stats: bool = False
    strict: bool = False
    verbose: bool = False
    explain: bool = False
    buffer: int | None = None
    rate: int | None = None
    debug: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """UsageError for values that make no sense."""
        for name, seconds in (("duration", self.duration), ("interval", self.interval)):
            if seconds is not None and not (_is_number(seconds) and 0 < seconds < 1e9):
                raise UsageError(f"--{name} {_plain(seconds)}", "give a number of seconds above 0")
        if self.max_events is not None and not (type(self.max_events) is int and self.max_events > 0):
            raise UsageError(f"--max-events {self.max_events!r}", "give a number above 0")
        if self.rate is not None and not (type(self.rate) is int and 0 <= self.rate < 1 << 32):
            raise UsageError(f"--rate {self.rate!r}", "give a number of rows in a second, 0 for no limit")
        size = self.buffer
        if size is not None and not (type(size) is int and 4096 <= size <= 1 << 30 and not size & (size - 1)):
            raise UsageError(f"--buffer {size!r}", "give a power of two from 4K to 1024M")
        if self.stats and self.output != "json":
            raise UsageError("--stats", "the account is a record of JSON: -o json; --verbose prints it on stderr")
        if self.explain and self.output != "table":
            raise UsageError(f"--explain and -o {self.output}", "the explanation is text: leave out one of them")
        if not self.header and self.output == "json":
            raise UsageError("--no-header and -o json", "JSON has no titles")
        times = (*TIMES, "local") if self.output in ("table", "screen") else TIMES
        if self.time not in times:
            raise UsageError(f"time '{self.time}'", f"allowed: {', '.join(times)}")
        if self.wide and (self.output != "table" or self.columns is not None):
            raise UsageError("--wide", "only a table without --columns leaves columns out")
        if self.columns is not None:
            self.columns = self._checked_columns(self.columns)

    def _checked_columns(self, columns: str | Sequence[str]) -> tuple[str, ...]:
        if not isinstance(columns, str) and not _is_sequence_of_text(columns):
            raise UsageError(f"--columns {columns!r}", "names as text with commas, or a sequence of names")
        names = names_in(columns)
        if not names:
            raise UsageError("--columns is empty", "give names of columns, separated by commas")
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"--columns has '{name}' twice")
        if "time" in names and self.time == "none":
            raise UsageError("--columns has 'time'", "--time none removes that column")
        return names

    def choose(self, columns: Sequence[Column], shown: Sequence[str], drawn: Sequence[str] = ()) -> tuple[Column, ...]:
        """The columns to print: those of --columns. Else those `shown` in a table, and all of them in JSON and CSV.

        A screen has all, those `shown` first, and hides the others. A table and a screen always have those `drawn`.
        UsageError for a name that is not in `columns`.
        """
        known = {column.name: column for column in columns if column.kind != "time" or self.time != "none"}
        default = [name for name in shown if name in known] if self.output in ("table", "screen") else [*known]
        for name in self.columns or ():
            if name not in known:
                raise UsageError(
                    f"unknown column '{name}'", did_you_mean(name, known) or f"there are {', '.join(known)}"
                )
        also = drawn if self.output in ("table", "screen") else ()
        chosen = tuple(known[name] for name in dict.fromkeys((*(self.columns or default), *also)))
        if self.output != "screen" or self.columns:
            return chosen
        others = (column for column in known.values() if column not in chosen)
        return (*chosen, *(msgspec.structs.replace(column, hidden=True) for column in others))

    def refuse_peers(self, why: str) -> None:
        """UsageError if the filter names a remote end. Call it where there is none; `why` says so."""
        for option, value in self.filter.describe():
            if option in ("--rport", "--raddr"):
                raise UsageError(f"{option} {value}", why)


def names_in(value: str | Iterable[str]) -> tuple[str, ...]:
    """The names in text with commas, or in several such texts."""
    several = [value] if isinstance(value, str) else value
    return tuple(name.strip() for text in several for name in text.split(",") if name.strip())


def _is_sequence_of_text(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
