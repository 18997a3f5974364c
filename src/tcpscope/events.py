"""The rows of a tool as a Python iterator, for the library."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, get_args, get_origin, get_type_hints

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.request import Request
from tcpscope.session import Stats
from tcpscope.stop import Stop
from tcpscope.tool import Tool, find
from tcpscope.values import converter

if TYPE_CHECKING:
    from concurrent.futures import Future

Row = TypeVar("Row", covariant=True)
FILTERS = (*(field.name for field in fields(Filter)), "ipv4", "ipv6")


class Events(Generic[Row]):
    """Made by `tcpscope.open`. Iterate over it for rows, or over `batches()` for lists of rows. `stats` is the account,
    `notes` what the run cannot see, and how many rows are over `rate`.

    All iterations share the same rows. If one is left early, the next one continues there. After `close()` there are no
    more rows. Without `close()` or `with` the end of the object closes it, with a ResourceWarning.
    """

    _open = False

    def __init__(self, tool: str | os.PathLike[str], given: dict[str, Any]) -> None:
        found = _found(tool)
        self._name = found.name
        request = _request(found, given)
        self._lock = threading.RLock()
        self._waiting: list[Row] = []
        self._stop = Stop(request.duration)
        try:
            self._run = found.open(request)
        except BaseException:
            self._stop.close()
            raise
        try:
            self._convert = converter(found.name, self._run.columns)
            self._batches = self._run.batches(self._stop, request.max_events)
            self._stop.begin()
        except BaseException:
            self.close()
            raise
        self._open = True

    def batches(self) -> Iterator[list[Row]]:
        """Lists of rows, as they were read. No list is empty."""
        while rows := self._take():
            yield rows

    def __iter__(self) -> Iterator[Row]:
        while rows := self._take():
            given = 0
            try:
                for row in rows:
                    given += 1
                    yield row
            finally:
                self._waiting += rows[given:]

    async def __aiter__(self) -> AsyncIterator[Row]:
        """The same in asyncio. A separate thread waits for the rows."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        thread = ThreadPoolExecutor(1)
        try:
            while True:
                dropped = threading.Event()
                future = thread.submit(self._take, dropped)
                try:
                    rows = await asyncio.wrap_future(future)
                except BaseException:  # cancelled, while the thread still waits for rows
                    dropped.set()
                    future.add_done_callback(self._give_back)
                    raise
                if not rows:
                    return
                given = 0
                try:
                    for row in rows:
                        given += 1
                        yield row
                finally:
                    self._waiting += rows[given:]
        finally:
            thread.shutdown(wait=False)

    def _take(self, dropped: threading.Event | None = None) -> list[Row]:
        """The next rows. Empty at the end, or when `dropped` is set because the caller was cancelled."""
        with self._lock:
            while not self._waiting:
                batch = next(self._batches, None)
                if batch is None:
                    return []
                self._waiting += map(self._convert, batch.rows)
                if dropped and dropped.is_set():
                    return []
            rows, self._waiting = self._waiting, []
            return rows

    def _give_back(self, future: Future[list[Row]]) -> None:
        if not future.cancelled() and not future.exception():
            self._waiting += future.result()

    @property
    def stats(self) -> Stats:
        """seen == shown + filtered + limited + lost, exact once the iteration has ended."""
        return self._run.account()

    @property
    def notes(self) -> tuple[str, ...]:
        """What this run cannot see, and why, as the command line prints it; with `rate` how many more rows came."""
        return tuple(self._run.notes)

    def stop(self) -> None:
        """End the iteration, from another thread or a signal handler. Rows that are in the buffer still come."""
        self._stop.stop()

    def close(self) -> None:
        """Detach. Called at the end of `with`. Waits until a thread that iterates has ended."""
        self._open = False
        self._stop.stop()
        with self._lock:
            self._run.close()
            self._stop.close()

    def __repr__(self) -> str:
        return f"<tcpscope {self._name}>"

    def __del__(self) -> None:
        if self._open:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _found(tool: str | os.PathLike[str]) -> Tool:
    """The tool with this name, or that of a user's program. Raises the errors of `find`, and of the compiler."""
    if isinstance(tool, str):
        return find(tool)
    if not isinstance(tool, os.PathLike):
        raise UsageError(f"tool={tool!r}", "give the name of a tool, or the Path of a program")
    from tcpscope.own.cli import of_file

    return of_file(Path(tool))


def _request(tool: Tool, given: dict[str, Any]) -> Request:
    """The request that keywords make. UsageError for a keyword that the tool has no use for."""
    useful = {
        "interval": bool(tool.intervals),
        "buffer": bool(tool.event),
        "rate": tool.rated,
    }
    asked = ["max_events", "columns", "duration", "time", *(name for name in useful if useful[name])]
    options = {option.name: option for option in tool.options}
    allowed = get_type_hints(Filter.from_options)
    known = [*FILTERS, *asked, *options]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
            raise UsageError(f"'{tool.name}' has no '{name}'", hint)
    return Request(
        filter=Filter.from_options(
            **{name: _checked(name, given[name], allowed[name]) for name in FILTERS if name in given}
        ),
        output="json",
        options={name: option.taken(given.get(name, option.unset)) for name, option in options.items()},
        **{name: given[name] for name in asked if name in given},
    )


def _checked(name: str, value: Any, allowed: Any) -> Any:
    """The value of a keyword, which must have the type `allowed`; of an iterator, what it gives. Raises UsageError."""
    if isinstance(value, Iterator):
        value = tuple(value)
    if not _fits(value, allowed):
        arms = get_args(allowed) or (allowed,)
        words = [arm.__name__ for arm in arms if isinstance(arm, type) and arm is not NoneType]
        words += ["several of them" for arm in arms if get_origin(arm) is Iterable]
        raise UsageError(f"{name}={value!r}", f"give a value of type {' or '.join(words)}")
    return value


def _fits(value: Any, allowed: Any) -> bool:
    """Whether the value has a type of this annotation. A bool is no int, and text is not several of anything."""
    arms = get_args(allowed)
    if get_origin(allowed) is Iterable:
        several = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
        return several and all(_fits(each, arms[0]) for each in value)
    if arms:
        return any(_fits(value, arm) for arm in arms)
    return isinstance(value, allowed) and (allowed is bool or not isinstance(value, bool))
