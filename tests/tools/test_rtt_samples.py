"""The samples of `rtt`: how many each end of a connection gives, and what becomes of each.

Both ends of a connection belong to this process. They talk in turns, one byte at a time, and nothing is retransmitted.
So the number of samples is known for each end: the handshake, each byte sent, and the FIN.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tcpscope.lab.hosts import DEVICE, Host, Lab, held
from tests.conftest import DEADLINE, CompletedRun, RunningTool, until

pytestmark = pytest.mark.kernel

FAMILIES = ("4", "6", "mapped")
SO_COOKIE = 57
ENDS = ("laddr", "lport", "raddr", "rport")

Rows = list[dict[str, Any]]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Here TCP waits ten seconds before it sends data again: nothing is, on the slowest kernel."""
    with Lab() as made:
        for host in made.hosts:
            for prefix, how in (
                ("192.0.2.0/24", ["scope", "link", "src", host.ipv4]),
                ("2001:db8::/64", ["metric", "256"]),
            ):
                route = ["ip", "route", "replace", prefix, "dev", DEVICE, "proto", "kernel", *how, "rto_min", "10s"]
                host.run(subprocess.run, route, check=True)
        yield made
        assert [host.counters()["TcpRetransSegs"] for host in made.hosts] == [0, 0]


def tcp_info(made: socket.socket) -> tuple[int, int]:
    """Packets that are not acknowledged, and the smoothed RTT in us."""
    data = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return struct.unpack_from("=I", data, 24)[0], struct.unpack_from("=I", data, 68)[0]


def listen(host: Host, family: str = "4") -> socket.socket:
    listener = host.socket(socket.AF_INET if family == "4" else socket.AF_INET6)
    if family == "mapped":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("0.0.0.0" if family == "4" else "::", 0))
    listener.listen(64)
    listener.settimeout(DEADLINE)
    return listener


class Talk:
    """A connection and what was said. `at_server` and `at_client` are its ends as each side calls them."""

    def __init__(self, lab: Lab, listener: socket.socket, family: str = "4") -> None:
        self.lab = lab
        kind = socket.AF_INET6 if family == "6" else socket.AF_INET
        port = listener.getsockname()[1]
        self.client = lab.client.socket(kind)
        self.client.settimeout(DEADLINE)
        self.client.connect((lab.server.address(kind), port))
        self.smoothed = [tcp_info(self.client)[1]]
        self.server = listener.accept()[0]
        self.server.settimeout(DEADLINE)
        self.said = 0
        server, client = (lab.server.address(kind), port), (lab.client.address(kind), self.client.getsockname()[1])
        self.at_server, self.at_client = (*server, *client), (*client, *server)

    def say(self, number: int) -> None:
        """So many requests, each with its response."""
        for _ in range(number):
            self.client.send(b"?")
            assert self.server.recv(2) == b"?"
            self.server.send(b"!")
            assert self.client.recv(2) == b"!"
            self.smoothed.append(tcp_info(self.client)[1])
            self.said += 1

    def settle(self) -> None:
        for end in (self.server, self.client):
            until(lambda end=end: tcp_info(end)[0] == 0, "the last acknowledgement")

    def close(self, first: str = "server") -> None:
        """Everything is acknowledged; then one end closes after the other, and none of them is left."""
        self.settle()
        ends = (self.server, self.client) if first == "server" else (self.client, self.server)
        ends[0].close()
        assert ends[1].recv(1) == b""
        ends[1].close()
        port = self.at_client[1]
        until(lambda: not any(port in (found.lport, found.rport) and found.state != "TIME_WAIT"
                              for host in self.lab.hosts for found in host.sockets()), "the end")  # fmt: skip

    @property
    def samples(self) -> int:
        """At either end, when it is closed."""
        return 1 + self.said + 1


def total(tool: RunningTool) -> Rows:
    assert tool.done is not None
    return [row for row in tool.done.rows if row["total"]]


def counts(rows: Rows) -> dict[tuple[Any, ...], int]:
    """Samples by connection; none is there twice."""
    found = {tuple(row[name] for name in ENDS): row["count"] for row in rows}
    assert len(found) == len(rows)
    return found


