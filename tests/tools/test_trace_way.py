"""`trace` behind routers, NAT, bridges and tunnels: a packet keeps its number, whatever happens to its headers."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.namespaces import Namespace
from tests.lacks import built_without
from tests.played_again import seen_in
from tests.tools.test_trace import covered

pytestmark = pytest.mark.root

PORT, OUTSIDE = 6991, 6992
CLIENT, SERVER = "198.51.100.2", "203.0.113.2"
OUT = ("QUEUE", "START_XMIT", "XMIT")
DEVICES = (*OUT, "RECEIVE")
SIZES = (1, 700, 1400, 20_000, 60_000)
CONNECTIONS = 4
TIMEOUT = 10  # seconds for each call of a socket: a fault ends the test
ATTEMPTS = 5  # a kernel may run no program in some tasks; then the devices have counted more than there are rows
Rows = list[dict[str, Any]]
_numbers = count()


class Way:
    """A client, a middle and a server, in namespaces of their own, joined by pairs of veth: `c`-`to_c`, `to_s`-`s`."""

    def __init__(self, held: ExitStack) -> None:
        number = next(_numbers)
        self.client, self.middle, self.server = self.all = tuple(
            held.enter_context(_closing(Namespace(f"way{number}-{role}"))) for role in ("client", "middle", "server")
        )
        self.names = {self.client.inode: "client", self.middle.inode: "middle", self.server.inode: "server"}
        for end, name in ((self.client, "c"), (self.server, "s")):
            self.run(
                self.middle,
                f"ip link add to_{name} numtxqueues 2 type veth peer name {name} numtxqueues 2 netns {end.name}",
            )
            held.callback(self.run, self.middle, f"ip link del to_{name}")
        self.devices = [(self.client, "c"), (self.middle, "to_c"), (self.middle, "to_s"), (self.server, "s")]
        for space, device in (*self.devices, (self.client, "lo"), (self.server, "lo")):
            self.up(space, device)

    @staticmethod
    def run(space: Namespace, script: str) -> str:
        command = ["ip", "netns", "exec", space.name, "sh", "-ec", script]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def up(self, space: Namespace, device: str) -> None:
        """Without IPv6, which would send packets by itself."""
        self.run(space, f"sysctl -qw net.ipv6.conf.{device}.disable_ipv6=1; ip link set {device} up")

    def neighbour(self, space: Namespace, device: str, address: str, there: Namespace, its: str) -> None:
        """Known for good: ARP would be packets, too."""
        link = self.run(there, f"cat /sys/class/net/{its}/address").strip()
        self.run(space, f"ip neigh replace {address} lladdr {link} dev {device} nud permanent")

    def routed(self) -> None:
        """The middle is a router."""
        for end, name, address, router in (
            (self.client, "c", CLIENT, f"{CLIENT}54"),
            (self.server, "s", SERVER, f"{SERVER}54"),
        ):
            self.run(self.middle, f"ip addr add {router}/24 dev to_{name}; sysctl -qw net.ipv4.ip_forward=1")
            self.run(end, f"ip addr add {address}/24 dev {name}; ip route add default via {router}")
            self.neighbour(end, name, router, self.middle, f"to_{name}")
            self.neighbour(self.middle, f"to_{name}", address, end, name)

    def bridged(self) -> None:
        """The middle is a bridge, and both ends are in one network."""
        self.run(
            self.middle,
            "ip link add br0 type bridge mcast_snooping 0; ip link set to_c master br0; ip link set to_s master br0",
        )
        self.up(self.middle, "br0")
        self.run(self.client, f"ip addr add {CLIENT}/24 dev c; ip route add {SERVER} dev c")
        self.run(self.server, f"ip addr add {SERVER}/24 dev s; ip route add {CLIENT} dev s")
        self.neighbour(self.client, "c", SERVER, self.server, "s")
        self.neighbour(self.server, "s", CLIENT, self.client, "c")

    def tunnel(self, kind: str) -> None:
        """Between the ends, through the router."""
        self.routed()
        for end, here, there, number in ((self.client, CLIENT, SERVER, 1), (self.server, SERVER, CLIENT, 2)):
            kind_of = f"type {kind} local {here} remote {there}" + (" id 7 dstport 4789" if kind == "vxlan" else "")
            self.run(end, f"ip link add t0 {kind_of}")
            self.up(end, "t0")
            self.run(end, f"ip addr add 192.0.2.{number}/24 dev t0; ip link set t0 mtu 1400")
        if kind == "vxlan":
            self.neighbour(self.client, "t0", "192.0.2.2", self.server, "t0")
            self.neighbour(self.server, "t0", "192.0.2.1", self.client, "t0")

    def tunnel_in_ipv6(self) -> None:
        """A VXLAN of IPv4 between the ends, whose own packets are IPv6."""
        self.run(self.middle, "sysctl -qw net.ipv6.conf.all.forwarding=1")
        for space, device, address in (
            (self.client, "c", "2001:db8:1::2"),
            (self.middle, "to_c", "2001:db8:1::1"),
            (self.middle, "to_s", "2001:db8:2::1"),
            (self.server, "s", "2001:db8:2::2"),
        ):
            self.run(space, f"sysctl -qw net.ipv6.conf.{device}.disable_ipv6=0")
            self.run(space, f"ip addr add {address}/64 dev {device} nodad")
        for end, here, there, number in ((self.client, 1, 2, 1), (self.server, 2, 1, 2)):
            self.run(end, f"ip route add default via 2001:db8:{here}::1")
            ends = f"local 2001:db8:{here}::2 remote 2001:db8:{there}::2"
            self.run(end, f"ip link add t0 type vxlan id 7 dstport 4789 {ends}")
            self.up(end, "t0")
            self.run(end, f"ip addr add 192.0.2.{number}/24 dev t0; ip link set t0 mtu 1400")
        self.neighbour(self.client, "t0", "192.0.2.2", self.server, "t0")
        self.neighbour(self.server, "t0", "192.0.2.1", self.client, "t0")

    def nat(self, space: Namespace, *rules: str) -> None:
        """Rules such as `postrouting meta l4proto tcp masquerade`."""
        lines = ["add table ip way"]
        for chain, priority in (("prerouting", -100), ("output", -100), ("postrouting", 100)):
            lines.append(f"add chain ip way {chain} {{ type nat hook {chain} priority {priority} ; }}")
        lines += [f"add rule ip way {rule}" for rule in rules]
        self.run(space, "nft -f - <<END\n" + "\n".join(lines) + "\nEND")

    def only(self, *spaces: Namespace) -> list[str]:
        """The option that leaves out all else that the host does: other runs of these tests, too."""
        return ["--netns", ",".join(str(space.inode) for space in spaces or self.all)]

    def counted(self) -> dict[tuple[int, str, str], int]:
        """What the devices have counted: XMIT and RECEIVE of each."""
        return {
            (space.inode, device, hop): int(
                self.run(space, f"cat /sys/class/net/{device}/statistics/{counter}_packets")
            )
            for space, device in self.devices
            for hop, counter in (("XMIT", "tx"), ("RECEIVE", "rx"))
        }


@contextmanager
def _closing(space: Namespace) -> Iterator[Namespace]:
    try:
        yield space
    finally:
        space.close()


@contextmanager
def another() -> Iterator[Way]:
    with ExitStack() as held:
        yield Way(held)


@pytest.fixture
def way() -> Iterator[Way]:
    with another() as made:
        yield made


seen = seen_in("way", another)
"""What a timer gives out, as that of a queue discipline, is handled in the task that it interrupts."""


def talk(way: Way, address: str, port: int, *, at: str = SERVER, sizes: tuple[int, ...] = SIZES) -> list[int]:
    """Some connections at a time, each of which sends these sizes and gets them back. Returns the clients' ports."""
    with ExitStack() as held:

        def limited(one: socket.socket) -> socket.socket:
            one.settimeout(TIMEOUT)
            return held.enter_context(one)

        listener = limited(way.server.run(socket.socket))
        listener.bind((at, PORT))
        listener.listen()
        clients = [limited(way.client.run(socket.socket)) for _ in range(CONNECTIONS)]
        for client in clients:
            client.connect((address, port))
        ends = [limited(listener.accept()[0]) for _ in clients]
        ports = [client.getsockname()[1] for client in clients]

        def echo(end: socket.socket) -> None:
            while data := end.recv(1 << 16):
                end.sendall(data)
            end.shutdown(socket.SHUT_WR)

        def ask(client: socket.socket) -> None:
            for size in sizes:
                client.sendall(os.urandom(size))
                while size:
                    got = len(client.recv(size))
                    assert got, f"the server closed with {size} bytes to come"
                    size -= got
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""

        with ThreadPoolExecutor(2 * CONNECTIONS) as pool:
            calls = [pool.submit(ask, client) for client in clients] + [pool.submit(echo, end) for end in ends]
        for call in calls:
            call.result()
    return ports


