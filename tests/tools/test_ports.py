"""`tcpscope ports` against a full dump of the sockets (sock_diag), and the calls of the application."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tcpscope.filters import Filter
from tcpscope.kernel.btf import Btf
from tcpscope.kernel.features import BTF
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Host, Lab
from tcpscope.ports import Owner, Pools
from tcpscope.schema import Layout
from tests.conftest import RunningTool
from tests.lacks import functions_cannot_be_hooked
from tests.played_again import seen
from tests.puppets import Puppet

Row = dict[str, Any]
Key = tuple[str, str, int]

CLOSING = ("FIN_WAIT1", "FIN_WAIT2", "CLOSE_WAIT", "LAST_ACK", "CLOSING")
NOT_SHOWN_AT_MOST = 5
"""Transitions in tasks for which a kernel runs no program (tests/record/unseen.py)."""

# Accepts connections on all `ports`. Closes each when its client sends "c" or ends its data, and resets it at "r".
SERVER = """
import selectors, threading
served = selectors.DefaultSelector()
def listen(port):
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", port))
    listener.listen(4096)
    listener.setblocking(False)
    served.register(listener, selectors.EVENT_READ, "listener")
def serve():
    while True:
        for key, _ in served.select():
            ready = key.fileobj
            if key.data == "listener":
                try:
                    connection, _ = ready.accept()
                except OSError:
                    continue
                served.register(connection, selectors.EVENT_READ, "connection")
                continue
            try:
                word = ready.recv(1)
            except OSError:
                word = b""
            if word == b"r":
                ready.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            served.unregister(ready)
            ready.close()
for port in ports:
    listen(port)
threading.Thread(target=serve, daemon=True).start()
"""

CLIENT = """
import errno, random
chance = random.Random(seed) if "seed" in globals() else random
open_ = []
def connect(family, address, port, near=None, early=False, reuse=False):
    made = socket.socket(family)
    if reuse:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if near is not None:
        if not early:
            made.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        made.bind(near)
    made.connect((address, port))
    return made
def close(made, how):
    if how == "reset":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif how in ("c", "r"):  # the server ends it first
        made.send(how.encode())
        try:
            made.recv(1)
        except OSError:
            pass
    elif how == "shutdown":
        made.shutdown(socket.SHUT_WR)
        made.recv(1)
    made.close()
def mix(number, ways, ports, most):
    for _ in range(number):
        if len(open_) < most and (not open_ or chance.random() < 0.5):
            family, address = chance.choice(ways)
            open_.append(connect(family, address, chance.choice(ports)))
        else:
            close(open_.pop(chance.randrange(len(open_))), chance.choice(("close", "reset", "c", "r", "shutdown")))
def fill(number, address, port, **options):
    for _ in range(number):
        open_.append(connect(socket.AF_INET, address, port, **options))
def drop(number, how="close"):
    for _ in range(number):
        close(open_.pop(), how)
def error_of(call):
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def rows_of(tool: RunningTool, host: Host) -> list[Row]:
    """The last snapshot of a host."""
    rows = tool.rows
    return last_of(rows, host.inode) if rows else []


def key_of(row: Row) -> Key:
    return row["laddr"], row["raddr"], row["rport"]


def dumped(host: Host, ports: list[int]) -> dict[Key, Counter[str]]:
    """Key -> state -> sockets, by a full dump."""
    found: dict[Key, Counter[str]] = {}
    for each in host.sockets():
        if each.rport in ports:
            laddr, raddr = (address.removeprefix("::ffff:") for address in (each.laddr, each.raddr))
            found.setdefault((laddr, raddr, each.rport), Counter())[each.state] += 1
    return found


def as_shown(states: Counter[str]) -> dict[str, int]:
    """What a row says. A timewait socket may be in FIN_WAIT2, which a dump does not tell from a full one."""
    return {
        "used": sum(states.values()),
        "syn_sent": states["SYN_SENT"],
        "established": states["ESTABLISHED"],
        "ending": states["TIME_WAIT"] + sum(states[name] for name in CLOSING),
    }


def of_row(row: Row) -> dict[str, int]:
    return {
        "used": row["used"] - row["bound"],
        "syn_sent": row["syn_sent"],
        "established": row["established"],
        "ending": row["time_wait"] + row["closing"],
    }


