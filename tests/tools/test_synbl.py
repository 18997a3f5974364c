"""`synbl`: one sample of both queues for each handshake, as the kernel counts them."""

from __future__ import annotations

from typing import Any

from tests.record import Script, Test, Watch, recorded
from tests.record.script import IPPROTO_TCP, TCP_FASTOPEN, Process, Socket

PORT, PARTS_PORT, NAMED_PORT = 6811, 6812, 6813
LENGTHS = Watch("synbl", "--lport", f"{PORT}")
PARTS = Watch("synbl", "--lport", f"{PARTS_PORT}", "-i", "0.3", every_kernel=False)
NAMED = Watch("synbl", "--lport", f"{NAMED_PORT}", "--comm", "wanted", every_kernel=False)
OPENS, OVERFLOWS = "TcpPassiveOpens", "TcpExtListenOverflows"
DROPPED = "TcpExtTCPReqQFullDrop"
FAST_OPEN = 0x207  # client, server, neither needs a cookie


def connect(script: Script, port: int, times: int, family: str = "4", process: Process | None = None) -> list[Socket]:
    """Connections, one after the other: each is in the accept queue before the next one begins."""
    client = process or script.client.process("client")
    made = []
    for _ in range(times):
        opens = script.server.counter(OPENS)
        near = client.socket("6" if family == "6" else "4")
        near.connect(script.server.address("6" if family == "6" else "4"), port)
        script.server.until_counter(OPENS, opens + 1)
        made.append(near)
    return made


def of(lengths: list[int]) -> list[list[int]]:
    """What a histogram column says of these lengths, by power of two."""
    octaves = [length.bit_length() for length in lengths]
    bounds = [(1 << bits - 1 if bits else 0, (1 << bits) - 1 if bits else 0) for bits in range(max(octaves) + 1)]
    return [[*bounds[bits], octaves.count(bits)] for bits in range(min(octaves), max(octaves) + 1)]


def check_lengths(row: dict[str, Any], queue: str, lengths: list[int]) -> None:
    assert row[f"{queue}_histogram"] == of(lengths)
    assert row[f"{queue}_max"] == max(lengths)
    assert min(lengths) <= row[f"{queue}_p50"] <= row[f"{queue}_p99"] <= row[f"{queue}_max"]
    assert row[f"{queue}_max_percent"] == round(100 * max(lengths) / row["limit"])


@recorded(LENGTHS)
def test_a_listener_that_does_not_accept(script: Script) -> Test:
    """Each connection finds one more before it. After three accept() calls it is three fewer."""
    server = script.server.process("server")
    listener = server.listener(PORT, backlog=16)
    cookie = listener.cookie()
    connect(script, PORT, 9)
    for _ in range(3):
        listener.accept()
    connect(script, PORT, 2)
    opens = script.server.counter(OPENS)
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert row["handshakes"] == opens.ret == 11
    check_lengths(row, "accept", [*range(1, 10), 7, 8])
    check_lengths(row, "syn", [0] * 11)
    assert (row["accept_full"], row["syn_full"], row["limit"], row["total"]) == (0, 0, 16, True)
    assert (row["laddr"], row["lport"], row["family"]) == (script.server.ipv4, PORT, 4)
    assert (row["pid"], row["comm"], row["cookie"]) == (server.pid, "server", int(cookie.ret))


@recorded(LENGTHS)
def test_a_full_accept_queue(script: Script) -> Test:
    """The queue holds one more than its limit. What is refused after that has no length, and is counted exactly."""
    listener = script.server.process("server").listener(PORT, backlog=3)
    connect(script, PORT, 4)
    client = script.client.process("blocked")
    blocked = [client.socket() for _ in range(3)]
    for each in blocked:
        each.start(script.server.ipv4, PORT)
    script.server.until_counter(OVERFLOWS, 3)
    for each in blocked:
        each.close()
    listener.close()
    opens, overflows = script.server.counter(OPENS), script.server.counter(OVERFLOWS)
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert row["handshakes"] == opens.ret == 4
    assert row["accept_full"] == overflows.ret >= 3
    check_lengths(row, "accept", [1, 2, 3, 4])
    assert (row["accept_max_percent"], row["syn_full"]) == (133, 0)


@recorded(LENGTHS)
def test_final_acks_that_are_refused(script: Script) -> Test:
    """More requests are under way than the accept queue has room for."""
    listener = script.server.process("server").listener(PORT, backlog=4)
    client = script.client.process("client")
    connect(script, PORT, 2, process=client)
    waiting = [client.socket() for _ in range(4)]
    with script.server.held():
        for each in waiting:
            each.start(script.server.ipv4, PORT)
        requests = script.server.until_sockets(4, state="SYN_RECV", lport=PORT)
    script.server.until_counter(OVERFLOWS, 1)
    listener.close()
    opens, overflows = script.server.counter(OPENS), script.server.counter(OVERFLOWS)
    seen = yield
    assert requests.ret == 4
    row = seen.row(LENGTHS, script.server)
    assert row["handshakes"] == opens.ret == 5
    assert row["accept_full"] == overflows.ret >= 1
    check_lengths(row, "accept", [1, 2, 3, 4, 5])
    check_lengths(row, "syn", [0, 0, 3, 2, 1])


