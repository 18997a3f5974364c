"""The library's view of a tool: its rows as a Python iterator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import TracebackType
from typing import Any

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.request import Request
from tcpscope.schema import Row
from tcpscope.session import Stats
from tcpscope.stop import Stop
from tcpscope.tool import find

_TIMES = ("iso", "elapsed", "none")


class Events:
    """Made by `tcpscope.open`. Iterate over it, or over `batches()` for whole lists; `stats` is the loss contract."""

    def __init__(self, tool: str, options: dict[str, Any], filters: dict[str, Any], **asked: Any) -> None:
        found = find(tool)
        _check("filter", filters, [*(field.name for field in fields(Filter)), "ipv4", "ipv6"])
        _check("option", options, [option.name for option in found.options])
        if asked["time"] not in _TIMES:
            raise UsageError(f"time '{asked['time']}'", f"allowed: {', '.join(_TIMES)}")
        request = Request(
            filter=Filter.from_options(**filters), output="json",
            options={option.name: option.unset for option in found.options} | options, **asked,
        )  # fmt: skip
        self._run = found.open(request)
        self._most = request.max_events
        self._stop = Stop(request.duration)
        self._stop.begin()

    def batches(self) -> Iterator[list[Row]]:
        """Lists of rows as they were read: never empty."""
        for batch in self._run.batches(self._stop, self._most):
            if batch.rows:
                yield list(batch.rows)

    def __iter__(self) -> Iterator[Row]:
        for rows in self.batches():
            yield from rows

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

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check(what: str, given: dict[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"unknown {what} '{name}'",
                             did_you_mean(name, known) or f"there are {', '.join(known) or 'none'}")  # fmt: skip