def by_number(rows: Rows) -> dict[int, Rows]:
    found: dict[int, Rows] = defaultdict(list)
    for row in rows:
        found[row["packet"]].append(row)
    return found


def way_of(text: str) -> list[tuple[str, ...]]:
    """Host, hop and device of a packet. `c:c`: OUT at device c of the client; `s:>s`: RECEIVE at the server."""
    found: list[tuple[str, ...]] = []
    for word in text.split():
        host, _, device = word.partition(":")
        name = {"c": "client", "m": "middle", "s": "server"}[host]
        if device.startswith(">"):
            found.append((name, "RECEIVE", device[1:]))
        else:
            found += [(name, hop, device) for hop in OUT]
    return found


def inside(outer: list[tuple[str, ...]], *hosts: str) -> list[tuple[str, ...]]:
    """The same in a tunnel `t0` between two hosts: its device is around that of its first host."""
    first, last = hosts
    head = [place for place in outer if place[0] == first]
    return [
        *((first, hop, "t0") for hop in OUT[:2]),
        *head,
        (first, "XMIT", "t0"),
        *outer[len(head) :],
        (last, "RECEIVE", "t0"),
    ]


def end(way: Way, row: dict[str, Any]) -> tuple[str, int]:
    """The host of a row, and the port of the client there."""
    return way.names[row["netns"]], row["rport"] if row["lport"] in (PORT, OUTSIDE) else row["lport"]