def agrees(tool: RunningTool, host: Host, ports: list[int]) -> bool:
    """Whether the last snapshot says what a full dump says, which is taken before it and after it."""
    seen = {key_of(row): of_row(row) for row in rows_of(tool, host) if row["raddr"]}
    now = {key: as_shown(states) for key, states in dumped(host, ports).items()}
    if seen.keys() != now.keys():
        return False
    most = NOT_SHOWN_AT_MOST if functions_cannot_be_hooked() else 0
    return sum(abs(seen[key][name] - now[key][name]) for key in now for name in now[key]) <= 2 * most


@pytest.mark.parametrize("number", [pytest.param(1500, marks=pytest.mark.kernel), 20_000])
def test_a_mix_of_opens_and_closes(lab: Lab, run_tool: type[RunningTool], number: int) -> None:
    """In random order, to several destinations, over both families and mapped: equal to a full dump at the end."""
    ports = [7001, 7002, 7003]
    server, client = Puppet(lab.server, "server"), Puppet(lab.client, "client")
    server.do(SERVER, ports=ports)
    client.do(CLIENT, seed=1)
    ways = [[2, lab.server.ipv4], [10, lab.server.ipv6], [10, f"::ffff:{lab.server.ipv4}"]]
    client.do("mix(200, ways, ports, 100)", ways=ways, ports=ports)  # older than the tool
    with run_tool("ports", "-i", "0.3", "--netns", f"{lab.client.inode},{lab.server.inode}") as tool:
        client.do("mix(number, ways, ports, 300)", number=number, ways=ways, ports=ports)
        tool.wait_for(lambda rows: agrees(tool, lab.client, ports))
        # Accepted connections take no port of their own.
        assert not any(row["raddr"] for row in rows_of(tool, lab.server))
        row = max(rows_of(tool, lab.client), key=lambda row: row["used"])
        assert row["time_wait"] > number // 200
        assert (row["comm"], row["pid"]) == ("client", client.pid)
        client.do("drop(len(open_), 'reset')")
        tool.wait_for(lambda rows: agrees(tool, lab.client, ports))
        tool.stop()
    assert tool.done is not None and tool.done.stats is not None
    assert tool.done.stats["table_full"] == 0


PORT = 7001
RANGE = (40_000, 40_099)


class Scene:
    """A client with a hundred local ports, a server that serves at three ports, and the tool."""

    def __init__(self, lab: Lab, run_tool: type[RunningTool], *options: str) -> None:
        self.lab = lab
        lab.client.sysctl("ip_local_port_range", f"{RANGE[0]} {RANGE[1] - 10}")
        lab.client.sysctl("tcp_tw_reuse", 0)
        self.server = Puppet(lab.server, "server")
        self.server.do(SERVER, ports=[PORT, PORT + 1, PORT + 2])
        self.client = self.puppet("client")
        self.other = self.puppet("other")  # every snapshot has a row for its one connection
        self.fill(1, self.other, PORT + 2)
        lab.client.sysctl("ip_local_port_range", f"{RANGE[0]} {RANGE[1]}")  # the last ten are free for a test to name
        self.tool = run_tool("ports", "-i", "0.2", "--netns", str(lab.client.inode), *options)

    def puppet(self, comm: str) -> Puppet:
        made = Puppet(self.lab.client, comm)
        made.do(CLIENT)
        return made

    def fill(self, number: int, puppet: Puppet | None = None, port: int = PORT, **options: Any) -> None:
        code = "fill(number, address, port, **options)"
        (puppet or self.client).do(code, number=number, address=self.lab.server.ipv4, port=port, options=options)

    def fails(self, code: str, **names: Any) -> str | None:
        """The errno of an expression that the client evaluates."""
        error: str | None = self.client.ask(f"error_of(lambda: {code})", address=self.lab.server.ipv4, **names)
        return error

    def until_gone(self, rport: int) -> None:
        """Until a snapshot has no row for connections to this port."""
        self.tool.wait_for(
            lambda rows: (shown := rows_of(self.tool, self.lab.client)) and all(row["rport"] != rport for row in shown)
        )

    def until(self, rport: int | None = PORT, laddr: str | None = None, **columns: Any) -> Row:
        """The row of a pool, as soon as a snapshot has these values in it."""

        def fits(rows: list[Row]) -> list[Row]:
            return [
                row
                for row in rows_of(self.tool, self.lab.client)
                if row["rport"] == rport
                and row["laddr"] == (laddr or self.lab.client.ipv4)
                and all(row[name] == value for name, value in columns.items())
            ]

        self.tool.wait_for(fits)
        found = fits(self.tool.rows)
        return found[0] if found else self.until(rport, laddr, **columns)


