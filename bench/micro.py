"""The user side alone: draining the ring buffer, and decoding and encoding what came out of it.

Run by the bench as a program of its own: `python -m bench.micro WORKLOAD`. Prints one JSON object with lists of
figures per second.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcpscope import tool as toolbox
from tcpscope.filters import Filter
from tcpscope.kernel.loaded import BATCH_BYTES
from tcpscope.output import Column, open_sink
from tcpscope.schema import Clock, Layout
from tcpscope.session import Session

RING_BYTES = 16 << 20
CONNECTIONS = 10_000
ROUNDS = 15


def main() -> None:
    states: Any = toolbox.find("states")
    drained = []
    with Session("transition", "transition", Filter(), ring_bytes=RING_BYTES) as session:
        assert session.layout is not None and session._ring is not None
        layout = session.layout
        for _ in range(ROUNDS):
            fill()
            size = 0
            began = time.perf_counter()
            for batch in session._ring.batches():
                size += len(batch)
            drained.append(size / layout.size / (time.perf_counter() - began))
        fill()
        kept = b"".join(map(bytes, session._ring.batches()))
        lost = session.account().lost
    shown = layout.select(states.shown)
    print(
        json.dumps(
            {
                "record_bytes": layout.size,
                "events": len(kept) // layout.size,
                "lost": lost,
                "drain": drained,
                "json": _rows(layout, kept, "json"),
                "json_default": _rows(shown, kept, "json"),
                "table": _rows(shown, kept, "table"),
                "csv": _rows(layout, kept, "csv"),
            }
        )
    )


def fill() -> None:
    """Make events that nobody reads yet."""
    traffic = [sys.argv[1], "connections", "0", "1", str(CONNECTIONS), "0"]
    subprocess.run(traffic, check=True, stdout=subprocess.DEVNULL)


def _rows(layout: Layout, data: bytes, format_: str) -> list[float]:
    """Rows per second from raw batches to a file that keeps nothing."""
    decoder = layout.decoder(Clock())
    with Path("/dev/null").open("wb") as nothing:
        sink = open_sink(format_, map(Column.of, decoder.fields), nothing)
        piece = BATCH_BYTES // layout.size * layout.size
        batches = [data[at : at + piece] for at in range(0, len(data), piece)]

        def work() -> None:
            for batch in batches:
                sink.rows(decoder.rows(batch))

        return [len(data) / layout.size / _seconds(work) for _ in range(ROUNDS)]


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
