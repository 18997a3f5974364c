"""`list` against `ss -tanpe` in a network namespace of its own, with two thousand sockets in every state.

The sockets belong to puppets. On kernels that give a cookie only to whoever asks for it, ss is asked first.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tcpscope.lab.hosts import Host, Lab
from tcpscope.lab.packets import raw_socket, syn
from tests.conftest import DEADLINE, RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

PAIRS = 1000
MANY, STATES, MAPPED, SIX, WAITING, REQUESTS = range(7000, 7006)
NOBODY = "198.51.100.0/24"
IPPROTO_MPTCP = 262
SS_STATES = {
    "ESTAB": "ESTABLISHED",
    "SYN-SENT": "SYN_SENT",
    "SYN-RECV": "SYN_RECV",
    "FIN-WAIT-1": "FIN_WAIT1",
    "FIN-WAIT-2": "FIN_WAIT2",
    "TIME-WAIT": "TIME_WAIT",
    "UNCONN": "CLOSE",
    "CLOSE-WAIT": "CLOSE_WAIT",
    "LAST-ACK": "LAST_ACK",
    "LISTEN": "LISTEN",
    "CLOSING": "CLOSING",
}

Rows = list[dict[str, Any]]


class Shown(NamedTuple):
    """What both ss and `list` say of a socket."""

    state: str
    recv_q: int
    send_q: int
    local: tuple[str, int]
    remote: tuple[str, int]
    cookie: int
    holders: tuple[tuple[int, str, int], ...]


def ss(host: Host) -> dict[int, Shown]:
    """`ss -tanpe` by cookie."""
    child = host.spawn(["ss", "-HtanpeO"], stdout=subprocess.PIPE, text=True)
    found = {}
    for line in child.communicate(timeout=DEADLINE)[0].splitlines():
        state, recv_q, send_q, local, remote, *rest = line.split()
        details = " ".join(rest)
        cookie = int(re.search(r"sk:([0-9a-f]+)", details)[1], 16)  # type: ignore[index]
        holders = re.findall(r'\("([^"]*)",pid=(\d+),fd=(\d+)\)', details)
        found[cookie] = Shown(
            SS_STATES[state],
            int(recv_q),
            int(send_q),
            end(local),
            end(remote),
            cookie,
            tuple(sorted((int(pid), comm, int(fd)) for comm, pid, fd in holders)),
        )
    return found


def end(text: str) -> tuple[str, int]:
    """Address and port as ss writes them; nothing is ("", 0)."""
    address, _, port = text.rpartition(":")
    address = address.strip("[]").partition("%")[0].removeprefix("::ffff:")
    return ("" if port == "*" else address, 0 if port == "*" else int(port))


def shown(row: dict[str, Any]) -> Shown:
    # ss writes the address of a dual-stack listener as "*".
    dual = row["family"] == 6 and row["laddr"] == "::" and row["state"] == "LISTEN"
    return Shown(
        row["state"],
        row["accept_queue"] if row["state"] == "LISTEN" else row["rx_queue_bytes"],
        row["accept_limit"] if row["state"] == "LISTEN" else row["tx_queue_bytes"],
        ("*" if dual else row["laddr"], row["lport"]),
        (row["raddr"] or "", row["rport"] or 0),
        row["cookie"],
        tuple(sorted((held["pid"], held["comm"], held["fd"]) for held in row["holders"])),
    )


class Site(NamedTuple):
    host: Host
    other: Host
    alice: Puppet
    bob: Puppet
    child: int


CONNECT_MANY = """
lowest, far = [], []
for _ in range(number):
    s = socket.create_connection((address, port))
    lowest.append(s)
    far.append(listener.accept()[0])
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab:
        host, other = lab.server, lab.client
        host.sysctl("tcp_syncookies", 0)
        # Emulated kernels are slow: nothing may end by itself meanwhile.
        for name in ("tcp_orphan_retries", "tcp_synack_retries", "tcp_syn_retries"):
            host.sysctl(name, 15)
        host.sysctl("tcp_fin_timeout", 600)
        alice, bob = Puppet(host, "alice"), Puppet(host, "bob")
        # All of alice's: two thousand established sockets, both ends in one host.
        alice.do("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))")
        alice.do("listener = socket.create_server((address, port), backlog=128)", address=host.ipv4, port=MANY)
        alice.do(CONNECT_MANY, number=PAIRS, address=host.ipv4, port=MANY)
        # Bob's: one in each state, toward the other host.
        ports = {"states": STATES, "mapped": MAPPED, "other_six": SIX, "waiting": WAITING}
        bob.do(STATES_OF_BOB, four=host.ipv4, six=host.ipv6, **ports)
        child = bob.ask("child")
        far = Puppet(other, "far")
        far.do(FAR, address=host.ipv4, six=host.ipv6, **ports)
        # The queue is in the order of the last packets of the handshakes.
        bob.do("kept = sorted((states_listener.accept()[0] for _ in range(8)),\n"
               "              key=lambda child: far.index(child.getpeername()[1]))",
               far=far.ask("[end.getsockname()[1] for end in ends]"))  # fmt: skip
        # FIN_WAIT2 with an owner and without, CLOSE_WAIT, TIME_WAIT.
        bob.do("shut = kept[0]; shut.shutdown(socket.SHUT_WR)")
        bob.do("kept[1].close()")
        far.do("ends[2].close()")
        far.do("ends[3].close(); ends[4].recv(0)")
        bob.do("kept[3].recv(1); kept[3].close()")  # close second: LAST_ACK, gone
        bob.do("kept[4].close()")
        far.do("ends[4].recv(1); ends[4].close()")  # bob closed first: TIME_WAIT
        bob.do("to_far = v6.accept(); unread = mapped_listener.accept()[0]")
        far.do("to_mapped.sendall(b'x' * 1234)")
        # Half open: requests of peers that never answer.
        bob.do("half = socket.create_server((four, port), backlog=64)", port=REQUESTS)
        other.blackhole(NOBODY)
        with other.run(raw_socket, socket.AF_INET) as raw:
            for number in range(1, 6):
                packet = syn(f"198.51.100.{number}", 10_000, host.ipv4, REQUESTS, 1_000_000)
                raw.sendto(packet, (host.ipv4, 0))
        # A FIN alone is acknowledged by a timer, and all acknowledgements must be here before none comes any more.
        for state, number in (("FIN_WAIT2", 2), ("CLOSE_WAIT", 2), ("TIME_WAIT", 1), ("SYN_RECV", 5)):
            has(host, state, number)
        until(lambda: not any(found.state in ("LAST_ACK", "FIN_WAIT1") for found in host.sockets()), "the last ones")
        until(lambda: Path(f"/proc/{child}/comm").read_text() == "bobs child\n", "the child's name")
        # Nothing comes back any more: FIN_WAIT1 with an owner and without, LAST_ACK.
        far.do("ends[7].close()")
        bob.do("kept[7].recv(1)")
        other.hold()
        bob.do("kept[5].shutdown(socket.SHUT_WR); kept[6].close(); kept[7].close()")
        bob.do("lost = socket.socket(); lost.setblocking(False); lost.connect_ex(('198.51.100.77', 9))")
        has(host, "FIN_WAIT1", 2)
        has(host, "LAST_ACK", 1)
        has(host, "SYN_SENT", 1)
        yield Site(host, other, alice, bob, child)
        os.kill(child, signal.SIGKILL)