def check(
    way: Way, run_tool: Any, there: list[Any], back: list[Any], where: tuple[str, int, str], *, routed: bool = True
) -> None:
    """Each packet has one number on its whole way, and one way. All bytes are acknowledged and read under it.

    If the middle is a router, it forwards each, where functions can be hooked.
    """
    address, port, bound = where
    forwards = routed and bool(Kernel().fentry)
    for _ in range(ATTEMPTS):
        before = way.counted()
        with run_tool("trace", *way.only(), "--port", f"{PORT},{OUTSIDE}", "--buffer", "64M") as tool:
            ports = talk(way, address, port, at=bound)
            after = way.counted()
        done = tool.done
        shown = Counter((row["netns"], row["device"], row["hop"]) for row in done.rows)
        unseen = {place: count - before[place] - shown[place] for place, count in after.items()}
        if not done.stats["missed"] and not any(unseen.values()):
            break
    assert (done.stats["missed"], done.stats["lost"], {*unseen.values()}) == (0, 0, {0}), unseen
    owners: dict[tuple[str, int], set[int]] = defaultdict(
        set
    )  # host and the client's port there -> of which connections
    for number, rows in sorted(by_number(done.rows).items()):
        places = [(way.names[row["netns"]], row["hop"], row["device"]) for row in rows if row["hop"] in DEVICES]
        assert places in (there, back), (number, rows)
        assert len({(row["seq"], row["ack"]) for row in rows}) == 1, rows
        if forwards:
            routers = [row for row in rows if row["hop"] in (*DEVICES, "FORWARD") and row["netns"] == way.middle.inode]
            assert [row["hop"] for row in routers] == ["RECEIVE", "FORWARD", *OUT], rows
        here = {end(way, row) for row in rows}
        mine = {port for port in ports if ("client", port) in here} or set().union(*(owners[one] for one in here))
        assert len(mine) == 1, rows
        for one in here:
            owners[one] |= mine
    assert {port for port in ports if owners["client", port] == {port}} == set(ports)
    assert all(len(mine) == 1 for mine in owners.values()), owners
    for name, hop in (("client", "ACKED"), ("client", "READ"), ("server", "ACKED"), ("server", "READ")):
        own: dict[int, Rows] = defaultdict(list)
        for row in done.rows:
            if way.names[row["netns"]] == name and row["hop"] == hop and row["data_bytes"]:
                own[min(owners[end(way, row)])].append(row)
        assert sorted(own) == sorted(ports), (name, hop)
        for rows in own.values():
            assert covered(rows, rows[0]["seq"]) == sum(SIZES), (name, hop)


