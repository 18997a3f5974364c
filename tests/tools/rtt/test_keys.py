"""`rtt` with each key, each filter and the owner: whose samples."""

from __future__ import annotations

from collections import Counter
from socket import IPPROTO_MPTCP
from typing import Any

import pytest

from tests.record import Script, Seen, Test, Watch, recorded
from tests.tools.rtt.site import FAMILIES, WATCH, Pair, Rows, Site, count, ends_of, run_of, totals_of

BOTH, OTHER = 6530, 6531
LISTENERS = {family: 6532 + i for i, family in enumerate(FAMILIES)}
OWNERS, MPTCP = 6535, 6536
BY_PID = Watch("rtt", "--by", "pid", "--port", f"{BOTH},{OTHER},{OWNERS},{MPTCP}")
CLIENTS = f"--rport {BOTH}-{OTHER}"
"""At their ends: the servers' have the clients' ports there."""
FILTERS = {
    "none": CLIENTS,
    "laddr": f"--port {BOTH}-{OTHER} --laddr 192.0.2.0/24,2001:db8::1",
    "raddr": f"--port {BOTH}-{OTHER} --raddr 192.0.2.2,2001:db8::1",
    "lport": CLIENTS,
    "rport": CLIENTS,
    "raddr,rport": CLIENTS,
}
BY = {key: Watch("rtt", "--by", key, *words.split(), every_kernel=False) for key, words in FILTERS.items()}
SERVERS4 = Watch("rtt", "--by", "connection", "-4", "--lport", "6532-6534", every_kernel=False)
CLIENTS6 = Watch("rtt", "--by", "connection", "-6", "--rport", "6532-6534", every_kernel=False)


@recorded(WATCH, BY_PID, *BY.values())
def test_every_key(script: Script) -> Test:
    """Two listeners; one has two connections of IPv4 and one of IPv6, the other one of IPv4."""
    site = Site(script)
    both, other = site.listen(BOTH, "mapped"), site.listen(OTHER)
    made = (BOTH, both, "mapped"), (BOTH, both, "mapped"), (BOTH, both, "6"), (OTHER, other, "4")
    for exchanges, (port, listener, family) in enumerate(made, 3):
        site.pair(port, listener, family).exchange(exchanges)
    site.over()
    seen = yield
    site.watched(seen)
    counts = dict(zip(site.pairs, (5, 6, 7, 8), strict=True))
    server4, server6 = script.server.ipv4, script.server.ipv6

    def by(name: str) -> dict[Any, int]:
        keys, rows = name.split(","), totals_of(seen, BY[name])
        found = {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row["count"] for row in rows}
        assert len(found) == len(rows)
        return found

    (row,) = totals_of(seen, BY["none"])
    assert row["count"] == 26
    assert by("laddr") == {script.client.ipv4: 19, server4: 19, script.client.ipv6: 7}
    assert by("raddr") == {server4: 19, script.client.ipv6: 7}
    lports: Counter[int] = Counter()  # connections to different ports may have the same
    for pair, samples in counts.items():
        lports[pair.local.ret] += samples
    assert by("lport") == lports
    assert by("rport") == {BOTH: 18, OTHER: 8}
    assert by("raddr,rport") == {(server4, BOTH): 11, (server6, BOTH): 7, (server4, OTHER): 8}
    owners = {site.client.pid: ("client", 26), site.server.pid: ("server", 26)}
    assert by_pid(seen, *owners) == owners
    for watch in BY.values():  # other traffic of the machine is filtered, too
        assert filtered(seen, watch) >= 2 * 26 - count(totals_of(seen, watch))


def filtered(seen: Seen, watch: Watch) -> int:
    stats = run_of(seen, watch).stats
    assert stats is not None
    return stats["filtered"]


def by_pid(seen: Seen, *pids: int) -> dict[int, tuple[str, int]]:
    """Of these owners their names and counts."""
    rows = totals_of(seen, BY_PID)
    found = {row["pid"]: (row["comm"], row["count"]) for row in rows}
    assert len(found) == len(rows)
    assert found.keys().isdisjoint({None, 0})
    return {pid: found[pid] for pid in pids}


@recorded(WATCH, SERVERS4, CLIENTS6)
def test_filters(script: Script) -> Test:
    """By family and port; those by address are in `test_every_key`, those by process in `test_by_process.py`."""
    site = Site(script)
    pairs = {family: site.new(port, family) for family, port in LISTENERS.items()}
    for exchanges, pair in enumerate(pairs.values(), 4):
        pair.exchange(exchanges)
    site.over()
    seen = yield
    site.watched(seen)
    four, six, mapped = (pairs[family] for family in FAMILIES)
    samples = 2 * sum(pair.samples for pair in pairs.values())
    for watch, ends in ((SERVERS4, [(four, four.far), (mapped, mapped.far)]), (CLIENTS6, [(six, six.near)])):
        expected = {pair.addresses_of(end) + pair.numbers_of(end): pair.samples for pair, end in ends}
        rows = totals_of(seen, watch)
        assert len(rows) == len(expected)
        assert {ends_of(row): row["count"] for row in rows} == expected
        # Other traffic of the machine is filtered, too.
        assert filtered(seen, watch) >= samples - sum(expected.values())


@recorded(WATCH, BY_PID)
def test_the_owner_is_who_accepted(script: Script) -> Test:
    """One process listens, its child accepts: a connection is one row all the same, and the child's."""
    site = Site(script)
    listener = site.listen(OWNERS)
    child = site.server.fork("child")
    site.route("4")
    near = site.client.socket()
    connected = near.connect(script.server.ipv4, OWNERS)
    local = near.name()
    script.server.until_sockets(1, "==", state="ESTABLISHED", lport=OWNERS, rport=local)
    far = child.at(listener).accept()
    pair = site.add(Pair("4", OWNERS, near, far, connected, local))
    pair.exchange(5)
    site.over()
    seen = yield
    rows: Rows = site.watched(seen)[far]  # the row over all is the child's
    assert count(rows) == 7
    # The handshake is over before anybody accepts: it is the listener's.
    owners = {site.server.pid: ("server", 1), child.pid: ("child", 6), site.client.pid: ("client", 7)}
    assert by_pid(seen, *owners) == owners


@recorded(WATCH, BY_PID)
def test_mptcp(script: Script) -> Test:
    """The processes hold MPTCP sockets; what is measured are the TCP sockets behind them."""
    server, client = script.server.process("server"), script.client.process("client")
    for host in script.hosts:
        host.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    listener = server.listener(MPTCP, protocol=IPPROTO_MPTCP, may_fail=True)
    near = client.socket(protocol=IPPROTO_MPTCP, may_fail=True)
    near.connect(script.server.ipv4, MPTCP, may_fail=True)
    listener.accept(may_fail=True)
    seen = yield
    if listener.made.errno != "none":
        assert not seen.machine.kernel.has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    found = by_pid(seen, server.pid, client.pid)
    assert {pid: comm for pid, (comm, _) in found.items()} == {server.pid: "server", client.pid: "client"}
    assert all(samples >= 1 for _, samples in found.values())
