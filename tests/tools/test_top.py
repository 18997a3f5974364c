"""`tcpscope top` against what was sent and read, and TCP_INFO: over a run the intervals sum to it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.record import Call, Script, Seen, Socket, Test, Watch, recorded
from tests.tools.pair import exchange, pair

PORT = 6760
PORTS = f"{PORT}-{PORT + 9}"
TOP = Watch("top", "-i", "0.3", "--port", PORTS)
BY_PID = Watch("top", "-i", "0.3", "--by", "pid", "--port", PORTS, every_kernel=False)
BY_PEER = Watch("top", "-i", "86400", "--by", "raddr", "--port", f"{PORT + 9}", every_kernel=False)
SHORT = Watch("top", "-i", "86400", "--port", PORTS, every_kernel=False)
OFTEN = Watch("top", "-i", "0.01", "--port", f"{PORT + 7}")
BY_CGROUP = Watch("top", "-i", "86400", "--by", "netns,cgroup", "--port", PORTS, every_kernel=False)
MOST = Watch("top", "-i", "86400", "-n", "1", "--sort", "rx_bytes", "--port", f"{PORT + 6}", every_kernel=False)
NUMBERS = ("tx_bytes", "rx_bytes", "retrans_bytes")
IPPROTO_MPTCP = 262
MSG_DONTWAIT = 0x40
LIMITS = ("limit", "app_pct", "rwnd_pct", "sndbuf_pct", "cwnd_pct")

Row = dict[str, Any]


def sums(rows: list[Row]) -> tuple[int, int, int]:
    for row in rows:
        assert row["tx_bytes"] or row["rx_bytes"] or row["retrans_bytes"]
        assert row["interval_us"] > 0
        assert abs(row["tx_bytes_per_s"] - row["tx_bytes"] * 1e6 / row["interval_us"]) <= 1
        assert abs(row["rx_bytes_per_s"] - row["rx_bytes"] * 1e6 / row["interval_us"]) <= 1
    return tuple(sum(row[name] for row in rows) for name in NUMBERS)  # type: ignore


def of(seen: Seen, watch: Watch, script: Script, port: int, local: Call) -> tuple[list[Row], list[Row]]:
    """The rows of both ends of a connection."""
    near = seen.rows(watch, script.client, lport=local.ret, rport=port)
    far = seen.rows(watch, script.server, lport=port, rport=local.ret)
    for rows, host, kind in ((near, script.client, "client"), (far, script.server, "server")):
        assert {(row["comm"], row["laddr"]) for row in rows} <= {(kind, host.ipv4), (kind, host.ipv6)}
    return near, far


def until_moved(script: Script, port: int, number: int = 1) -> None:
    """Until a look has shown the server's end of a connection."""
    script.server.until_rows(TOP, number, since=0, lport=port)


def close(near: Socket, far: Socket) -> tuple[Call, Call]:
    """Both ends close; TCP_INFO before."""
    near.until_acknowledged(), far.until_acknowledged()
    infos = near.info(), far.info()
    near.close()
    far.until_end()
    far.close()
    return infos


def check(rows: list[Row], info: dict[str, int], sent: int, read: int) -> None:
    """Against the application and TCP_INFO. Before its end no FIN is in the kernel's numbers."""
    tx, rx, retrans = sums(rows)
    assert (tx, rx) == (sent, read) == (info["tx_bytes"] - info["bytes_retrans"], info["received"])
    assert retrans == info["bytes_retrans"]


@recorded(TOP, SHORT)
def test_both_ends(script: Script) -> Test:
    """Of a connection that many looks see, and of an IPv6 one."""
    ends = {port: pair(script, port, kind).ends for port, kind in ((PORT, "4"), (PORT + 1, "6"))}
    infos = {}
    for port, (near, far, _) in ends.items():
        exchange(near, far, 5000, 70_000)
        until_moved(script, port)
        exchange(near, far, 300, 20)
        infos[port] = close(near, far)
    seen = yield
    for port, (_, _, local) in ends.items():
        near_rows, far_rows = of(seen, TOP, script, port, local)
        assert len(far_rows) >= 2
        check(near_rows, infos[port][0].info, 5300, 70_020)
        check(far_rows, infos[port][1].info, 70_020, 5300)
        for rows, several in zip(of(seen, SHORT, script, port, local), (near_rows, far_rows), strict=True):
            assert len(rows) == 1
            assert sums(rows) == sums(several)


@recorded(TOP, SHORT)
def test_shorter_than_an_interval(script: Script) -> Test:
    """No look sees one of them: SHORT looks once, when they are gone."""
    made = []
    near, far, local = pair(script, PORT).ends
    for number in range(5):
        exchange(near, far, 100 + number, 10)
        made.append((local, close(near, far)))
        near, far, local = pair(script, PORT + number + 1).ends
    seen = yield
    for number, (local, infos) in enumerate(made):
        port = PORT + number
        for watch in (TOP, SHORT):
            near_rows, far_rows = of(seen, watch, script, port, local)
            check(near_rows, infos[0].info, 100 + number, 10)
            check(far_rows, infos[1].info, 10, 100 + number)