THERE, BACK = way_of("c:c m:>to_c m:to_s s:>s"), way_of("s:s m:>to_s m:to_c c:>c")


def test_a_router_that_is_left_out(way: Way, run_tool: Any) -> None:
    """It has no rows. The packets that it forwards keep their numbers, and the time since its XMIT is known."""
    way.routed()
    for _ in range(ATTEMPTS):
        with run_tool("trace", *way.only(way.client, way.server), "--port", f"{PORT}", "--buffer", "64M") as tool:
            talk(way, SERVER, PORT, sizes=(1000,))
        if not tool.done.stats["missed"]:
            break
    assert tool.done.stats["missed"] == 0
    assert {way.names[row["netns"]] for row in tool.done.rows} == {"client", "server"}
    sent = {"client": [place for place in THERE if place[0] != "middle"]}
    sent["server"] = [place for place in BACK if place[0] != "middle"]
    found = [row for row in tool.done.rows if row["data_bytes"] == 1000 and row["hop"] == "RECEIVE"]
    assert {row["netns"] for row in found} == {way.client.inode, way.server.inode}
    for row in found:
        rows = [other for other in tool.done.rows if other["packet"] == row["packet"] and other["hop"] in DEVICES]
        sender = way.names[rows[0]["netns"]]
        assert [(way.names[other["netns"]], other["hop"], other["device"]) for other in rows] == sent[sender], rows
        assert row["before"] == "XMIT"
        assert row["since_us"] is not None


def test_a_router(way: Way, run_tool: Any) -> None:
    way.routed()
    check(way, run_tool, THERE, BACK, (SERVER, PORT, SERVER))


def test_a_bridge(way: Way, run_tool: Any) -> None:
    way.bridged()
    check(way, run_tool, THERE, BACK, (SERVER, PORT, SERVER), routed=False)