@recorded(LENGTHS)
def test_a_full_syn_queue(script: Script) -> Test:
    """Without cookies further SYNs are dropped."""
    client = script.client.process("client")
    with script.server.sysctls(tcp_syncookies=0):
        listener = script.server.process("server").listener(PORT, backlog=4)
        with script.server.held():
            for _ in range(8):
                client.socket().start(script.server.ipv4, PORT)
            script.server.until_counter(DROPPED, 3)
            requests = script.server.diag(state="SYN_RECV", lport=PORT)
        script.server.until_counter(OPENS, requests)
        listener.close()
    opens, dropped, overflows = (script.server.counter(name) for name in (OPENS, DROPPED, OVERFLOWS))
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert requests.ret in (4, 5)  # five of five, since the kernel takes one more than the limit
    assert row["handshakes"] == opens.ret >= requests.ret
    assert (row["syn_full"], row["accept_full"]) == (dropped.ret, overflows.ret)
    assert row["syn_full"] >= 3
    assert row["syn_max"] == requests.ret - 1


@recorded(LENGTHS)
def test_cookies(script: Script) -> Test:
    """A handshake by cookie has no request in the SYN queue. With 2 cookies are always sent: that queue is not full."""
    with script.server.sysctls(tcp_syncookies=2):
        script.server.process("server").listener(PORT, backlog=8)
        connect(script, PORT, 3)
    sent = script.server.counter("TcpExtSyncookiesSent")
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert (row["handshakes"], row["syn_full"], row["accept_full"]) == (3, 0, 0)
    assert sent.ret >= 3
    check_lengths(row, "accept", [1, 2, 3])
    check_lengths(row, "syn", [0, 0, 0])


@recorded(LENGTHS)
def test_fast_open(script: Script) -> Test:
    """The child is made at the SYN. Its request does not count in the SYN queue."""
    for host in script.hosts:
        host.sysctl("tcp_fastopen", FAST_OPEN)
    listener = script.server.process("server").listener(PORT, backlog=8)
    listener.option(IPPROTO_TCP, TCP_FASTOPEN, 5)
    connect(script, PORT, 1)
    early = script.client.process("client").socket()
    early.send_to("early", script.server.ipv4, PORT)
    early.until_state("ESTABLISHED")
    opens, fast = script.server.counter(OPENS), script.server.counter("TcpExtTCPFastOpenPassive")
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert (row["handshakes"], fast.ret) == (opens.ret, 1)
    assert opens.ret == 2
    check_lengths(row, "accept", [1, 2])
    check_lengths(row, "syn", [0, 0])


@recorded(LENGTHS)
def test_both_families_at_one_listener(script: Script) -> Test:
    """A connection that is IPv4 on an IPv6 socket passes two functions of the kernel, and is one handshake."""
    script.server.process("server").listener(PORT, "::", dual=True, backlog=16)
    connect(script, PORT, 3, "4")
    connect(script, PORT, 2, "6")
    opens = script.server.counter(OPENS)
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert row["handshakes"] == opens.ret == 5
    check_lengths(row, "accept", [1, 2, 3, 4, 5])
    assert (row["laddr"], row["family"]) == ("::", 6)


@recorded(LENGTHS)
def test_listeners_of_one_port(script: Script) -> Test:
    """Each has its own row, with the handshakes that its own accept() calls return."""
    servers = [script.server.process(name) for name in ("one", "other")]
    listeners = [server.listener(PORT, backlog=16, reuse_port=True) for server in servers]
    connect(script, PORT, 12)
    for listener in listeners:
        listener.blocking(False)
    accepted = [[listener.accept(may_fail=True) for _ in range(12)] for listener in listeners]
    seen = yield
    rows = {row["pid"]: row for row in seen.rows(LENGTHS, script.server)}
    taken = [sum(child.accepted.ret > 0 for child in children) for children in accepted]
    assert sum(taken) == 12
    for server, number in zip(servers, taken, strict=True):
        if number:
            check_lengths(rows[server.pid], "accept", [*range(1, number + 1)])
            assert (rows[server.pid]["handshakes"], rows[server.pid]["comm"]) == (number, server.comm)
    assert len(rows) == sum(map(bool, taken))


@recorded(LENGTHS)
def test_an_older_listener(script: Script) -> Test:
    with script.older():
        server = script.server.process("older")
        server.listener(PORT, backlog=16)
        connect(script, PORT, 2)
    connect(script, PORT, 2)
    seen = yield
    row = seen.row(LENGTHS, script.server)
    assert (row["handshakes"], row["pid"], row["comm"]) == (2, server.pid, "older")
    check_lengths(row, "accept", [3, 4])


@recorded(PARTS)
def test_intervals(script: Script) -> Test:
    """They add up to the total."""
    server = script.server.process("server")
    server.listener(PARTS_PORT, backlog=16)
    for _ in range(3):
        connect(script, PARTS_PORT, 2)
        server.pause(400_000)
    seen = yield
    rows = seen.rows(PARTS, script.server)
    (whole,) = (row for row in rows if row["total"])
    parts = [row for row in rows if not row["total"]]
    assert sum(row["handshakes"] for row in parts) == whole["handshakes"] == 6
    assert len(parts) >= 3
    assert [row["accept_max"] for row in parts] == sorted(row["accept_max"] for row in parts)
    check_lengths(whole, "accept", [*range(1, 7)])


@recorded(NAMED)
def test_filter_by_owner(script: Script) -> Test:
    for name, address in (("wanted", script.server.ipv4), ("another", script.server.ipv6)):
        script.server.process(name).listener(NAMED_PORT, address)
    connect(script, NAMED_PORT, 2)
    connect(script, NAMED_PORT, 3, "6")
    seen = yield
    row = seen.row(NAMED, script.server)
    assert (row["comm"], row["handshakes"], row["family"]) == ("wanted", 2, 4)
    run = seen.run(NAMED)
    assert run.stats is not None
    assert run.stats["filtered"] >= 6  # two lengths of each handshake