def account(tool: RunningTool) -> dict[str, int]:
    """The statistics, which add up and agree with the rows."""
    done: CompletedRun | None = tool.done
    assert done is not None
    stats = done.stats
    assert stats is not None, done.stderr
    assert stats["seen"] == stats["shown"] + stats["filtered"] + stats["lost"]
    assert stats["shown"] == sum(row["count"] for row in total(tool))
    assert stats["table_full"] == stats["missed"] == 0
    return stats


def lossless(tool: RunningTool) -> Rows:
    assert account(tool)["lost"] == 0
    return total(tool)


def watch(host: Host, *arguments: str) -> tuple[str, ...]:
    return ("rtt", "--by", "connection", *arguments, "--netns", str(host.inode))


@pytest.mark.parametrize("first", ["server", "client"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_as_acknowledged_packets(lab: Lab, run_tool: type[RunningTool], family: str, first: str) -> None:
    listener = listen(lab.server, family)
    with run_tool(*watch(lab.server)) as at_server, run_tool(*watch(lab.client)) as at_client:
        talks = []
        for number in (0, 1, 2, 7, 60):
            talks.append(Talk(lab, listener, family))
            talks[-1].say(number)
            talks[-1].close(first)
    assert counts(lossless(at_server)) == {talk.at_server: talk.samples for talk in talks}
    assert counts(lossless(at_client)) == {talk.at_client: talk.samples for talk in talks}
    for row in total(at_server) + total(at_client):
        assert row["pid"] == os.getpid()
        assert 0 < row["min_us"] <= row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]
        assert row["min_us"] <= row["mean_us"] <= row["max_us"]
        assert sum(count for *_, count in row["histogram"]) == row["count"]


def test_none_for_what_is_received(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Of a receiver only the handshake and the FIN are acknowledged."""
    listener = listen(lab.server)
    with run_tool(*watch(lab.server)) as tool:
        talk = Talk(lab, listener)
        for _ in range(100):
            talk.client.sendall(b"x" * 5000)
            left = 5000
            while left:
                left -= len(talk.server.recv(left))
        talk.close("client")
    assert counts(lossless(tool)) == {talk.at_server: 2}


def test_none_from_before_the_tool(lab: Lab, run_tool: type[RunningTool]) -> None:
    talk = Talk(lab, listen(lab.server))
    talk.say(20)
    talk.settle()
    with run_tool(*watch(lab.client)) as tool:
        talk.say(10)
        talk.close()
    assert counts(lossless(tool)) == {talk.at_client: 10 + 1}
    assert total(tool)[0]["pid"] == os.getpid()


def test_one_held_back_for_a_time_we_know(lab: Lab, run_tool: type[RunningTool]) -> None:
    listener = listen(lab.server)
    with run_tool(*watch(lab.client)) as tool:
        talk = Talk(lab, listener)
        talk.say(3)
        with held(lab.server):
            begin = time.monotonic()
            talk.client.send(b"?")
            sent = time.monotonic()
            assert talk.server.recv(2) == b"?"
            talk.server.send(b"!")
            until(lambda: time.monotonic() > sent + 0.3, "time to pass")
            released = time.monotonic()
        assert talk.client.recv(2) == b"!"
        end = time.monotonic()
        talk.said += 1
        talk.close()
    (row,) = lossless(tool)
    assert row["count"] == talk.samples
    assert (released - sent) * 1e6 <= row["max_us"] <= (end - begin) * 1e6
    assert row["p50_us"] < 300_000


def test_each_smoothed_one_is_that_of_tcp_info(lab: Lab, run_tool: type[RunningTool]) -> None:
    """After each response the test asks TCP_INFO: the values must be the same ones."""
    listener = listen(lab.server)
    with run_tool(*watch(lab.client, "--smoothed")) as tool:
        talk = Talk(lab, listener)
        talk.say(50)
    (row,) = lossless(tool)
    # The last is seen at the next segment, and that has not come if the response itself was the acknowledgement.
    assert row["count"] in (50, 51)
    told = talk.smoothed[: row["count"]]
    assert (row["min_us"], row["max_us"]) == (min(told), max(told))
    assert row["mean_us"] == pytest.approx(sum(told) / len(told), abs=0.06)
    octaves = Counter(value.bit_length() for value in told)
    assert {low.bit_length(): count for low, _, count in row["histogram"] if count} == octaves


def test_one_connection_although_its_cookie_comes_late(lab: Lab, run_tool: type[RunningTool]) -> None:
    """5.10 gives a socket its cookie when somebody asks for it."""
    listener = listen(lab.server)
    with run_tool(*watch(lab.server)) as tool:
        talk = Talk(lab, listener)
        talk.say(2)
        cookie = struct.unpack("Q", talk.server.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
        talk.say(2)
        talk.close()
    assert counts(lossless(tool)) == {talk.at_server: talk.samples}
    assert total(tool)[0]["cookie"] in (cookie, None)


def test_filters(lab: Lab, run_tool: type[RunningTool]) -> None:
    listeners = {family: listen(lab.server, family) for family in FAMILIES}
    port = {family: str(listener.getsockname()[1]) for family, listener in listeners.items()}
    wanted: dict[tuple[str, ...], Callable[[str], bool]] = {
        ("-p", str(os.getpid())): lambda family: True,
        ("-p", "1"): lambda family: False,
        ("--lport", port["mapped"]): lambda family: family == "mapped",
        ("--rport", port["4"]): lambda family: False,
        ("-4",): lambda family: family != "6",
        ("--raddr", lab.client.ipv6): lambda family: family == "6",
        ("--laddr", "192.0.2.0/24", "-p", str(os.getpid())): lambda family: family != "6",
    }
    with ExitStack() as stack:
        tools = {case: stack.enter_context(run_tool(*watch(lab.server, *case))) for case in wanted}
        at_client = stack.enter_context(run_tool(*watch(lab.client, "--rport", port["4"])))
        talks = {family: Talk(lab, listener, family) for family, listener in listeners.items()}
        for talk in talks.values():
            talk.say(4)
            talk.close()
    for case, tool in tools.items():
        chosen = {talk.at_server: talk.samples for family, talk in talks.items() if wanted[case](family)}
        assert counts(lossless(tool)) == chosen, case
    assert counts(lossless(at_client)) == {talks["4"].at_client: talks["4"].samples}


def test_intervals_sum_to_the_total(lab: Lab, run_tool: type[RunningTool]) -> None:
    """The traffic runs over the borders, and the tool ends within an interval."""
    listener = listen(lab.server)
    with run_tool(*watch(lab.server, "-i", "0.1", "--time", "elapsed")) as tool:
        talks = []
        end = time.monotonic() + DEADLINE
        while len({row["time"] for row in tool.rows}) < 8:
            assert time.monotonic() < end
            talks.append(Talk(lab, listener))
            talks[-1].say(25)
            talks[-1].close()
    assert counts(lossless(tool)) == {talk.at_server: talk.samples for talk in talks}
    assert tool.done is not None
    for row in total(tool):
        parts = [part for part in tool.done.rows if part["rport"] == row["rport"] and not part["total"]]
        assert sum(part["count"] for part in parts) == row["count"]
        assert min(part["min_us"] for part in parts) == row["min_us"]
        assert max(part["max_us"] for part in parts) == row["max_us"]


@pytest.mark.parametrize("interval", [(), ("-i", "1000")])
def test_no_more_keys_than_asked_for(lab: Lab, run_tool: type[RunningTool], interval: tuple[str, ...]) -> None:
    listener = listen(lab.server)
    arguments = watch(lab.server, "--max-keys", "2", *interval)
    with run_tool(*arguments) as tool, run_tool(*arguments, "--strict") as strict:
        talks = [Talk(lab, listener) for _ in range(10)]
        for talk in talks:
            talk.say(5)
        for talk in talks:
            talk.close()
    for each, status in ((tool, 0), (strict, 5)):
        # Those that came first have all of their samples, the others none.
        assert counts(total(each)) == {talk.at_server: talk.samples for talk in talks[:2]}
        assert account(each)["lost"] == sum(talk.samples for talk in talks[2:])
        assert each.done is not None
        assert each.done.status == status


def test_each_interval_has_room_again(lab: Lab, run_tool: type[RunningTool]) -> None:
    listener = listen(lab.server)
    with run_tool(*watch(lab.server, "--max-keys", "1", "-i", "0.1")) as tool:
        talks = []
        for _ in range(4):
            talks.append(Talk(lab, listener))
            talks[-1].close()
            rport = talks[-1].at_server[3]
            tool.wait_for(lambda rows, rport=rport: sum(row["count"] for row in rows if row["rport"] == rport) == 2)
    assert counts(lossless(tool)) == {talk.at_server: 2 for talk in talks}
