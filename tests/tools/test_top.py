"""`tcpscope top` against what was sent and read, and TCP_INFO: over a run the intervals sum to it."""

from __future__ import annotations

from typing import Any

from tests.record import Call, Script, Seen, Socket, Test, Watch, recorded

PORT = 6760
PORTS = f"{PORT}-{PORT + 9}"
TOP = Watch("top", "-i", "0.3", "--port", PORTS)
BY_PID = Watch("top", "-i", "0.3", "--by", "pid", "--port", PORTS, every_kernel=False)
BY_PEER = Watch("top", "-i", "86400", "--by", "raddr", "--port", f"{PORT + 9}", every_kernel=False)
SHORT = Watch("top", "-i", "86400", "--port", PORTS, every_kernel=False)

Row = dict[str, Any]


def sums(rows: list[Row]) -> tuple[int, int, int]:
    for row in rows:
        assert row["tx_bytes"] or row["rx_bytes"] or row["retrans_bytes"]
    return tuple(sum(row[name] for row in rows) for name in ("tx_bytes", "rx_bytes", "retrans_bytes"))  # type: ignore


def pair(script: Script, port: int, kind: str = "4") -> tuple[Socket, Socket, Call]:
    """The two ends of a connection, of a process each, and its client's port."""
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(port, script.server.address(kind))
    near = client.socket(kind)
    near.connect(script.server.address(kind), port)
    return near, listener.accept(), near.name()


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


def exchange(near: Socket, far: Socket, there: int, back: int) -> None:
    near.send_all(there)
    far.read(there)
    far.send_all(back)
    near.read(back)


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
    ends = {port: pair(script, port, kind) for port, kind in ((PORT, "4"), (PORT + 1, "6"))}
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
    near, far, local = pair(script, PORT)
    for number in range(5):
        exchange(near, far, 100 + number, 10)
        made.append((local, close(near, far)))
        near, far, local = pair(script, PORT + number + 1)
    seen = yield
    for number, (local, infos) in enumerate(made):
        port = PORT + number
        for watch in (TOP, SHORT):
            near_rows, far_rows = of(seen, watch, script, port, local)
            check(near_rows, infos[0].info, 100 + number, 10)
            check(far_rows, infos[1].info, 10, 100 + number)


@recorded(TOP, SHORT)
def test_retransmissions(script: Script) -> Test:
    near, far, local = pair(script, PORT)
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
        near, far, local = pair(script, PORT)
        exchange(near, far, 1000, 2000)
        near.until_acknowledged(), far.until_acknowledged()
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
    near, far, local = pair(script, PORT)
    exchange(near, far, 50, 60)
    near.until_acknowledged(), far.until_acknowledged()
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


@recorded(BY_PID, BY_PEER)
def test_groups(script: Script) -> Test:
    """By process: two connections of a pair of processes. By address: both ends have moved the same."""
    near, far, _ = pair(script, PORT + 9)
    second = far.process.listener(PORT + 8)
    other = near.process.socket()
    other.connect(script.server.ipv4, PORT + 8)
    exchange(near, far, 100, 1000)
    exchange(other, second.accept(), 10, 20_000)
    near.until_acknowledged(), other.until_acknowledged()
    script.stay()
    seen = yield
    for end, moved in ((near, (110, 21_000)), (far, (21_000, 110))):
        rows = [row for row in seen.run(BY_PID).rows if row["pid"] == end.process.pid]
        assert rows[0].keys() == {"time", "pid", "comm", "tx_bytes", "rx_bytes", "retrans_bytes"}
        assert sums(rows)[:2] == moved
    by_peer = {row["raddr"]: (row["tx_bytes"], row["rx_bytes"]) for row in seen.run(BY_PEER).rows}
    assert by_peer == {script.server.ipv4: (100, 1000), script.client.ipv4: (1000, 100)}