@recorded(TOP, SHORT)
def test_retransmissions(script: Script) -> Test:
    near, far, local = pair(script, PORT).ends
    exchange(near, far, 100, 100)
    with script.client.losing():
        near.send_all(3000)
        near.until_field("retrans", 2)
    far.read(3000)
    infos = close(near, far)
    seen = yield
    for watch in (TOP, SHORT):
        near_rows, far_rows = of(seen, watch, script, PORT, local)
        check(near_rows, infos[0].info, 3100, 100)
        check(far_rows, infos[1].info, 100, 3100)
        assert sums(near_rows)[2] > 0


@recorded(TOP, SHORT)
def test_older_than_the_tool(script: Script) -> Test:
    """Only what it moves while the tool runs counts."""
    with script.older():
        near, far, local = pair(script, PORT).ends
        exchange(near, far, 1000, 2000)
        far.until_acknowledged()
    exchange(near, far, 10, 20)
    until_moved(script, PORT)
    exchange(near, far, 7, 0)
    close(near, far)
    seen = yield
    for watch in (TOP, SHORT):
        near_rows, far_rows = of(seen, watch, script, PORT, local)
        assert sums(near_rows)[:2] == (17, 20)
        assert sums(far_rows)[:2] == (20, 17)


@recorded(TOP)
def test_from_the_accept_queue(script: Script) -> Test:
    """At the start it waits in an accept queue, and no process holds it. Bytes from before accept() do not count."""
    server, client = script.server.process("server"), script.client.process("client")
    with script.older():
        listener = server.listener(PORT)
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        local = near.name()
        near.send_all(1000)
        near.until_acknowledged()
    far = listener.accept()
    near.send_all(10)
    far.read(1010)
    close(near, far)
    seen = yield
    near_rows, far_rows = of(seen, TOP, script, PORT, local)
    assert sums(near_rows)[:2] == (10, 0)
    assert sums(far_rows)[0] == 0
    assert sums(far_rows)[1] <= 10


@recorded(TOP)
def test_open_at_the_end(script: Script) -> Test:
    """The last look has what came after the one before it; a disconnected socket is another connection then."""
    near, far, local = pair(script, PORT).ends
    exchange(near, far, 50, 60)
    far.until_acknowledged()
    near.disconnect()
    near.connect(script.server.ipv4, PORT)
    again = near.name()
    near.send_all(70)
    near.until_acknowledged()
    script.stay()
    seen = yield
    near_rows, far_rows = of(seen, TOP, script, PORT, local)
    assert sums(near_rows) == (50, 60, 0)
    assert sums(far_rows) == (60, 50, 0)
    assert sums(seen.rows(TOP, script.client, lport=again.ret))[0] == 70


@recorded(BY_PID, BY_PEER, BY_CGROUP)
def test_groups(script: Script) -> Test:
    """By process: two connections of a pair of processes. By address: both ends have moved the same."""
    near, far, _ = pair(script, PORT + 9).ends
    second = far.process.listener(PORT + 8)
    other = near.process.socket()
    other.connect(script.server.ipv4, PORT + 8)
    exchange(near, far, 100, 1000)
    exchange(other, second.accept(), 10, 20_000)
    script.stay()
    seen = yield
    for end, moved in ((near, (110, 21_000)), (far, (21_000, 110))):
        rows = [row for row in seen.run(BY_PID).rows if row["pid"] == end.process.pid]
        assert {row["comm"] for row in rows} == {end.process.comm}
        assert "srtt_us" not in rows[0] and "raddr" not in rows[0]
        assert sums(rows)[:2] == moved
    by_peer = {row["raddr"]: (row["tx_bytes"], row["rx_bytes"]) for row in seen.run(BY_PEER).rows}
    assert by_peer == {script.server.ipv4: (100, 1000), script.client.ipv4: (1000, 100)}
    for host in script.hosts:
        (row,) = seen.rows(BY_CGROUP, host)
        assert (sorted((row["tx_bytes"], row["rx_bytes"])), row["connections"]) == ([110, 21_000], 2)


SENDING = ("send_all", "sendmsg", "write_all", "sendfile", "splice_in", "zerocopy")
TAKING = ("read", "peek_and_read", "splice_out", "readv")


@pytest.mark.parametrize("kind", ["4", "6", "mapped"])
@recorded(TOP, SHORT)
def test_ways_of_bytes(script: Script, kind: str) -> Test:
    """All calls that send and all that receive, one after the other: what they moved, TCP_INFO and the rows agree."""
    near, far, local = pair(script, PORT, kind).ends
    sent = 0
    for number, way in enumerate(SENDING):
        size = 30_000 + number
        call = near(way, size, wait=False)
        far(TAKING[number % len(TAKING)], size)
        call.join()
        sent += size
    back = [far("write_all", 1000), near("peek_and_read", 1000)]
    infos = close(near, far)
    seen = yield
    assert [call.ret for call in back] == [1000, 1000]
    assert infos[0].info["acked"] == sent + 1  # the SYN
    assert infos[1].info["acked"] == 1000
    for watch in (TOP, SHORT):
        near_rows, far_rows = of(seen, watch, script, PORT, local)
        check(near_rows, infos[0].info, sent, 1000)
        check(far_rows, infos[1].info, 1000, sent)