ROUTER = f"{CLIENT}54"
DNAT = f"tcp dport {OUTSIDE} dnat to {SERVER}:{PORT}"
NATS = {
    "dnat of the router": ("middle", [f"prerouting {DNAT}"], ROUTER, OUTSIDE),
    "snat of the router": (
        "middle",
        [f"postrouting oifname to_s meta l4proto tcp snat to {SERVER}54:20000-29999 random"],
        SERVER,
        PORT,
    ),
    "masquerade": (
        "middle",
        ["postrouting oifname to_s meta l4proto tcp masquerade to :20000-29999 random"],
        SERVER,
        PORT,
    ),
    "both": (
        "middle",
        [f"prerouting {DNAT}", "postrouting oifname to_s meta l4proto tcp masquerade to :20000-29999 random"],
        ROUTER,
        OUTSIDE,
    ),
    "dnat of the client": ("client", [f"output {DNAT}"], "192.0.2.99", OUTSIDE),
    "masquerade of the client": (
        "client",
        ["postrouting meta l4proto tcp masquerade to :20000-29999 random"],
        SERVER,
        PORT,
    ),
    "redirect of the server": ("server", [f"prerouting tcp dport {OUTSIDE} redirect to :{PORT}"], SERVER, OUTSIDE),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.kernel) if name == "both" else name for name in NATS]
)
def test_nat(way: Way, run_tool: Any, name: str) -> None:
    host, rules, address, port = NATS[name]
    way.routed()
    way.nat(getattr(way, host), *rules)
    check(way, run_tool, THERE, BACK, (address, port, SERVER))


TUNNELS = {
    "ipip": ("NET_IPIP", "ipip.ko"),
    "gre": ("NET_IPGRE", "ip_gre.ko"),
    "vxlan": ("VXLAN", "vxlan.ko"),
}


def skip_without(kind: str) -> None:
    option, module = TUNNELS[kind]
    if built_without(option, module):
        pytest.skip(f"this kernel has no tunnels of the kind {kind} (CONFIG_{option})")


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.kernel) for kind in ("ipip", "gre")), "vxlan"])
def test_a_tunnel(way: Way, run_tool: Any, kind: str) -> None:
    """Behind its device the packet has another header before its own."""
    skip_without(kind)
    way.tunnel(kind)
    there, back = inside(THERE, "client", "server"), inside(BACK, "server", "client")
    check(way, run_tool, there, back, ("192.0.2.2", PORT, "192.0.2.2"))


def of_packet(rows: Rows, number: int) -> Rows:
    return [row for row in rows if row["packet"] == number]


@seen
def test_segments_in_a_tunnel_of_the_other_ip_version(way: Way, run_tool: Any) -> None:
    """The queue discipline below the tunnel's device cuts the packets."""
    skip_without("vxlan")
    way.tunnel_in_ipv6()
    way.run(way.client, "tc qdisc replace dev c root tbf rate 100mbit burst 1600 latency 10s")
    with run_tool("trace", *way.only(), "--port", f"{PORT}", "--buffer", "64M") as tool:
        talk(way, "192.0.2.2", PORT, at="192.0.2.2", sizes=(20_000,))
    rows = tool.done.rows
    cut = [row for row in rows if row["hop"] == "SEGMENTED" and row["netns"] == way.client.inode]
    assert cut
    for whole in cut:
        mine = of_packet(rows, whole["packet"])
        segments = [row for row in mine if row["hop"] == "XMIT" and row["device"] == "c"]
        assert covered(segments, whole["seq"]) == whole["data_bytes"], mine


@seen
def test_a_packet_that_waits_for_arp_below_a_tunnel(way: Way, run_tool: Any) -> None:
    skip_without("vxlan")
    way.tunnel("vxlan")
    way.run(way.client, f"ip neigh del {ROUTER} dev c")
    with run_tool("trace", *way.only(), "--port", f"{PORT}", "--buffer", "64M") as tool:
        talk(way, "192.0.2.2", PORT, at="192.0.2.2", sizes=(1,))
    first = next(row for row in tool.done.rows if row["flags"] == "SYN")
    places = [
        (way.names[row["netns"]], row["hop"], row["device"])
        for row in of_packet(tool.done.rows, first["packet"])
        if row["hop"] in DEVICES
    ]
    assert places[:4] == [*(("client", hop, "t0") for hop in OUT), ("client", "QUEUE", "c")]
    assert sorted(places) == sorted(inside(THERE, "client", "server"))


