"""Our own probes through `tcpscope run`: row by row what their tools show of the same faults.

The others have a tool that tells them by constants what is asked (drops, listeners, trace), or send no rows: they
add up in the kernel, or are read by an iterator (rtt, traffic, congestion, sockets, ports, owner, health).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from importlib.resources import files
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.lossy_path import LossyPath
from tcpscope.lab.scenarios.server_dies import ServerDies
from tests.conftest import RunningTool, until

pytestmark = pytest.mark.root

OWN_CLOCK = ("time", "lat", "wait", "duration", "since", "in_state", "srtt", "established", "handshake")
"""What each of two programs reads at a moment of its own. Whether it is known must be the same."""


def refused_and_killed(lab: Lab) -> None:
    """Handshakes that are refused, SYN-ACKs that are sent again, and a server that dies: ten attempts, ten ends."""
    ServerDies().run(lab)


def lost_on_the_way(lab: Lab) -> None:
    """One segment in ten is lost, until all have arrived."""
    LossyPath(seconds=1, one_in=10).run(lab)
    until(lambda: not any(found.send_q for found in lab.client.sockets()), "everything to arrive")


def asked_and_answered(lab: Lab) -> None:
    """Three connections whose server accepts late, and reads late."""
    with lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener:
        where = listener.getsockname()
        for _ in range(3):
            with lab.client.run(socket.create_connection, where) as made:
                made.sendall(b"question")
                until(lambda: any(s.recv_q for s in lab.server.sockets() if s.state == "ESTABLISHED"), "the question")
                with listener.accept()[0] as accepted:
                    assert accepted.recv(100) == b"question"
                    accepted.sendall(b"answer")
                    assert made.recv(100) == b"answer"


# The fault -> the probe, its tool, a column, and values of it that must be among its rows.
PROBES: dict[Callable[[Lab], None], dict[str, tuple[str, str, set[Any]]]] = {
    refused_and_killed: {
        "transition": ("states", "new_state", {"ESTABLISHED", "CLOSE_WAIT", "CLOSE"}),
        "attempt": ("connect", "outcome", {"ESTABLISHED"}),
        "resets": ("reset", "direction", {"SENT", "RECEIVED"}),
        "life": ("life", "end", {"RST_SENT"}),
    },
    lost_on_the_way: {
        "retrans": ("retrans", "state", {"ESTABLISHED"}),
    },
    asked_and_answered: {
        "accepted": ("accept", "comm", set()),
        "action": ("tracer", "action", {"CONNECT", "ACCEPT", "CLOSE"}),
        "wait": ("pktlat", "comm", set()),
    },
}


def comparable(rows: list[dict[str, Any]]) -> list[str]:
    """The rows without order, since processors race, and without the clock of the program."""
    found = [
        {name: value is None if name.startswith(OWN_CLOCK) else value for name, value in row.items()} for row in rows
    ]
    return sorted(map(repr, found))


@pytest.mark.parametrize("play", PROBES, ids=lambda play: play.__name__)
def test_it_shows_what_its_tool_shows(lab: Lab, run_tool: type[RunningTool], play: Callable[[Lab], None]) -> None:
    netns = ("--netns", f"{lab.client.inode},{lab.server.inode}")
    objects = files("tcpscope") / "bpf"
    with ExitStack() as stack:
        pairs = {
            probe: [
                stack.enter_context(run_tool(*words, *netns))
                for words in (("run", str(objects / f"{probe}.bpf.o")), (tool,))
            ]
            for probe, (tool, *_) in PROBES[play].items()
        }
        play(lab)
    for probe, (own, tool) in pairs.items():
        _, column, values = PROBES[play][probe]
        assert own.done and tool.done and own.done.stats
        assert comparable(own.done.rows) == comparable(tool.done.rows), probe
        assert own.done.rows and {row[column] for row in own.done.rows} >= values, probe
        account = own.done.stats
        assert account["seen"] == account["shown"] + account["filtered"] + account["limited"] + account["lost"]
        assert (account["shown"], account["lost"]) == (len(own.done.rows), 0)
        assert "'flush" not in own.done.stderr, probe  # its second way has no role of its own