@pytest.mark.kernel
@seen
def test_a_range_is_filled(lab: Lab, run_tool: type[RunningTool]) -> None:
    """No word, warning, critical; and the calls that fail, with their owner."""
    scene = Scene(lab, run_tool, "--warn", "50%")
    with scene.tool as tool:
        scene.fill(40)
        row = scene.until(used=40)
        assert (row["level"], row["available"], row["percent"], row["bound"]) == (None, 100, 40.0, 0)
        assert (row["first_port"], row["last_port"], row["reserved"]) == (*RANGE, 0)
        assert (row["established"], row["held"], row["comm"], row["pid"]) == (40, 40, "client", scene.client.pid)
        assert "helps" not in tool.stderr and "help" not in tool.stderr
        scene.fill(11)
        assert scene.until(used=51)["level"] == "warning"
        scene.fill(49)
        assert scene.until(used=100)["level"] == "critical"
        late = scene.puppet("late")
        code = "error_of(lambda: connect(2, address, port))"
        assert late.ask(code, address=lab.server.ipv4, port=PORT) == "EADDRNOTAVAIL"
        tool.wait_for(lambda rows: sum(row["failed"] for row in rows) == 1)
        row = next(row for row in tool.rows if row["failed"])
        assert (row["errno"], row["failed_pid"], row["failed_comm"]) == ("EADDRNOTAVAIL", late.pid, "late")
        assert (row["used"], row["rport"], row["comm"]) == (100, PORT, "client")
        assert row["search_us"] > 0 and row["search_max_us"] >= int(row["search_us"])
        done = tool.stop()
    assert done.status == 6
    assert f"{lab.client.ipv4} to {lab.server.ipv4}:{PORT} had 100.0 % of its local ports in use" in done.stderr
    assert sum(row["opened"] for row in done.rows if row["rport"] == PORT) == 101
    assert max(row["opened_per_s"] or 0 for row in done.rows) > 0


@pytest.mark.kernel
@seen
def test_below_the_limit_of_warn_the_status_is_0(lab: Lab, run_tool: type[RunningTool]) -> None:
    scene = Scene(lab, run_tool)
    scene.fill(40)
    words = ("ports", "--netns", str(lab.client.inode))
    for percent, status in (("50%", 0), ("40", 6)):
        with run_tool(*words, "--warn", percent, ready=False) as tool:
            done = tool.wait()
        assert done.status == status
        assert [(row["used"], row["opened"], row["opened_per_s"]) for row in done.rows] == [
            (40, None, None),
            (1, None, None),
        ]
        assert [row["comm"] for row in done.rows] == ["client", "other"]


