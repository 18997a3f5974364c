"""The library's view of a tool: its events as a Python iterator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import TracebackType
from typing import Any

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.schema import Row
from tcpscope.session import Stats
from tcpscope.stop import Stop
from tcpscope.tool import Request, Stream, find, names


class Events:
    """Made by `tcpscope.open`. Iterate over it, or over `batches()` for whole lists; `stats` is the loss contract."""

    def __init__(
        self,
        tool: str,
        duration: float | None,
        max_events: int | None,
        time: str,
        columns: tuple[str, ...] | None,
        buffer: int | None,
        options: dict[str, Any],
        filters: dict[str, Any],
    ) -> None:
        found = find(tool)
        if not isinstance(found, Stream):
            streams = [name for name in names() if isinstance(find(name), Stream)]
            raise UsageError(f"'{tool}' makes no events", f"these do: {', '.join(streams)}")
        known = [field.name for field in fields(Filter)] + ["ipv4", "ipv6"]
        for name in filters:
            if name not in known:
                hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
                raise UsageError(f"unknown filter '{name}'", hint)
        self._tool = found
        self._request = Request(
            filter=Filter.from_options(**filters), output="json", time=time, columns=columns, duration=duration,
            max_events=max_events, buffer=buffer, options=options,
        )  # fmt: skip
        if time not in ("iso", "elapsed", "none"):
            raise UsageError(f"time '{time}'", "allowed: iso, elapsed, none")
        known = [option.name for option in found.event_options]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or f"there are {', '.join(known) or 'none'}"
                raise UsageError(f"unknown option '{name}'", hint)
        self._session = found.open(self._request)
        self._stop = Stop(duration)
        self._stop.begin()

    def batches(self) -> Iterator[list[Row]]:
        """Lists of events as they were read: never empty."""
        for rows in self._tool.rows(self._session, self._stop, self._request):
            if rows:
                yield rows

    def __iter__(self) -> Iterator[Row]:
        for rows in self.batches():
            yield from rows

    @property
    def stats(self) -> Stats:
        """seen == shown + filtered + lost, exact once the iteration has ended."""
        return self._session.account()

    def stop(self) -> None:
        """End the iteration, from another thread or from a signal handler: what is in the buffer still comes."""
        self._stop.stop()

    def close(self) -> None:
        """Detach. Called at the end of `with`."""
        self._session.close()
        self._stop.close()

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
