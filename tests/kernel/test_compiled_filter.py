"""Every filter, on connections whose ends and owners are known.

All filters watch the same connections at the same time, each in a session of its own. What each one lets through is
held against a rule written here for it, and against `Filter.matches`, which specifies the kernel's filter.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tcpscope import filters
from tcpscope.errors import UsageError
from tcpscope.filters import Filter, address_bytes
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Host, Lab
from tcpscope.run import Run, Streaming
from tcpscope.schema import Clock
from tcpscope.session import Session, Stats
from tests.conftest import until
from tests.puppets import Puppet

Row = dict[str, Any]
Rule = Callable[[Row], bool]

LONG = "fifteen-letters"  # as many as the kernel keeps
FEW = {
    "pid of a server",
    "comm of full length",
    "uid of root",
    "cgroup above",
    "IPv6",
    "lport list and range",
    "port",
    "rport",
    "laddr network",
    "raddr all IPv6",
    "several of each",
    "many networks, raddr all",
    "many networks and an owner",
    "several at once",
}
"""What each kernel of the matrix is asked: every option once. The kernel of this machine is asked everything."""

MANY_IPV4 = [f"10.{n}.0.0/16" for n in range(0, 20, 2)]
MANY_IPV6 = [f"2001:db8:{n:x}::/48" for n in range(1, 20, 2)]


@dataclass
class Cast:
    """Who acts, and where."""

    host: Host
    elsewhere: Host
    alice: Puppet  # user 1001, in the cgroup `inner`
    bob: Puppet  # user 1002, in the cgroup `outer`
    web: Puppet  # user 1003
    db: Puppet  # root
    twin: Puppet  # root
    inner: Path
    outer: Path
    chosen: Puppet | None = None  # whose listener got the connection from port 40007

    @property
    def puppets(self) -> tuple[Puppet, ...]:
        return self.alice, self.bob, self.web, self.db, self.twin


@dataclass
class Watcher:
    """One filter at work."""

    run: Run

    def rows(self) -> tuple[list[Row], Stats]:
        """Everything that it let through, and the account."""
        rows = [_mapping(row) for batch in self.run.end() for row in batch.rows]
        return rows, self.run.account()


class Watchers:
    def __init__(self, stack: contextlib.ExitStack, kernel: Kernel) -> None:
        self._stack, self._kernel = stack, kernel

    def add(self, wanted: Filter) -> Watcher:
        session = Session(
            "transition",
            "transition",
            wanted,
            ring_bytes=1 << 16,
            kernel=self._kernel,
            entries={"connections": 8192},
        )
        assert session.layout is not None
        return Watcher(self._stack.enter_context(Streaming(session, session.layout.decoder(Clock("none")))))


def _mapping(row: Any) -> Row:
    return {name: getattr(row, name) for name in row.__struct_fields__}


def key(row: Row) -> tuple[Any, ...]:
    """What is the same in all sessions: not the times."""
    names = ("old_state", "new_state", "laddr", "lport", "raddr", "rport", "family", "netns", "pid", "comm", "uid")
    return tuple(row[name] for name in names)


def by_socket(rows: list[Row]) -> list[tuple[Any, ...]]:
    """The keys of rows, those of one socket together and in their order.

    What two processors do to two sockets at the same time may lie in one order in one ring, in another in the next.
    """
    return sorted(map(key, rows), key=lambda values: (values[3], values[5] or 0))


@pytest.fixture(scope="module")
def cast() -> Iterator[Cast]:
    mount = filters.cgroup_mount()
    outer = mount / f"tcpscope-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        with Lab() as lab:
            outer.mkdir()
            inner.mkdir()
            host = lab.client
            alice, bob = Puppet(host, "alice"), Puppet(host, "bob")
            web, db, twin = Puppet(host, "web"), Puppet(host, LONG), Puppet(host, "twin")
            (inner / "cgroup.procs").write_text(str(alice.pid))
            (outer / "cgroup.procs").write_text(str(bob.pid))
            for uid, puppet in ((1001, alice), (1002, bob), (1003, web)):
                puppet.do("os.setresuid(uid, uid, uid)", uid=uid)
            db.ask("1"), twin.ask("1")
            yield Cast(host, lab.server, alice, bob, web, db, twin, inner, outer)
    finally:
        for path in (inner, outer):
            if path.exists():
                until(lambda path=path: _removed(path), f"the end of the processes in {path}")


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def listen(puppet: Puppet, name: str, family: str, address: str, port: int) -> None:
    puppet.do(
        f"{name} = socket.socket(socket.{family})\n"
        f"if socket.{family} == socket.AF_INET6: {name}.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)\n"
        f"{name}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); {name}.bind((address, port)); {name}.listen()",
        address=address,
        port=port,
    )


def connect(puppet: Puppet, source: tuple[str, int], to: tuple[str, int], family: str = "AF_INET") -> bool:
    puppet.do(
        f"connection = socket.socket(socket.{family})\n"
        "connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "connection.bind(tuple(source)); error = connection.connect_ex(tuple(to))",
        source=source,
        to=to,
    )
    return bool(puppet.ask("error == 0"))


def act_before(cast: Cast) -> None:
    """A connection that waits for accept() already when the watchers begin: nobody knows whose it is."""
    listen(cast.twin, "older", "AF_INET", "127.0.2.8", 7001)
    assert connect(cast.alice, ("127.0.1.5", 40008), ("127.0.2.8", 7001))
    cast.alice.do("earlier = connection")


def act(cast: Cast) -> None:
    """All connections, one after the other, from birth to death; the listeners are closed at last."""
    alice, bob, web, db, twin = cast.puppets
    ipv4, ipv6 = cast.host.ipv4, cast.host.ipv6
    listen(web, "any", "AF_INET6", "::", 8080)
    listen(web, "six", "AF_INET6", "::1", 8443)
    listen(db, "four", "AF_INET", ipv4, 9000)
    listen(db, "six", "AF_INET6", ipv6, 9001)
    listen(twin, "shared", "AF_INET", "127.0.2.7", 7000)
    listen(db, "shared", "AF_INET", "127.0.2.7", 7000)
    for client, source, to, server, listener, family in (
        (alice, ("127.0.1.5", 40001), ("127.0.2.1", 8080), web, "any", "AF_INET"),
        (alice, ("::1", 40002), ("::1", 8443), web, "six", "AF_INET6"),
        (bob, (ipv4, 40003), (ipv4, 9000), db, "four", "AF_INET"),
        (bob, (ipv6, 40004), (ipv6, 9001), db, "six", "AF_INET6"),
        (bob, ("::ffff:127.0.3.3", 40005), ("::ffff:127.0.2.1", 8080), web, "any", "AF_INET6"),
    ):
        assert connect(client, source, to, family)
        server.do(f"child, _ = {listener}.accept()")
        client.do("connection.shutdown(socket.SHUT_WR)")
        server.do("child.recv(1); child.close()")
        client.do("connection.recv(1); connection.close()")
    assert not connect(alice, ("127.0.1.5", 40006), ("127.0.2.9", 9999))
    # Whose child it is only the kernel can tell: the listeners are two processes, and neither accepts.
    assert connect(alice, ("127.0.1.5", 40007), ("127.0.2.7", 7000))
    (waiting,) = (each for each in cast.host.sockets() if each.state == "LISTEN" and each.lport == 7000 and each.recv_q)
    cast.chosen = db if waiting.inode == db.ask("os.fstat(shared.fileno()).st_ino") else twin
    alice.do("connection.close()")
    alice.do("earlier.close()")
    for puppet, names in ((web, ("any", "six")), (db, ("four", "six", "shared")), (twin, ("shared", "older"))):
        for name in names:
            puppet.do(f"{name}.close()")
    stranger = Puppet(cast.elsewhere, "alice")
    assert not connect(stranger, (cast.elsewhere.ipv4, 40001), (cast.elsewhere.ipv4, 8080))


def one_of(name: str, *values: Any) -> Rule:
    return lambda row: row[name] in values


def options_and_rules(cast: Cast) -> dict[str, tuple[dict[str, Any], Rule]]:
    """Options as the command line gives them, and what they mean, said once more."""
    alice, bob, web, *_ = cast.puppets
    return {
        "pid of a client": ({"pid": str(bob.pid)}, one_of("pid", bob.pid)),
        "pid of a server": ({"pid": str(web.pid)}, one_of("pid", web.pid)),
        "comm": ({"comm": "alice"}, one_of("comm", "alice")),
        "comm, beginning of one": ({"comm": "fifteen-letter"}, lambda row: False),
        "comm of full length": ({"comm": LONG}, one_of("comm", LONG)),
        "uid": ({"uid": "1002"}, one_of("uid", 1002)),
        "uid of root": ({"uid": "root"}, one_of("uid", 0)),
        "cgroup": ({"cgroup": str(cast.inner)}, one_of("pid", alice.pid)),
        "cgroup above": ({"cgroup": f"/{cast.outer.name}"}, one_of("pid", alice.pid, bob.pid)),
        "cgroup by id": ({"cgroup": str(cast.outer.stat().st_ino)}, one_of("pid", alice.pid, bob.pid)),
        "IPv4": ({"ipv4": True}, one_of("family", 4)),
        "IPv6": ({"ipv6": True}, one_of("family", 6)),
        "lport": ({"lport": "8080"}, one_of("lport", 8080)),
        "lport list and range": ({"lport": "9000,40003-40005"}, one_of("lport", 9000, 40003, 40004, 40005)),
        "rport": ({"rport": "8080"}, one_of("rport", 8080)),
        "rport range": ({"rport": "1-8442"}, lambda row: row["rport"] is not None and row["rport"] < 8443),
        "port": ({"port": "9999,40004"}, lambda row: bool({row["lport"], row["rport"]} & {9999, 40004})),
        "all ports": ({"port": "1-65535"}, lambda row: True),
        "all remote ports": ({"rport": "1-65535"}, lambda row: row["rport"] is not None),
        "laddr": ({"laddr": "127.0.1.5"}, one_of("laddr", "127.0.1.5")),
        "laddr network": (
            {"laddr": "127.0.2.0/23"},
            one_of("laddr", "127.0.2.1", "127.0.2.7", "127.0.2.8", "127.0.3.3"),
        ),
        "laddr IPv6": ({"laddr": "2001:db8::/64"}, one_of("laddr", cast.host.ipv6)),
        "laddr of both": ({"laddr": "::1,192.0.2.0/30"}, one_of("laddr", "::1", cast.host.ipv4)),
        "raddr": ({"raddr": "127.0.2.9"}, one_of("raddr", "127.0.2.9")),
        "raddr all IPv4": ({"raddr": "0.0.0.0/0"}, lambda row: row["raddr"] is not None and row["family"] == 4),
        "raddr all IPv6": ({"raddr": "::/0"}, lambda row: row["raddr"] is not None and row["family"] == 6),
        "raddr mapped": ({"raddr": "::ffff:127.0.3.3"}, one_of("raddr", "127.0.3.3")),
        "pids": ({"pid": f"{alice.pid},{bob.pid}"}, one_of("pid", alice.pid, bob.pid)),
        "comms": ({"comm": ["alice", f"fifteen-letter,{LONG}"]}, one_of("comm", "alice", LONG)),
        "uids": ({"uid": "root,1003"}, one_of("uid", 0, 1003)),
        "cgroups, one below the other": (
            {"cgroup": [str(cast.inner), cast.outer.stat().st_ino]},
            one_of("pid", alice.pid, bob.pid),
        ),
        "cgroups": ({"cgroup": [str(cast.inner), 2**40]}, one_of("pid", alice.pid)),
        "several of each": (
            {
                "pid": [alice.pid, bob.pid, web.pid],
                "comm": "bob,web",
                "uid": [1001, 1002],
                "cgroup": [str(cast.outer), 2**40],
                "lport": "40004,40005",
                "laddr": "127.0.0.0/8,10.0.0.0/8",
            },
            lambda row: row["pid"] == bob.pid and row["lport"] == 40005,
        ),
        "two networks": ({"raddr": ["127.0.3.0/24", "::1"]}, one_of("raddr", "127.0.3.3", "::1")),
        "many networks, laddr": ({"laddr": [*MANY_IPV4, "127.0.1.0/24", "::1"]}, one_of("laddr", "127.0.1.5", "::1")),
        "many networks, raddr": (
            {"raddr": [*MANY_IPV6, "2001:db8::/126", "127.0.2.9"]},
            one_of("raddr", cast.host.ipv6, "127.0.2.9"),
        ),
        "many networks, raddr all": (
            {"raddr": [*MANY_IPV4, "::/0"]},
            lambda row: row["raddr"] is not None and row["family"] == 6,
        ),
        "many networks and an owner": (
            {"raddr": [*MANY_IPV4, "127.0.0.0/8"], "uid": 1002, "lport": "40000-50000"},
            lambda row: row["uid"] == 1002 and row["raddr"] == "127.0.2.1",
        ),
        "several at once": (
            {"comm": "web", "ipv4": True, "rport": "40005", "laddr": "127.0.0.0/8"},
            lambda row: row["comm"] == "web" and row["rport"] == 40005,
        ),
        "none that match together": ({"comm": "web", "uid": "1002"}, lambda row: False),
    }


def combinations(cast: Cast, count: int) -> list[Filter]:
    """Filters put together at random, the same ones every time."""
    chance = random.Random(793)
    choices: dict[str, list[Any]] = {
        "pid": [*(puppet.pid for puppet in cast.puppets), [cast.alice.pid, cast.web.pid]],
        "comm": ["alice", "bob", "web", LONG, f"alice,{LONG}"],
        "uid": [0, 1001, 1002, 1003, "0,1001"],
        "cgroup": [cast.inner.stat().st_ino, cast.outer.stat().st_ino, [cast.inner.stat().st_ino, 2**40]],
        "family": [4, 6],
        "lport": ["40001-40003", "8080", "7000,8443,40004-40007", "9000-9001"],
        "rport": ["40001-40003", "8080", "9999,8443,40004-40007", "1-65535"],
        "port": ["40001", "8080,9001", "7000-9000", "40007"],
        "laddr": ["127.0.0.0/8", "::1", "2001:db8::/32,192.0.2.1", "0.0.0.0/0,::/0", [*MANY_IPV4, "127.0.0.0/23"]],
        "raddr": ["127.0.0.0/8", "::1", "2001:db8::/32,192.0.2.1", "0.0.0.0/0", [*MANY_IPV6, "127.0.0.0/22"]],
    }
    found: list[Filter] = []
    while len(found) < count:
        names = chance.sample(sorted(choices), chance.choice((1, 2, 2, 3)))
        with contextlib.suppress(UsageError):  # a contradiction
            found.append(
                Filter.from_options(**{name: chance.choice(choices[name]) for name in names}, netns=cast.host.inode)
            )
    return found


@dataclass
class Seen:
    everything: list[Row]
    by_rule: dict[str, tuple[list[Row], Stats]]
    at_random: list[tuple[Filter, list[Row], Stats]]
    elsewhere: list[Row]
    both: list[Row]  # of both namespaces, to port 8080


@pytest.fixture(scope="module", params=[pytest.param("few", marks=pytest.mark.kernel), "all"])
def seen(cast: Cast, request: pytest.FixtureRequest) -> Iterator[Seen]:
    everything_is_asked = request.param == "all"
    act_before(cast)
    with contextlib.ExitStack() as stack:
        watchers = Watchers(stack, Kernel())
        host = Filter.from_options(netns=cast.host.netns)
        assert host.netns == (cast.host.inode,)
        everything = watchers.add(host)
        elsewhere = watchers.add(Filter.from_options(netns=str(cast.elsewhere.inode)))
        both = watchers.add(Filter.from_options(netns=[cast.elsewhere.netns, cast.host.inode], rport="8080"))
        rules = {
            name: watchers.add(Filter.from_options(**options, netns=f"pid:{cast.alice.pid}"))
            for name, (options, _) in options_and_rules(cast).items()
            if everything_is_asked or name in FEW
        }
        at_random = [(wanted, watchers.add(wanted)) for wanted in combinations(cast, 16 if everything_is_asked else 4)]
        act(cast)
        yield Seen(
            everything.rows()[0],
            {name: watcher.rows() for name, watcher in rules.items()},
            [(wanted, *watcher.rows()) for wanted, watcher in at_random],
            elsewhere.rows()[0],
            both.rows()[0],
        )


def test_everything_is_there(cast: Cast, seen: Seen) -> None:
    """The rules below would say nothing if the rows were not those of the calls made."""
    steps = {}
    for row in seen.everything:
        steps.setdefault((row["lport"], row["rport"]), []).append(row["new_state"])
    active = ["SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]
    passive = ["SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"]
    listeners = {(port, None): ["LISTEN", "CLOSE"] for port in (8080, 8443, 9000, 9001)}
    listeners[7000, None] = ["LISTEN", "LISTEN", "CLOSE", "CLOSE"]
    pairs = [(40001, 8080), (40002, 8443), (40003, 9000), (40004, 9001), (40005, 8080)]
    listeners[7001, None] = ["CLOSE"]
    assert {ends: states for ends, states in steps.items() if not {40007, 40008} & {*ends}} == (
        dict.fromkeys(pairs, active)
        | {(b, a): passive for a, b in pairs}
        | listeners
        | {(40006, 9999): ["SYN_SENT", "CLOSE"]}
    )
    assert steps[7000, 40007][:3] == passive[:3]
    unknown = [row for row in seen.everything if row["pid"] is None]
    assert {(row["lport"], row["rport"], row["comm"], row["uid"], row["cgroup"]) for row in unknown} == {
        (7001, 40008, None, None, None)
    }
    assert cast.chosen
    assert {row["pid"] for row in seen.everything if row["lport"] == 7000 and row["rport"]} == {cast.chosen.pid}


def test_netns(cast: Cast, seen: Seen) -> None:
    assert {row["netns"] for row in seen.everything} == {cast.host.inode}
    assert [(row["netns"], row["lport"], row["comm"]) for row in seen.elsewhere] == [
        (cast.elsewhere.inode, 40001, "alice")
    ] * 2
    assert {(row["netns"], row["lport"]) for row in seen.both} == {
        (cast.host.inode, 40001),
        (cast.host.inode, 40005),
        (cast.elsewhere.inode, 40001),
    }


def test_each_filter_lets_through_what_it_says(cast: Cast, seen: Seen) -> None:
    rules = options_and_rules(cast)
    for name, (rows, stats) in seen.by_rule.items():
        rule = rules[name][1]
        # As multisets: what happens on two CPUs at once reaches two rings in any order.
        assert Counter(map(key, rows)) == Counter(key(row) for row in seen.everything if rule(row)), name
        assert stats.shown == len(rows), name
        assert stats.seen == stats.shown + stats.filtered, name
        assert stats.lossless, name


def test_no_rule_is_empty_by_mistake(cast: Cast, seen: Seen) -> None:
    empty = {name for name, (rows, _) in seen.by_rule.items() if not rows}
    assert empty == {"comm, beginning of one", "none that match together"} & seen.by_rule.keys()


def test_the_kernel_decides_as_filter_matches(cast: Cast, seen: Seen) -> None:
    nested = {alice_or_bob.pid for alice_or_bob in (cast.alice, cast.bob)}
    outer = cast.outer.stat().st_ino
    shown = 0
    for wanted, rows, stats in seen.at_random:
        expected = []
        for row in seen.everything:
            plain = row | {
                "laddr": address_bytes(row["laddr"]),
                "raddr": address_bytes(row["raddr"]) if row["raddr"] else None,
                "in_cgroup": outer in wanted.cgroup and row["pid"] in nested,
            }
            if wanted.matches(plain):
                expected.append(key(row))
        assert Counter(map(key, rows)) == Counter(expected), wanted
        assert stats.seen == stats.shown + stats.filtered, wanted
        shown += bool(expected)
    assert shown or len(seen.at_random) < 16


def test_the_cgroup_of_the_row(cast: Cast, seen: Seen) -> None:
    ids = {row["comm"]: row["cgroup"] for row in seen.everything}
    assert (ids["alice"], ids["bob"]) == (cast.inner.stat().st_ino, cast.outer.stat().st_ino)


def test_the_constants_and_the_keys() -> None:
    """An option with one value is in the constants, one with several has a key for each."""
    wanted = Filter.from_options(uid=7, comm="a,b", raddr="10.0.0.0/8,2001:db8::/32")
    assert compiled_filter.constants(wanted)["filter"]["uid"] == 7
    assert [key.hex() for key in compiled_filter.keys(wanted)] == [
        "a00000000200000061" + 15 * "00",
        "a00000000200000062" + 15 * "00",
        "8800000006000400" + 10 * "00" + "ffff0a000000",
        "400000000600060020010db8" + 12 * "00",
    ]
    assert compiled_filter.keys(Filter.from_options(uid=7, comm="a", raddr="10.0.0.0/8")) == []
    ports = compiled_filter.constants(Filter.from_options(lport="1,8,65535"))["filter_lport"]
    assert [at for at, byte in enumerate(ports) if byte] == [0, 1, 8191]
    assert (ports[0], ports[1], ports[8191]) == (2, 1, 128)


def test_every_option_is_under_test(cast: Cast) -> None:
    """Of the kernels of the matrix too. Every session asks for a namespace; ipv4 and ipv6 are the family."""
    rules = options_and_rules(cast)
    for names in (rules.keys(), FEW):
        used = set(itertools.chain.from_iterable(rules[name][0] for name in names))
        assert set(Filter.__dataclass_fields__) <= used | {"netns", "family"}