def has(host: Host, state: str, number: int) -> None:
    """Wait until so many of its sockets are in that state."""
    until(lambda: sum(found.state == state for found in host.sockets()) >= number, f"{number} x {state}")


STATES_OF_BOB = """
states_listener = socket.create_server((four, states), backlog=16)
mapped_listener = socket.create_server(("::", mapped), family=socket.AF_INET6, dualstack_ipv6=True, backlog=7)
v6 = socket.create_server((six, other_six), family=socket.AF_INET6, backlog=8)
queue = socket.create_server((four, waiting), backlog=3)
child = os.fork()
if not child:
    open("/proc/self/comm", "w").write("bobs child")
    time.sleep(100000)
"""
FAR = """
ends = [socket.create_connection((address, states)) for _ in range(8)]
to_mapped = socket.create_connection((address, mapped))
to_six = socket.create_connection((six, other_six))
waits = [socket.create_connection((address, waiting)) for _ in range(3)]
waits[0].sendall(b"x" * 10)
waits[1].close()
"""


def make_time_wait(site: Site) -> None:
    """It lasts a minute, whatever is set."""
    site.alice.do("s = socket.create_connection(listener.getsockname()); t = listener.accept()[0]\n"
                  "sport = s.getsockname()[1]; s.close(); t.recv(1); t.close()")  # fmt: skip
    sport = site.alice.ask("sport")
    until(
        lambda: [found.state for found in site.host.sockets() if sport in (found.lport, found.rport)] == ["TIME_WAIT"],
        "TIME_WAIT",
    )


def listed(site: Site, *arguments: str) -> Rows:
    with RunningTool("list", "--netns", str(site.host.inode), *arguments) as tool:
        done = tool.wait()
    assert done.status == 0
    return done.rows


def settled(site: Site, *arguments: str) -> tuple[dict[int, Shown], Rows]:
    """What ss and `list` say, while nothing changed between two looks of ss."""
    for _ in range(5):
        before = ss(site.host)
        rows = listed(site, *arguments)
        if before == (after := ss(site.host)):
            return after, rows
    pytest.fail("the sockets do not come to rest")


def test_all_sockets_as_ss_shows_them(site: Site) -> None:
    make_time_wait(site)
    expected, rows = settled(site)
    assert len(expected) > 2 * PAIRS
    assert len(rows) == len({row["cookie"] for row in rows})  # each once
    found = {row["cookie"]: shown(row) for row in rows}
    cookies = expected.keys() | found.keys()
    assert [(expected.get(c), found.get(c)) for c in cookies if expected.get(c) != found.get(c)] == []
    assert {row["netns"] for row in rows} == {site.host.inode}