@pytest.mark.kernel
@seen
def test_time_wait_counts_until_it_ends(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Timewait sockets whose timer runs out, some that are used again, and the rest at the end of their process."""
    scene = Scene(lab, run_tool)
    lab.client.sysctl("tcp_fin_timeout", 2)
    silent = Puppet(lab.server, "silent")
    silent.do("listener = socket.create_server((address, port))", address=lab.server.ipv4, port=PORT + 7)
    with scene.tool:
        scene.fill(10, port=PORT + 7)
        scene.client.do("drop(10)")  # the server does not close: they wait in FIN_WAIT2, with a timer
        assert scene.until(PORT + 7, used=10, time_wait=10)["held"] == 10
        scene.until_gone(PORT + 7)
        scene.fill(30)
        scene.client.do("drop(30)")
        row = scene.until(used=30, time_wait=30)
        assert (row["established"], row["held"], row["comm"]) == (0, 30, "client")
        scene.fill(70)
        scene.until(used=100, time_wait=30)
        # One in TIME_WAIT may be used again when it is a second old: a slow fill() would already use those.
        lab.client.sysctl("tcp_tw_reuse", 1)
        scene.client.do(
            "deadline = time.monotonic() + 60\n"
            "for _ in range(5):\n"
            "    while error_of(lambda: fill(1, address, port)) and time.monotonic() < deadline: time.sleep(0.05)",
            address=lab.server.ipv4,
            port=PORT,
        )
        scene.until(used=100, time_wait=25, established=75)
        scene.tool.wait_for(lambda rows: agrees(scene.tool, lab.client, [PORT, PORT + 2]))


@pytest.mark.kernel
@seen
def test_reserved_ports_and_other_destinations(lab: Lab, run_tool: type[RunningTool]) -> None:
    """A reserved port is missing to all; each destination has the others of its own."""
    scene = Scene(lab, run_tool)
    lab.client.sysctl("ip_local_reserved_ports", "40000-40009,40050,50000")
    with scene.tool as tool:
        for port in (PORT, PORT + 1):
            scene.fill(60, port=port)
        for port in (PORT, PORT + 1):
            row = scene.until(port, used=60)
            assert (row["available"], row["reserved"], row["level"]) == (89, 11, "warning")
        scene.fill(29)
        assert scene.until(used=89)["level"] == "critical"
        assert scene.fails("connect(2, address, port)", port=PORT) == "EADDRNOTAVAIL"
        assert scene.fails("open_.append(connect(2, address, port))", port=PORT + 1) is None
        assert scene.until(PORT + 1, used=61)["percent"] == 68.5
        tool.wait_for(lambda rows: [(row["rport"], row["failed"]) for row in rows if row["failed"]] == [(PORT, 1)])


@pytest.mark.kernel
@seen
def test_bind_takes_ports_from_all_destinations(lab: Lab, run_tool: type[RunningTool]) -> None:
    """An early bind() to port 0; with IP_BIND_ADDRESS_NO_PORT connect() chooses, for each destination."""
    scene = Scene(lab, run_tool)
    lab.client.sysctl("ip_local_reserved_ports", "40097")
    near, far = {"near": [lab.client.ipv4, 0]}, {"address": lab.server.ipv4, "port": PORT}
    early = scene.puppet("early")
    early.do("near = tuple(near)", **near)
    scene.client.do("near = tuple(near)", **near)
    with scene.tool as tool:
        # A listener takes a port; two sockets at one port take one; a reserved one is missing already.
        early.do(
            "def bound(port, number=1, listens=False):\n"
            "    made = [socket.socket() for _ in range(number)]\n"
            "    for each in made:\n"
            "        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
            "        each.bind((near[0], port))\n"
            "        if listens: each.listen()\n"
            "    return made\n"
            "listener, pair, apart, = bound(40099, listens=True), bound(40098, 2), bound(40097)"
        )
        row = scene.until(None, used=1)
        assert (row["raddr"], row["bound"], row["held"], row["available"]) == (None, 1, 2, 99)
        early.do("for at, each in enumerate(pair): each.connect((address, port + at))", **far)
        scene.until(None, used=1, established=2)
        early.do("made = [socket.socket() for _ in range(30)]\nfor each in made: each.bind(near)")
        row = scene.until(None, used=31)
        assert (row["comm"], row["pid"], row["held"]) == ("early", early.pid, 32)
        early.do("for each in made[:10]: each.connect((address, port))", **far)
        scene.until(None, used=31, established=12)
        scene.client.do("fill(20, address, port, near=near)", **far)
        row = scene.until(used=52)
        assert (row["established"], row["bound"], row["held"], row["level"]) == (20, 32, 20, "warning")
        # bind() finds no port any more. It takes none of connect() either: 20, and one that may be among them.
        early.do(
            "def one_more():\n    made.append(socket.socket())\n    made[-1].bind(near)\n"
            "while not (found := error_of(one_more)): pass"
        )
        assert early.ask("found") == "EADDRINUSE"
        taken = early.ask("len(made)")  # the last one has no port, and the pair has one
        assert 99 - 20 - 1 - 1 <= taken <= 99 - 20 - 1
        scene.until(None, used=taken)
        tool.wait_for(lambda rows: any(row["failed"] for row in rows))
        row = next(row for row in tool.rows if row["failed"])
        assert (row["errno"], row["failed_comm"], row["raddr"], row["failed"]) == ("EADDRINUSE", "early", None, 1)
        # In TIME_WAIT the port is still one of those that bind() has taken; then all are given back.
        early.do("for each in made[:10]: close(each, 'close')")
        row = scene.until(None, time_wait=10)
        assert row["used"] == taken
        # connect() has looked for no port: bind() had taken it.
        assert all(row["search_us"] is None for row in tool.rows if row["raddr"] is None)
        early.do("for each in (*made[10:], *pair, *listener, *apart): close(each, 'reset')")
        scene.until(None, used=10, time_wait=10)
        scene.until(used=30, bound=10)


@pytest.mark.kernel
@seen
def test_older_sockets(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Of each kind, from before the tool: with owners, bound, without a process, in TIME_WAIT."""
    scene = Scene(lab, run_tool)
    scene.fill(5)
    scene.client.do("bound = socket.socket()\nbound.bind((near, 0))", near=lab.client.ipv4)
    scene.fill(3, port=PORT + 1)
    scene.client.do("drop(3)")
    with scene.tool:
        row = scene.until(used=6)
        assert (row["established"], row["bound"], row["comm"], row["held"]) == (5, 1, "client", 5)
        row = scene.until(PORT + 1, used=4)
        assert (row["time_wait"], row["bound"], row["comm"]) == (3, 1, None)
        assert scene.until(None)["used"] == 1
        scene.client.do("bound.close()")
        scene.until(used=5, bound=0)
        scene.client.do("drop(5, 'reset')")
        scene.until(PORT + 1, used=3)
        scene.until_gone(PORT)


@pytest.mark.kernel
@seen
def test_only_what_is_asked_for(lab: Lab, run_tool: type[RunningTool]) -> None:
    scene = Scene(lab, run_tool)
    second = scene.puppet("second")
    scene.fill(2)
    scene.fill(3, second, PORT + 1)
    words = ("ports", "--netns", str(lab.client.inode))
    for options, ports in (
        ((), {PORT, PORT + 1, PORT + 2}),
        (("--pid", str(second.pid)), {PORT + 1}),
        (("--comm", "client"), {PORT}),
        (("--rport", str(PORT)), {PORT}),
        (("--raddr", "192.0.2.77"), set()),
        (("-6",), set()),
    ):
        with run_tool(*words, *options, ready=False) as tool:
            done = tool.wait()
        assert {row["rport"] for row in done.rows} == ports, options
    for option in ("--lport", "--port"):
        with run_tool("ports", option, "80", ready=False) as tool:
            assert tool.wait().status == 2
    with run_tool("ports", "--warn", "much", ready=False) as tool:
        assert tool.wait().status == 2


@pytest.mark.kernel
@seen
def test_a_full_table_of_timewait_sockets(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Of those that the kernel does not make (tcp_max_tw_buckets) the port is free at once."""
    scene = Scene(lab, run_tool)
    lab.client.sysctl("tcp_max_tw_buckets", 5)
    with scene.tool as tool:
        scene.fill(20)
        scene.client.do("drop(20)")
        scene.until(used=5, time_wait=5)
        tool.wait_for(lambda rows: agrees(tool, lab.client, [PORT, PORT + 2]))
        done = tool.stop()
    assert done.stats is not None
    assert (done.stats["lost"], done.stats["table_full"]) == (0, 0)


@pytest.mark.kernel
@seen
def test_the_end_of_a_namespace(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Its timewait sockets end with it."""
    here = Scene(lab, run_tool)
    with run_tool("ports", "-i", "0.2") as tool:
        with Lab() as other:
            there = Scene(other, run_tool)
            there.fill(20)
            there.client.do("drop(20)")
            there.other.do("drop(1, 'reset')")  # a socket that still sends its FIN would hold the namespace
            inode = other.client.inode
            tool.wait_for(lambda rows: [row for row in rows_of(tool, other.client) if row["time_wait"] == 20])
        tool.wait_for(lambda rows: rows_of(tool, lab.client) and not last_of(rows, inode))
    assert here.other.pid


def last_of(rows: list[Row], inode: int) -> list[Row]:
    """The last snapshot of a namespace."""
    last = max(row["time"] for row in rows)
    return [row for row in rows if row["time"] == last and row["netns"] == inode]


@pytest.mark.kernel
@seen
def test_a_range_of_the_sockets_own(lab: Lab, run_tool: type[RunningTool]) -> None:
    """IP_LOCAL_PORT_RANGE narrows that of the namespace, where the kernel has the option."""
    scene = Scene(lab, run_tool)
    lab.client.sysctl("ip_local_reserved_ports", "40012")
    if not can_narrow(scene):
        return
    with scene.tool:
        scene.client.do("for _ in range(4): narrow(address, port)", address=lab.server.ipv4, port=PORT)
        row = scene.until(used=5)
        assert (row["first_port"], row["last_port"], row["reserved"], row["available"]) == (40_010, 40_019, 1, 9)
        assert row["level"] == "warning"
        # A port that bind() has taken may lie outside of these.
        scene.client.do("bound = socket.socket()\nbound.bind((near, 0))", near=lab.client.ipv4)
        row = scene.until(used=6)
        assert (row["available"], row["percent"], row["level"]) == (9, None, None)


@pytest.mark.kernel
@seen
def test_sockets_with_several_ranges(lab: Lab, run_tool: type[RunningTool]) -> None:
    """The share of such a row is not known: most of its ports may lie outside of the range of one socket."""
    scene = Scene(lab, run_tool, "--warn", "50%")
    lab.client.sysctl("ip_local_port_range", "40000 40999")
    with scene.tool as tool:
        scene.client.do(
            "kept = [socket.socket() for _ in range(40)]\nfor each in kept: each.bind((near, 0))", near=lab.client.ipv4
        )
        scene.fill(20)
        row = scene.until(used=60)
        assert (row["available"], row["percent"], row["bound"]) == (1000, 6.0, 40)
        if not can_narrow(scene):
            return
        row = scene.until(used=61)
        assert (row["available"], row["percent"], row["level"], row["first_port"]) == (None, None, None, None)
        assert scene.until(PORT + 2, used=41)["available"] == 1000
        done = tool.stop()
    assert done.status == 0
    assert not any(row["level"] for row in done.rows)


def can_narrow(scene: Scene) -> bool:
    """Makes a connection from one of ten ports, where the kernel has IP_LOCAL_PORT_RANGE."""
    scene.client.do(
        "def narrow(address, port):\n"
        "    made = socket.socket()\n"
        "    made.setsockopt(socket.IPPROTO_IP, 51, struct.pack('I', 40010 | 40019 << 16))\n"
        "    made.connect((address, port))\n"
        "    open_.append(made)"
    )
    error = scene.fails("narrow(address, port)", port=PORT)
    assert (error == "ENOPROTOOPT") == (Btf.parse(BTF.read_bytes()).field("inet_sock", "local_port_range") is None)
    return error is None


class Tables:
    """The maps of the probe, in the memory of the test. It takes the place of a session and of its `loaded`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spec, self.loaded = Spec.of("ports"), self
        self.maps: dict[str, dict[bytes, bytes]] = {"pool_places": {}, "holder_places": {}, "reserved": {}}
        self.arrays: dict[str, memoryview] = {}
        self.when_removed: Callable[[str], None] = lambda name: None
        monkeypatch.setattr("tcpscope.ports.opened", lambda *args: [])
        monkeypatch.setattr("tcpscope.ports.wait_for_programs", lambda: None)

    def memory(self, name: str) -> memoryview:
        return memoryview(bytearray(4))

    def values(self, name: str, size: int) -> memoryview:
        return self.arrays.setdefault(name, memoryview(bytearray(size)))

    def entries(self, name: str, key: int, value: Layout) -> list[tuple[bytes, Any]]:
        return [(each, value.decoder(raw=True).rows(found)[0]) for each, found in self.maps[name].items()]

    def value(self, name: str, key: bytes, size: int) -> bytes | None:
        return self.maps[name].get(key)

    def insert(self, name: str, key: bytes, value: bytes) -> bool:
        return self.maps[name].setdefault(key, value) is value

    def remove(self, name: str, key: bytes) -> None:
        self.maps[name].pop(key, None)
        self.when_removed(name)

    def push(self, name: str, value: bytes) -> None:
        pass

    def iterate(self, hook: str) -> list[bytes]:
        return []

    def seed_counts(self, counts: bool) -> None:
        pass

    def walk_alone(self) -> None:
        pass

    def write(self, name: str, layout: str, place: int, **fields: int | bytes) -> None:
        """Set fields of a struct."""
        struct_ = self.spec.layout(layout, internal=True)
        for field, value in fields.items():
            at, size = (place - 1) * struct_.size + struct_.field(field).offset, struct_.field(field).size
            data = value if isinstance(value, bytes) else value.to_bytes(size, "little")
            self.arrays[name][at : at + len(data)] = data

    def pool(self, place: int, established: int) -> None:
        self.maps["pool_places"].setdefault(b"key", place.to_bytes(4, "little"))
        self.write("pools", "pool", place, kind=3, family=4, netns=1, sockets=struct.pack("<2i", 0, established))


def test_two_places_with_one_key_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program adds to a place that it found before its key was removed, another one makes a new place."""
    tables = Tables(monkeypatch)
    pools = Pools(tables, Filter(), [])  # type: ignore[arg-type]
    tables.pool(1, established=0)

    def others(name: str) -> None:
        if name == "pool_places":
            tables.pool(1, established=3)
            tables.maps["pool_places"].clear()
            tables.pool(2, established=4)

    tables.when_removed = others
    assert pools.look() == []
    tables.when_removed = lambda name: None
    assert [(pool.used, pool.established) for pool in pools.look()] == [(7, 7)]
    tables.pool(1, established=0)
    assert [pool.used for pool in pools.look()] == [4]
    assert [pool.used for pool in pools.look()] == [4]


def test_a_place_that_is_used_again_keeps_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes it after it was judged idle, and before its key would be removed."""
    tables = Tables(monkeypatch)
    pools = Pools(tables, Filter(), [])  # type: ignore[arg-type]
    tables.pool(1, established=0)
    removed = []

    def other(name: str) -> None:
        removed.append(name)
        tables.pool(1, established=1)

    tables.when_removed = other  # the reserved ports go first
    assert pools.look() == []
    assert removed == ["reserved"]
    assert [pool.used for pool in pools.look()] == [1]


def test_an_unknown_process_whose_calls_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Tables(monkeypatch)
    pools = Pools(tables, Filter(), [])  # type: ignore[arg-type]
    tables.pool(1, established=1)
    tables.maps["holder_places"][b"holder"] = (1).to_bytes(4, "little")
    tables.write("holders", "pool_holder", 1, pool=1, ports=1, failed_connects=struct.pack("<2Q", 5, 0))
    (pool,) = pools.look()
    assert pool.failures == {"EADDRNOTAVAIL": 5}
    assert (pool.owner, pool.failing) == (None, Owner(None, None, None, 5))


def test_only_those_near_their_end_and_those_whose_calls_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Tables(monkeypatch)
    pools = Pools(tables, Filter(), [])  # type: ignore[arg-type]
    places = {b"namespace": 1, b"near": 2, b"far": 3, b"fails": 4, b"narrow": 5}
    tables.maps["pool_places"] = {key: place.to_bytes(4, "little") for key, place in places.items()}
    tables.maps["reserved"][(1).to_bytes(4, "little")] = bytes(65536 // 8)
    tables.write("pools", "pool", 1, kind=1, netns=1, range=1099 << 16 | 1000, checked_ns=1)
    for place, established in ((2, 50), (3, 49), (4, 1), (5, 1)):
        sockets = struct.pack("<2i", 0, established)
        spans = struct.pack("<Q", 7)
        tables.write("pools", "pool", place, kind=3, family=4, netns=1, rport=place, sockets=sockets, spans=spans)
    tables.write("pools", "pool", 5, own=1000 << 16 | 1000)
    tables.maps["holder_places"][b"holder"] = (1).to_bytes(4, "little")
    tables.write("holders", "pool_holder", 1, pool=4, ports=1, failed_connects=struct.pack("<2Q", 5, 0))
    assert [(pool.rport, pool.share) for pool in pools.look(least=0.5)] == [(5, 1.0), (2, 0.5), (4, 0.01)]
    tables.write("pools", "pool", 3, sockets=struct.pack("<2i", 0, 60))
    near = pools.look(least=0.5)[1]
    assert (near.rport, near.used, near.used_first) == (3, 60, 49)
    pools.look()
    assert [(pool.rport, pool.opened) for pool in pools.look()] == [(5, 0), (3, 0), (2, 0), (4, 0)]


def test_the_namespace_of_a_pool_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program has made the place of the pool, and not yet that of its namespace. So its range is not known."""
    tables = Tables(monkeypatch)
    pools = Pools(tables, Filter(), [])  # type: ignore[arg-type]
    tables.pool(1, established=1)
    assert pools.look(least=0.5) == []
    (pool,) = pools.look()
    assert (pool.used, pool.used_first, pool.range, pool.share) == (1, 1, None, None)
