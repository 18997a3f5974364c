"""`rtt` with each key, each filter and the owner: whose samples."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import until
from tests.puppets import Puppet
from tests.tools.rtt.site import FAMILIES, Pair, Tools, all_ended, listen, ports

pytestmark = pytest.mark.kernel


def test_every_key(site: Lab) -> None:
    """Two listeners; one has two connections of IPv4 and one of IPv6, the other one of IPv4."""
    both, other = listen(site, "mapped"), listen(site)
    arguments = {name: f"--by {name}" for name in ("none", "laddr", "raddr", "lport", "rport", "pid")}
    arguments |= {"two": "--by raddr,rport"}
    with Tools(site.client, **arguments) as tools:
        pairs = [Pair(site, "4", both), Pair(site, "4", both), Pair(site, "6", both), Pair(site, "4", other)]
        for number, pair in enumerate(pairs, 3):
            pair.exchange(number)
        all_ended(site, pairs)
        counts = dict(zip(pairs, (5, 6, 7, 8), strict=True))
        a, _, c, d = pairs
        server4, server6 = site.server.ipv4, site.server.ipv6
        client4, client6 = site.client.ipv4, site.client.ipv6
        (row,) = tools.done("none")
        assert row["count"] == 26

        def by(name: str, *keys: str) -> dict[Any, int]:
            rows = tools.done(name)
            return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row["count"] for row in rows}

        assert by("laddr", "laddr") == {client4: 19, client6: 7}
        assert by("raddr", "raddr") == {server4: 19, server6: 7}
        lports: Counter[int] = Counter()  # connections to different ports may have the same
        for pair, count in counts.items():
            lports[pair.ports[0]] += count
        assert by("lport", "lport") == lports
        assert by("rport", "rport") == {a.port: 18, d.port: 8}
        assert by("two", "raddr", "rport") == {(server4, a.port): 11, (server6, c.port): 7, (server4, d.port): 8}
        (row,) = tools.done("pid")
        assert (row["pid"], row["comm"]) == (os.getpid(), Path("/proc/self/comm").read_text().strip())


def test_filters(site: Lab) -> None:
    listeners = {family: listen(site, family) for family in FAMILIES}
    port = {family: listener.getsockname()[1] for family, listener in listeners.items()}
    wanted: dict[str, Callable[[str], bool]] = {
        f"-p {os.getpid()}": lambda family: True,
        "-p 1": lambda family: False,
        f"--lport {port['mapped']}": lambda family: family == "mapped",
        f"--rport {port['4']}": lambda family: False,
        "-4": lambda family: family != "6",
        "-6": lambda family: family == "6",
        f"--raddr {site.client.ipv6}": lambda family: family == "6",
        f"--laddr 192.0.2.0/24 -p {os.getpid()}": lambda family: family != "6",
    }
    cases = {case: f"--by connection {case}" for case in wanted}
    with Tools(site.server, **cases) as tools, Tools(site.client, one=f"--by connection -R {port['4']}") as at_client:
        pairs = {family: Pair(site, family, listener) for family, listener in listeners.items()}
        for number, pair in enumerate(pairs.values(), 4):
            pair.exchange(number)
        all_ended(site, list(pairs.values()))
        samples = sum(pair.samples for pair in pairs.values())
        for case, wants in wanted.items():
            found = {(row["rport"], row["lport"]): row["count"] for row in tools.done(case)}
            chosen = {pair.ports: pair.samples for family, pair in pairs.items() if wants(family)}
            assert found == chosen, case
            # Other traffic of the machine is filtered, too.
            assert tools.stats(case)["filtered"] >= samples - sum(chosen.values())
        (row,) = at_client.done("one")
        assert (row["lport"], row["count"]) == (pairs["4"].ports[0], pairs["4"].samples)


def test_the_owner_is_who_accepted(site: Lab) -> None:
    """One process listens, its child accepts: a connection is one row all the same, and the child's."""
    with Tools(site.server, connection="--by connection", pid="--by pid") as tools:
        parent = Puppet(site.server, "parent")
        port = next(ports)
        parent.do("listener = socket.create_server((address, port))", address=site.server.ipv4, port=port)
        parent.do(
            "ours, theirs = socket.socketpair()\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    open('/proc/self/comm', 'w').write('child')\n"
            "    theirs.recv(1); made = listener.accept()[0]\n"
            "    for _ in range(5): made.recv(100); made.sendall(b'answer')\n"
            "    made.recv(1); made.close(); theirs.send(b'x'); os._exit(0)"
        )
        near = site.client.socket(socket.AF_INET)
        near.connect((site.server.ipv4, port))
        until(lambda: any((s.lport, s.state) == (port, "ESTABLISHED") for s in site.server.sockets()), "the handshake")
        parent.do("ours.send(b'x')")
        for _ in range(5):
            near.sendall(b"request")
            assert near.recv(100) == b"answer"
        near.close()
        parent.do("ours.recv(1)")
        child = parent.ask("os.waitpid(child, 0)[0]")
        until(lambda: not any(s.lport == port and s.rport for s in site.server.sockets()), "the end")
        (row,) = tools.done("connection")
        assert (row["count"], row["pid"], row["comm"]) == (7, child, "child")
        # The handshake is over before anybody accepts: it is the listener's.
        by_pid = {row["pid"]: (row["comm"], row["count"]) for row in tools.done("pid")}
        assert by_pid == {parent.pid: ("parent", 1), child: ("child", 6)}
        parent.kill()