def test_the_states_are_all_there(site: Site) -> None:
    make_time_wait(site)
    rows = listed(site)
    states = Counter(row["state"] for row in rows)
    assert states["SYN_RECV"] == 5
    assert states["SYN_SENT"] == 1 <= states["TIME_WAIT"]
    assert states["FIN_WAIT1"] == states["FIN_WAIT2"] == 2
    assert states["LAST_ACK"] == 1
    assert states["LISTEN"] == 6
    assert states["ESTABLISHED"] > 2 * PAIRS
    owned = Counter(row["state"] for row in rows if row["holders"])
    assert owned["SYN_RECV"] == owned["TIME_WAIT"] == owned["LAST_ACK"] == 0
    assert owned["FIN_WAIT1"] == owned["FIN_WAIT2"] == 1  # the other ones were closed


def test_queues(site: Site) -> None:
    rows = listed(site, "-L", f"{MAPPED},{WAITING}")
    (listener,) = (row for row in rows if (row["lport"], row["state"]) == (WAITING, "LISTEN"))
    assert (listener["accept_queue"], listener["accept_limit"]) == (3, 3)
    assert listener["rx_queue_bytes"] is listener["tx_queue_bytes"] is None
    assert all(row["accept_queue"] is row["accept_limit"] is None for row in rows if row["state"] != "LISTEN")
    waiting = [row for row in rows if row["lport"] == WAITING and row["state"] != "LISTEN"]
    assert sorted((row["state"], row["rx_queue_bytes"]) for row in waiting) == [
        ("CLOSE_WAIT", 1),
        ("ESTABLISHED", 0),
        ("ESTABLISHED", 10),
    ]
    assert [row["holders"] for row in waiting] == [[], [], []]  # nobody has accepted them
    (unread,) = (row for row in rows if (row["lport"], row["state"]) == (MAPPED, "ESTABLISHED"))
    assert (unread["rx_queue_bytes"], unread["family"], unread["raddr"]) == (1234, 4, site.other.ipv4)


def test_every_holder(site: Site) -> None:
    (listener,) = (row for row in listed(site, "-L", str(WAITING)) if row["state"] == "LISTEN")
    fd = site.bob.ask("queue.fileno()")
    assert [(held["pid"], held["comm"], held["fd"]) for held in listener["holders"]] == sorted(
        [(site.bob.pid, "bob", fd), (site.child, "bobs child", fd)]
    )
    assert (listener["pid"], listener["comm"]) == min([(site.bob.pid, "bob"), (site.child, "bobs child")])
    assert {held["uid"] for held in listener["holders"]} == {os.getuid()}


def test_cookies_are_those_of_the_sockets(site: Site) -> None:
    ss(site.host)
    cookie = struct.unpack("Q", bytes(site.bob.ask("list(queue.getsockopt(socket.SOL_SOCKET, 57, 8))")))[0]
    (listener,) = (row for row in listed(site, "-L", str(WAITING)) if row["state"] == "LISTEN")
    assert listener["cookie"] == cookie


def test_filters(site: Site) -> None:
    asked = {
        "everything": [],
        "pid": ["-p", str(site.child)],
        "port": ["-L", f"{SIX}-{WAITING}"],
        "family": ["-6"],
        "nobody": ["--raddr", NOBODY],
        "comm": ["--comm", "alice", "-R", str(MANY)],
    }
    with ExitStack() as stack:
        netns = ("--netns", str(site.host.inode))
        tools = {
            name: stack.enter_context(RunningTool("list", *netns, *words, ready=False)) for name, words in asked.items()
        }
        found = {name: tool.wait().rows for name, tool in tools.items()}
    assert {row["lport"] for row in found["pid"]} == {STATES, MAPPED, SIX, WAITING}
    assert all(len(row["holders"]) == 2 for row in found["pid"])  # one holder is asked for, all are shown
    assert by_cookie(found["port"]) == by_cookie(row for row in found["everything"] if row["lport"] in (SIX, WAITING))
    assert by_cookie(found["family"]) == by_cookie(row for row in found["everything"] if row["family"] == 6)
    assert {row["lport"] for row in found["family"] if row["state"] == "ESTABLISHED"} == {SIX}
    assert Counter(row["state"] for row in found["nobody"]) == {"SYN_RECV": 5, "SYN_SENT": 1}
    assert len(found["comm"]) == PAIRS
    with RunningTool("list", "--netns", str(site.other.inode)) as tool:
        assert {row["netns"] for row in tool.wait().rows} == {site.other.inode}


def by_cookie(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {row["cookie"]: row for row in rows}


def test_mptcp(site: Site) -> None:
    """An MPTCP socket holds a TCP socket, which ss shows as the process's."""
    try:
        listener = site.other.socket(socket.AF_INET, protocol=IPPROTO_MPTCP)
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    listener.bind(("0.0.0.0", 7100))
    listener.listen(4)
    with RunningTool("list", "--netns", str(site.other.inode), "-L", "7100") as tool:
        (row,) = tool.wait().rows
    (expected,) = (found for found in ss(site.other).values() if found.local[1] == 7100)
    assert [held["pid"] for held in row["holders"]] == [os.getpid()]
    assert (row["state"], row["accept_limit"]) == (expected.state, expected.send_q) == ("LISTEN", 4)
