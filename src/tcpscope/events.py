"""The library's view of a tool: its rows as a Python iterator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.request import Request
from tcpscope.session import Stats
from tcpscope.stop import Stop
from tcpscope.tool import find
from tcpscope.values import converter

Row = TypeVar("Row", covariant=True)
FILTERS = (*(field.name for field in fields(Filter)), "ipv4", "ipv6")
_ASKED = {"duration": None, "interval": None, "max_events": None, "time": "iso", "columns": None, "buffer": None}
_TIMES = ("iso", "elapsed", "none")


class Events(Generic[Row]):
    """Made by `tcpscope.open`. Iterate over it, or over `batches()` for whole lists; `stats` is the loss contract."""

    def __init__(self, tool: str, given: dict[str, Any]) -> None:
        found = find(tool)
        options = {option.name: option.unset for option in found.options}
        known = [*FILTERS, *_ASKED, *options]
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
                raise UsageError(f"'{found.name}' has no '{name}'", hint)
        asked: dict[str, Any] = {name: given.get(name, default) for name, default in _ASKED.items()}
        if asked["time"] not in _TIMES:
            raise UsageError(f"time '{asked['time']}'", f"allowed: {', '.join(_TIMES)}")
        request = Request(
            filter=Filter.from_options(**{name: given[name] for name in FILTERS if name in given}), output="json",
            options={name: given.get(name, default) for name, default in options.items()}, **asked,
        )  # fmt: skip
        self._run = found.open(request)
        self._most = request.max_events
        self._convert = converter(found.name, self._run.columns)
        self._stop = Stop(request.duration)
        self._stop.begin()

    def batches(self) -> Iterator[list[Row]]:
        """Lists of rows as they were read: never empty."""
        for batch in self._run.batches(self._stop, self._most):
            if batch.rows:
                yield list(map(self._convert, batch.rows))

    def __iter__(self) -> Iterator[Row]:
        for rows in self.batches():
            yield from rows

    async def __aiter__(self) -> AsyncIterator[Row]:
        """The same in asyncio. The waiting is done in another thread."""
        import asyncio

        batches = self.batches()
        try:
            while rows := await asyncio.to_thread(next, batches, None):
                for row in rows:
                    yield row
        finally:
            self.stop()

    @property
    def stats(self) -> Stats:
        """seen == shown + filtered + lost, exact once the iteration has ended."""
        return self._run.account()

    def stop(self) -> None:
        """End the iteration, from another thread or from a signal handler: what is in the buffer still comes."""
        self._stop.stop()

    def close(self) -> None:
        """Detach. Called at the end of `with`."""
        self._run.close()
        self._stop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
