"""How many connections were opened, received and closed, and how many failed: for the live line and the last line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tcpscope.request import Request
from tcpscope.run import Batch
from tcpscope.tool import find


class Connecting:
    """Counts transitions. No rule needs it yet; it says what was watched."""

    def __init__(self, request: Request) -> None:
        asked = Request(filter=request.filter, columns=("role", "old_state", "new_state"), debug=request.debug)
        self.run = find("states").open(asked)
        self._changes: Counter[tuple[str | None, str, str]] = Counter()

    def poll(self) -> None:
        self._take(self.run.poll())

    def end(self) -> None:
        self._take(self.run.end())

    def _take(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._changes.update((row.role, row.old_state, row.new_state) for row in batch.rows)

    def _count(self, old: str | None = None, new: str | None = None) -> int:
        return sum(n for (_, o, w), n in self._changes.items() if old in (None, o) and new in (None, w))

    @property
    def opened(self) -> int:
        return self._count(old="SYN_SENT", new="ESTABLISHED")

    @property
    def received(self) -> int:
        return self._count(old="SYN_RECV", new="ESTABLISHED")

    @property
    def failed(self) -> int:
        return self._count(old="SYN_SENT", new="CLOSE")

    @property
    def closed(self) -> int:
        return self._count(new="CLOSE") - self.failed - self._count(old="LISTEN", new="CLOSE")

    def counts(self) -> dict[str, int]:
        return {
            "connections_opened": self.opened,
            "connections_received": self.received,
            "connections_closed": self.closed,
            "connects_failed": self.failed,
        }

    def live(self) -> str:
        return (
            f"{self.opened} connections opened, {self.received} received, {self.closed} closed, "
            f"{self.failed} failed to open"
        )

    def blind_spots(self) -> list[str]:
        if not self.failed:
            return []
        return [f"{self.failed} connects failed; no rule checks them yet: see 'tcpscope connect --failed'"]