@seen
def test_nat_before_a_tunnel(way: Way, run_tool: Any) -> None:
    """Below the tunnel's device a received packet has the ends of its header, not those of the socket that sent it."""
    skip_without("vxlan")
    way.tunnel("vxlan")
    way.nat(way.client, f"output tcp dport {OUTSIDE} dnat to 192.0.2.2:{PORT}")
    with run_tool("trace", *way.only(), "--port", f"{PORT},{OUTSIDE}", "--buffer", "64M") as tool:
        talk(way, "192.0.2.99", OUTSIDE, at="192.0.2.2", sizes=(1000,))
    sent = [row for row in tool.done.rows if row["hop"] == "QUEUE" and row["netns"] == way.client.inode]
    assert {row["rport"] for row in sent} == {OUTSIDE}
    received = [row for row in tool.done.rows if row["hop"] == "RECEIVE" and row["device"] in ("to_c", "s")]
    ends = {(row["device"], row["family"], row["laddr"], row["lport"], row["raddr"]) for row in received}
    assert ends == {(device, 4, "192.0.2.2", PORT, "192.0.2.1") for device in ("to_c", "s")}


@seen
def test_ports_that_nat_has_yet_to_change(way: Way, run_tool: Any) -> None:
    """They do not match the filter at RECEIVE: the packet begins at TCP."""
    way.routed()
    way.nat(way.server, f"prerouting tcp dport {OUTSIDE} redirect to :{PORT}")
    with run_tool("trace", *way.only(), "--port", f"{PORT}", "--buffer", "64M") as tool:
        talk(way, SERVER, OUTSIDE)
    assert {row["netns"] for row in tool.done.rows} == {way.server.inode}
    received = {row["hop"]: row["before"] for row in tool.done.rows if row["direction"] == "RECEIVED"}
    assert received.keys() >= {"TCP", "READ"}
    assert (received["TCP"], received["READ"]) == (None, "TCP")


@seen
def test_a_queue_of_the_router(way: Way, run_tool: Any) -> None:
    """tbf lets 1000 bytes pass every 80 ms. The packets wait under the number that the client's TCP gave them."""
    way.routed()
    way.run(way.middle, "tc qdisc replace dev to_s root tbf rate 100kbit burst 1600 latency 10s")
    with run_tool("trace", *way.only(), "--port", f"{PORT}", "--buffer", "64M") as tool:
        talk(way, SERVER, PORT, sizes=(1000,))
    waited = [row for row in tool.done.rows if row["hop"] == "DEQUEUE" and row["data_bytes"] == 1000]
    assert {(row["netns"], row["device"], row["direction"]) for row in waited} == {
        (way.middle.inode, "to_s", "RECEIVED")
    }
    assert max(row["since_us"] for row in waited) >= (CONNECTIONS * 1000 - 1600) * 8 / 100_000 * 1_000_000
    for row in waited:
        places = [
            (way.names[other["netns"]], other["hop"])
            for other in tool.done.rows
            if other["packet"] == row["packet"] and other["device"]
        ]
        assert places[: len(OUT)] == [("client", hop) for hop in OUT]
        assert [place for place in places if place[0] == "middle"][-3:] == [
            ("middle", hop) for hop in ("DEQUEUE", "START_XMIT", "XMIT")
        ]
        assert places[-1] == ("server", "RECEIVE")


@seen
def test_a_router_that_cuts(way: Way, run_tool: Any) -> None:
    """Nobody knows the segments of a forwarded packet: they are counted."""
    way.routed()
    way.run(way.middle, "tc qdisc replace dev to_s root tbf rate 100mbit burst 1600 latency 10s")
    with run_tool("trace", *way.only(), "--port", f"{PORT}", "--buffer", "64M") as tool:
        talk(way, SERVER, PORT, sizes=(20_000,))
    cut = [row for row in tool.done.rows if row["hop"] == "SEGMENTED" and row["netns"] == way.middle.inode]
    assert cut
    assert tool.done.stats["missed"] >= len(cut)