@recorded(TOP)
def test_io_uring(script: Script) -> Test:
    near, far, local = pair(script, PORT).ends
    sent = near("uring_send", 40_000, may_fail=True)
    far.until_field("received", sent)
    far.receive(65536, MSG_DONTWAIT, may_fail=True)
    far.send_all(500)
    near.until_received(500)
    got = near("uring_receive", 500, may_fail=True)
    infos = close(near, far)
    seen = yield
    if sent.errno in ("ENOSYS", "EPERM"):
        assert not seen.machine.kernel.has_type("io_kiocb") or seen.machine.config["io_uring_disabled"] != "0"
        pytest.skip("this kernel has no io_uring, or does not let us")
    assert (sent.ret, got.ret) == (40_000, 500)
    near_rows, far_rows = of(seen, TOP, script, PORT, local)
    check(near_rows, infos[0].info, 40_000, 500)
    check(far_rows, infos[1].info, 500, 40_000)


@recorded(TOP)
def test_mptcp(script: Script) -> Test:
    """Of an MPTCP connection its subflow is a row, with the owner of the whole."""
    for host in script.hosts:
        host.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(PORT, protocol=IPPROTO_MPTCP, may_fail=True)
    near = client.socket(protocol=IPPROTO_MPTCP, may_fail=True)
    near.connect(script.server.ipv4, PORT, may_fail=True)
    far = listener.accept(may_fail=True)
    local = near.name(may_fail=True)
    near.send_all(7000, may_fail=True)
    far.read(7000, may_fail=True)
    near("close", may_fail=True)
    far.read(1, may_fail=True)
    far("close", may_fail=True)
    seen = yield
    if listener.made.ret < 0:
        assert not seen.machine.kernel.has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    near_rows, far_rows = of(seen, TOP, script, PORT, local)
    assert sums(near_rows) == (7000, 0, 0)
    assert sums(far_rows) == (0, 7000, 0)


@pytest.mark.concurrent
@recorded(OFTEN)
def test_looks_beside_ends(script: Script) -> Test:
    """A look every hundredth of a second, while short connections end: each byte counts once."""
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(PORT + 7)
    parts = []
    for number in range(1, 4):
        served = listener("answer_all", 700, wait=False)
        asked = client("ask_all", script.server.ipv4, PORT + 7, 700)
        served.join()
        parts.append((asked, served))
        script.server.until_rows(OFTEN, 700 * number, since=0, lport=PORT + 7)
    seen = yield
    sent = sum(asked.ret for asked, _ in parts)
    assert sent == sum(served.ret for _, served in parts) > 0
    near = seen.rows(OFTEN, script.client, rport=PORT + 7)
    far = seen.rows(OFTEN, script.server, lport=PORT + 7)
    assert sums(near) == (sent, 3 * 2100, 0)
    assert sums(far) == (3 * 2100, sent, 0)
    assert len({row["time"] for row in near}) >= 3


@recorded(MOST)
def test_most_of_a_column(script: Script) -> Test:
    """--sort and -n: of the two ends that have moved as much the one that received more."""
    near, far, _ = pair(script, PORT + 6).ends
    exchange(near, far, 5000, 10)
    close(near, far)
    seen = yield
    (row,) = seen.run(MOST).rows
    assert (row["rx_bytes"], row["tx_bytes"], row["comm"]) == (5000, 10, "server")


@recorded(SHORT)
def test_limited_by_the_receive_window(script: Script) -> Test:
    """The other end does not read for a second. The share of that time is what TCP_INFO says."""
    near, far, local = pair(script, PORT).ends
    size = 8 << 20
    made = near.process.now()
    beside = near.process.thread().at(near)
    sending = near("send_all", size, wait=False)
    beside.until_field("rwnd_us", 1_000_000)
    far.read(size)
    sending.join()
    infos = close(near, far)
    seen = yield
    (row,), (other,) = of(seen, SHORT, script, PORT, local)
    info = infos[0].info
    share = 100 * info["rwnd_us"] / (infos[0].end_us - made.begin_us)
    assert row["limit"] == "rwnd"
    assert abs(row["rwnd_pct"] - share) < 15
    assert row["app_pct"] + row["rwnd_pct"] + row["sndbuf_pct"] + row["cwnd_pct"] < 100.3
    assert row["srtt_us"] > 0
    assert [other[name] for name in LIMITS] == [None] * len(LIMITS)  # it has sent nothing


@recorded(SHORT)
def test_limited_by_the_application(script: Script) -> Test:
    near, far, local = pair(script, PORT).ends
    exchange(near, far, 100, 10)
    near.process.pause(300_000)
    exchange(near, far, 100, 10)
    close(near, far)
    seen = yield
    for (row,) in of(seen, SHORT, script, PORT, local):
        assert (row["limit"], row["rwnd_pct"], row["sndbuf_pct"]) == ("application", 0, 0)
        assert row["app_pct"] > 50
